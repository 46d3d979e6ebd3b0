"""From the body of a chat completion to what the engines answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from neounify.pipeline.chatting import ChatRequest
from neounify.pipeline.interleaving import InterleaveRequest
from neounify.pipeline.messages import read_conversation, read_request
from neounify.serve.http.chat_schema import ChatBody
from neounify.serve.http.chat_turns import Turn, read_turns
from neounify.serve.http.context import Context, new_seed
from neounify.serve.http.errors import bad_request, blame
from neounify.serve.http.rendering import off_loop
from neounify.serve.http.text_options import (
    check_text_only,
    for_each_answer,
    logprobs_of,
    tools_of,
)
from neounify.text.tools import ToolUse

DEFAULT_TOKENS = 512


async def read_chat(
    body: ChatBody, context: Context
) -> Sequence[ChatRequest] | Sequence[InterleaveRequest]:
    """A request for each of the `n` answers.

    Raises ApiError, PromptError, ImageError, RequestError and Refused.
    """
    context.check_model(body.model)
    context.check_n(body.n)
    turns = await read_turns(body, context)
    images = [image for turn in turns for image in turn.images]
    tools = tools_of(body)
    await context.check_prompt(_texts(body, turns, tools), images)
    if body.paints:
        check_text_only(body)
        return [await off_loop(lambda: _interleave_request(body, turns, context), body.text_size)]
    return await off_loop(lambda: _chat_requests(body, turns, tools, context), body.text_size)


def _texts(body: ChatBody, turns: Sequence[Turn], tools: ToolUse) -> Iterator[str]:
    """All that the caller wrote, one by one."""
    yield from (turn.text for turn in turns)
    yield from (tool.definition() for tool in tools.offered)
    yield from (call.arguments for turn in turns for call in turn.tool_calls)
    if body.negative_prompt:
        yield body.negative_prompt


def _chat_requests(
    body: ChatBody, turns: Sequence[Turn], tools: ToolUse, context: Context
) -> Sequence[ChatRequest]:
    messages, images = read_conversation([turn.for_pipeline() for turn in turns], ())
    request = ChatRequest(
        messages=messages,
        images=images,
        max_new_tokens=_max_tokens(body, context),
        stop=body.stops,
        think=body.thinks,
        sampling=body.sampling(seed=body.seed, logprobs=logprobs_of(body)),
        tool_use=tools,
        response_format=body.response_format.schema_of_answer,
    )
    return for_each_answer(request, body.n)


def _interleave_request(body: ChatBody, turns: list[Turn], context: Context) -> InterleaveRequest:
    if "text" not in body.modalities:
        raise bad_request(
            'modalities: use ["text", "image"], or /v1/images/generations for images alone',
            "modalities",
        )
    if body.stops:
        raise bad_request("stop: answers with images take no stop strings", "stop")
    system = turns.pop(0).text if turns[0].role == "system" else ""
    with blame("messages"):
        text, history, images = read_request([turn.for_pipeline() for turn in turns], ())
    shown = turns[-1].images
    seed = new_seed(body.seed)
    most = context.settings.limits.answer_images
    if body.max_images is not None and body.max_images > most:
        raise bad_request(f"max_images: at most {most} on this server", "max_images")
    return InterleaveRequest(
        prompt=text,
        history=history,
        sizes=[context.size(body, shown[0] if shown else None)],
        sampling=context.sampling(body, editing=True, steps=body.steps),
        images=images,
        max_images=most if body.max_images is None else body.max_images,
        max_new_tokens=_max_tokens(body, context),
        seed=seed,
        negative_prompt=body.negative_prompt,
        think=body.thinks,
        system=system,
        text=body.sampling(seed=seed),
    )


def _max_tokens(body: ChatBody, context: Context) -> int:
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise bad_request(
                "max_tokens and max_completion_tokens are the same setting with different "
                f"values, {body.max_tokens} and {body.max_completion_tokens}; give one of them",
                "max_tokens",
            )
        return context.check_tokens(body.max_completion_tokens, "max_completion_tokens")
    if body.max_tokens is not None:
        return context.check_tokens(body.max_tokens, "max_tokens")
    return min(DEFAULT_TOKENS, context.settings.limits.tokens)
