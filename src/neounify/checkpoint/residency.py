"""Weights in memory: one stored tensor as a parameter, and which stream's are resident.

`memory="all"` keeps everything (NullResidency). `memory="stream"` drops the weights of an unused
stream as soon as another one is used (prefill needs only one stream, denoising the other), and
brings them back from the mapped files when it is used again. No host copy is kept. "layers" is in
`checkpoint.layers`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from neounify.checkpoint.lora_file import LoraPair
from neounify.checkpoint.mapped import MappedFile, TensorInfo, all_finite
from neounify.checkpoint.names import stream_of
from neounify.errors import CheckpointError
from neounify.model.parts import STREAMS, StreamName
from neounify.runtime.devices import abilities
from neounify.runtime.process import return_freed_memory

if TYPE_CHECKING:
    from neounify.quant.formats import PublishedFormat, Shape, WeightFormat
    from neounify.quant.stored import StoredCodes

CHUNK_ELEMENTS = 2**21
SAMPLE_BYTES = 4096
CODES_ALIGNMENT = 16
"""Bytes at whose multiples operators on codes want them; mapped elsewhere they are copied."""


class Share(NamedTuple):
    """The part of a tensor that a rank holds: `places` along the dimension `dim`, 0 or 1."""

    dim: int
    places: range

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor, not copied."""
        return tensor.narrow(self.dim, self.places.start, len(self.places))


