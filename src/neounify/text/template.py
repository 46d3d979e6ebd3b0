"""Messages and prompts: from a conversation and images to token ids, in ChatML.

A prompt is first a list of pieces: special tokens by name, plain text, images. Plain
text between two special tokens is tokenised in one go, because cutting it elsewhere
changes the ids, and always as plain text: a user who types `<|im_end|>` writes ten
characters and ends nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise, zip_longest
from typing import Literal

from neounify.errors import PromptError
from neounify.text.forms import NEO, Template, check_no_clip
from neounify.text.tokenizer import Tokenizer
from neounify.text.tokens import IM_END, IM_START, IMAGE_OPEN, THINK_CLOSE, THINK_OPEN
from neounify.text.tools import (
    CALL_CLOSE,
    CALL_OPEN,
    MARKS,
    RESPONSE_CLOSE,
    RESPONSE_OPEN,
    TOOLS_FOOT,
    Tool,
    ToolCall,
    tools_head,
)

IMAGE_MARK = "<image>"
"""Stands in a user's text where an image belongs."""

NO_PROMPT = "a prompt is needed: the text is empty and there is no image"
NO_MESSAGES = "the list of messages is empty; at least one is needed"

Role = Literal["system", "user", "assistant", "tool"]

_NOT_TEXT = re.compile("[\\0\ud800-\udfff]")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    A user's text marks each image with `<image>`. In other roles the mark is plain text; an
    assistant's images stand at `image_offsets`, ascending numbers of characters of `text`.
    `image_numbers` are those by which a user's images are announced, where the text numbers them.
    `tool_calls` are those an assistant's turn ended with; the text of a "tool" turn is the result
    of one of them.

    Raises PromptError for an unknown role, text that is not valid or, a user's, marks a clip, and
    offsets out of order.
    """

    role: Role
    text: str
    tool_calls: tuple[ToolCall, ...] = field(default=(), kw_only=True)
    image_offsets: tuple[int, ...] = field(default=(), kw_only=True)
    image_numbers: tuple[int, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if self.role not in ("system", "user", "assistant", "tool"):
            raise PromptError(
                f"a message is from system, user, assistant or tool, not {self.role!r}"
            )
        check_text(self.text, f"the {self.role} message")
        if self.role == "user":
            check_no_clip(self.text)
        if self.tool_calls and self.role != "assistant":
            raise PromptError(f"only assistant messages hold tool calls, this one is {self.role!r}")
        for call in self.tool_calls:
            check_text(call.name + call.arguments, "a tool call")
        if self.image_offsets and self.role != "assistant":
            raise PromptError(f"image_offsets are for assistant messages, not for {self.role!r}")
        cuts = (0, *self.image_offsets, len(self.text))
        if any(low > high for low, high in pairwise(cuts)):
            raise PromptError(
                f"image_offsets {self.image_offsets} must ascend within the text's "
                f"{len(self.text)} characters"
            )

    @property
    def pieces(self) -> list[str]:
        """The texts around the images: one more than there are images."""
        if self.role == "user":
            return self.text.split(IMAGE_MARK)
        cuts = (0, *self.image_offsets, len(self.text))
        return [self.text[low:high] for low, high in pairwise(cuts)]

    @property
    def n_images(self) -> int:
        """Number of images in the message."""
        return len(self.pieces) - 1


def check_text(text: str, what: str) -> None:
    """Raise PromptError unless `what`, as the error calls it, is text."""
    if not isinstance(text, str):
        raise PromptError(f"{what} must be text, not {type(text).__name__}")
    wrong = _NOT_TEXT.search(text)
    if wrong:
        raise PromptError(
            f"{what} holds U+{ord(wrong[0]):04X} at character {wrong.start()}; "
            "NUL and lone surrogates are not text"
        )


# --- prompts ---


@dataclass(frozen=True)
class TextSegment:
    """Token ids of text, special tokens and the `<img>`, `</img>` around images included."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class ImageSegment:
    """The tokens of one image; `image` is its index in the caller's list of images."""

    image: int


Segment = TextSegment | ImageSegment


