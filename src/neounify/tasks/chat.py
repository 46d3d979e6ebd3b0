"""Chat and completion: requests, chat input as messages with image placeholders, programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import PIL.Image
import torch
from typing_extensions import Unpack

from neounify.config import TextSampling
from neounify.config.sampling import TextKnobs, check_keywords
from neounify.engine.messages import (
    Decode,
    Prefill,
    PromptInput,
    TextInput,
    new_number,
)
from neounify.errors import PromptError, RequestError
from neounify.grammar import calls_grammar, json_grammar
from neounify.image.io import ImageSource, read_image
from neounify.tasks.answer import AnswerEvents, AnswerText, check_stop, decode_text
from neounify.tasks.clips import Frames, clip_ranges, frame_bounds, place_videos
from neounify.tasks.parts import read_parts, read_tool_calls
from neounify.tasks.program import (
    NEXT,
    Compute,
    Processor,
    Program,
    PromptPrefilled,
    TextPiece,
    Usage,
    new_sequences,
    pack_images,
    prompt_inputs,
)
from neounify.text.forms import NEO, VIDEO_MARK, Template, marked, unnumbered
from neounify.text.template import (
    IMAGE_MARK,
    NO_MESSAGES,
    NO_PROMPT,
    Message,
    Prompt,
    chat_prompt,
    continues_answer,
    place_images,
)
from neounify.text.tokens import END_OF_TEXT, IM_END
from neounify.text.tools import Tool, ToolCallReader, ToolUse, read_tool

Conversation = str | Sequence[Message | Mapping[str, Any]]
Images = list[PIL.Image.Image]
ImageInputs = ImageSource | Sequence[ImageSource]
CHAT_TOKENS = 512
"""Tokens of an answer where a request sets no limit."""
COMPLETION_TOKENS = 16
"""The same of a completion."""


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """One conversation to continue; `images` are those of `messages` in order.

    `clips` are the places among them of frames of one clip each. If the last message is the
    assistant's, the answer continues it. `response_format` is a JSON schema that the
    answer follows, None for plain text.
    """

    messages: Sequence[Message]
    images: Sequence[PIL.Image.Image] = ()
    clips: Sequence[range] = ()
    system: str = ""
    think: bool = False
    max_new_tokens: int = CHAT_TOKENS
    stop: Sequence[str] = ()
    sampling: TextSampling = field(default_factory=TextSampling)
    tool_use: ToolUse = field(default_factory=ToolUse)
    response_format: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RequestError(
                f"max_new_tokens must be at least 1, got {self.max_new_tokens}",
                param="max_new_tokens",
            )
        check_stop(self.stop)
        if self.response_format is not None and self.tool_use.forced:
            raise RequestError(
                f"response_format: with tool_choice {self.tool_use.choice!r} the answer is a tool "
                "call and has no other format; leave one of the two out",
                param="response_format",
            )
        constrained = self.response_format is not None or bool(self.tool_use.forced)
        if constrained and continues_answer(self.messages):
            name = "tool_choice" if self.tool_use.forced else "response_format"
            raise RequestError(
                f"{name}: an answer that the last message begins cannot be constrained; "
                "leave that message out",
                param=name,
            )


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """Text or token ids to continue as they are, without a chat template.

    With `echo` the answer begins with the prompt.
    """

    prompt: str | Sequence[int]
    max_new_tokens: int = COMPLETION_TOKENS
    stop: Sequence[str] = ()
    echo: bool = False
    sampling: TextSampling = field(default_factory=TextSampling)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise RequestError(
                f"max_new_tokens must be at least 0, got {self.max_new_tokens}",
                param="max_new_tokens",
            )
        if not self.prompt:
            raise PromptError(
                "prompt: there is nothing to continue, the prompt is empty", param="prompt"
            )
        check_stop(self.stop)

    def ids(self, processor: Processor) -> tuple[int, ...]:
        """Token ids of the prompt; special tokens typed in a text stay characters.

        Raises PromptError for what is no text, and for ids that the tokenizer does not have.
        """
        if isinstance(self.prompt, str):
            return tuple(processor.tokenizer.encode(self.prompt))
        last = processor.tokenizer.vocab_size - 1
        for token in self.prompt:
            if not 0 <= token <= last:
                raise PromptError(f"prompt: token ids are 0 to {last}, got {token}", param="prompt")
        return tuple(self.prompt)


class ChatKnobs(TextKnobs, total=False):
    """The keyword arguments of `make_chat_request`."""

    max_new_tokens: int
    stop: Sequence[str]
    system: str
    think: bool
    seed: int | None
    logprobs: int | None
    tools: Sequence[Tool | Mapping[str, Any]]
    tool_choice: Literal["auto", "none", "required"]
    response_format: Mapping[str, Any] | None


def make_chat_request(
    prompt: Conversation,
    images: Sequence[PIL.Image.Image],
    videos: Sequence[Frames] = (),
    template: Template = NEO,
    *,
    max_new_tokens: int = CHAT_TOKENS,
    stop: Sequence[str] = (),
    system: str = "",
    think: bool = False,
    seed: int | None = None,
    logprobs: int | None = None,
    colour_profiles: bool = True,
    tools: Sequence[Tool | Mapping[str, Any]] = (),
    tool_choice: Literal["auto", "none", "required"] = "auto",
    response_format: Mapping[str, Any] | None = None,
    **sampling: Unpack[TextKnobs],
) -> ChatRequest:
    """Chat request from user input, checked. `sampling` are fields of TextSampling."""
    check_keywords("chat", sampling, TextKnobs)
    if videos or not isinstance(prompt, str) or VIDEO_MARK in prompt:
        prompt = place_videos(prompt, videos)
    messages, ordered = read_conversation(prompt, images, template, colour_profiles=colour_profiles)
    return ChatRequest(
        messages=messages,
        images=ordered,
        clips=clip_ranges(prompt, ordered),
        system=system,
        think=think,
        max_new_tokens=max_new_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        sampling=TextSampling(seed=seed, logprobs=logprobs, **sampling),
        tool_use=ToolUse(tools=tuple(map(read_tool, tools)), choice=tool_choice),
        response_format=response_format,
    )


# --- chat input ---


def read_images(images: ImageInputs, *, colour_profiles: bool = True) -> Images:
    """One image or several, as `read_image` reads them; ImageError names what cannot be read."""
    several: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
    return [read_image(image, colour_profiles=colour_profiles) for image in several]


def read_conversation(
    prompt: Conversation,
    images: Sequence[PIL.Image.Image],
    template: Template = NEO,
    *,
    colour_profiles: bool = True,
) -> tuple[list[Message], Images]:
    """Messages with a placeholder for each image, and the images in that order.

    `prompt` is a question, or a list of messages {"role", "content"}; a content is a text,
    where a user's has marks, or a list of {"type": "text", "text"}, {"type": "image", "image"} and
    {"type": "video", "video": Frames} parts. Images of `images` fill the marks of texts in order;
    those left over go in front of the first user message. Where `template` numbers marks, numbers
    count those of one message. Raises PromptError, and ImageError for parts that hold no image.
    """
    if isinstance(prompt, str):
        if not prompt.strip() and not images:
            raise PromptError(NO_PROMPT)
        prompt = [{"role": "user", "content": prompt}]
    if not prompt:
        raise PromptError(NO_MESSAGES)
    messages: list[Message] = []
    ordered: list[PIL.Image.Image] = []
    used = 0
    for turn in prompt:
        if isinstance(turn, Message) and turn.role == "user" and not turn.image_numbers:
            turn = {"role": turn.role, "content": turn.text}
        if isinstance(turn, Message):
            messages.append(turn)
            marks, turn_images = turn.n_images, list(images[used : used + turn.n_images])
        else:
            message, marks, turn_images = _read_message(
                turn, images[used:], template, len(ordered), colour_profiles
            )
            messages.append(message)
        used += marks
        ordered += turn_images
    if used > len(images):
        raise PromptError(
            f"the text has {used} {IMAGE_MARK} marks for {len(images)} images; at most one mark "
            "for each"
        )
    rest = list(images[used:])
    if rest and any(message.image_numbers for message in messages):
        raise PromptError(
            f"the text marks images by numbers, but not all: {len(rest)} of {len(images)} have no "
            "mark"
        )
    return _place_rest(messages, rest, ordered, template.image_line)


def read_request(
    prompt: Conversation, images: Sequence[PIL.Image.Image], *, colour_profiles: bool = True
) -> tuple[str, list[Message], list[PIL.Image.Image]]:
    """Prompt text, earlier turns, and all images in order, of an interleaved answer.

    Images of a plain text that have no mark are placed when the prompt is built, numbered.
    Raises PromptError unless the last message is a user's.
    """
    if isinstance(prompt, str):
        return prompt, [], list(images)
    messages, ordered = read_conversation(prompt, images, colour_profiles=colour_profiles)
    *history, last = messages
    if last.role != "user":
        raise PromptError(
            f"an answer with images needs a user's message last, this one is {last.role!r}"
        )
    return last.text, history, ordered


def _read_message(
    turn: Mapping[str, Any],
    images: Sequence[PIL.Image.Image],
    template: Template,
    before: int,
    colour_profiles: bool,
) -> tuple[Message, int, list[PIL.Image.Image]]:
    """The message, the number of `images` its marks take, and all its images in order.

    Numbers of images count on from the `before` of earlier messages.
    """
    role, pieces = read_parts(turn)
    text, offsets, used = "", [], 0
    numbers: tuple[int, ...] = ()
    turn_images: list[PIL.Image.Image] = []
    for piece in pieces:
        if isinstance(piece, str):
            taken: list[PIL.Image.Image] = []
            if role == "user":
                piece, taken, numbers = _read_text(piece, images[used:], template, len(pieces) == 1)
                used += piece.count(IMAGE_MARK)
            turn_images += taken
            text += piece
        elif isinstance(piece, Frames):
            turn_images += piece.images
            text += piece.stamps
        else:
            turn_images.append(read_image(piece.source, colour_profiles=colour_profiles))
            if role == "user":
                text += IMAGE_MARK
            else:
                offsets.append(len(text))
    message = Message(
        role,
        text,
        image_offsets=tuple(offsets),
        image_numbers=tuple(before + number for number in numbers),
        tool_calls=read_tool_calls(turn),
    )
    return message, used, turn_images


def _read_text(
    text: str, images: Sequence[PIL.Image.Image], template: Template, is_whole: bool
) -> tuple[str, list[PIL.Image.Image], tuple[int, ...]]:
    """A text of a user with IMAGE_MARK for each mark, its images, and their numbers.

    Marks have numbers only in a text that `is_whole`: without clips and other images in it.
    """
    if template.number_marks and is_whole:
        return marked(text, images)
    text = unnumbered(text) if template.number_marks else text
    return text, list(images[: text.count(IMAGE_MARK)]), ()


def _place_rest(
    messages: list[Message], rest: Images, ordered: Images, line: str
) -> tuple[list[Message], Images]:
    if not rest:
        return messages, ordered
    first = next((n for n, m in enumerate(messages) if m.role == "user"), None)
    if first is None:
        roles = ", ".join(message.role for message in messages)
        raise PromptError(
            f"{len(rest)} images have no mark and no user message to stand in; the messages are of "
            f"{roles}"
        )
    text = messages[first].text
    total = text.count(IMAGE_MARK) + len(rest)
    messages[first] = Message("user", place_images(text, total, numbered=False, line=line))
    before = sum(message.n_images for message in messages[:first])
    return messages, ordered[:before] + rest + ordered[before:]


# --- programs ---


def prompt_of(processor: Processor, request: ChatRequest) -> Prompt:
    """The prompt of a conversation. Raises PromptError."""
    return chat_prompt(
        processor.tokenizer,
        request.messages,
        system=request.system,
        think=request.think,
        tools=request.tool_use.offered,
        frames=set(chain(*request.clips)),
        template=processor.template,
    )


def constrained_sampling(processor: Processor, request: ChatRequest) -> TextSampling:
    """Sampling of the answer, constrained to its schema or to tool calls if requested.

    Raises RequestError for a schema that cannot be followed.
    """
    use = request.tool_use
    if use.forced:
        grammar = calls_grammar(
            processor.vocabulary,
            use.forced,
            parallel=use.parallel and use.name is None,
            thinks=request.think,
        )
    elif request.response_format is not None:
        grammar = json_grammar(
            processor.vocabulary,
            request.response_format,
            what="response_format",
            tools=use.offered,
            thinks=request.think,
        )
    else:
        return request.sampling
    return replace(request.sampling, constraint=grammar)


def call_reader(request: ChatRequest) -> ToolCallReader | None:
    """Parser of tool calls in the answer; None without tools."""
    use = request.tool_use
    return ToolCallReader(forced=bool(use.forced)) if use.offered else None


def chat_images(processor: Processor, request: ChatRequest) -> list[torch.Tensor]:
    """Images of a conversation [3, height, width], resized and normalised."""
    config = processor.config
    least, most = config.sampling.chat_min_pixels, config.sampling.chat_max_pixels
    bounds = [(least, most)] * len(request.images)
    for clip in request.clips:
        config.check_can("chat_video")
        bounds[clip.start : clip.stop] = [frame_bounds(config, len(clip))] * len(clip)
    pairs = zip(request.images, bounds, strict=True)
    return [prepared for image, pair in pairs for prepared in processor.prepare([image], *pair)]


def answer_text(processor: Processor, request: ChatRequest) -> AnswerText:
    """Text decoder of the answer."""
    begun = continues_answer(request.messages) and bool(request.messages[-1].text)
    return AnswerText(processor.tokenizer.stream(), request.stop, continues=begun)


def chat(processor: Processor, request: ChatRequest, *, thoughts: bool = True) -> Program[None]:
    """Answer a conversation; with `thoughts` they are events apart from the answer's text."""
    processor.check_writes_text(think=request.think)
    # One step: each round trip to a thread waits for the interpreter lock beside the engines.
    sampling, prompt, images = yield Compute(partial(_prepare, processor, request))
    packed = yield from pack_images(images, processor.config.token_size)
    text = AnswerEvents(
        processor,
        lambda: answer_text(processor, request),
        thinking=thoughts and request.think,
        thoughts=thoughts,
        calls=call_reader(request),
    )
    stops, inputs = frozenset((processor.token(IM_END),)), prompt_inputs(prompt, packed)
    yield from _answer(inputs, text, sampling, stops, request.max_new_tokens)


