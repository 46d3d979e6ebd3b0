"""Messages: commands to the engines, their replies, and references to tensors in both.

Plain data, so that it makes no difference whether caller and engine share a process. A command has
the number of its call, and so have the replies to it; the last one is `final`.

A reference has one receiver, which takes the tensors out once. It belongs to the caller of the
engines from the moment the caller packs or receives it: references not taken when a call ends are
freed there, no matter which side packed them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from neounify import errors
from neounify.cache import SequenceCache
from neounify.config import TextSampling
from neounify.decode.sampler import LogProbs
from neounify.errors import NeounifyError, OutOfMemory, TensorsGone, is_out_of_memory
from neounify.flow.guidance import Branch
from neounify.flow.sampling import ResolvedSampling
from neounify.model.layout import Grid

log = logging.getLogger("neounify.engine")

new_number: Callable[[], int] = itertools.count(1).__next__
"""Numbers of calls and of requests, unique in this process."""

SequenceName = tuple[int, str]
"""Number of the request, and which of its sequences."""


# --- tensors ---


class TensorRef(Protocol):
    """Tensors by name, for one receiver."""

    def free(self) -> None:
        """Free tensors that will not be taken; calling it again is no error."""


@dataclass(frozen=True, eq=False)
class LocalTensors:
    """Tensors by name in this process; empty once taken."""

    tensors: dict[str, Tensor]

    def free(self) -> None:
        self.tensors.clear()


@dataclass(frozen=True, eq=False)
class LocalCache:
    """KV cache of a sequence in this process, read in place without a copy."""

    cache: SequenceCache

    def free(self) -> None:
        """Does nothing: the cache is freed with its last reference."""


class Transport(Protocol):
    """Packs tensors for one receiver, which takes them out.

    `copies`: whether packing copies the tensors, in time proportional to their size.
    """

    copies: bool

    def pack(self, tensors: Mapping[str, Tensor]) -> TensorRef:
        """A reference to copies of the tensors, or to themselves. Raises OutOfMemory."""

    def pack_heads(self, keys: Tensor, values: Tensor) -> TensorRef:
        """A reference to copies of keys and values [layers, kv_heads, length, d], by those names.

        In a group each rank has some of the heads, and the reference is to all of them.
        """

    def take(self, ref: TensorRef) -> Mapping[str, Tensor]:
        """The tensors of a reference, which is freed. Raises TensorsGone."""


class LocalTransport:
    """Transport within one process: references hold the tensors themselves."""

    copies = False

    def pack(self, tensors: Mapping[str, Tensor]) -> TensorRef:
        return LocalTensors(dict(tensors))

    def pack_heads(self, keys: Tensor, values: Tensor) -> TensorRef:
        return self.pack({"keys": keys, "values": values})

    def take(self, ref: TensorRef) -> Mapping[str, Tensor]:
        assert isinstance(ref, LocalTensors)
        tensors = dict(ref.tensors)
        ref.tensors.clear()
        if not tensors:
            raise TensorsGone("the tensors of the request were given up or taken before")
        return tensors


# --- parts of prompts ---


@dataclass(frozen=True)
class TextInput:
    """Text ids, special tokens included."""

    ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ImageInput:
    """A clean image, normalised: the reference is to `pixels` [channels, height, width].

    `digest` stands for the pixels where cached prefixes are compared.
    """

    pixels: TensorRef
    digest: bytes
    grid: Grid

    @property
    def tokens(self) -> int:
        return self.grid.length


PromptInput = TextInput | ImageInput
Prompts = Mapping[SequenceName, tuple[PromptInput, ...]]


def with_images(prompts: Prompts, transport: Transport) -> Prompts:
    """The prompts with their images out of their references. Raises TensorsGone.

    The prompts of guidance branches share the references of their images.
    """
    taken: dict[int, LocalTensors] = {}

    def take(part: PromptInput) -> PromptInput:
        if not isinstance(part, ImageInput):
            return part
        if id(part.pixels) not in taken:
            taken[id(part.pixels)] = LocalTensors(dict(transport.take(part.pixels)))
        return replace(part, pixels=taken[id(part.pixels)])

    return {name: tuple(map(take, parts)) for name, parts in prompts.items()}


# --- to the understanding engine ---


@dataclass(frozen=True)
class Decode:
    """Decode a sequence until a token of `stop_ids` or `max_new_tokens` in all.

    `sampling` counts for the first Decode of a sequence; later ones continue its random state.
    Answered by Tokens and, at the end, Decoded.
    """

    call: int
    sequence: SequenceName
    sampling: TextSampling
    stop_ids: frozenset[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Prefill:
    """Prefill new sequences; at most `room` tokens will be decoded behind each prompt.

    Prompts that can never fit into the cache are refused, all others wait until there is room.
    `then` is decoded at once, without a round trip to the caller, under the same call number.
    `pinned` sequences stay for others to share: preempted, they are prefilled again once nothing
    else is to do and there is room.
    """

    call: int
    prompts: Prompts
    room: Mapping[SequenceName, int]
    then: Decode | None = None
    pinned: bool = False


@dataclass(frozen=True)
class Append:
    """Append to sequences."""

    call: int
    parts: Prompts


@dataclass(frozen=True)
class Export:
    """Export sequences' keys and values, to generate images behind them."""

    call: int
    sequences: tuple[SequenceName, ...]