@dataclass(frozen=True)
class Prompt:
    """A prompt whose images have no size yet, and which so has no length yet."""

    segments: tuple[Segment, ...]

    @property
    def n_images(self) -> int:
        """Number of images in the prompt."""
        return sum(isinstance(segment, ImageSegment) for segment in self.segments)

    def ids(self, tokens_per_image: Sequence[int], context_id: int) -> list[int]:
        """Token ids of the whole prompt, every image as its number of `context_id`.

        Args:
            tokens_per_image: token count of each image, in the order of the caller's list.
            context_id: the id of `<IMG_CONTEXT>`.

        Raises:
            PromptError: the number of counts is not the number of images.
        """
        if len(tokens_per_image) != self.n_images:
            raise PromptError(
                f"the prompt holds {self.n_images} images, {len(tokens_per_image)} were given"
            )
        ids: list[int] = []
        for segment in self.segments:
            if isinstance(segment, ImageSegment):
                ids += [context_id] * tokens_per_image[segment.image]
            else:
                ids += segment.ids
        return ids


@dataclass(frozen=True)
class _Special:
    name: str


@dataclass(frozen=True)
class _Plain:
    text: str


@dataclass(frozen=True)
class _Mark:
    """One of tools.MARKS; plain text where a tokenizer has no such token."""

    name: str


@dataclass(frozen=True)
class _Image:
    index: int


_Piece = _Special | _Plain | _Mark | _Image

_ANSWER = (_Special(IM_START), _Plain("assistant\n"))
_NO_THOUGHT = (_Special(THINK_OPEN), _Plain("\n\n"), _Special(THINK_CLOSE), _Plain("\n\n"))
_OPEN_THOUGHT = (_Special(THINK_OPEN), _Plain("\n"))
_OPEN_IMAGE = (_Special(IMAGE_OPEN),)


def place_images(text: str, n_images: int, *, numbered: bool, line: str = NEO.image_line) -> str:
    """A user's text with exactly one `<image>` mark per image; missing ones go in front.

    Args:
        text: the text, with or without marks.
        n_images: how many images there are, at least 0.
        numbered: the rule of editing and interleaving, where two or more images without
            any mark are announced as `Image-1:`, `Image-2:`; `line` follows each in front.

    Raises:
        PromptError: there are more marks than images.
    """
    marks = text.count(IMAGE_MARK)
    if marks > n_images:
        raise PromptError(
            f"the text has {marks} {IMAGE_MARK} marks for {n_images} images; at most one mark "
            "for each"
        )
    if numbered and marks == 0 and n_images >= 2:
        front = "".join(f"Image-{number}:{IMAGE_MARK}\n" for number in range(1, n_images + 1))
    else:
        front = f"{IMAGE_MARK}{line}" * (n_images - marks)
    return front + text


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    system: str = "",
    think: bool = False,
    tools: Sequence[Tool] = (),
    frames: Collection[int] = (),
    template: Template = NEO,
) -> Prompt:
    """Prompt of a conversation, up to where the model's answer starts or continues.

    Every turn is written where it stands, whatever its role: several system messages, two user
    turns in a row and an answer first are all read as they come. A last message of the
    assistant is the beginning of the answer (prefill): it stays open.

    Args:
        tokenizer: of the model that will read it.
        messages: at least one turn; images are counted over all of them.
        system: a system message before the others; left out when empty.
        think: open a thought for the model to write in.
        tools: functions offered to the model, behind the system message.
        frames: the images that are frames of clips, which have times and no numbers.
        template: form of the model's prompts.

    Raises:
        PromptError: no messages, or a thought asked for behind the beginning of an answer.
    """
    if not messages:
        raise PromptError(NO_MESSAGES)
    begun = continues_answer(messages)
    if begun and think:
        raise PromptError(
            "the last message begins the answer, so no thought can come before it: turn thinking "
            "off, or leave the message out"
        )
    turns = list(messages[:-1] if begun else messages)
    if turns and turns[0].role == "system" and not system:
        system = turns.pop(0).text
    total = sum(message.n_images for message in messages) - len(frames)
    images = _Images(template, total, frames)
    system = system or template.chat_system
    pieces = [*_system_turn(system, tools), *_turns(turns, images), *_ANSWER]
    if begun:
        pieces += _content(messages[-1], images)
    pieces += _OPEN_THOUGHT if think else ()
    return _assemble(tokenizer, pieces, template)


def continues_answer(messages: Sequence[Message]) -> bool:
    """Whether the last message is the beginning of the answer, to be written on."""
    return bool(messages) and messages[-1].role == "assistant" and not messages[-1].tool_calls