def _prepare(
    processor: Processor, request: ChatRequest
) -> tuple[TextSampling, Prompt, list[torch.Tensor]]:
    sampling = constrained_sampling(processor, request)
    return sampling, prompt_of(processor, request), chat_images(processor, request)


def complete(processor: Processor, request: CompletionRequest) -> Program[None]:
    """Continue a text without a chat template."""
    processor.check_writes_text()
    ids: tuple[int, ...] = yield Compute(partial(request.ids, processor))
    tokenizer = processor.tokenizer
    text = AnswerEvents(
        processor,
        lambda: AnswerText(tokenizer.stream(), request.stop, strip=False),
        thoughts=False,
    )
    ends = (tokenizer.find(name) for name in (IM_END, END_OF_TEXT))
    stops = frozenset(end for end in ends if end is not None)
    if request.echo:
        prompt = request.prompt
        yield TextPiece(prompt if isinstance(prompt, str) else tokenizer.decode(ids, False))
    inputs = (TextInput(ids),)
    yield from _answer(inputs, text, request.sampling, stops, request.max_new_tokens)


def _answer(
    prompt: tuple[PromptInput, ...],
    text: AnswerEvents,
    sampling: TextSampling,
    stops: frozenset[int],
    max_new_tokens: int,
) -> Program[None]:
    (name,) = new_sequences("cond").values()
    call = new_number()
    decode = Decode(call, name, sampling, stops, max_new_tokens)
    usage = Usage.of(prompt, (yield Prefill(call, {name: prompt}, {name: max_new_tokens}, decode)))
    yield PromptPrefilled(usage.prompt)
    ended = yield from decode_text((yield NEXT), text, usage)
    yield usage.finished(None if ended is None else ended.finish_reason)
