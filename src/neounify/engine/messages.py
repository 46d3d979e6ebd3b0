"""What the front of a server and its engines say to each other.

Plain data: ids, numbers, names, and parcels of tensors (`transport.py`), so that it makes no
difference whether they share a process. An order has the number of the call it belongs to; its
replies carry the same number, the last one says so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from neounify.config import TextSampling
from neounify.decode.sampler import LogProbs
from neounify.engine.tensors import TensorRef
from neounify.errors import NeounifyError, OutOfMemory
from neounify.flow.guidance import Branch
from neounify.flow.sampling import ResolvedSampling
from neounify.model.layout import Grid

log = logging.getLogger("neounify.serve")

SequenceName = tuple[int, str]
"""Number of the request, and which of its sequences."""


@dataclass(frozen=True)
class TextPart:
    """Text ids, special tokens included."""

    ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class PicturePart:
    """A clean image, normalised: the parcel holds `pixels` [3, height, width]."""

    pixels: TensorRef
    digest: bytes
    grid: Grid

    @property
    def tokens(self) -> int:
        return self.grid.length


PromptPart = TextPart | PicturePart


# --- to the understanding engine ---


@dataclass(frozen=True)
class Write:
    """Write on behind a sequence until a token of `stop_ids` or `max_new_tokens` in all.

    `sampling` counts for the first Write of a sequence; later ones go on drawing.
    """

    call: int
    sequence: SequenceName
    sampling: TextSampling
    stop_ids: frozenset[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Open:
    """Read new sequences; `room` tokens at most will be written behind each prompt.

    What can never fit into the cache is refused, all else waits until there is room.
    `then` is written as soon as the prompts are read, without a way to the front and back.
    """

    call: int
    prompts: Mapping[SequenceName, tuple[PromptPart, ...]]
    room: Mapping[SequenceName, int]
    then: Write | None = None


@dataclass(frozen=True)
class Extend:
    """Append to sequences."""

    call: int
    parts: Mapping[SequenceName, tuple[PromptPart, ...]]


@dataclass(frozen=True)
class Export:
    """Hand out a copy of sequences' keys and values, to paint behind them."""

    call: int
    sequences: tuple[SequenceName, ...]


@dataclass(frozen=True)
class Close:
    """Forget sequences, whatever they are doing. Has no reply."""

    sequences: tuple[SequenceName, ...]


# --- to the generation engine ---


@dataclass(frozen=True)
class Prefix:
    """What an image is painted behind: `keys`, `values` [layers, kv_heads, length, d]."""

    parcel: TensorRef
    next_t: int


@dataclass(frozen=True)
class Keep:
    """Keep a prefix under a name, so that `Paint` may refer to it."""

    call: int
    name: str
    prefix: Prefix


@dataclass(frozen=True)
class Paint:
    """Paint images behind the same prefixes; the parcel holds `noise` [count, tokens, 3·C²].

    A prefix is given or the name of a kept one. `previews` of each image are sent on the way.
    """

    call: int
    noise: TensorRef
    grid: Grid
    sampling: ResolvedSampling
    prefixes: Mapping[Branch, Prefix | str]
    previews: int


@dataclass(frozen=True)
class Cancel:
    """Stop painting for a call. Has no reply."""

    call: int


Order = Open | Write | Extend | Export | Close | Keep | Paint | Cancel


# --- from the engines ---


@dataclass(frozen=True)
class Opened:
    """The prompts have been read; `cached` of their `tokens` were known already."""

    tokens: int
    cached: int


@dataclass(frozen=True)
class Token:
    """The next token of a sequence, with its log-probabilities where they were asked for."""

    id: int
    logprobs: LogProbs | None = None


@dataclass(frozen=True)
class Written:
    """A sequence ended; `pending` tokens are written but not yet in its keys and values."""

    finish_reason: Literal["stop", "length"]
    stopped_by: int | None
    pending: tuple[int, ...]


@dataclass(frozen=True)
class Extended:
    """What was to be appended is there."""


@dataclass(frozen=True)
class Exported:
    """Copies of the sequences, in the order asked for."""

    prefixes: tuple[Prefix, ...]


@dataclass(frozen=True)
class Kept:
    """The prefix is kept."""


@dataclass(frozen=True)
class Seen:
    """Image `index` after `step` of `steps`; `pixels` [3, height, width] are its prediction."""

    index: int
    step: int
    steps: int
    pixels: TensorRef


@dataclass(frozen=True)
class Done:
    """Image `index` is finished; the parcel holds `pixels` [3, height, width]."""

    index: int
    pixels: TensorRef


@dataclass(frozen=True)
class Failed:
    """The call cannot be answered. `kind` is the name of the error's class."""

    kind: str
    message: str


Answer = Opened | Token | Written | Extended | Exported | Kept | Seen | Done | Failed


@dataclass(frozen=True)
class Reply:
    """An answer to a call; the last one of a call is `final`."""

    call: int
    answer: Answer
    final: bool


def failed(call: int, error: Exception) -> Reply:
    """The last reply to a call that cannot be answered; an error nobody foresaw goes to the log."""
    if not isinstance(error, NeounifyError):
        log.error("an order failed", exc_info=error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            error = OutOfMemory("no memory is left for the request")
    return Reply(call, Failed(type(error).__name__, str(error)), True)


def parcels_of(answer: Answer) -> tuple[TensorRef, ...]:
    """What an answer brings, and its receiver has to take or free."""
    if isinstance(answer, Exported):
        return tuple(prefix.parcel for prefix in answer.prefixes)
    return (answer.pixels,) if isinstance(answer, Seen | Done) else ()


def discard(reply: Reply) -> None:
    """Free what a reply brings that nobody waits for any more."""
    for parcel in parcels_of(reply.answer):
        parcel.free()


@dataclass(frozen=True)
class Report:
    """How an engine is doing: gauges as they are now, counters since it started."""

    gauges: Mapping[str, float]
    counters: Mapping[str, float]
