"""Bodies and answers of chat completions: OpenAI's fields, and ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field

from neounify.serve.http.completions import Alternatives, TextUsage, TopLogProb
from neounify.serve.http.errors import bad_request
from neounify.serve.http.fields import (
    AnswerModel,
    ImageFields,
    LimitedText,
    TextFields,
    TokenCount,
    blame,
)
from neounify.serve.http.media_choice import MediaChoice
from neounify.text.tools import Tool, ToolUse

# An image as Markdown: a data URL, or a result of a server such as this one. Other URLs stay
# text, as fetching them is nothing that an answer asks for. Space behind a URL is part of it: two
# repetitions of space in a row would take quadratic time.
_MARKDOWN_IMAGE = re.compile(
    r"!\[[^\[\]]{0,300}\]\(\s*(data:image/[^()]*|[^\s()]{0,500}/v1/results/[\w.-]{20,80}\s*)\)",
    re.ASCII | re.IGNORECASE,
)


Modality = Literal["text", "image"]
Content = Annotated[str, Field(max_length=64 * 2**20)]
"""Text that may hold images in data URLs; without them it is bounded by the server's limits."""
Name = Annotated[str, Field(min_length=1, max_length=64)]


class ChatTextPart(BaseModel):
    """A piece of text."""

    type: Literal["text"]
    text: LimitedText


class InputImageUrl(BaseModel):
    """A data URL, a result of this server, or a URL of a host that the operator allows."""

    url: str


class ChatImagePart(BaseModel):
    """An image."""

    type: Literal["image_url"]
    image_url: InputImageUrl


class InputVideoUrl(BaseModel):
    """A data URL such as data:video/mp4;base64,…, or a URL of a host that the operator allows."""

    url: str


class ChatVideoPart(BaseModel):
    """A clip, whose frames are seen as images."""

    type: Literal["video_url"]
    video_url: InputVideoUrl


Part = ChatTextPart | ChatImagePart | ChatVideoPart


class AnswerImage(BaseModel):
    """An image beside the text of an earlier answer, as this server gives it."""

    image_url: InputImageUrl
    text_offset: Annotated[int, Field(ge=0)] | None = None


