"""Groups of an iteration: further draws of prompts, seeds, and a resume with changed settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neounify.errors import CheckpointError
from neounify.pipeline import load
from neounify.post_train.advantage import group_advantages, informative
from neounify.post_train.rollout import image_request
from neounify.train.state import saved_states
from support.post_training import BASE, PROMPTS, built, described, metrics, run, state_tensors
from train.test_trainer import trainer


@pytest.mark.parametrize("name", ["flow-grpo", "nft", "dpo", "trajectory", "dmd2"])
def test_images_of_stories_are_trained(tmp_path: Path, name: str) -> None:
    prompts = {**PROMPTS, "categories": {"story": 1.0, "edit": 1.0}}
    training = run(tmp_path, name, {"prompts": prompts}, steps=2)
    assert training.progress.step == 2
    before = load(BASE[0]).model.state_dict()
    assert any(not torch.equal(p, before[n]) for n, p in training.model.state_dict().items())


# --- a resume ---


def test_a_state_of_another_shape(tmp_path: Path) -> None:
    trainer(tmp_path, described("nft")).run(stop_after=2)
    again = trainer(tmp_path, described("nft", {"group": 4}))
    again.resume(saved_states(again.states)[-2])
    with pytest.raises(CheckpointError, match=r"method\.group was 3 and is 4\. Give"):
        again.run()


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("nft", {"prompts": {**PROMPTS, "seed": 1}}, "method.prompts.seed was 0 and is 1"),
        ("nft", {"sampler": {"steps": 4}}, "method.sampler.steps was 3 and is 4"),
        ("flow-grpo", {"eta": 0.5}, "method.eta was 0.7 and is 0.5"),
        ("dpo", {"max_draws": 2}, None),
        ("nft", {"beta": 0.5}, None),
    ],
)
def test_a_resume_names_the_settings_that_changed(
    tmp_path: Path, kind: str, method: dict[str, Any], message: str | None
) -> None:
    trainer(tmp_path, described(kind)).run(stop_after=1)
    again = trainer(tmp_path, described(kind, method))
    again.resume(saved_states(again.states)[-1])
    if message is None:
        again.run(stop_after=2)
        assert again.progress.step == 2
        return
    with pytest.raises(CheckpointError, match=message):
        again.run()


def test_a_resume_with_a_reference_that_was_not_saved(tmp_path: Path) -> None:
    trainer(tmp_path, described("nft", {"kl": 0.0})).run(stop_after=2)
    again = trainer(tmp_path, described("nft"))
    again.resume(saved_states(again.states)[-1])
    with pytest.raises(CheckpointError, match=r"no reference.* method\.kl was 0\.0 and is 0\.1"):
        again.run()


# --- further draws of prompts ---


DRAWS = {
    "max_draws": 4,
    "rewards": [{"kind": "program", "name": "support.rewards:differs_for_some"}],
}


@pytest.mark.parametrize("kind", ["flow-grpo", "nft", "dpo"])
def test_further_prompts_are_drawn_until_enough_groups_differ(tmp_path: Path, kind: str) -> None:
    method = built(tmp_path, kind, DRAWS)
    once = built(tmp_path, kind, {**DRAWS, "max_draws": 1})
    several = 0
    for number in range(4):
        iteration, first = method.sample(number), once.sample(number)
        rewards = torch.cat(list(iteration.rewards))
        trained, differ = torch.cat(list(iteration.trained)), informative(rewards)
        several += iteration.draws > 1
        assert len(rewards) == 4 * iteration.draws
        assert int(differ[: 4 * (iteration.draws - 1)].sum()) < 4
        assert int(trained.sum()) == min(4, int(differ.sum()))
        assert bool((trained <= differ).all())
        known = torch.cat(list(iteration.advantages))
        assert bool((known[~trained] == 0).all())
        assert torch.allclose(known[trained], group_advantages(rewards[trained]))
        chosen = {(index, samples[0] // 3) for index, samples in method.units(iteration)}
        assert len(chosen) == int(trained.sum())
        assert torch.equal(torch.cat(list(first.trained)), informative(torch.cat(first.rewards)))
        assert first.draws == 1
    assert several
    report = method.report()
    assert 1 < report["draws"] <= 4
    assert 0 < report["groups"] <= 4
    assert not {"draws", "groups"} & set(once.report())


def test_draws_are_bounded_and_never_repeat_a_prompt(tmp_path: Path) -> None:
    alike = {"max_draws": 3, "rewards": [{"kind": "program", "name": "support.rewards:alike"}]}
    method = built(tmp_path, "nft", alike)
    numbers: list[int] = []
    source = method.prompts

    class Counted:
        def case(self, number: int) -> Any:
            numbers.append(number)
            return source.case(number)

    method.prompts = Counted()
    for number in range(2):
        iteration = method.sample(number)
        assert iteration.draws == 3
        assert method.units(iteration) == []
    assert numbers == list(range(24))


@pytest.mark.parametrize("kind", ["flow-grpo", "dpo"])
def test_a_run_that_draws_further_prompts_resumes_to_the_bit(tmp_path: Path, kind: str) -> None:
    method = {**DRAWS, "updates": 2}
    run(tmp_path / "whole", kind, method, steps=4)
    for stop in (1, 2):
        folder = tmp_path / f"stopped{stop}"
        trainer(folder, described(kind, method, steps=4)).run(stop_after=stop)
        again = trainer(folder, described(kind, method, steps=4))
        again.resume(saved_states(again.states)[-1])
        again.run()
        whole, cut = (state_tensors(f, 4) for f in (tmp_path / "whole", folder))
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[n], cut[n]) for n in whole)
        assert metrics(folder) == metrics(tmp_path / "whole")


# --- seeds ---


@pytest.mark.parametrize("kind", ["flow-grpo", "trajectory"])
def test_neighbouring_seeds_share_no_noise(tmp_path: Path, kind: str) -> None:
    first, second = (built(tmp_path, kind, {"seed": seed}) for seed in (0, 1))
    cases = first.cases(0, 2)[0][:1]
    if kind == "trajectory":
        grid = image_request(cases[0], first.resolve(first.config.student, cases)).grid(
            first.model.config
        )
        noise = [method.noise(0, place, 1, grid) for method in (first, second) for place in (0, 1)]
        noise.append(first.noise(0, 0, 1, grid, 1))
    else:
        noise = [
            method.rollout(cases, 0, index).final for method in (first, second) for index in (0, 1)
        ]
    assert len({tensor.numpy().tobytes() for tensor in noise}) == len(noise)
