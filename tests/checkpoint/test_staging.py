"""Layers staged through buffers: the schedule of a device, run on the CPU."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from neounify.checkpoint import LoadedCheckpoint, load_checkpoint, to_published
from neounify.checkpoint.layer_image import ALIGNMENT, layer_image
from neounify.checkpoint.layers import LayerResidency
from neounify.checkpoint.mapped import MappedFile
from neounify.checkpoint.names import layer_of
from neounify.checkpoint.reader import CheckpointFolder
from neounify.checkpoint.residency import Share, StoredWeight
from neounify.checkpoint.staging import Event, HostCopies, Staged, readers_for
from neounify.config import MlpConfig
from neounify.errors import Cancelled, CheckpointError, RequestError
from neounify.model import NeoUnify
from neounify.pipeline import load
from neounify.runtime.memory_plan import SLOTS, STAGING
from neounify.text import byte_tokenizer
from support.checkpoint_folders import SMALL, random_weights, write_checkpoint
from support.lora_files import lora_tensors

pytestmark = pytest.mark.filterwarnings("ignore::neounify.errors.SizeWarning")

LAYERS = 6
DEEP = SMALL.replace(num_layers=LAYERS, vocab_size=512)


class Recorded(HostCopies):
    """Copies within the host's memory, with a list of what was done."""

    def __init__(self) -> None:
        self.host: list[int] = []
        self.device: list[int] = []
        self.copied = 0
        self.fails = False

    def host_buffer(self, size: int) -> Tensor:
        self.host.append(size)
        return super().host_buffer(size)

    def slot(self, size: int) -> Tensor:
        self.device.append(size)
        # Values that would show if a layer were used before its copy.
        return torch.full((size,), 255, dtype=torch.uint8)

    def copy(self, slot: Tensor, buffer: Tensor, after: Event | None) -> Event:
        if self.fails:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.copied += 1
        return super().copy(slot, buffer, after)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "deep", DEEP, random_weights(DEEP))


def feed_of(folder: Path, dtype: str = "float32") -> tuple[Staged, NeoUnify, Recorded]:
    """The generation stream of a checkpoint, staged; its model, and the record of its copies."""
    checkpoint = CheckpointFolder.open(folder)
    model = load_checkpoint(folder, dtype=dtype).model
    parameters = dict(model.named_parameters())
    layers: dict[int, dict[str, StoredWeight]] = {}
    for name, parameter in parameters.items():
        place = layer_of(name)
        if place is not None and place[1] == "gen":
            published = to_published(name)
            source = StoredWeight(checkpoint.file_of(published), checkpoint.stored_name(published))
            layers.setdefault(place[0], {})[name] = source
            parameter.data = parameter.data.new_empty(0)
    copies = Recorded()
    images = {number: layer_image(sources, parameters) for number, sources in layers.items()}
    return Staged(images, copies, readers=2), model, copies


def one_pass(feed: Staged) -> None:
    for number in range(LAYERS):
        feed.take(number)
        feed.give_back(number)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("neounify-")]


def check_layer(model: NeoUnify, expected: NeoUnify, number: int) -> None:
    for name, tensor in expected.named_parameters():
        if layer_of(name) == (number, "gen"):
            assert torch.equal(model.get_parameter(name), tensor), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_are_right_in_any_order(folder: Path, dtype: str) -> None:
    expected = load_checkpoint(folder, dtype=dtype).model
    feed, model, copies = feed_of(folder, dtype)
    orders = [range(LAYERS), range(LAYERS), (0, 0, 0), (3, 1, 5), range(LAYERS), (0, 1), (0, 1)]
    feed.open()
    for number in (n for order in orders for n in order):
        feed.take(number)
        check_layer(model, expected, number)
        feed.give_back(number)
    feed.close()
    assert threads() == []
    assert all(p.numel() == 0 for n, p in model.named_parameters() if layer_of(n) and ".gen." in n)
    assert len(copies.host) == STAGING
    assert len(copies.device) == SLOTS


def test_the_order_wraps(folder: Path) -> None:
    """Three passes in order copy every layer once a pass, and at most the slots ahead."""
    feed, _, copies = feed_of(folder)
    feed.open()
    for _ in range(3):
        one_pass(feed)
    feed.close()
    assert 3 * LAYERS <= copies.copied <= 3 * LAYERS + SLOTS