@dataclass(frozen=True)
class Release:
    """Release sequences, whatever their state. Has no reply."""

    sequences: tuple[SequenceName, ...]


# --- to the generation engine ---


@dataclass(frozen=True)
class Prefix:
    """Keys and values that an image is generated behind: [layers, kv_heads, length, d] each."""

    ref: TensorRef
    next_t: int


@dataclass(frozen=True)
class KeepPrefix:
    """Keep a prefix under a name, so that `GenerateImages` may refer to it."""

    call: int
    name: str
    prefix: Prefix


@dataclass(frozen=True)
class GenerateImages:
    """Generate images, or clips, behind the same prefixes.

    `noise` refers to [count, tokens, token_width], of a `grid` with tubes to [count, tokens,
    tube_width]. A prefix is passed, or named if kept. After each of `preview_steps`, counted from
    1, a StepPreview of each image is sent.
    """

    call: int
    noise: TensorRef
    grid: Grid
    sampling: ResolvedSampling
    prefixes: Mapping[Branch, Prefix | str]
    preview_steps: frozenset[int]


@dataclass(frozen=True)
class Cancel:
    """Stop generating images for a call. Has no reply."""

    call: int


Command = Prefill | Decode | Append | Export | Release | KeepPrefix | GenerateImages | Cancel


def is_for_generation(command: Command) -> bool:
    """Whether the generation engine runs the command; the others are the understanding engine's."""
    return isinstance(command, KeepPrefix | GenerateImages | Cancel)


# --- from the engines ---


@dataclass(frozen=True)
class Prefilled:
    """The prompts are prefilled; `cached` of their `tokens` were in the cache already."""

    tokens: int
    cached: int


@dataclass(frozen=True)
class DecodedToken:
    """The next token of a sequence, with its log-probabilities where they were asked for."""

    id: int
    logprobs: LogProbs | None = None


@dataclass(frozen=True)
class Decoded:
    """A sequence ended; `pending` tokens are decoded but not yet in its keys and values."""

    finish_reason: Literal["stop", "length"]
    stopped_by: int | None
    pending: tuple[int, ...]


@dataclass(frozen=True)
class Appended:
    """The text and images are appended and prefilled."""


@dataclass(frozen=True)
class Exported:
    """Prefixes of the sequences, in the order asked for."""

    prefixes: tuple[Prefix, ...]


@dataclass(frozen=True)
class Kept:
    """The prefix is kept."""