def image_prompt(
    tokenizer: Tokenizer, text: str, *, system: str, think: bool, template: Template = NEO
) -> Prompt:
    """Conditional prompt of image generation and of editing.

    Args:
        tokenizer: of the model that will read it.
        text: what to generate, with an `<image>` mark per input image.
        system: the system message; left out when empty.
        think: end with an open thought; `after_think_ids` follow it. Else the thought is empty
            and `<img>` ends the prompt.
        template: form of the model's prompts.

    Raises:
        PromptError: neither text nor images, or a text that is too long.
    """
    _check_says_something(text)
    _check_length(tokenizer, text, template, "the prompt")
    thought = _NO_THOUGHT if template.thinks else ()
    end = _OPEN_THOUGHT if think else (*thought, *map(_Special, template.paint_open))
    return _single_turn(tokenizer, text, system, end, template=template)


def interleave_prompt(
    tokenizer: Tokenizer, text: str, *, system: str, think: bool, history: Sequence[Message] = ()
) -> Prompt:
    """Conditional prompt of an interleaved answer of text and images.

    Args:
        tokenizer: of the model that will read it.
        text: the request, with an `<image>` mark for each of its input images.
        system: the system message; left out when empty.
        think: let the model open a thought itself; else the prompt ends with an empty one.
        history: earlier turns, written as in `chat_prompt`; their images come first.

    Raises:
        PromptError: neither text nor images in the request.
    """
    _check_says_something(text)
    return _single_turn(tokenizer, text, system, () if think else _NO_THOUGHT, history)


def unconditional_prompt(
    tokenizer: Tokenizer, negative: str = "", template: Template = NEO
) -> Prompt:
    """Unconditional prompt, which guidance steers away from: a user turn, then `<img>`.

    Args:
        tokenizer: of the model that will read it.
        negative: the text of the turn; empty asks for nothing, as the published models do.
        template: form of the model's prompts.
    """
    _check_length(tokenizer, check_negative(negative), template, "the negative prompt")
    end = tuple(map(_Special, template.paint_open))
    return _single_turn(tokenizer, negative, "", end, template=template)


def images_only_prompt(
    tokenizer: Tokenizer, n_images: int, *, open_image: bool, negative: str = ""
) -> Prompt:
    """Prompt of the input images alone, without the instruction.

    Args:
        tokenizer: of the model that will read it.
        n_images: how many, at least 0.
        open_image: end with `<img>` (editing); interleaving adds it for an image.
        negative: what guidance steers away from; it follows the images as an instruction would.
    """
    text = IMAGE_MARK * n_images
    if check_negative(negative):
        text = place_images(negative, n_images, numbered=True)
    return _single_turn(tokenizer, text, "", _OPEN_IMAGE if open_image else ())


def check_negative(text: str) -> str:
    """The text of a negative prompt. Raises PromptError for text that is not valid or has marks."""
    check_text(text, "the negative prompt")
    check_no_clip(text)
    if IMAGE_MARK in text:
        raise PromptError(f"the negative prompt holds no images, but it has an {IMAGE_MARK} mark")
    return text


def after_think_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that follow a thought and open the image: a blank line and `<img>`."""
    return [*tokenizer.encode("\n\n"), tokenizer.id(IMAGE_OPEN)]


def _single_turn(
    tokenizer: Tokenizer,
    text: str,
    system: str,
    end: tuple[_Piece, ...],
    history: Sequence[Message] = (),
    template: Template = NEO,
) -> Prompt:
    check_text(text, "the prompt")
    turns = _turns([*history, Message("user", text)], _Images(template))
    return _assemble(tokenizer, [*_system_turn(system), *turns, *_ANSWER, *end], template)


def _system_turn(text: str, tools: Sequence[Tool] = ()) -> list[_Piece]:
    check_text(text, "the system message")
    content: list[_Piece] = [_Plain(text)] if text else []
    if tools:
        offer = tools_head(tools)
        check_text(offer, "the definition of a tool")
        content += [_Plain("\n\n" + offer if text else offer), *_with_marks(TOOLS_FOOT)]
    return _turn("system", content) if content else []


def _with_marks(text: str) -> list[_Piece]:
    """Pieces of the package's own text, whose call marks become tokens."""
    parts = re.split(f"({CALL_OPEN}|{CALL_CLOSE})", text)
    return [_Mark(part) if part in MARKS else _Plain(part) for part in parts]