def _canonical(part: Any) -> Any:
    """The part as OpenAI's chat has it, from the Responses API's and from other clients'."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind in ("input_text", "output_text"):
        return {"type": "text", "text": part.get("text")}
    if kind == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    if kind in ("image_url", "input_image", "image"):
        url = next((part[key] for key in ("image_url", "image", "url") if key in part), None)
        if url is None and part.get("file_id") is not None:
            raise ValueError("file_id: this server keeps no files; send the image as a data URL")
        return {"type": "image_url", "image_url": url if isinstance(url, dict) else {"url": url}}
    if kind in ("video_url", "input_video", "video"):
        url = next((part[key] for key in ("video_url", "video", "url") if key in part), None)
        return {"type": "video_url", "video_url": url if isinstance(url, dict) else {"url": url}}
    return part


ContentPart = Annotated[Part, Field(discriminator="type"), BeforeValidator(_canonical)]


def text_part(text: str) -> ChatTextPart:
    """A piece of text, however long."""
    return ChatTextPart.model_construct(type="text", text=text)


def image_part(url: str) -> ChatImagePart:
    """An image by its URL."""
    return ChatImagePart(type="image_url", image_url=InputImageUrl(url=url))


def answer_parts(content: Sequence[Part], images: Sequence[AnswerImage]) -> list[Part]:
    """The parts of an earlier answer, from each form in which this server returns them.

    Images beside a single text stand at their offsets, else behind it; images written in Markdown
    where they are written. Images in the content itself exclude others.
    """
    parts = list(content)
    if not any(isinstance(part, ChatImagePart) for part in parts):
        parts = _with_images("".join(p.text for p in parts if isinstance(p, ChatTextPart)), images)
    return [piece for part in parts for piece in _split_markdown(part)]


def _with_images(text: str, images: Sequence[AnswerImage]) -> list[Part]:
    parts: list[Part] = []
    begin = 0
    for image in sorted(images, key=lambda image: _offset(image, text)):
        end = _offset(image, text)
        parts += [text_part(text[begin:end]), image_part(image.image_url.url)]
        begin = end
    return [*parts, text_part(text[begin:])]


def _offset(image: AnswerImage, text: str) -> int:
    return len(text) if image.text_offset is None else min(image.text_offset, len(text))


def _split_markdown(part: Part) -> Iterator[Part]:
    """The texts and images of a part, whose text may hold images in Markdown."""
    if not isinstance(part, ChatTextPart):
        yield part
        return
    texts = _MARKDOWN_IMAGE.split(part.text)
    for index, piece in enumerate(texts):
        if index % 2:
            yield image_part(piece)
        elif piece:
            yield text_part(piece)


class EarlierFunction(BaseModel):
    """The function of a call, and its arguments as JSON text."""

    name: Name
    arguments: LimitedText = "{}"


class EarlierToolCall(BaseModel):
    """A tool call of an earlier answer."""

    type: Literal["function"] = "function"
    function: EarlierFunction


class ChatMessage(BaseModel):
    """One turn. What else clients put into messages they send back is not read.

    An earlier answer may hold images: as parts, in `images` beside its text, or in Markdown.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | Annotated[list[ContentPart], Field(max_length=1000)] | None = None
    tool_calls: Annotated[list[EarlierToolCall], Field(max_length=128)] | None = None

    images: Annotated[list[AnswerImage], Field(max_length=1000)] | None = Field(
        None, description="Of an earlier answer, as this server gives them. Extension."
    )

    @property
    def text_size(self) -> int:
        """Characters of the content, images in text included."""
        if isinstance(self.content, list):
            return sum(len(part.text) for part in self.content if isinstance(part, ChatTextPart))
        return len(self.content or "")

    @property
    def parts(self) -> list[Part]:
        """The content as parts, whichever way it was written."""
        if isinstance(self.content, str):
            parts: list[Part] = [text_part(self.content)]
        else:
            parts = self.content or []
        return answer_parts(parts, self.images or ()) if self.role == "assistant" else parts


class Function(BaseModel):
    """A function that the model may call; `strict` is not read: forced calls always follow it."""

    name: Name
    description: LimitedText | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema.")
    strict: bool | None = None


class ChatTool(BaseModel):
    """A tool, of which there is one kind."""

    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    """One of the functions."""

    name: Name


class NamedTool(BaseModel):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(BaseModel):
    """A JSON schema under a name; it is always followed, whatever `strict` says."""

    name: Annotated[str, Field(max_length=200)] = ""
    description: LimitedText | None = None
    definition: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """Form of the answer: text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The schema that the answer follows; None for text."""
        if self.type == "json_object":
            return {"type": "object"}
        if self.type == "json_schema" and self.json_schema is not None:
            return self.json_schema.definition or {}
        return None


def _text_only() -> list[Modality]:
    return ["text"]