def test_buffers_are_as_large_as_the_largest_layer(folder: Path) -> None:
    feed, _, copies = feed_of(folder)
    feed.open()
    feed.close()
    size = max(image.size for image in feed._layers.values())
    assert copies.host == [size] * STAGING
    assert copies.device == [size] * SLOTS
    kept = load_checkpoint(folder).model
    values = sum(p.nbytes for n, p in kept.named_parameters() if layer_of(n) == (0, "gen"))
    tensors = sum(layer_of(n) == (0, "gen") for n, _ in kept.named_parameters())
    assert values <= size <= values + tensors * ALIGNMENT


def test_two_threads_share_the_slots(folder: Path) -> None:
    expected = load_checkpoint(folder).model
    feed, model, _ = feed_of(folder)
    lock, failures = threading.Lock(), []

    def work(order: list[int]) -> None:
        feed.open()
        try:
            for number in order * 5:
                feed.take(number)
                try:
                    with lock:
                        check_layer(model, expected, number)
                finally:
                    feed.give_back(number)
        except BaseException as error:
            failures.append(error)
        finally:
            feed.close()

    numbers = list(range(LAYERS))
    orders = [numbers, numbers[::-1], numbers[2:] + numbers[:2], [3], [1, 4]]
    workers = [threading.Thread(target=work, args=(order,)) for order in orders]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert not any(worker.is_alive() for worker in workers)
    assert failures == []
    assert threads() == []


def test_a_file_that_is_cut_off_is_one_error(folder: Path) -> None:
    feed, _, _ = feed_of(folder)
    size = (folder / "model.safetensors").stat().st_size
    os.truncate(folder / "model.safetensors", size // 4)
    feed.open()
    with pytest.raises(CheckpointError, match="was cut off while it was in use: it has"):
        one_pass(feed)
    feed.close()
    assert threads() == []


def test_an_error_of_the_device_reaches_the_caller_once_and_goes(folder: Path) -> None:
    feed, _, copies = feed_of(folder)
    copies.fails = True
    feed.open()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        feed.take(0)
    feed.close()
    assert threads() == []
    copies.fails = False
    feed.open()
    feed.take(0)
    feed.give_back(0)
    feed.close()
    assert threads() == []


@pytest.mark.parametrize(("cores", "readers"), [(1, 4), (2, 4), (8, 4), (12, 6), (16, 8), (128, 8)])
def test_readers_are_as_many_as_the_host_has_cores_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cores: int, readers: int
) -> None:
    assert readers_for(cores) == readers
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    feed, _, copies = feed_of(folder)
    feed = Staged(feed._layers, copies)
    feed.open()
    assert feed._session is not None
    assert feed._session.readers._max_workers == readers
    feed.close()


def test_a_layer_left_taken_is_freed_at_the_end(folder: Path) -> None:
    feed, model, _ = feed_of(folder)
    feed.open()
    feed.take(2)
    feed.close()
    assert threads() == []
    assert all(p.numel() == 0 for n, p in model.named_parameters() if layer_of(n) == (2, "gen"))


def test_touching_tensors_are_read_in_one_piece(folder: Path) -> None:
    feed, _, _ = feed_of(folder)
    image = feed._layers[0]
    pieces = image.reads((), trunk=True)
    reads = {(read.file, read.start): sum(size for _, size in read.places) for read in pieces}
    stored = sorted((part.source.info.start, part.source.info.stop) for part in image.parts)
    runs = 1 + sum(left[1] != right[0] for left, right in pairwise(stored))
    assert len(reads) == runs < len(stored)
    assert sum(reads.values()) == sum(stop - start for start, stop in stored)