def _turns(messages: Sequence[Message], images: _Images) -> list[_Piece]:
    """Pieces of the turns in their order; consecutive tool results are one turn."""
    pieces: list[_Piece] = []
    for role, group in groupby(messages, key=lambda turn: turn.role):
        if role == "tool":
            pieces += _responses_turn(list(group))
            continue
        for turn in group:
            pieces += _turn(role, [*_content(turn, images), *_calls(turn)])
    return pieces


def _calls(turn: Message) -> list[_Piece]:
    content: list[_Piece] = []
    for number, call in enumerate(turn.tool_calls):
        line = "\n" if turn.text or number else ""
        content += [_Plain(line), _Mark(CALL_OPEN), _Plain(f"\n{call.as_json()}\n")]
        content.append(_Mark(CALL_CLOSE))
    return content


def _responses_turn(turns: Sequence[Message]) -> list[_Piece]:
    """Pieces of consecutive tool results, as one user turn."""
    content: list[_Piece] = []
    for number, turn in enumerate(turns):
        line = "\n" if number else ""
        content += [_Plain(line), _Mark(RESPONSE_OPEN), _Plain(f"\n{turn.text}\n")]
        content.append(_Mark(RESPONSE_CLOSE))
    return _turn("user", content)


def _content(message: Message, images: _Images) -> list[_Piece]:
    first, *rest = message.pieces
    content: list[_Piece] = [_Plain(first)]
    for part, number in zip_longest(rest, message.image_numbers[: len(rest)]):
        content += [*images.take(number), _Plain(part)]
    return content


class _Images:
    """The images of a prompt in order: `total` in all, besides the `frames` of clips."""

    def __init__(self, template: Template, total: int = 0, frames: Collection[int] = ()) -> None:
        self.template, self.total, self.frames, self.next = template, total, frames, 0

    def take(self, number: int | None) -> list[_Piece]:
        """Pieces of the next image; `number` announces it, None: its place in the order."""
        template, index = self.template, self.next
        self.next += 1
        image = (_Special(template.image_open), _Image(index), _Special(template.image_close))
        if not template.numbered or self.total < 2 or index in self.frames:
            return list(image)
        return [_Plain(template.numbered.format(number or index + 1)), *image]


def _turn(role: Role, content: Sequence[_Piece]) -> list[_Piece]:
    return [_Special(IM_START), _Plain(f"{role}\n"), *content, _Special(IM_END), _Plain("\n")]


def _assemble(tokenizer: Tokenizer, pieces: Sequence[_Piece], template: Template = NEO) -> Prompt:
    marks = {name: tokenizer.find(name) for name in MARKS}
    typed = _typed([name for name, token in marks.items() if token is not None])
    segments: list[Segment] = []
    ids: list[int] = []
    plain = ""

    def encode(text: str) -> Iterator[int]:
        for part in typed.split(text):
            yield from tokenizer.encode(part)

    for piece in pieces:
        token = marks[piece.name] if isinstance(piece, _Mark) else None
        if isinstance(piece, _Plain):
            plain += piece.text
            if not template.one_piece:
                ids += encode(plain)
                plain = ""
            continue
        if isinstance(piece, _Mark) and token is None:
            plain += piece.name
            continue
        ids += encode(plain)
        plain = ""
        if isinstance(piece, _Image):
            segments += [TextSegment(tuple(ids)), ImageSegment(piece.index)]
            ids = []
        else:
            ids.append(tokenizer.id(piece.name) if token is None else token)
    segments.append(TextSegment((*ids, *encode(plain))))
    return Prompt(tuple(segments))


def _typed(marks: Sequence[str]) -> re.Pattern[str]:
    """Positions at which text is cut, so that a typed tool mark is not read as its token."""
    inside = "|".join(re.escape(mark[1:]) for mark in marks)
    return re.compile(f"(?<=<)(?={inside})" if inside else "(?!)")


def _check_length(tokenizer: Tokenizer, text: str, template: Template, what: str) -> None:
    most = template.max_prompt_tokens
    length = 0 if most is None else len(tokenizer.encode(text))
    if most is not None and length > most:
        raise PromptError(f"{what} has {length:,} tokens, this model reads {most:,} at most")


def _check_says_something(text: str) -> None:
    check_text(text, "the prompt")
    if not text.strip():
        raise PromptError(NO_PROMPT)