class ChatBody(TextFields, ImageFields):
    """A conversation to continue."""

    without_effect: ClassVar[frozenset[str]] = TextFields.without_effect | {
        "add_generation_prompt",
        "continue_final_message",
        "moderation",
        "verbosity",
    }
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **TextFields.only,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "echo": (False,),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    tools: Annotated[list[ChatTool], Field(max_length=128)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = Field(
        True, description="Whether a forced answer may hold several calls."
    )
    response_format: ResponseFormat = ResponseFormat(type="text")
    logprobs: bool = False
    top_logprobs: Alternatives = 0
    max_completion_tokens: TokenCount | None = Field(
        None, description="The newer name of max_tokens."
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] = "none"
    include_reasoning: bool = Field(True, description="Return the thought too. Extension.")
    media_io_kwargs: MediaChoice = Field(
        MediaChoice(),
        description='Which frames of clips are seen: {"video": {"fps": 2, "num_frames": 32}}; by '
        "default the model's rule. vLLM's extension.",
    )
    modalities: list[Modality] = Field(default_factory=_text_only, min_length=1, max_length=2)
    max_images: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Maximum images of an interleaved answer. Extension."
    )
    content_format: Literal["parts", "string", "markdown"] = Field(
        "string",
        description="How an interleaved answer is returned: `content` as a string with the images "
        "beside it in `images`, as parts with images in their places, or as a string with the "
        "images inside as Markdown. Extension.",
    )

    @property
    def text_size(self) -> int:
        """Characters of all messages."""
        return sum(message.text_size for message in self.messages)

    @property
    def thinks(self) -> bool:
        """Whether the model is to think first."""
        if self.think is not None:
            return self.think
        return self.reasoning_effort not in ("none", "minimal")

    @property
    def wants_images(self) -> bool:
        """Whether the answer may contain images."""
        return "image" in self.modalities

    @property
    def alternatives(self) -> int | None:
        """Number of alternatives reported with every token; None for no log-probabilities."""
        if self.top_logprobs and not self.logprobs:
            raise bad_request(
                f"top_logprobs: {self.top_logprobs} needs logprobs to be true", "top_logprobs"
            )
        return self.top_logprobs if self.logprobs else None

    @property
    def tool_use(self) -> ToolUse:
        """The tools, and which must be called. Raises ApiError and PromptError."""
        with blame("tools"):
            tools = tuple(
                Tool(
                    name=tool.function.name,
                    description=tool.function.description or "",
                    parameters=tool.function.parameters,
                )
                for tool in self.tools
            )
        parallel, choice = self.parallel_tool_calls, self.tool_choice
        if isinstance(choice, NamedTool):
            return ToolUse(
                tools=tools, choice="required", name=choice.function.name, parallel=parallel
            )
        return ToolUse(tools=tools, choice=choice, parallel=parallel)

    def check_interleaved(self) -> None:
        """Raises ApiError for fields that answers with images do not support."""
        for name, asked in (
            ("n", self.n > 1),
            ("tools", bool(self.tools)),
            ("response_format", self.response_format.type != "text"),
            ("logprobs", self.logprobs),
        ):
            if asked:
                message = f"{name}: not supported for answers with images"
                raise bad_request(message, name, "unsupported")
        if "text" not in self.modalities:
            raise bad_request(
                'modalities: use ["text", "image"], or /v1/images/generations for images alone',
                "modalities",
            )
        if self.stops:
            raise bad_request("stop: answers with images take no stop strings", "stop")
        contents = [m.content for m in self.messages if isinstance(m.content, list)]
        if any(isinstance(part, ChatVideoPart) for parts in contents for part in parts):
            message = "messages: videos are not supported for answers with images"
            raise bad_request(message, "messages", "unsupported")


class ImageUrl(AnswerModel):
    """An image as a data URL."""

    url: str


class ChatImage(AnswerModel):
    """A generated image of an answer."""

    type: Literal["image_url"]
    index: int
    image_url: ImageUrl
    evaluations: float = Field(description="Evaluations of the network, of each guidance branch.")
    text_offset: int = Field(description="Characters of the text that come before it.")


class AnswerTextPart(AnswerModel):
    """Text between images."""

    type: Literal["text"]
    text: str


class AnswerImagePart(AnswerModel):
    """An image between pieces of text."""

    type: Literal["image_url"]
    image_url: ImageUrl


class CalledFunction(AnswerModel):
    """The function that the model calls; `arguments` are JSON text."""

    name: str
    arguments: str


class AnswerToolCall(AnswerModel):
    """A call of a function."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(AnswerModel):
    """The answer; `content` is a list of parts where `content_format` asked for it."""

    role: Literal["assistant"]
    content: str | list[AnswerTextPart | AnswerImagePart] | None = Field(
        description="Null where there is nothing but calls."
    )
    refusal: None
    tool_calls: list[AnswerToolCall] | None = None
    images: list[ChatImage] | None = None
    reasoning_content: str | None = Field(None, description="The thought before the answer.")


class ChatLogProb(TopLogProb):
    """A token of the answer, with the natural logarithm of its probability."""

    top_logprobs: list[TopLogProb]


class ChatLogProbs(AnswerModel):
    """The tokens of the answer."""

    content: list[ChatLogProb]
    refusal: None


class ChatChoice(AnswerModel):
    """One of the `n` answers."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: ChatLogProbs | None


class ChatCompletion(AnswerModel):
    """An answer as a whole."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TextUsage
