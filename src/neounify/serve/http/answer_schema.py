"""What answers look like, for the API's description; tests hold real answers against it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImageUrl(_Answer):
    """A picture as a data URL."""

    url: str


class ChatImage(_Answer):
    """A painted picture of an answer."""

    type: Literal["image_url"]
    index: int
    image_url: ImageUrl
    text_offset: int = Field(description="Characters of the text that come before it.")


class TextContent(_Answer):
    """A piece of text between pictures."""

    type: Literal["text"]
    text: str


class ImageContent(_Answer):
    """A picture between pieces of text."""

    type: Literal["image_url"]
    image_url: ImageUrl


class CalledFunction(_Answer):
    """The function that the model calls; `arguments` are JSON text."""

    name: str
    arguments: str


class AnswerToolCall(_Answer):
    """A call of a function."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(_Answer):
    """The answer; `content` is a list of parts where `content_format` asked for it."""

    role: Literal["assistant"]
    content: str | list[TextContent | ImageContent] | None = Field(
        description="Null where there is nothing but calls."
    )
    refusal: None
    tool_calls: list[AnswerToolCall] | None = None
    images: list[ChatImage] | None = None
    reasoning_content: str | None = Field(None, description="The thought before the answer.")


class TopLogProb(_Answer):
    """A token that might have stood in the place of another."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogProb(TopLogProb):
    """A token of the answer, with the natural logarithm of its probability."""

    top_logprobs: list[TopLogProb]


class ChatLogProbs(_Answer):
    """The tokens of the answer."""

    content: list[ChatLogProb]
    refusal: None


class ChatChoice(_Answer):
    """One of the `n` answers."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: ChatLogProbs | None


class PromptTokens(_Answer):
    """Of the prompt's tokens: those known from earlier requests, and those of images."""

    audio_tokens: Literal[0]
    cached_tokens: int
    image_tokens: int


class CompletionTokens(_Answer):
    """Of the answer's tokens: those of a thought; beside them those of painted images."""

    accepted_prediction_tokens: Literal[0]
    audio_tokens: Literal[0]
    image_tokens: int
    reasoning_tokens: int
    rejected_prediction_tokens: Literal[0]


class TextUsage(_Answer):
    """Tokens of text, and of the images that were read; painted images are not in the totals."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens


class ChatCompletion(_Answer):
    """An answer as a whole."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TextUsage


class CompletionLogProbs(_Answer):
    """Tokens of a text, the logarithms of their probabilities, and the likeliest in each place."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Answer):
    """One continuation; those of the first prompt come first."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: CompletionLogProbs | None


class Completion(_Answer):
    """Texts that continue prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TextUsage


class PaintedImage(_Answer):
    """One image: its file in base64, or where to fetch it for a limited time."""

    b64_json: str | None = None
    url: str | None = None
    seed: int
    reasoning_content: str | None = None


class ImageUsage(_Answer):
    """Tokens of the prompt, which counts once, and of all images."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[Literal["cached_tokens", "image_tokens", "text_tokens"], int]
    output_tokens_details: dict[Literal["image_tokens", "text_tokens"], int]


class Images(_Answer):
    """Painted images."""

    created: int
    data: list[PaintedImage]
    background: Literal["opaque"]
    output_format: Literal["png", "jpeg", "webp"]
    quality: str
    size: str
    usage: ImageUsage


class ModelCard(_Answer):
    """The model that is served; `neounify` has its own settings and this server's limits."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    neounify: dict[str, Any]


class ModelList(_Answer):
    """All models, of which there is one."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(_Answer):
    """Whether the process lives and takes requests.

    `engines` by name: "ready", "starting", "failing" for one that dies again and again and is still
    being tried, or "stopped".
    """

    live: bool
    ready: bool
    engines: dict[str, str] = {}


Responses = dict[int | str, dict[str, Any]]
"""By status, as FastAPI wants them."""
EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}
"""The other form of an answer, with `stream`."""