@dataclass(frozen=True)
class StoredWeight:
    """A stored tensor (by its name in the file), decoded and updated when it is read.

    `codes` says how a quantised weight is decoded; `updates` are added to its values. `kept` is the
    dtype of codes that are not decoded, None for weights in the dtype of the model. With a
    `share`, only that part of the tensor is read. `format` is the one that a plain weight is
    quantised in whenever it is read, with `read_codes`.
    """

    file: MappedFile
    name: str
    updates: tuple[LoraPair, ...] = ()
    codes: StoredCodes | None = None
    share: Share | None = None
    kept: torch.dtype | None = None
    format: PublishedFormat | None = None

    @property
    def info(self) -> TensorInfo:
        return self.file.tensors[self.name]

    @property
    def shape(self) -> torch.Size:
        """Shape of what is read."""
        shape = list(self.info.shape if self.codes is None else self.codes.shape)
        if self.kept is not None:
            shape = list(self.info.stored_shape)
        if self.share is not None:
            shape[self.share.dim] = len(self.share.places)
        return torch.Size(shape)

    def is_view(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the values can be used where they are mapped, without a copy."""
        return (
            not self.updates
            and self.codes is None
            and self.format is None
            and device.type == "cpu"
            and self.info.dtype == dtype
            and self.file.is_view(self.name)
            and (self.share is None or self.share.dim == 0)
            and (self.kept is None or self._start % CODES_ALIGNMENT == 0)
        )

    @property
    def _start(self) -> int:
        """The first byte in the file of what is read, where that is all columns."""
        rows = 0 if self.share is None else self.share.places.start
        stored = self.info.stored_shape
        return self.info.start + rows * math.prod(stored[1:]) * self.info.dtype.itemsize

    def view(self) -> Tensor:
        """The stored tensor without updates, mapped where the file aligns it."""
        stored = self.file.tensor(self.name)
        return stored if self.share is None else self.share.of(stored)

    def read(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new tensor with the values, updates added, in one dtype on one device.

        Works in pieces and drops the file's pages behind it, so that little more than the
        result is resident. Raises CheckpointError for values that are not finite.
        """
        if self._crosses_rows and (self.updates or self.share is not None):
            whole = replace(self, updates=(), share=None).read(torch.float32, device)
            return self._part_of(whole, dtype, check=True)
        return self._assembled(self._pieces(), dtype, device, check=True)

    def read_codes(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors of its `format`, quantised on one device. Raises CheckpointError.

        A share is cut from the codes of the whole weight, so that it is that of one process.
        """
        whole = replace(self, share=None)

        def read(rows: range) -> Tensor:
            return replace(whole, share=Share(0, rows)).read(torch.float32, device)

        codes = whole._quantised(device, read)
        if self.share is None:
            return codes
        assert self.format is not None
        shares = part_shares(self.format, tuple(whole.shape), self.share)
        cuts = {part: shares[part] for part in codes}
        return {
            part: codes[part] if cut is None else cut.of(codes[part]).clone()
            for part, cut in cuts.items()
        }

    def encode(self, stored: Tensor) -> dict[str, Tensor]:
        """`read_codes` of the stored tensor, elsewhere than in its file; values are not checked."""
        weight = self.decode(stored, stored.dtype)
        return self._quantised(stored.device, lambda rows: weight[rows.start : rows.stop].float())

    def _quantised(
        self, device: torch.device, read: Callable[[range], Tensor]
    ) -> dict[str, Tensor]:
        from neounify.quant.formats import quantise_rows

        assert self.format is not None
        return quantise_rows(self.format, tuple(self.shape), device, read)

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The values of the stored tensor, elsewhere than in its file: decoded, updates added.

        Where the two are the same, no copy. Values are not checked: that waits for the device.
        """
        if self.codes is None and not self.updates and stored.dtype == dtype:
            return stored
        if self._crosses_rows and self.updates:
            whole = replace(self, updates=()).decode(stored, torch.float32)
            return self._part_of(whole, dtype, check=False)
        pieces = iter([(0, torch.atleast_1d(stored))])
        return self._assembled(pieces, dtype, stored.device, check=False)

    def _assembled(
        self,
        pieces: Iterator[tuple[int, Tensor]],
        dtype: torch.dtype,
        device: torch.device,
        *,
        check: bool,
    ) -> Tensor:
        """A new tensor from (first row, rows) as they are stored."""
        result = torch.empty(self.shape, dtype=dtype, device=device)
        # Codes that the device cannot hold are decoded on the host.
        decoding = device if abilities(device).float8 else torch.device("cpu")
        updates = [update.to(device) for update in self.updates]
        columns = self.share is not None and self.share.dim == 1
        first = 0 if self.share is None or columns else self.share.places.start
        rows = torch.atleast_1d(result)
        if self.info.blocks is not None:
            rows = result.view(self.info.stored_shape[0] if self._crosses_rows else len(result), -1)
        for start, stored in pieces:
            piece = rows[start - first : start - first + stored.shape[0]]
            if self.codes is not None:
                stored = self.codes.decode(stored.to(decoding), start)
            if updates:
                stored = stored.to(device, torch.float32, copy=True)
                for update in updates:
                    update.add_to(stored, start)
            piece.copy_(self.share.of(stored) if self.share is not None and columns else stored)
            if check and not all_finite(self._checked(piece)):
                raise self._not_finite(stored, dtype)
        return result

    @property
    def _crosses_rows(self) -> bool:
        """Whether blocks hold the ends of rows, so that rows cannot be read alone."""
        return self.info.blocks is not None and self.info.stored_shape[0] != self.info.shape[0]

    def _part_of(self, whole: Tensor, dtype: torch.dtype, *, check: bool) -> Tensor:
        """What is read, from all values in float32: of blocks that cross the ends of rows."""
        for update in self.updates:
            update.to(whole.device).add_to(whole, 0)
        part = whole if self.share is None else self.share.of(whole)
        result = part.to(dtype, copy=True)
        if check and not all_finite(result):
            raise self._not_finite(part, dtype)
        return result

    def _checked(self, stored: Tensor) -> Tensor:
        """The numbers of stored rows that may be NaN: of blocks that stay codes, their scales."""
        if self.info.blocks is None or stored.dtype.is_floating_point:
            return stored
        return self.info.blocks.scales(stored.reshape(-1, self.info.blocks.nbytes))

    def verify(self) -> None:
        """Read every value once; CheckpointError when one is NaN or infinite."""
        for _, stored in self._pieces():
            if not all_finite(self._checked(stored)):
                raise self._not_finite(stored, stored.dtype)

    def verify_sample(self) -> None:
        """`verify` for the first 4 KiB only: one page, where a ruined tensor shows already."""
        dtype = self.info.dtype
        sample = self.file.head(self.name, SAMPLE_BYTES)
        if self.info.blocks is not None:
            sample = sample[: len(sample) // self.info.blocks.nbytes * self.info.blocks.nbytes]
        stored = torch.frombuffer(bytearray(sample), dtype=dtype) if sample else torch.empty(0)
        if not all_finite(self._checked(stored)):
            raise self._not_finite(stored, dtype)

    def _pieces(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of about two million elements each; a piece's pages go with it."""
        stored = torch.atleast_1d(self.file.tensor(self.name))
        row_elements = max(1, math.prod(stored.shape[1:]))
        row_bytes = row_elements * stored.element_size()
        step = max(1, CHUNK_ELEMENTS // row_elements)
        rows = range(stored.shape[0])
        if self.share is not None and self.share.dim == 0:
            rows = self.share.places
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            yield start, stored[start:stop]
            # From the tensor's start: a page that two pieces share goes with the second.
            self.file.release(self.name, 0, stop * row_bytes)

    def _not_finite(self, stored: Tensor, dtype: torch.dtype) -> CheckpointError:
        where = f"{self.file.path}: tensor {self.name!r}"
        if not all_finite(self._checked(stored)):
            return CheckpointError(f"{where} holds NaN or infinite values; the weights are damaged")
        return CheckpointError(
            f"{where} does not fit in {dtype}: values overflow; load it in a wider dtype"
        )


def part_shares(format: WeightFormat, shape: Shape, share: Share | None) -> dict[str, Share | None]:
    """What a rank with a share of a weight [N, K] holds of each tensor of its format, None for all.

    Rows cut all tensors but the codebook, columns those that have some.
    """
    from neounify.quant.formats import CODEBOOK

    shares: dict[str, Share | None] = {}
    for part, (size, _) in format.layout(shape).items():
        shares[part] = None if part == CODEBOOK else share
        if share is not None and share.dim == 1:
            width = size[1] if len(size) == 2 else 1
            ends = (share.places.start * width // shape[1], share.places.stop * width // shape[1])
            shares[part] = Share(1, range(*ends)) if width > 1 else None
    return shares


class Residency(Protocol):
    """Says when a stream's weights are needed."""

    def use(self, stream: StreamName) -> AbstractContextManager[None]:
        """A context in which the weights of `stream`, and the shared ones, are there.

        Any number of threads may be inside, for either stream, and a thread may be inside both.
        """


class NullResidency:
    """Everything is always in memory."""

    def use(self, stream: StreamName) -> AbstractContextManager[None]:
        return nullcontext()


class StreamResidency:
    """Keeps in memory only the streams in use; the last one used stays until the other is used.

    Three kinds of parameters, chosen by what `sources` (our tensor name → source) allow:

    - Shared tensors (embedding, lm_head) always stay.
    - A parameter that is a view of a mapped file loses its pages, which the next touch reads
      again. It can be read at any time, in use or not.
    - Any other (cast, on another device, with LoRA updates) is emptied, shape [0], and rebuilt
      on entry: cast, copied and merged again. It must not be touched outside `use`.

    A parameter that was written to in place since it was filled is never dropped. The model
    must not be moved or cast afterwards.
    """

    def __init__(self, model: nn.Module, sources: Mapping[str, StoredWeight]) -> None:
        self._lock = threading.Lock()
        self._users: dict[StreamName, int] = dict.fromkeys(STREAMS, 0)
        self._weights: dict[StreamName, list[Weight]] = {name: [] for name in STREAMS}
        # A mapped page behind the end of a file that was cut off would end the process.
        self._files = {source.file for source in sources.values()}
        parameters = dict(model.named_parameters())
        for name, source in sources.items():
            stream = stream_of(name)
            if stream != "shared":
                self._weights[stream].append(make_weight(parameters, name, source))
        weights = [weight for stream in self._weights.values() for weight in stream]
        # What they leave, and what it took to make them, would stay with the process.
        self._rebuilds = any(not weight.mapped for weight in weights)

    @contextmanager
    def use(self, stream: StreamName) -> Iterator[None]:
        """See Residency. Entering raises CheckpointError when weights cannot be rebuilt."""
        self._enter(stream)
        try:
            yield
        finally:
            self._leave(stream)

    def _enter(self, stream: StreamName) -> None:
        with self._lock:
            for other, users in self._users.items():
                if other != stream and not users:
                    self._drop(other)
            if not self._users[stream]:
                self._fill(stream)
            self._users[stream] += 1

    def _leave(self, stream: StreamName) -> None:
        with self._lock:
            self._users[stream] -= 1
            if not self._users[stream] and any(self._users.values()):
                self._drop(stream)

    def _fill(self, stream: StreamName) -> None:
        for file in self._files:
            file.check_length()
        try:
            # A caller's inference mode would make tensors that the parameters cannot take over.
            with torch.inference_mode(False), torch.no_grad():
                for weight in self._weights[stream]:
                    weight.fill()
        except BaseException:
            self._drop(stream)
            raise
        if self._rebuilds:
            return_freed_memory()

    def _drop(self, stream: StreamName) -> None:
        pages: dict[MappedFile, list[tuple[int, int]]] = {}
        with torch.inference_mode(False), torch.no_grad():
            for weight in self._weights[stream]:
                weight.drop(pages)
        for file, ranges in pages.items():
            file.release_ranges(ranges)


class Weight(Protocol):
    """A parameter whose memory can be freed and filled again; `mapped` where it is its file's."""

    mapped: bool

    def fill(self) -> None: ...

    def drop(self, pages: dict[MappedFile, list[tuple[int, int]]]) -> None:
        """Free the memory, or add the byte ranges to be dropped to `pages`."""


def make_weight(parameters: Mapping[str, nn.Parameter], name: str, source: StoredWeight) -> Weight:
    """A parameter (our name) as a view of its file where it is one, else to be rebuilt."""
    if source.format is not None:
        return _QuantisedWeight(parameters, name, source)
    parameter = parameters[name]
    if parameter.numel() and source.is_view(parameter.dtype, parameter.device):
        return _MappedWeight(parameter, source)
    return _RebuiltWeight(parameter, source)


def code_names(name: str, source: StoredWeight) -> dict[str, str]:
    """The parameters (our names) that a weight becomes, by the tensors of its format."""
    assert source.format is not None
    module = name.rpartition(".")[0]
    return {part: f"{module}.{part}" for part in source.format.layout(tuple(source.shape))}


class _MappedWeight:
    mapped = True

    def __init__(self, parameter: nn.Parameter, source: StoredWeight) -> None:
        self.parameter = parameter
        self.source = source
        self.address = source.view().data_ptr()
        self.version = parameter._version

    def fill(self) -> None:
        pass

    def drop(self, pages: dict[MappedFile, list[tuple[int, int]]]) -> None:
        untouched = self.parameter._version == self.version
        if untouched and self.parameter.data_ptr() == self.address:
            info = self.source.info
            pages.setdefault(self.source.file, []).append((info.start, info.stop))


class _RebuiltWeight:
    mapped = False

    def __init__(self, parameter: nn.Parameter, source: StoredWeight) -> None:
        self.parameter = parameter
        self.source = source
        self.version = parameter._version

    def fill(self) -> None:
        if self.parameter.numel() == 0:
            dtype, device = self.parameter.dtype, self.parameter.device
            self.parameter.data = self.source.read(dtype, device)
            self.version = self.parameter._version

    def drop(self, pages: dict[MappedFile, list[tuple[int, int]]]) -> None:
        if self.parameter._version == self.version:
            self.parameter.data = self.parameter.data.new_empty(0)


class _QuantisedWeight:
    """The parameters of a layer of codes, made of a plain weight."""

    mapped = False

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], name: str, source: StoredWeight
    ) -> None:
        names = code_names(name, source)
        self.parameters = {part: parameters[ours] for part, ours in names.items()}
        self.source = source
        self.versions = self._versions()

    def _versions(self) -> Sequence[int]:
        return [parameter._version for parameter in self.parameters.values()]

    def fill(self) -> None:
        if all(parameter.numel() for parameter in self.parameters.values()):
            return
        device = next(iter(self.parameters.values())).device
        for part, tensor in self.source.read_codes(device).items():
            self.parameters[part].data = tensor
        self.versions = self._versions()

    def drop(self, pages: dict[MappedFile, list[tuple[int, int]]]) -> None:
        if self._versions() == self.versions:
            for parameter in self.parameters.values():
                parameter.data = parameter.data.new_empty(0)