def test_large_tensors_are_cut_into_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neounify.checkpoint.layer_image.PIECE", 1000)
    expected = load_checkpoint(folder).model
    feed, model, _ = feed_of(folder)
    pieces = feed._layers[0].reads((), trunk=True)
    assert all(sum(size for _, size in read.places) <= 1000 for read in pieces)
    feed.open()
    feed.take(0)
    check_layer(model, expected, 0)
    feed.give_back(0)
    feed.close()


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The residency of a device, with copies within the host's memory in place of its own."""
    copies = Recorded()
    monkeypatch.setattr("neounify.checkpoint.staging.DeviceCopies", lambda device: copies)
    monkeypatch.setattr("neounify.checkpoint.layers.in_place", lambda device: False)
    return copies


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_a_model_runs_on_staged_layers(
    folder: Path, on_a_device: Recorded, tmp_path: Path, adapted: bool
) -> None:
    targets = [f"language_model.model.layers.{n}.mlp.down_proj" for n in range(LAYERS)]
    save_file(lora_tensors(DEEP, targets), tmp_path / "lora.safetensors")
    lora = tmp_path / "lora.safetensors" if adapted else None
    plain = load_checkpoint(folder, lora=lora)
    moved = load_checkpoint(folder, lora=lora, memory="layers", resident_layers=2)
    assert isinstance(moved.residency, LayerResidency)
    outputs = []
    for loaded in (plain, moved):
        with torch.inference_mode(), loaded.residency.use("und"):
            outputs.append(forward(loaded.model, torch.arange(4)))
    assert torch.equal(*outputs)
    assert on_a_device.copied >= LAYERS - 2
    assert threads() == []


