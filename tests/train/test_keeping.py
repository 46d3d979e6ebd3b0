"""The residual stream in bfloat16, and frozen weights in bfloat16 or in host memory."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from neounify.distributed.shards import local
from neounify.errors import ConfigError
from neounify.train.loop import Trainer
from neounify.train.progress import Progress, Sampling
from neounify.train.state import saved_states
from neounify.train.supervised import SupervisedConfig
from support.parallel_runs import SPARSE, losses, numpy, one_stage, recipe, this_rank, trainer
from support.ranks import run_ranks

TWO_STAGES: dict[str, Any] = {
    "model": SPARSE,
    "parallel": {"expert": 2},
    "stages": [
        {
            "name": "und",
            "steps": 2,
            "packs_per_step": 4,
            "freeze": ["gen"],
            "data": [{"kind": "scenes", "world": "easy", "tasks": {"vqa": 1.0}}],
        },
        {"name": "gen", "steps": 2, "packs_per_step": 4, "freeze": ["und", "shared"]},
    ],
}


def two_stages(folder: Path, frozen: str, stop_after: int | None = None) -> dict[str, Any]:
    """Weights after both stages, in bfloat16 on the ranks, and how each was kept meanwhile."""
    defaults = {"precision": "bfloat16", "frozen_weights": frozen, "residual": "bfloat16"}
    if frozen == "bfloat16":  # a mean in host memory is the same
        defaults["ema_memory"] = "host"
    training = trainer(folder, recipe(**TWO_STAGES, defaults=defaults), this_rank())
    first, alive = weakref.ref(training.model), {}

    def look(_: Sampling, progress: Progress) -> dict[str, float]:
        alive[progress.stage] = first() is not None and first() is not training.model
        return {}

    training.evaluate = look
    if states := saved_states(training.states):
        training.resume(states[-1])
    training.run(stop_after=stop_after)
    weights = {name: numpy(p) for name, p in training.model.named_parameters()}
    kept = {name: str(local(p).dtype) for name, p in training.model.named_parameters()}
    return {"weights": weights, "kept": kept, "units": gathered(training), "alive": alive}


def gathered(training: Trainer) -> set[str]:
    """Names of the parameters that the first layer gathers."""
    layer = training.model.layers[0]
    assert isinstance(layer, FSDPModule)
    cut = {name for name, p in layer.named_parameters() if isinstance(p, DTensor)}
    before = {name: local(p).numel() for name, p in layer.named_parameters()}
    layer.unshard()
    after = {name: local(p).numel() for name, p in layer.named_parameters()}
    layer.reshard()
    return {name for name in cut if after[name] > before[name]}


def on_two_ranks(folder: str) -> dict[str, Any]:
    at = Path(folder)
    results = {kind: two_stages(at / kind, kind) for kind in ("float32", "bfloat16")}
    results["first"] = two_stages(at / "first", "bfloat16", stop_after=1)
    results["resumed"] = two_stages(at / "first", "bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SupervisedConfig, "unused_streams", lambda *_: ())
        results["on devices"] = two_stages(at / "on devices", "float32")
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    return run_ranks(on_two_ranks, str(folder), ranks=2, seconds=540.0)[0]


def means(line: dict[str, float]) -> list[float]:
    return [line[name] for name in ("text/loss", "image/loss") if name in line]


def is_frozen(name: str) -> bool:
    """In the second stage."""
    return ".gen." not in name and not name.startswith(
        ("gen_", "timestep", "noise_scale", "image_head")
    )


def test_frozen_weights_in_bfloat16_train_the_others_to_the_same_bits(two: dict[str, Any]) -> None:
    plain, half = two["float32"], two["bfloat16"]
    assert set(plain["kept"].values()) == {"torch.float32"}
    for name, weight in plain["weights"].items():
        frozen = is_frozen(name)
        assert half["kept"][name] == f"torch.{'bfloat16' if frozen else 'float32'}"
        wanted = torch.from_numpy(weight)
        wanted = wanted.bfloat16() if frozen else wanted
        assert torch.equal(torch.as_tensor(half["weights"][name]), wanted.float()), name


def test_a_stream_that_no_batch_calls_leaves_the_devices(two: dict[str, Any]) -> None:
    """And comes back unchanged; a stage that is resumed there ends with the same weights."""
    units, every = two["first"]["units"], two["bfloat16"]["units"]
    assert units
    assert not any(name.startswith("gen.") for name in units)
    assert any(name.startswith("gen.") for name in every)
    for name, weight in two["bfloat16"]["weights"].items():
        assert np.array_equal(two["resumed"]["weights"][name], weight), name


def test_the_model_of_a_stage_before_is_freed(two: dict[str, Any]) -> None:
    """The second stage keeps other weights frozen, so that it has a model of its own."""
    assert two["bfloat16"]["alive"] == {1: False}  # no previews where a stream is in host memory


def test_losses_do_not_know_where_an_unused_stream_is(two: dict[str, Any], folder: Path) -> None:
    here, there = losses(folder / "float32"), losses(folder / "on devices")
    assert [means(line) for line in here] == [means(line) for line in there]


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Dtypes of what layers were given."""
    seen: set[torch.dtype] = set()

    def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.update(x.dtype for x in arguments[0].values() if isinstance(x, Tensor))

    from neounify.model.stream import Layer

    original = Layer._run

    def run(layer: Layer, *arguments: Any) -> Any:
        look(layer, arguments)
        return original(layer, *arguments)

    monkeypatch.setattr(Layer, "_run", run)
    return seen


@pytest.mark.parametrize("model", [{}, SPARSE])
def test_the_residual_stream_in_bfloat16(
    tmp_path: Path, inputs: set[torch.dtype], model: dict[str, Any]
) -> None:
    reached = {}
    for residual in ("float32", "bfloat16"):
        inputs.clear()
        stage = one_stage(precision="bfloat16", residual=residual, checkpoint_activations=True)
        training = trainer(tmp_path / residual, recipe(model=model, **stage), this_rank())
        training.run()
        # Autocast alone gives the embeddings of noisy images in bfloat16.
        assert (torch.float32 in inputs) == (residual == "float32")
        assert training.model.compute_dtype == torch.float32
        reached[residual] = [means(line) for line in losses(tmp_path / residual)]
    for half, full in zip(reached["bfloat16"], reached["float32"], strict=True):
        assert half == pytest.approx(full, rel=3e-2)
    assert reached["bfloat16"] != reached["float32"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"residual": "bfloat16"}, "residual: .* needs precision"),
        ({"frozen_weights": "bfloat16"}, "frozen_weights: .* needs precision"),
        (
            {"frozen_weights": "bfloat16", "precision": "bfloat16", "lora": {"rank": 2}},
            "beside adapters",
        ),
        (
            {
                "residual": "bfloat16",
                "precision": "bfloat16",
                "method": {"kind": "text-grpo"},
                "freeze": ["gen"],
                "data": [],
            },
            "text-grpo has it in float32",
        ),
    ],
)
def test_settings_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(**one_stage(**fields))
