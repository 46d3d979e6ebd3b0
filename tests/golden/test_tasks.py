"""Whole tasks against the recorded arrays of the published implementation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import neounify
from neounify.image.io import read_image
from neounify.pipeline import ImagePart, TextPart
from neounify.tasks import image as image_task
from neounify.tasks import program
from neounify.tasks.image import edit_images
from support.golden import load_fixture, needs_golden
from support.golden_steps import (
    NAMES,
    SINGLE_PASS,
    TRAJECTORY,
    PromptPositions,
    Script,
    Steps,
    error,
    image_file,
    pipeline,
)
from support.models import embed_clean
from support.scripted_sampler import script_sampler

pytestmark = [needs_golden, pytest.mark.parametrize("name", NAMES)]
Checkpoint = Callable[[str], Path]
BRANCHES = {"cond": "cond", "image": "img_cond", "uncond": "uncond"}
"""Our names of the guidance branches and the recorded ones."""


def settings(case: dict[str, Any]) -> dict[str, Any]:
    """Our arguments for a recorded text-to-image or editing case."""
    arguments = {
        "width": 64,
        "height": 96,
        "steps": case["num_steps"],
        "shift": case["timestep_shift"],
        "seed": case["seed"],
        "guidance": case["cfg_scale"],
        "guidance_norm": case.get("cfg_norm", "none"),
        "guidance_interval": tuple(case.get("cfg_interval", (0, 1))),
        "images_per_prompt": case.get("batch_size", 1),
    }
    if "img_cfg_scale" in case:
        arguments |= {"image_guidance": case["img_cfg_scale"], "published_interval": True}
    return arguments


def check_steps(steps: Steps, recorded: dict[str, Tensor], prefix: str) -> None:
    for number, (z, v) in enumerate(zip(steps.z, steps.v, strict=True)):
        assert error(z[None], recorded[f"{prefix}.step{number}.z"]) <= TRAJECTORY
        for branch, value in v.items():
            name = f"{prefix}.step{number}.v_{BRANCHES[branch]}"
            assert error(value[None], recorded[name]) <= TRAJECTORY


def test_text_to_image(name: str, golden_checkpoint: Checkpoint) -> None:
    recorded, info = load_fixture(name, "t2i")
    pipe = pipeline(golden_checkpoint(name))
    for case, parameters in info["cases"].items():
        out = pipe.generate(info["prompt"], **settings(parameters))
        assert error(out.pixels, recorded[f"{case}.final"]) <= TRAJECTORY, case


def test_text_to_image_step_by_step(
    name: str, golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, info = load_fixture(name, "t2i")
    steps = Steps(monkeypatch)
    pipeline(golden_checkpoint(name)).generate(info["prompt"], **settings(info["cases"]["none"]))
    assert len(steps.z) == 4
    assert steps.t == pytest.approx(recorded["none.timesteps"][:-1].tolist(), abs=1e-6)
    check_steps(steps, recorded, "none")


@pytest.mark.parametrize("count", [1, 2])
def test_initial_noise(name: str, count: int, golden_checkpoint: Checkpoint) -> None:
    recorded, info = load_fixture(name, "t2i")
    pipe = pipeline(golden_checkpoint(name))
    arguments = settings(info["cases"]["none" if count == 1 else "none_b2"])
    noise = recorded[f"noise_b{count}"]
    from_noise = pipe.generate(info["prompt"], **arguments | {"seed": 0}, noise=noise)
    drawn = pipe.generate(info["prompt"], **arguments)
    assert error(from_noise.pixels, drawn.pixels) <= 1e-6


def test_editing(name: str, golden_checkpoint: Checkpoint) -> None:
    recorded, info = load_fixture(name, "it2i")
    pipe = pipeline(golden_checkpoint(name))
    for case, parameters in edit_cases(info, rounded=False):
        group = case.split(".")[0]
        images = [image_file(image) for image in info["images"][group]]
        out = pipe.edit(info["prompts"][group], images, **settings(parameters))
        assert error(out.pixels, recorded[f"{case}.final"]) <= TRAJECTORY, case


def test_editing_with_rounded_pixels(
    name: str, golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, info = load_fixture(name, "it2i")
    pipe = pipeline(golden_checkpoint(name))
    prepare = program.prepare_image

    def rounded(*arguments: Any, **options: Any) -> Tensor:
        return prepare(*arguments, **options).bfloat16().float()

    monkeypatch.setattr(program, "prepare_image", rounded)
    for case, parameters in edit_cases(info, rounded=True):
        group = case.split(".")[0]
        images = [image_file(image) for image in info["images"][group]]
        out = pipe.edit(info["prompts"][group], images, **settings(parameters))
        assert error(out.pixels, recorded[f"{case}.final"]) <= TRAJECTORY, case
        assert error(embedded(pipe, images), recorded[f"{case}.vit_embeds"]) <= SINGLE_PASS


@pytest.mark.parametrize("group", ["1img", "2img"])
def test_editing_step_by_step(
    name: str, group: str, golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, info = load_fixture(name, "it2i")
    pipe = pipeline(golden_checkpoint(name))
    steps = Steps(monkeypatch)
    images = [image_file(image) for image in info["images"][group]]
    case = settings(info["cases"][f"{group}.4_2"])
    pipe.edit(info["prompts"][group], images, **case, noise=recorded["noise_b1"])
    assert steps.t == pytest.approx(recorded[f"{group}.timesteps"][:-1].tolist(), abs=1e-6)
    check_steps(steps, recorded, f"{group}.4_2")
    for branch, positions in steps.positions[0].items():
        assert torch.equal(positions, recorded[f"{group}.4_2.indexes_{BRANCHES[branch]}"])
    assert error(embedded(pipe, images), recorded[f"{group}.vit_embeds"]) <= SINGLE_PASS


def edit_cases(info: dict[str, Any], *, rounded: bool) -> list[tuple[str, dict[str, Any]]]:
    return [
        (case, parameters)
        for case, parameters in info["cases"].items()
        if isinstance(parameters, dict) and case.endswith("bf16px") == rounded
    ]


@torch.inference_mode()
def embedded(pipe: neounify.Pipeline, images: list[Path]) -> Tensor:
    """The understanding embedding of all input images of an edit."""
    return embed_clean(pipe.model, edit_images(pipe.processor, [read_image(i) for i in images]))


@pytest.mark.parametrize("group", ["1img", "2img", "2img_auto"])
def test_positions_of_editing_prompts(
    name: str, group: str, golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, info = load_fixture(name, "it2i")
    prompts = PromptPositions(monkeypatch)
    images = [image_file(image) for image in info["images"][group]]
    pipeline(golden_checkpoint(name)).edit(
        info["prompts"][group],
        images,
        width=32,
        height=32,
        steps=1,
        guidance=4,
        image_guidance=1 if group == "2img_auto" else 2,
    )
    assert len(prompts.seen) == (2 if group == "2img_auto" else 3)
    seen = prompts.seen
    if len(seen) == 3:  # the unconditional prompt, which images share, is read first
        seen = [*seen[1:], seen[0]]
    for branch, positions in zip(BRANCHES.values(), seen, strict=False):
        assert torch.equal(positions, recorded[f"{group}.{branch}.indexes"])


def test_positions_of_chat_and_interleaving_prompts(
    name: str, golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(golden_checkpoint(name))
    prompts = PromptPositions(monkeypatch)
    recorded, info = load_fixture(name, "chat")
    pipe.chat(info["question"], [image_file(info["image"])], max_new_tokens=1)
    assert torch.equal(prompts.seen[0], recorded["turn1.indexes"])
    recorded, info = load_fixture(name, "interleave")
    prompts.seen.clear()
    parts = pipe.interleave(
        info["prompt"],
        [image_file("a_512x512")],
        guidance=4,
        image_guidance=2,
        system=info["system_message"],
        max_new_tokens=1,
        max_images=0,
    )
    list(parts)
    for branch, positions in zip(BRANCHES.values(), prompts.seen, strict=False):
        assert torch.equal(positions, recorded[f"{branch}.indexes"])
    assert len(prompts.seen) == 3


def test_chat(name: str, golden_checkpoint: Checkpoint) -> None:
    recorded, info = load_fixture(name, "chat")
    pipe = pipeline(golden_checkpoint(name))
    image = [image_file(info["image"])]
    history = [
        {"role": "user", "content": info["question"]},
        {"role": "assistant", "content": "A red boat."},
        {"role": "user", "content": "And the colour?"},
    ]
    results = {
        "turn1": pipe.chat(info["question"], image, max_new_tokens=12),
        "turn2": pipe.chat(history, image, max_new_tokens=12),
        "text_only": pipe.chat(info["question"], max_new_tokens=12),
    }
    for case, result in results.items():
        assert list(result.token_ids) == recorded[f"{case}.answer_ids"][0].tolist()
        assert result.text == info["results"][case]["response"].strip()
        assert result.prompt_tokens == recorded[f"{case}.input_ids"].shape[1]


def test_chat_logits(
    name: str, golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, info = load_fixture(name, "chat")
    seen: list[Tensor] = []

    def recording(logits: Tensor) -> int:
        seen.append(logits.clone())
        return int(logits.argmax())

    script_sampler(monkeypatch, recording)
    pipe = pipeline(golden_checkpoint(name))
    pipe.chat(info["question"], [image_file(info["image"])], max_new_tokens=12)
    assert error(torch.stack(seen)[None], recorded["turn1.greedy_logits"]) <= SINGLE_PASS


@pytest.mark.parametrize("case", ["closed", "eos"])
def test_thinking(
    name: str, case: str, golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, info = load_fixture(name, "think")
    script = Script(recorded[f"{case}.script"].tolist())
    steps = Steps(monkeypatch)
    script_sampler(monkeypatch, script)
    out = pipeline(golden_checkpoint(name)).generate(
        info["prompt"], width=64, height=96, steps=2, guidance=4, shift=3, seed=17, think=True
    )
    assert error(script.logits(), recorded[f"{case}.logits"]) <= SINGLE_PASS
    assert error(out.pixels, recorded[f"{case}.final"]) <= TRAJECTORY
    assert error(steps.v[0]["cond"][None], recorded[f"{case}.v_cond_step0"]) <= TRAJECTORY
    assert torch.equal(steps.positions[0]["cond"], recorded[f"{case}.indexes_image"])
    assert out.thoughts == [info["think_text"][case].removesuffix("</think>")]


@pytest.mark.parametrize("case", ["4_1", "4_2", "1_1"])
def test_interleaving(
    name: str, case: str, golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, info = load_fixture(name, "interleave")
    script = Script(recorded["script"].tolist())
    steps = Steps(monkeypatch)
    script_sampler(monkeypatch, script)
    guidance, image_guidance = map(float, case.split("_"))
    parts = list(
        pipeline(golden_checkpoint(name)).interleave(
            info["prompt"],
            [image_file("a_512x512")],
            width=[64, 96],
            height=[96, 32],
            steps=2,
            guidance=guidance,
            image_guidance=image_guidance,
            shift=3,
            seed=19,
            max_images=2,
            system=info["system_message"],
        )
    )
    assert error(script.logits(), recorded[f"{case}.logits"]) <= TRAJECTORY
    images = [part for part in parts if isinstance(part, ImagePart)]
    for number, image in enumerate(images):
        assert error(image.pixels[None], recorded[f"{case}.image{number}"]) <= TRAJECTORY
        first = 2 * number
        key = f"{case}.image{number}"
        assert error(steps.z[first][None], recorded[f"{key}.z0"]) <= SINGLE_PASS
        assert error(steps.v[first]["cond"][None], recorded[f"{key}.v_cond_step0"]) <= TRAJECTORY
        positions = steps.positions[first]["cond"]
        assert torch.equal(positions, recorded[f"{key}.indexes_cond"])
    assert len(images) == 2
    text = "".join(part.text if isinstance(part, TextPart) else "" for part in parts)
    assert text == info["text"][case].replace("<image>", "")


def test_interleaving_with_given_text(
    name: str, golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, info = load_fixture(name, "interleave")
    pipe = pipeline(golden_checkpoint(name))
    tokenizer = pipe.tokenizer
    first, second, end = info["image_only"]["gt_text"].split("<image>")
    opening = [tokenizer.id("<img>")]
    ids = [*tokenizer.encode(first), *opening, *tokenizer.encode(second), *opening]
    script = Script([*ids, *tokenizer.encode(end), tokenizer.id("<|im_end|>")])
    draws = iter([recorded[f"image_only.image{n}.randn"] for n in range(2)])
    script_sampler(monkeypatch, script)
    monkeypatch.setattr(image_task, "initial_noise", lambda s, scale, g: next(draws) * scale)
    parts = pipe.interleave(
        info["prompt"],
        [image_file("a_512x512")],
        width=[64, 96],
        height=[96, 32],
        steps=2,
        guidance=info["image_only"]["cfg_scale"],
        image_guidance=info["image_only"]["img_cfg_scale"],
        shift=3,
        system=info["system_message"],
    )
    images = [part for part in parts if isinstance(part, ImagePart)]
    assert len(images) == 2
    for number, image in enumerate(images):
        recorded_image = recorded[f"image_only.image{number}"]
        assert error(image.pixels[None], recorded_image) <= TRAJECTORY