def test_cancelling_and_errors_leave_no_thread(folder: Path, on_a_device: Recorded) -> None:
    byte_tokenizer().save(folder)
    pipe = load(folder, memory="layers", resident_layers=1)

    def paint(callback: Callable[[threading.Event], None]) -> None:
        event = threading.Event()
        with pytest.raises((Cancelled, CheckpointError)):
            pipe.generate(
                "a boat", width=64, height=64, steps=4, cancel=event,
                callback=lambda *_: callback(event),
            )  # fmt: skip
        assert threads() == []
        for name, parameter in pipe.model.named_parameters():
            place = layer_of(name)
            if place is not None and place[0] < LAYERS - 1:
                assert parameter.numel() == 0, name

    paint(lambda event: event.set())
    on_a_device.fails = False
    size = (folder / "model.safetensors").stat().st_size
    paint(lambda event: os.truncate(folder / "model.safetensors", size // 2))


def forward(model: NeoUnify, ids: Tensor) -> Tensor:
    """Logits of a text."""
    from neounify.attention import select_for
    from neounify.model.layout import Document, Layout, Text

    layout = Layout([Document((Text(len(ids)),))])
    hidden = {"und": model.embed_und(layout, ids)}
    attend = select_for(model, "auto").plan(layout, None)
    return model.logits(model.backbone(layout, hidden, attend)["und"])  # type: ignore[arg-type]


# --- sparse layers ---

EXPERTS, TOP = 16, 2
SPARSE_MLP = MlpConfig(
    width=48,
    num_experts=EXPERTS,
    experts_per_token=TOP,
    expert_width=24,
    sparse=(True,) * (LAYERS - 1) + (False,),
)
SPARSE = DEEP.replace(und_mlp=SPARSE_MLP, gen_mlp=replace(SPARSE_MLP, sparse=(True,) * LAYERS))


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    weights = {name: 0.2 * tensor for name, tensor in random_weights(SPARSE).items()}
    folder = write_checkpoint(tmp_path / "sparse", SPARSE, weights)
    byte_tokenizer().save(folder)
    return folder


class BytesRead:
    """Bytes that were read into staging buffers, by experts (True) and others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of = {True: 0, False: 0}
        self.lock = threading.Lock()
        original = MappedFile.read_into

        def read_into(file: MappedFile, start: int, targets: Sequence[memoryview]) -> None:
            size = sum(len(target) for target in targets)
            stop = start + size
            experts = sum(
                max(0, min(stop, info.stop) - max(start, info.start))
                for name, info in file.tensors.items()
                if ".experts." in name
            )
            with self.lock:
                self.of[True] += experts
                self.of[False] += size - experts
            original(file, start, targets)

        monkeypatch.setattr(MappedFile, "read_into", read_into)

    def taken(self) -> dict[bool, int]:
        """What was read since the last call."""
        with self.lock:
            taken, self.of = self.of, {True: 0, False: 0}
        return taken


EXPERT_BYTES = 3 * SPARSE.hidden_size * 24 * 4
SPARSE_LAYERS = LAYERS - 1


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
def test_text_of_a_sparse_model_reads_only_the_experts_of_its_tokens(
    sparse: Path, on_a_device: Recorded, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    options = {"quantise": "int8"} if form == "int8" else {"dtype": form}
    whole = load(sparse, memory="all", **options)  # type: ignore[arg-type]
    layers = load(sparse, memory="layers", resident_layers=0, **options)  # type: ignore[arg-type]
    read = BytesRead(monkeypatch)
    answers = [
        pipe.chat("what is it, in some more words?", max_new_tokens=6) for pipe in (whole, layers)
    ]
    assert answers[0].token_ids == answers[1].token_ids
    assert len(on_a_device.device) <= SLOTS
    assert threads() == []
    # The prompt reads every layer whole, and up to SLOTS more are staged ahead. Then a token
    # reads at most its experts.
    decoded = len(answers[0].token_ids) - 1
    assert decoded >= 2
    most = (SPARSE_LAYERS + SLOTS) * EXPERTS + decoded * SPARSE_LAYERS * TOP
    assert SPARSE_LAYERS * EXPERTS * EXPERT_BYTES <= read.taken()[True] <= most * EXPERT_BYTES


def both(folder: Path, resident: int = 0) -> tuple[LoadedCheckpoint, LoadedCheckpoint]:
    """A model that is whole in memory, and one by layers."""
    by_layers = load_checkpoint(folder, memory="layers", resident_layers=resident)
    whole = load_checkpoint(folder)
    # A product of one row depends on how its weight is aligned, which in the file it is not.
    for loaded in (whole, by_layers):
        for parameter in loaded.model.parameters():
            if parameter.numel():
                parameter.data = parameter.data.clone()
    return whole, by_layers


def test_few_tokens_in_a_row_read_nothing_but_their_experts(
    sparse: Path, on_a_device: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, moved = both(sparse)
    read = BytesRead(monkeypatch)
    with torch.inference_mode(), moved.residency.use("und"):
        forward(moved.model, torch.arange(1))  # what was staged before is used up
        read.taken()
        for number in range(8):
            ids = torch.arange(number, number + 1)
            assert torch.equal(forward(moved.model, ids), forward(whole.model, ids))
    experts = read.taken()[True]
    assert experts == 8 * SPARSE_LAYERS * TOP * EXPERT_BYTES


def test_many_tokens_after_few_have_all_their_experts(sparse: Path, on_a_device: Recorded) -> None:
    whole, moved = both(sparse, resident=1)
    with torch.inference_mode(), moved.residency.use("und"):
        for count in (1, 60, 1, 2, 60, 60, 1):
            ids = torch.arange(count)
            assert torch.equal(forward(moved.model, ids), forward(whole.model, ids))
    for name, parameter in moved.model.named_parameters():
        if layer_of(name) == (0, "und"):
            assert parameter.numel() == 0, name


def test_threads_that_need_other_experts_of_a_layer(sparse: Path, on_a_device: Recorded) -> None:
    whole, moved = both(sparse)
    with torch.inference_mode():
        expected = [forward(whole.model, torch.arange(n, n + 2)) for n in range(12)]
    failures: list[BaseException] = []

    def work(numbers: Sequence[int]) -> None:
        try:
            with torch.inference_mode(), moved.residency.use("und"):
                for n in numbers:
                    assert torch.equal(forward(moved.model, torch.arange(n, n + 2)), expected[n])
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(range(n, 12, 3),)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert failures == []
    assert threads() == []


def test_experts_cut_off_while_they_are_fetched_are_one_error(
    sparse: Path, on_a_device: Recorded
) -> None:
    moved = load_checkpoint(sparse, memory="layers", resident_layers=0)
    with torch.inference_mode(), moved.residency.use("und"):
        forward(moved.model, torch.arange(1))
        file = MappedFile(sparse / "model.safetensors")
        os.truncate(file.path, min(i.start for n, i in file.tensors.items() if ".experts." in n))
        with pytest.raises(CheckpointError, match="was cut off while it was in use"):
            forward(moved.model, torch.arange(1))
    assert threads() == []


def test_shares_of_ranks_are_refused(folder: Path) -> None:
    checkpoint = CheckpointFolder.open(folder)
    name = "layers.0.gen.qkv.q_proj.weight"
    published = to_published(name)
    share = Share(0, range(4))
    source = StoredWeight(checkpoint.file_of(published), published, share=share)
    parameters = dict(load_checkpoint(folder).model.named_parameters())
    with pytest.raises(RequestError, match="shares of ranks"):
        layer_image({name: source}, parameters)
