"""The GAN head of DMD2: its losses, real images, what it moves, resume, off by default."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from neounify.data.sample import DataError
from neounify.errors import CheckpointError, ConfigError
from neounify.post_train.dmd2 import Dmd2, _Turn
from neounify.post_train.prompts import PromptConfig, build_prompts
from neounify.post_train.realism import (
    RealismHead,
    head_loss,
    real_tokens,
    student_realism_loss,
    without_gradient,
)
from neounify.scenes.bench.checks import check_image
from neounify.scenes.world.facts import SceneFacts
from neounify.scenes.world.scene import scene_config
from neounify.train.method import TrainStep
from neounify.train.state import saved_states
from support.post_training import STEPS, built, described, metrics, run, state_tensors
from train.test_trainer import trainer

GAN = {"gan": 5e-3}
CPU = torch.device("cpu")


def test_losses_have_known_values() -> None:
    logits = torch.tensor([0.0, 2.0])
    softplus = [math.log(2), math.log1p(math.exp(2))]
    torch.testing.assert_close(head_loss(-logits, logits), 2 * torch.tensor(softplus))
    torch.testing.assert_close(student_realism_loss(-logits), torch.tensor(softplus))


def test_a_head_learns_to_tell_two_kinds_of_states_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    real, generated = (torch.randn(32, 4, 16, generator=generator) for _ in range(2))
    real[..., :3] += 1
    head = RealismHead(16, seed=1)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    first = float(head_loss(head(real), head(generated)).mean().detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss = head_loss(head(real), head(generated)).mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first / 4
    assert torch.equal(RealismHead(16, seed=1).inner.weight, RealismHead(16, seed=1).inner.weight)


def turn(method: Dmd2) -> _Turn:
    [cases] = method.cases(0, 3)[:1]
    step = TrainStep(number=0, stage_step=0, batches=(), seed=0)
    return _Turn(method, cases, step, 0, 1, torch.Generator().manual_seed(0))


def test_the_gradient_reaches_the_student_alone(tmp_path: Path) -> None:
    method: Dmd2 = built(tmp_path, "dmd2", GAN)
    assert method.head is not None
    one = turn(method)
    image, end = one.generated()
    tau, noise = one._drawn(end)
    one._realism(one._noised(image, noise, tau, end), tau).sum().backward()
    trained = [p for p in method.model.parameters() if p.requires_grad]
    assert sum(float(p.grad.norm()) for p in trained if p.grad is not None) > 0
    second = method.second_parameters()
    assert all(p.grad is None and p.requires_grad for p in second.values())
    assert any(name.startswith("head.") for name in second)


def test_the_fakes_turn_trains_fake_and_head(tmp_path: Path) -> None:
    method: Dmd2 = built(tmp_path, "dmd2", GAN)
    turn(method).fake_loss().sum().backward()
    for name, parameter in method.second_parameters().items():
        if name.startswith("head."):
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
    assert all(p.grad is None for p in method.model.parameters())
    assert 0 <= method.report()["gan/accuracy"] <= 1


def test_resuming_is_exact_to_the_bit(tmp_path: Path) -> None:
    run(tmp_path / "whole", "dmd2", GAN)
    for stop in (1, 2, 4):
        folder = tmp_path / f"stopped{stop}"
        trainer(folder, described("dmd2", GAN)).run(stop_after=stop)
        again = trainer(folder, described("dmd2", GAN))
        again.resume(saved_states(again.states)[-1])
        again.run()
        whole, cut = (state_tensors(f, STEPS) for f in (tmp_path / "whole", folder))
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[name], cut[name]) for name in whole)
        assert metrics(folder) == metrics(tmp_path / "whole")
    first = state_tensors(tmp_path / "whole", 1)
    moved = {
        n for n in whole if n.startswith("method.head.") and not torch.equal(whole[n], first[n])
    }
    assert "method.head.outer.weight" in moved


def test_off_by_default(tmp_path: Path) -> None:
    run(tmp_path / "plain", "dmd2")
    run(tmp_path / "off", "dmd2", {"gan": 0.0, "gan_fake": 0.5})
    run(tmp_path / "on", "dmd2", GAN)
    plain, off, on = (state_tensors(tmp_path / name, STEPS) for name in ("plain", "off", "on"))
    assert not any(name.startswith("method.head.") for name in plain)
    assert plain.keys() == off.keys()
    assert all(torch.equal(plain[name], off[name]) for name in plain)
    assert any(
        not torch.equal(plain[name], on[name]) for name in plain if name.startswith("model.")
    )


def test_a_state_without_a_head(tmp_path: Path) -> None:
    trainer(tmp_path, described("dmd2")).run(stop_after=2)
    again = trainer(tmp_path, described("dmd2", GAN))
    again.resume(saved_states(again.states)[-1])
    with pytest.raises(CheckpointError, match=r"no head\.norm\.weight"):
        again.run()


def test_parameters_without_gradient_are_trained_again_afterwards() -> None:
    one, frozen = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    frozen.requires_grad_(False)
    with without_gradient([one, frozen]):
        inside = (one.requires_grad, frozen.requires_grad)
    assert inside == (False, False)
    assert (one.requires_grad, frozen.requires_grad) == (True, False)


# --- real images ---


def test_real_images_of_scenes_are_what_their_prompts_say() -> None:
    config = PromptConfig(categories={"two_object": 1.0, "attribution": 1.0, "edit": 1.0})
    source = build_prompts(config, (64, 64), 32)
    for number in range(12):
        case = source.case(number)
        assert case.real is not None
        image = case.real()
        assert image.size == (64, 64)
        if isinstance(case.target, SceneFacts):
            assert check_image(case.target, np.asarray(image), scene_config("default")).correct
        else:
            assert (np.asarray(image) != np.asarray(case.images[0])).any()
    tokens = real_tokens([source.case(0), source.case(1)], 32, CPU)
    assert tokens.shape == (2, 4, 3 * 32**2)
    assert tokens.min() >= -1
    assert tokens.max() <= 1


def lines(folder: Path, *records: dict[str, Any]) -> PromptConfig:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return PromptConfig(kind="jsonl", path=str(file))


def test_real_images_of_files(tmp_path: Path) -> None:
    PIL.Image.new("L", (50, 40), 255).save(tmp_path / "a.png")
    record = {"prompt": "white", "image": "a.png", "width": 64, "height": 32}
    source = build_prompts(lines(tmp_path, record), (64, 64), 32)
    tokens = real_tokens([source.case(0)], 32, CPU)
    torch.testing.assert_close(tokens, torch.ones(1, 2, 3 * 32**2))


@pytest.mark.parametrize("image", [3, "../a.png"])
def test_real_images_that_cannot_be(tmp_path: Path, image: Any) -> None:
    with pytest.raises(DataError, match="line 1"):
        build_prompts(lines(tmp_path, {"prompt": "x", "image": image}), (64, 64), 32)


def test_prompts_without_a_real_image(tmp_path: Path) -> None:
    source = build_prompts(lines(tmp_path, {"prompt": "x"}), (64, 64), 32)
    with pytest.raises(ConfigError, match="'x' has no real image"):
        real_tokens([source.case(0)], 32, CPU)
    text = {"kind": "text", "path": "prompts.txt", "width": 32, "height": 32}
    with pytest.raises(ConfigError, match="gan needs real images"):
        described("dmd2", {**GAN, "prompts": text})
