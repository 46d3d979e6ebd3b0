"""The body of a chat completion: OpenAI's fields, and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from neounify.serve.http.chat_parts import (
    AnswerImage,
    ImagePart,
    Part,
    TextPart,
    answer_parts,
    text_part,
)
from neounify.serve.http.fields import PaintingFields
from neounify.serve.http.text_fields import Text, TextFields, TokenCount

Modality = Literal["text", "image"]
Content = Annotated[str, Field(max_length=64 * 2**20)]
"""Text that may hold images in data URLs; without them it is bounded by the server's limits."""
Name = Annotated[str, Field(min_length=1, max_length=64)]


class EarlierFunction(BaseModel):
    """The function of a call, and its arguments as JSON text."""

    name: Name
    arguments: Text = "{}"


class ToolCall(BaseModel):
    """A call that an assistant's message made."""

    type: Literal["function"] = "function"
    function: EarlierFunction


class ChatMessage(BaseModel):
    """One turn. What else clients put into messages they send back is not read.

    An earlier answer may hold images: as parts, in `images` beside its text, or in Markdown.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | Annotated[list[Part], Field(max_length=1000)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None

    images: Annotated[list[AnswerImage], Field(max_length=1000)] | None = Field(
        None, description="Of an earlier answer, as this server gives them. Extension."
    )

    @property
    def text_size(self) -> int:
        """Characters of the content, images in text included."""
        if isinstance(self.content, list):
            return sum(len(part.text) for part in self.content if isinstance(part, TextPart))
        return len(self.content or "")

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content as parts, whichever way it was written."""
        if isinstance(self.content, str):
            parts: list[TextPart | ImagePart] = [text_part(self.content)]
        else:
            parts = self.content or []
        return answer_parts(parts, self.images or ()) if self.role == "assistant" else parts


class Function(BaseModel):
    """A function that the model may call; `strict` is not read: forced calls always follow it."""

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema.")
    strict: bool | None = None


class Tool(BaseModel):
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
    description: Text | None = None
    definition: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What the answer is: text, any JSON object, or JSON by a schema."""

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


class ChatBody(TextFields, PaintingFields):
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
    tools: Annotated[list[Tool], Field(max_length=128)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = Field(
        True, description="Whether a forced answer may hold several calls."
    )
    response_format: ResponseFormat = ResponseFormat(type="text")
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    max_completion_tokens: TokenCount | None = Field(
        None, description="The newer name of max_tokens."
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] = "none"
    include_reasoning: bool = Field(True, description="Return the thought too. Extension.")
    modalities: list[Modality] = Field(default_factory=_text_only, min_length=1, max_length=2)
    max_images: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        None, description="Images of an interleaved answer at most. Extension."
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
        """Whether a thought is wanted."""
        if self.think is not None:
            return self.think
        return self.reasoning_effort not in ("none", "minimal")

    @property
    def paints(self) -> bool:
        """Whether the answer may hold images."""
        return "image" in self.modalities
