"""memory="stream": what is in memory when, and that it is always right when it is needed."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from neounify.checkpoint import NullResidency, StreamResidency, load_checkpoint, stream_of
from neounify.checkpoint.residency import StoredWeight
from neounify.config import MlpConfig
from neounify.errors import CheckpointError
from neounify.model import NeoUnify
from support.checkpoint_folders import SMALL, random_weights, write_checkpoint
from support.lora_files import lora_tensors

WIDE = SMALL.replace(
    hidden_size=512,
    vocab_size=1024,
    und_mlp=MlpConfig(width=4096),
    gen_mlp=MlpConfig(width=4096),
)


def stream_bytes(model: NeoUnify, stream: str) -> int:
    return sum(p.nbytes for name, p in model.named_parameters() if stream_of(name) == stream)


def assert_equal_in(stream: str, model: NeoUnify, expected: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        if stream_of(name) in (stream, "shared"):
            assert torch.equal(tensor, expected[name]), name


@pytest.fixture
def cast(small: Path) -> tuple[NeoUnify, StreamResidency, dict[str, Tensor]]:
    """A model whose streams are rebuilt on entry, its residency and its right values."""
    expected = load_checkpoint(small, dtype="bfloat16").model.state_dict()
    model, residency, *_ = load_checkpoint(small, dtype="bfloat16", memory="stream")
    assert isinstance(residency, StreamResidency)
    return model, residency, expected


Cast = tuple[NeoUnify, StreamResidency, dict[str, Tensor]]


def test_memory_all_does_nothing(small: Path) -> None:
    model, residency, *_ = load_checkpoint(small, dtype="bfloat16")
    assert isinstance(residency, NullResidency)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with residency.use("und"), residency.use("gen"):
        pass
    assert before == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def test_rebuilt_streams_come_and_go(cast: Cast) -> None:
    model, residency, expected = cast
    shared = sum(expected[name].nbytes for name in expected if stream_of(name) == "shared")
    assert (stream_bytes(model, "und"), stream_bytes(model, "gen")) == (0, 0)
    assert stream_bytes(model, "shared") == shared
    for _ in range(2):
        with residency.use("und"):
            assert_equal_in("und", model, expected)
            assert stream_bytes(model, "gen") == 0
        assert stream_bytes(model, "und") > 0, "the last stream used stays until the other is used"
        with residency.use("gen"):
            assert_equal_in("gen", model, expected)
            assert stream_bytes(model, "und") == 0
    assert stream_bytes(model, "shared") == shared


def test_both_streams_can_be_in_use(cast: Cast) -> None:
    model, residency, expected = cast
    with residency.use("und"):
        with residency.use("gen"), residency.use("und"):
            assert_equal_in("und", model, expected)
            assert_equal_in("gen", model, expected)
        assert_equal_in("und", model, expected)
        assert stream_bytes(model, "gen") == 0, "idle while the other stream is in use"


def test_a_stream_that_is_entered_again_is_not_rebuilt(cast: Cast) -> None:
    model, residency, _ = cast
    with residency.use("und"):
        address = model.get_parameter("layers.0.und.qkv.q_proj.weight").data_ptr()
    with residency.use("und"):
        assert model.get_parameter("layers.0.und.qkv.q_proj.weight").data_ptr() == address


def test_an_exception_inside_leaves_the_stream(cast: Cast) -> None:
    model, residency, _ = cast
    with pytest.raises(ZeroDivisionError), residency.use("und"):
        _ = 1 / 0
    with residency.use("gen"):
        assert stream_bytes(model, "und") == 0


def test_parameters_written_to_are_kept(cast: Cast) -> None:
    model, residency, expected = cast
    with residency.use("und"):
        model.und_norm.weight.fill_(3)
    with residency.use("gen"):
        assert (model.und_norm.weight == 3).all()
        assert model.get_parameter("layers.0.und.qkv.q_proj.weight").numel() == 0
    with residency.use("und"):
        assert (model.und_norm.weight == 3).all()
        assert torch.equal(
            model.state_dict()["und_patch.patch.bias"], expected["und_patch.patch.bias"]
        )


def test_inside_inference_mode(cast: Cast) -> None:
    model, residency, expected = cast
    with torch.inference_mode():
        for stream in ("und", "gen", "und"):
            with residency.use(stream):
                assert_equal_in(stream, model, expected)
    assert not any(p.is_inference() or p.data.is_inference() for p in model.parameters())


def test_many_threads_always_find_right_weights(cast: Cast) -> None:
    model, residency, expected = cast
    failures: list[BaseException] = []
    start = threading.Barrier(6)

    def work(seed: int) -> None:
        order = torch.randint(2, (30,), generator=torch.Generator().manual_seed(seed)).tolist()
        try:
            start.wait()
            for stream in (("und", "gen")[choice] for choice in order):
                with residency.use(stream):
                    assert_equal_in(stream, model, expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_weights_that_cannot_be_rebuilt(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    weights[name][-1, -1] = float("nan")
    folder = write_checkpoint(tmp_path / "nan", SMALL, weights)
    model, residency, *_ = load_checkpoint(folder, dtype="bfloat16", memory="stream")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"'{name}' holds NaN"), residency.use("und"):
            raise AssertionError("must not get here")
        assert stream_bytes(model, "und") == 0
    with residency.use("gen"):
        assert stream_bytes(model, "gen") > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_is_merged_again_on_entry(small: Path, tmp_path: Path, dtype: str) -> None:
    targets = [
        "language_model.model.layers.0.self_attn.q_proj_mot_gen",
        "language_model.model.layers.1.mlp.down_proj",
    ]
    save_file(lora_tensors(SMALL, targets), tmp_path / "lora.safetensors")
    lora = (tmp_path / "lora.safetensors", 0.5)
    expected = load_checkpoint(small, dtype=dtype, lora=lora).model.state_dict()
    plain = load_checkpoint(small, dtype=dtype).model.state_dict()
    assert not torch.equal(
        expected["layers.0.gen.qkv.q_proj.weight"], plain["layers.0.gen.qkv.q_proj.weight"]
    )
    model, residency, *_ = load_checkpoint(small, dtype=dtype, lora=lora, memory="stream")
    for stream in ("und", "gen", "und", "gen"):
        with residency.use(stream):
            assert_equal_in(stream, model, expected)
    assert model.get_parameter("layers.1.und.out.mlp.down_proj.weight").numel() == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mapped_streams_leave_resident_memory(
    tmp_path: Path, memory_status: Callable[[str], int], dtype: str
) -> None:
    weights = random_weights(WIDE, getattr(torch, dtype))
    folder = write_checkpoint(tmp_path / "wide", WIDE, weights)
    del weights
    model, residency, *_ = load_checkpoint(folder, dtype=dtype, memory="stream")
    und, gen, shared = (stream_bytes(model, stream) for stream in ("und", "gen", "shared"))
    assert und + gen > 0.9 * (und + gen + shared) > 45e6
    start = memory_status("RssFile")

    def touched(*streams: str) -> float:
        for name, parameter in model.named_parameters():
            if stream_of(name) in streams:
                float(parameter.sum())
        return memory_status("RssFile") - start

    slack = 0.1 * und
    with residency.use("und"):
        assert touched("und", "shared") == pytest.approx(und + shared, abs=slack)
    for _ in range(2):
        with residency.use("gen"):
            assert touched("gen") == pytest.approx(gen + shared, abs=slack)
        with residency.use("und"):
            assert touched("und") == pytest.approx(und + shared, abs=slack)
            with residency.use("gen"):
                assert touched("und", "gen") == pytest.approx(und + gen + shared, abs=slack)
            assert touched() == pytest.approx(und + shared, abs=slack)


def test_mapped_parameters_are_right_after_dropping_and_never_lose_changes(small: Path) -> None:
    expected = load_checkpoint(small).model.state_dict()
    model, residency, *_ = load_checkpoint(small, memory="stream")
    with residency.use("und"):
        model.embed_tokens.weight.mul_(2)
        model.get_parameter("und_patch.patch.weight").mul_(2)
        model.get_parameter("layers.1.und.qkv.k_proj.weight").data = torch.ones(16, 32)
    for stream in ("gen", "und"):
        with residency.use(stream):
            pass
    changed = ("embed_tokens.weight", "und_patch.patch.weight")
    for name, tensor in model.state_dict().items():
        if name == "layers.1.und.qkv.k_proj.weight":
            assert (tensor == 1).all()
        else:
            assert torch.equal(tensor, expected[name] * (2 if name in changed else 1)), name


def test_mapped_parameters_do_not_keep_a_copy(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a mapped tensor needs no reading")

    monkeypatch.setattr(StoredWeight, "read", refuse)
    _, residency, *_ = load_checkpoint(small, memory="stream")
    with residency.use("und"), residency.use("gen"):
        pass
