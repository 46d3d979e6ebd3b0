"""LoRA files: merged as the formula says, or refused whole with every problem named."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from neounify.checkpoint import LoraSpec, from_published, load_model
from neounify.errors import CheckpointError
from support.checkpoint_folders import SMALL, random_weights
from support.lora_files import lora_tensors

LAYER = "language_model.model.layers.1"
TARGETS = [
    f"{LAYER}.self_attn.q_proj_mot_gen",
    f"{LAYER}.mlp_mot_gen.down_proj",
    f"{LAYER}.self_attn.o_proj",
    "fm_modules.timestep_embedder.mlp.0",
    "language_model.lm_head",
]
CONV = "fm_modules.vision_model_mot_gen.embeddings.patch_embedding"


def write(folder: Path, tensors: dict[str, Tensor], name: str = "lora.safetensors") -> Path:
    path = folder / name
    save_file(tensors, path)
    return path


def merged_by_hand(tensors: dict[str, Tensor], target: str, strength: float = 1.0) -> Tensor:
    """W + strength · alpha/r · up @ down in float64."""
    weight = random_weights(SMALL)[f"{target}.weight"].double()
    down = tensors[f"{target}.lora_down.weight"].double().flatten(1)
    up = tensors[f"{target}.lora_up.weight"].double().flatten(1)
    rank = down.shape[0]
    alpha = float(tensors.get(f"{target}.alpha", torch.tensor(float(rank))))
    return weight + strength * alpha / rank * (up @ down).view(weight.shape)


@pytest.mark.parametrize("strength", [1.0, 0.25, -2.0])
@pytest.mark.parametrize("alpha", [6.0, None])
@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_merging_follows_the_formula(
    small: Path, tmp_path: Path, strength: float, alpha: float | None, prefix: str
) -> None:
    path = write(tmp_path, lora_tensors(SMALL, TARGETS, alpha=alpha, prefix=prefix))
    plain = lora_tensors(SMALL, TARGETS, alpha=alpha)
    state = load_model(small, lora=path, lora_strength=strength).state_dict()
    untouched = load_model(small).state_dict()
    for target in TARGETS:
        name = from_published(f"{target}.weight")
        assert name is not None
        expected = merged_by_hand(plain, target, strength)
        torch.testing.assert_close(state[name].double(), expected, rtol=0, atol=1e-5)
        assert not torch.allclose(state[name], untouched.pop(name), atol=1e-2)
    assert all(torch.equal(state[name], tensor) for name, tensor in untouched.items())


def test_the_sum_is_rounded_once(small: Path, tmp_path: Path) -> None:
    tensors = lora_tensors(SMALL, TARGETS)
    state = load_model(small, dtype="bfloat16", lora=write(tmp_path, tensors)).state_dict()
    weight = random_weights(SMALL)["language_model.lm_head.weight"]
    delta = (
        tensors["language_model.lm_head.lora_up.weight"]
        @ (tensors["language_model.lm_head.lora_down.weight"])
    )
    expected = (weight + 2 * delta).to(torch.bfloat16)
    assert (state["lm_head.weight"] == expected).float().mean() > 0.999
    rounded_first = weight.to(torch.bfloat16) + (2 * delta).to(torch.bfloat16)
    assert (state["lm_head.weight"] == rounded_first).float().mean() < 0.9


@pytest.mark.parametrize("flat", [False, True])
def test_convolutions(small: Path, tmp_path: Path, flat: bool) -> None:
    tensors = lora_tensors(SMALL, [CONV])
    if flat:
        tensors = {key: t.flatten(1) if t.ndim > 1 else t for key, t in tensors.items()}
    state = load_model(small, lora=write(tmp_path, tensors)).state_dict()
    expected = merged_by_hand(tensors, CONV)
    torch.testing.assert_close(
        state["gen_patch.patch.weight"].double(), expected, rtol=0, atol=1e-5
    )


def test_several_files_each_with_its_strength(small: Path, tmp_path: Path) -> None:
    first, second = (lora_tensors(SMALL, TARGETS[:2], seed=seed) for seed in (1, 2))
    one, two = (
        write(tmp_path, tensors, f"{number}.safetensors")
        for number, tensors in enumerate((first, second))
    )
    weight = random_weights(SMALL)[f"{TARGETS[0]}.weight"].double()
    delta_one = merged_by_hand(first, TARGETS[0]) - weight
    delta_two = merged_by_hand(second, TARGETS[0]) - weight
    cases: list[tuple[LoraSpec | list[LoraSpec], Tensor]] = [
        ([one, (two, 0.5)], weight + 3 * delta_one + 0.5 * delta_two),
        ((str(two), 0.5), weight + 0.5 * delta_two),
        ([one], weight + 3 * delta_one),
        ([], weight),
    ]
    for lora, expected in cases:
        model = load_model(small, lora=lora, lora_strength=3.0)
        actual = model.state_dict()["layers.1.gen.qkv.q_proj.weight"].double()
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_the_same_lora_twice_adds_up(small: Path, tmp_path: Path) -> None:
    path = write(tmp_path, lora_tensors(SMALL, TARGETS))
    twice = load_model(small, lora=[path, path]).state_dict()
    double = load_model(small, lora=path, lora_strength=2).state_dict()
    for name, tensor in double.items():
        torch.testing.assert_close(twice[name], tensor, rtol=0, atol=1e-5)


def test_all_problems_are_listed_at_once(small: Path, tmp_path: Path) -> None:
    tensors = lora_tensors(SMALL, TARGETS)
    q, down_proj, o_proj, timestep, head = TARGETS
    del tensors[f"{q}.lora_up.weight"]
    tensors[f"{down_proj}.lora_down.weight"] = torch.zeros(3, 99)
    tensors[f"{o_proj}.alpha"] = torch.zeros(2)
    tensors[f"{timestep}.lora_up.weight"][0, 0] = float("nan")
    tensors[f"diffusion_model.{head}.alpha"] = torch.tensor(1.0)
    tensors["language_model.model.layers.9.self_attn.q_proj.lora_up.weight"] = torch.zeros(32, 3)
    tensors["lora_unet_x.lora_up.weight"] = torch.zeros(2, 2)
    tensors["something"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match="nothing was merged; problems: 7") as caught:
        load_model(small, lora=write(tmp_path, tensors))
    message = str(caught.value)
    for pattern in (
        f"{q} has no lora_up.weight",
        rf"{down_proj} of shape \[32, 48\] cannot take lora_down \[3, 99\] and lora_up \[32, 3\]",
        rf"{o_proj}: alpha has shape \[2\], expected a scalar",
        f"{timestep} holds NaN",
        rf"{head} is stored twice, as .*{head}\.alpha and .*{head}\.alpha",
        r"2 of 7 modules are not in this model: .*\.layers\.9\.self_attn\.q_proj, lora_unet_x",
        "no part of a LoRA, .*: something",
    ):
        assert re.search(pattern, message), (pattern, message)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"language_model.model.norm.lora_up.weight": torch.zeros(1)}, "has no lora_down.weight"),
        (
            {
                "language_model.model.norm.lora_up.weight": torch.zeros(32, 1),
                "language_model.model.norm.lora_down.weight": torch.zeros(1, 1),
            },
            "cannot take",
        ),
        (
            {
                "language_model.lm_head.lora_up.weight": torch.zeros(96, 2, dtype=torch.int64),
                "language_model.lm_head.lora_down.weight": torch.zeros(2, 32),
            },
            "expected floats",
        ),
        (
            {
                "language_model.lm_head.lora_up.weight": torch.zeros(96, 0),
                "language_model.lm_head.lora_down.weight": torch.zeros(0, 32),
            },
            "cannot take",
        ),
        ({}, "holds no tensors"),
    ],
)
def test_single_problems(
    small: Path, tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(small, lora=write(tmp_path, tensors))


def test_a_problem_in_the_second_file_stops_the_first_too(small: Path, tmp_path: Path) -> None:
    good = write(tmp_path, lora_tensors(SMALL, TARGETS))
    bad = write(tmp_path, {"x": torch.zeros(1)}, "bad.safetensors")
    with pytest.raises(
        CheckpointError, match=r"problems: 1\n  bad\.safetensors: no part of a LoRA"
    ):
        load_model(small, lora=[good, bad])


def test_strength_that_is_no_number(small: Path, tmp_path: Path) -> None:
    path = write(tmp_path, lora_tensors(SMALL, TARGETS))
    with pytest.raises(CheckpointError, match="strength nan"):
        load_model(small, lora=path, lora_strength=float("nan"))


def test_missing_file(small: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: cannot be read"):
        load_model(small, lora=tmp_path / "gone.safetensors")
