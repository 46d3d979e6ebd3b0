"""The post-training recipes of the repository: two steps of every stage on a tiny model.

A recipe keeps all that it says but the weights, the sizes of its batches, and paths and services.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from neounify.checkpoint.names import part_of, stream_of
from neounify.lora.layers import HALVES
from neounify.model.neo import NeoUnify
from neounify.pipeline import load
from neounify.post_train.base import PromptMethodConfig
from neounify.post_train.rewards import RewardConfig, Rewarded, Rewards
from neounify.train.recipe import ModelRecipe, Recipe, StageRecipe, read_recipe
from support.models import TINY_CHANGES
from train.test_trainer import recipe, trainer

FOLDER = Path(__file__).parents[2] / "recipes"
FILES = [
    path
    for path in sorted(FOLDER.glob("*.toml"))
    if isinstance(read_recipe(path).stages[0].method, PromptMethodConfig)
]
SMALL = {
    "prompts_per_iteration": 4,
    "group": 2,
    "prompts_per_step": 4,
    "epoch_steps": 1,
    "max_new_tokens": 8,
    "max_think_tokens": 8,
}
"""Sizes of a method, where it has them."""
LAYERS = 4
"""One more than the last layers that a published recipe freezes."""


class _Service(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        items = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
        body = json.dumps({"rewards": [{"value": 0.5} for _ in items]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Service)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/reward"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tiny model, and two that continued from it with other weights in the generation stream."""
    folder = tmp_path_factory.mktemp("models")
    changes = {**TINY_CHANGES, "num_layers": LAYERS}
    tiny = recipe(model={"preset": "scenes", "changes": changes, "tokenizer": {"samples": 50}})
    training = trainer(folder, tiny)
    training.export(folder / "base")
    for number, name in enumerate(("first", "second")):
        with torch.no_grad():
            for label, parameter in training.model.named_parameters():
                if stream_of(label) == "gen":
                    parameter.mul_(1.1 + 0.1 * number)
        training.export(folder / name)
    return [folder / name for name in ("base", "first", "second")]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [
        {"prompt": f"{text} {number}", "category": category, "text": text}
        for number in range(4)
        for category, text in (("text", "OPEN"), ("aesthetic", "a house"), ("edit", "a tree"))
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


@pytest.fixture(autouse=True)
def rewards_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an untrained model samples is all equally wrong: add a difference to real rewards."""
    measure = Rewards.measure

    def differing(self: Rewards, outputs: Any, cases: Any) -> Rewarded:
        rewarded = measure(self, outputs, cases)
        assert not rewarded.failures
        return replace(rewarded, total=rewarded.total + torch.arange(len(outputs)).numpy() / 100)

    monkeypatch.setattr(Rewards, "measure", differing)


def small(stage: StageRecipe, models: list[Path], prompts: Path, service: str) -> StageRecipe:
    """The stage with small batches, and tiny models, files and services at its paths."""
    method: Any = stage.method
    known = {item.name for item in fields(method)}
    changes: dict[str, Any] = {name: size for name, size in SMALL.items() if name in known}
    if method.prompts.kind != "scenes":
        changes["prompts"] = replace(method.prompts, path=str(prompts))
    if getattr(method, "teacher_checkpoint", None):
        changes["teacher_checkpoint"] = models[0]
    if "teachers" in known:
        changes["teachers"] = {
            name: models[1 + number % 2] for number, name in enumerate(method.teachers)
        }
    if "rewards" in known:
        changes["rewards"] = tuple(_local(reward, service) for reward in method.rewards)
    return replace(stage, method=replace(method, **changes), packs_per_step=2, log_every=1)


def _local(reward: RewardConfig, service: str) -> RewardConfig:
    if reward.kind == "ocr":
        return replace(reward, reader="support.rewards:reads_open")
    return replace(reward, url=service) if reward.kind == "http" else reward


def trained(model: NeoUnify, stage: StageRecipe) -> set[str]:
    """The parameters that a stage says it trains."""
    names = [name for name, _ in model.named_parameters()]
    if stage.lora is not None:
        return {name for name in names if name.endswith(HALVES)}
    if not _has_images(stage):
        names = [name for name in names if not name.startswith("und_patch")]
    last = {str(n) for n in range(LAYERS - stage.freeze_last_layers, LAYERS)}
    frozen = set(stage.freeze)
    return {
        name
        for name in names
        if not {stream_of(name), part_of(name)} & frozen
        and not (name.startswith("layers.") and name.split(".")[1] in last)
    }


def _has_images(stage: StageRecipe) -> bool:
    """Whether some prompts have images, without which nothing reaches their embedding."""
    method: Any = stage.method
    categories = method.prompts.categories or {"edit": 1.0}
    return any(name in ("edit", "caption") or "question/" in name for name in categories)


def stages_of(file: Path, models: list[Path], prompts: Path, service: str) -> Recipe:
    read = read_recipe(file)
    stages = tuple(small(stage, models, prompts, service) for stage in read.stages)
    return replace(read, model=ModelRecipe(checkpoint=models[0]), stages=stages, workers=0)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_stage_moves_what_it_trains_and_not_a_bit_else(
    tmp_path: Path, file: Path, models: list[Path], prompts: Path, service: str
) -> None:
    whole = stages_of(file, models, prompts, service)
    for stage in whole.stages:
        training = trainer(tmp_path / stage.name, replace(whole, stages=(stage,)))
        before = {n: p.detach().clone() for n, p in training.model.named_parameters()}
        training.run(stop_after=2)
        after = dict(training.model.named_parameters())
        moved = {n for n, p in after.items() if n not in before or not torch.equal(p, before[n])}
        expected = trained(training.model, stage)
        assert expected
        assert moved == expected
        if stage.lora is not None:
            # Adapters are absent before: A begins at random, B at 0.
            assert all(after[name].any() for name in expected if name.endswith(HALVES[1]))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_stages_follow_one_another(
    tmp_path: Path, file: Path, models: list[Path], prompts: Path, service: str
) -> None:
    whole = stages_of(file, models, prompts, service)
    # Two steps, or one of each capability.
    steps = [max(2, len(getattr(stage.method, "teachers", ()))) for stage in whole.stages]
    stages = zip(whole.stages, steps, strict=True)
    short = replace(whole, stages=tuple(replace(stage, steps=count) for stage, count in stages))
    trainer(tmp_path, short).run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    reported = [(x["stage"], x["stage_step"]) for x in lines if x["kind"] == "train"]
    assert reported == [(s.name, step + 1) for s in short.stages for step in range(s.steps)]
    config = load(models[0]).model.config
    for stage in short.stages:
        config = stage.method.checkpoint_config(config)
    exported = load(tmp_path / "model").model
    assert exported.config.sampling == config.sampling
    assert not any(name.endswith(HALVES) for name, _ in exported.named_parameters())