@dataclass(frozen=True)
class StepPreview:
    """Image `index` after `step` of `steps`; `pixels` [channels, height, width] its prediction.

    That of a clip is the frame in its middle.
    """

    index: int
    step: int
    steps: int
    pixels: TensorRef


@dataclass(frozen=True)
class ImageReady:
    """Image `index` is finished; the reference is to its `pixels` [channels, height, width].

    `evaluations` of the network were spent on it, each guidance branch counted, parts in
    proportion to their layers.
    """

    index: int
    pixels: TensorRef
    evaluations: float


@dataclass(frozen=True)
class FramesReady:
    """Frames of clip `index` from number `first` of `total`, in order, once they are final.

    The reference is to `frames`, uint8 [n, height, width, channels]. `evaluations` as of
    `ImageReady`, for the whole clip.
    """

    index: int
    first: int
    total: int
    frames: TensorRef
    evaluations: float


@dataclass(frozen=True)
class Failed:
    """The call cannot be answered. `kind` is the name of the error's class."""

    kind: str
    message: str
    error: Exception | None = field(default=None, compare=False)
    """The error itself, in the process where it was raised."""

    def __reduce__(self) -> tuple[type[Failed], tuple[str, str]]:
        return Failed, (self.kind, self.message)

    def exception(self) -> Exception:
        """The error to raise; in another process one of the same kind and message."""
        if self.error is not None:
            return self.error
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, NeounifyError):
            return kind(self.message)
        return RuntimeError(self.message)


Answer = (
    Prefilled
    | DecodedToken
    | Decoded
    | Appended
    | Exported
    | Kept
    | StepPreview
    | ImageReady
    | FramesReady
    | Failed
)


@dataclass(frozen=True)
class Reply:
    """An answer to a call; the last one of a call is `final`."""

    call: int
    answer: Answer
    final: bool


class StepMemory:
    """Context of the work of a step: `error` is set, and not raised, if there is no memory for it.

    Other errors are raised. `work` says what the memory was for. `alone` is False for a rank of a
    group: it ends with the error, since the others continue the step.
    """

    def __init__(self, work: str, *, alone: bool = True) -> None:
        self.work, self.alone = work, alone
        self.error: OutOfMemory | None = None

    def __enter__(self) -> StepMemory:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not (self.alone and isinstance(error, Exception) and is_out_of_memory(error)):
            return False
        log.error("no memory is left to %s", self.work, exc_info=error)
        self.error = OutOfMemory(
            f"no memory is left to {self.work}; try again later, or a smaller request"
        )
        # The frames of the error hold the tensors of the step.
        error.__traceback__ = None
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        return True


def failed(call: int, error: Exception, *, alone: bool = True) -> Reply:
    """The last reply to a call that cannot be answered; an unexpected error is logged.

    In a rank of a group, which is not `alone`, an unexpected error is raised: the others may not
    have it, and would continue the call.
    """
    if not isinstance(error, NeounifyError):
        if not alone:
            raise error
        log.error("a command failed", exc_info=error)
        if is_out_of_memory(error):
            error = OutOfMemory("no memory is left for the request")
    return Reply(call, Failed(type(error).__name__, str(error), error), True)


def refs_of(answer: Answer) -> tuple[TensorRef, ...]:
    """Tensor references of an answer, which its receiver has to take or free."""
    if isinstance(answer, Exported):
        return tuple(prefix.ref for prefix in answer.prefixes)
    if isinstance(answer, FramesReady):
        return (answer.frames,)
    return (answer.pixels,) if isinstance(answer, StepPreview | ImageReady) else ()


def discard(reply: Reply) -> None:
    """Free the tensors of a reply whose call is closed."""
    for ref in refs_of(reply.answer):
        ref.free()


@dataclass(frozen=True)
class EngineReport:
    """Metrics of an engine: gauges as they are now, counters since it started."""

    gauges: Mapping[str, float]
    counters: Mapping[str, float]
