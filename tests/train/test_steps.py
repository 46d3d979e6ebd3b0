"""Effects of single steps: sums, seeds, modes, compiled functions, warnings."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from neounify.attention.blocks import BlockAttention
from neounify.attention.padded import PaddedAttention
from neounify.errors import ConfigError, ImageError
from neounify.lora.layers import LoraLinear
from neounify.model.stream import Layer, call_plain
from neounify.train import supervised
from neounify.train.log import REPORTS, DivergenceWatch, Log
from neounify.train.loop import Trainer, TrainingStopped
from neounify.train.loss import Metrics
from neounify.train.method import DROPOUT, TrainStep, pack_seed, seeded
from neounify.train.optim import OptimizerConfig, OptimizerSet
from neounify.train.progress import Progress, Sampling, sampling_of
from neounify.train.recipe import Recipe, StageRecipe
from neounify.train.setup import build_setup
from neounify.train.state import saved_states
from train.test_trainer import recipe, trainer

CPU = torch.device("cpu")
STREAMS = ("und", "gen")


def loud(folder: Path, parsed: Recipe, evaluate: Any = None) -> tuple[Trainer, io.StringIO]:
    """A trainer and what it prints."""
    console = Console(file=io.StringIO(), width=400)
    log = Log(folder, console, tensorboard=False)
    start = build_setup(parsed, CPU, folder)
    assert isinstance(console.file, io.StringIO)
    return Trainer(parsed, start, folder, log, evaluate), console.file


def stages(**values: Any) -> list[dict[str, Any]]:
    return [{"name": "a", "steps": 4, **values}]


def test_every_pack_has_a_different_seed() -> None:
    positions = [(s, n, p) for s in range(3) for n in (0, 1, 1009, 1_000_003) for p in (0, 1, 1009)]
    seeds = {pack_seed(*position) for position in positions}
    assert len(seeds) == len(positions)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Far in steps for one seed, near in seeds: once the same noise.
    assert pack_seed(0, 1_000_003, 0) != pack_seed(1, 0, 0)
    assert pack_seed(0, 0, 1009) != pack_seed(0, 1, 0)
    assert pack_seed(0, 0, 0) != pack_seed(0, 0, 0, DROPOUT)
    assert pack_seed(3, 4, 5) == pack_seed(3, 4, 5)


def test_seeding_dropout_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with seeded(CPU, 5):
        first = torch.rand(3)
    with seeded(CPU, 5):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)


def adapted(folder: Path, **stage: Any) -> Trainer:
    lora = {"rank": 2, "dropout": 0.5}
    return trainer(folder, recipe(stages=stages(lora=lora, save_every=1, **stage)))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_adapter_dropout_resumes_to_the_bit(tmp_path: Path, checkpointed: bool) -> None:
    torch.manual_seed(11)
    adapted(tmp_path / "whole", checkpoint_activations=checkpointed).run()
    torch.manual_seed(22)
    adapted(tmp_path / "cut", checkpoint_activations=checkpointed).run(stop_after=2)
    again = adapted(tmp_path / "cut", checkpoint_activations=checkpointed)
    again.resume(saved_states(again.states)[-1])
    torch.manual_seed(33)
    again.run()
    one, two = (
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in (tmp_path / "whole", tmp_path / "cut")
    )
    assert one == two


def test_dropout_differs_from_step_to_step(tmp_path: Path) -> None:
    run = adapted(tmp_path)
    stage = run.recipe.stages[0]
    drawn = []
    for number in range(3):
        step = TrainStep(number=number, stage_step=0, batches=(), seed=0)
        with run._dropout(stage, step):
            drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == 3


def test_evaluation_is_without_dropout_and_training_resumes_with_it(tmp_path: Path) -> None:
    modes: list[bool] = []

    def evaluate(sampling: Sampling, _: Progress) -> dict[str, float]:
        with sampling() as pipe:
            modes.append(any(m.training for m in pipe.model.modules()))
        return {}

    parsed = recipe(stages=stages(lora={"rank": 2, "dropout": 0.5}, sample_every=2))
    run, _ = loud(tmp_path, parsed, evaluate)
    original = supervised.loss_of

    def watched(model: Any, *args: Any) -> Any:
        assert all(m.training for m in model.modules() if isinstance(m, LoraLinear))
        return original(model, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised, "loss_of", watched)
        run.run()
    assert modes == [False, False]


def test_an_evaluation_that_fails_costs_no_training(tmp_path: Path) -> None:
    def evaluate(*_: object) -> dict[str, float]:
        raise ImageError("no such size")

    run, said = loud(tmp_path, recipe(stages=stages(sample_every=2)), evaluate)
    run.run()
    assert (tmp_path / "model").is_dir()
    assert "no evaluation: no such size" in said.getvalue()
    assert run.model.training


@pytest.mark.parametrize(("name", "kind"), [("auto", PaddedAttention), ("blocks", BlockAttention)])
def test_a_stage_chooses_its_attention(tmp_path: Path, name: str, kind: type) -> None:
    run = trainer(tmp_path, recipe(stages=[{"name": "a", "steps": 1, "attention": name}]))
    kinds: set[type] = set()
    run.model.register_forward_pre_hook(lambda _, inputs: kinds.add(type(inputs[0].attend)))
    run.run()
    assert kinds == {kind}
    with sampling_of(run.setup, run.recipe.stages[0]) as pipe:
        assert pipe.attention == name


def test_compiling_ends_with_the_stage_that_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[bool] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    original = supervised.load_packs

    def packs(*args: Any) -> Iterator[Any]:
        calls = [m.call is not call_plain for m in run.model.modules() if isinstance(m, Layer)]
        compiled.extend([all(calls), any(calls)])
        return original(*args)

    monkeypatch.setattr(supervised, "load_packs", packs)
    three = [{"name": n, "steps": 1, "compile": n != "b"} for n in "abc"]
    run = trainer(tmp_path, recipe(stages=three))
    run.run()
    assert compiled == [True, True, False, False, True, True]


def test_a_skipped_step_leaves_no_trace_in_the_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = supervised.loss_of
    calls = 0

    def sometimes_infinite(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        loss = original(*args)
        if calls in (2, 6):
            args[5].text += float("nan")
            return loss * float("inf")
        return loss

    monkeypatch.setattr(supervised, "loss_of", sometimes_infinite)
    run, _ = loud(tmp_path, recipe(stages=stages(steps=6, log_every=3)))
    run.run()

    def strict(value: str) -> None:
        raise AssertionError(value)

    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=strict) for line in lines]
    assert [record["nonfinite"] for record in records] == [1, 2]
    assert all(record["text/loss"] > 0 for record in records)
    assert records[1]["gradient_norm"] is None


def test_sums_merge_to_what_they_are_together() -> None:
    one, two, both = Metrics(), Metrics(), Metrics()
    for metrics, value in ((one, 1.0), (two, 3.0)):
        for target in (metrics, both):
            target.add_text(torch.tensor([2]), torch.tensor([value]), torch.tensor([True]))
    one.merge(two)
    assert one.report() == both.report()
    assert one.report()["text/loss"] == 2.0


STAGE = StageRecipe(name="a", steps=100)


def watched(losses: list[float]) -> list[tuple[int, str]]:
    watch = DivergenceWatch()
    looks = [(n, watch.look(n, {"image/loss": loss}, STAGE)) for n, loss in enumerate(losses)]
    return [(n, warning) for n, warning in looks if warning]


def test_a_loss_that_stays_far_above_its_level_is_reported_once() -> None:
    falling = [1 / (1 + n) for n in range(10)]
    assert watched(falling) == []
    ((step, warning),) = watched([*falling, *[4.0] * 20])
    assert step <= 10 + 2 * REPORTS
    for part in ("training diverges", "image loss", "optimizer.learning_rate (2e-05)", "warmup"):
        assert part in warning
    # A second rise is a second warning.
    assert len(watched([*falling, *[4.0] * 20, *[0.1] * 30, *[4.0] * 20])) == 2


def test_noise_and_single_spikes_are_no_divergence() -> None:
    noisy = [0.5 + 0.4 * (-1) ** n for n in range(50)]
    assert watched(noisy) == []
    assert watched([0.3] * 5 + [9.0] + [0.3] * 20) == []
    assert watched([0.0001] * 5 + [0.004] * 20) == []


def test_a_run_that_diverges_says_so(tmp_path: Path) -> None:
    wild = {"name": "adamw", "learning_rate": 30.0}
    parsed = recipe(stages=stages(steps=25, optimizer=wild, schedule={"name": "constant"}))
    run, said = loud(tmp_path, parsed)
    try:
        run.run()
    except TrainingStopped as error:
        said.write(str(error))
    assert "training diverges" in said.getvalue()
    assert "optimizer.learning_rate (30)" in said.getvalue()


def test_steps_that_are_not_finite_name_the_settings(tmp_path: Path) -> None:
    run = trainer(tmp_path, recipe(stages=stages(max_nonfinite=2)))
    with torch.no_grad():
        run.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(TrainingStopped, match=r"optimizer\.learning_rate .*clip .*warmup"):
        run.run()


def test_a_warm_up_longer_than_its_stage_is_reported(tmp_path: Path) -> None:
    run, said = loud(tmp_path, recipe(stages=stages(schedule={"warmup": 9})))
    run.run()
    assert "schedule.warmup (9) is not below steps (4)" in said.getvalue()


def test_states_of_earlier_versions_still_load(tmp_path: Path) -> None:
    """States that earlier versions wrote have no counts of sources, hashes or name of a method."""
    trainer(tmp_path).run(stop_after=2)
    state = saved_states(tmp_path / "states")[-1]
    facts = json.loads((state / "state.json").read_text())
    del facts["sources"], facts["files"], facts["progress"]["damaged_samples"]
    del facts["method"], facts["progress"]["ended"]
    (state / "state.json").write_text(json.dumps(facts))
    again = trainer(tmp_path)
    again.resume(state)
    again.run(stop_after=4)
    assert again.progress.step == 4


def test_a_rate_for_what_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    sparse = {"learning_rate": 1e-3, "lr_scale": {"experts": 2.0}}
    run = trainer(tmp_path, recipe(stages=stages(optimizer=sparse)))
    with pytest.raises(ConfigError, match="this model has no experts"):
        run.run()


ORDER = ["q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "q_norm_hw", "k_norm", "k_norm_hw"]


def test_gradient_norms_are_summed_in_the_order_of_saved_runs(tmp_path: Path) -> None:
    """Another order changes the last bit of a norm, and so a resumed run."""
    model = trainer(tmp_path).model
    names = {id(p): n.split(".") for n, p in model.named_parameters()}
    optimizers = OptimizerSet(dict(model.named_parameters()), OptimizerConfig())
    assert len(optimizers.parameters) == len(names)
    for number in range(model.config.num_layers):
        for stream in ("und", "gen"):
            parts = [names[id(p)] for p in optimizers.parameters]
            inner = [n[4] for n in parts if n[:3] == ["layers", str(number), stream]]
            rest = ["post_norm", "mlp", "mlp", "mlp"]
            assert inner == ["input_norm", *ORDER, *rest]


def test_dropout_of_adapters_is_drawn_in_the_order_of_saved_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = adapted(tmp_path, packs_per_step=1)
    called: list[str] = []
    original = LoraLinear.forward

    def noted(layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        called.extend(n for n, m in run.model.named_modules() if m is layer)
        return original(layer, x)

    monkeypatch.setattr(LoraLinear, "forward", noted)
    run.run(stop_after=1)
    first = [name.removeprefix("layers.0.") for name in called if name.startswith("layers.0.")]
    qkv, out = ["v_proj", "q_proj", "k_proj"], ["o_proj", "gate_proj", "up_proj", "down_proj"]
    expected = [f"{stream}.{name}" for names in (qkv, out) for stream in STREAMS for name in names]
    assert [f"{n.split('.')[0]}.{n.split('.')[-1]}" for n in first] == expected
