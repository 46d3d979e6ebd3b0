"""LoRA files as trainers and tools write them: one update under many names, there and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neounify.checkpoint import expected_shapes, from_published, load_model
from neounify.checkpoint.lora_file import ModuleNames, module_name
from neounify.checkpoint.peft_config import Patterns
from neounify.errors import CheckpointError
from neounify.lora.peft import LoraForm, convert_lora
from support.checkpoint_folders import CONFIGS, SMALL, random_weights, write_checkpoint

LAYER = "language_model.model.layers.1"
CONV = "fm_modules.vision_model_mot_gen.embeddings.patch_embedding"
RANKS = {
    f"{LAYER}.self_attn.q_proj_mot_gen": 3,
    f"{LAYER}.mlp.down_proj": 2,
    "language_model.lm_head": 3,
    "fm_modules.timestep_embedder.mlp.0": 3,
    CONV: 4,
}
"""Ranks of the modules in every file here: mixed within one file."""

Pairs = dict[str, tuple[Tensor, Tensor]]
Form = Callable[[Path, Pairs], tuple[Path, dict[str, float]]]
"""Writes pairs; the path to give, and the scale of every module."""


def pairs() -> Pairs:
    """Published module name → (down, up)."""
    generator = torch.Generator().manual_seed(5)
    weights, pairs = random_weights(SMALL), {}
    for target, rank in RANKS.items():
        out, *rest = weights[f"{target}.weight"].shape
        down = torch.randn(rank, *rest, generator=generator) / 4
        up = torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator) / 4
        pairs[target] = (down, up)
    return pairs


def named(
    template: str, halves: tuple[str, str], alpha: float | None = None, flat: bool = False
) -> Form:
    """One file whose keys are `template` with the module's name, and a half."""

    def write(folder: Path, pairs: Pairs) -> tuple[Path, dict[str, float]]:
        tensors: dict[str, Tensor] = {}
        for target, matrices in pairs.items():
            name = template.format(target.replace(".", "_") if flat else target)
            tensors |= {f"{name}.{h}": t for h, t in zip(halves, matrices, strict=True)}
            if alpha is not None:
                tensors[f"{name}.alpha"] = torch.tensor(alpha)
        save_file(tensors, folder / "my.safetensors")
        scales = {t: 1.0 if alpha is None else alpha / r for t, r in RANKS.items()}
        return folder / "my.safetensors", scales

    return write


def peft(**fields: object) -> Form:
    """A folder of PEFT's; rank and alpha of single modules in its patterns."""

    def write(folder: Path, pairs: Pairs) -> tuple[Path, dict[str, float]]:
        path, _ = named("base_model.model.{}", AB)(folder, pairs)
        path.rename(folder / "adapter_model.safetensors")
        document = {
            "peft_type": "LORA",
            "r": 3,
            "lora_alpha": 6,
            "use_rslora": False,
            "rank_pattern": {"down_proj": 2, r"embeddings\.patch_(embedding|x)": 4},
            "alpha_pattern": {"language_model.lm_head": 1.5, "mlp.down_proj": 8},
            **fields,
        }
        (folder / "adapter_config.json").write_text(json.dumps(document))
        alphas = {"language_model.lm_head": 1.5, f"{LAYER}.mlp.down_proj": 8.0}
        root = 0.5 if document["use_rslora"] else 1.0
        return folder, {t: alphas.get(t, 6.0) / r**root for t, r in RANKS.items()}

    return write


def metadata(**entries: str) -> Form:
    """One file of A/B pairs that says its alpha, 6, in the metadata."""

    def write(folder: Path, pairs: Pairs) -> tuple[Path, dict[str, float]]:
        path, _ = named("transformer.{}", AB)(folder, pairs)
        save_file(load_file(path), path, metadata=entries)
        return path, {target: 6 / rank for target, rank in RANKS.items()}

    return write


AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
DIFFUSERS = {
    "transformer.r": 3,
    "transformer.lora_alpha": 6,
    "transformer.rank_pattern": {"mlp.down_proj": 2, "patch_embedding": 4},
}
FORMS: dict[str, Form] = {
    "published": named("{}", DOWN_UP, alpha=6.0),
    "published, no alpha": named("{}", DOWN_UP),
    "ComfyUI": named("diffusion_model.{}", DOWN_UP),
    "ComfyUI, whole checkpoint": named("model.diffusion_model.{}", DOWN_UP, alpha=2.0),
    "A/B without a config": named("{}", AB),
    "A/B with alpha": named("{}", AB, alpha=6.0),
    "ComfyUI A/B": named("diffusion_model.{}", AB),
    "A/B .default": named("{}", ("lora_A.default.weight", "lora_B.default.weight")),
    "A/B bare": named("base_model.model.{}", ("lora_A", "lora_B")),
    "diffusers": named("transformer.{}", AB),
    "diffusers, old": named("unet.{}", ("lora.down.weight", "lora.up.weight")),
    "diffusers, config in metadata": metadata(lora_adapter_metadata=json.dumps(DIFFUSERS)),
    "alpha in metadata": metadata(ss_network_alpha="6.0", ss_network_dim="3"),
    "kohya": named("lora_unet_{}", DOWN_UP, alpha=6.0, flat=True),
    "kohya, text encoder": named("lora_te1_{}", DOWN_UP, flat=True),
    "kohya, transformer": named("lora_transformer_{}", AB, flat=True),
    "LyCORIS": named("lycoris_{}", DOWN_UP, alpha=1.0, flat=True),
    "PEFT": peft(),
    "PEFT, rslora": peft(use_rslora=True),
}


def by_hand(pairs: Pairs, scales: dict[str, float], strength: float = 1.0) -> dict[str, Tensor]:
    """Our name → W + strength · scale · up @ down in float64, of the modules in the file."""
    weights = random_weights(SMALL)
    expected = {}
    for target, (down, up) in pairs.items():
        weight = weights[f"{target}.weight"].double()
        delta = up.double().flatten(1) @ down.double().flatten(1)
        name = from_published(f"{target}.weight")
        assert name is not None
        expected[name] = weight + strength * scales[target] * delta.view(weight.shape)
    return expected


def check_merged(base: Path, lora: object, expected: dict[str, Tensor]) -> None:
    plain, state = load_model(base).state_dict(), load_model(base, lora=lora).state_dict()  # type: ignore[arg-type]
    for name, tensor in state.items():
        if name in expected:
            torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=2e-5)
            assert not torch.allclose(tensor, plain[name], atol=1e-2)
        else:
            assert torch.equal(tensor, plain[name])


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_is_merged(small: Path, tmp_path: Path, form: str) -> None:
    path, scales = FORMS[form](tmp_path, pairs())
    check_merged(small, (path, 0.5), by_hand(pairs(), scales, 0.5))


@pytest.mark.parametrize("target", ["peft", "published"])
@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_is_written_anew(
    small: Path, tmp_path: Path, form: str, target: LoraForm
) -> None:
    (tmp_path / "theirs").mkdir()
    path, scales = FORMS[form](tmp_path / "theirs", pairs())
    out = tmp_path / ("out" if target == "peft" else "out.safetensors")
    shapes = expected_shapes(SMALL)
    written = convert_lora((path, 2.0), shapes, out, target, base="some")
    check_merged(small, written, by_hand(pairs(), scales, 2.0))
    file = out / "adapter_model.safetensors" if target == "peft" else out
    kernel = {k: tuple(t.shape) for k, t in load_file(file).items() if CONV in k and t.ndim > 1}
    assert sorted(len(shape) for shape in kernel.values()) == [4, 4]
    # And once more, into the other form and back: the very same file.
    other: LoraForm = "published" if target == "peft" else "peft"
    between = tmp_path / ("x.safetensors" if other == "published" else "x")
    convert_lora(written, shapes, between, other)
    again = convert_lora(between, shapes, tmp_path / "again" / out.name, target, base="some")
    if target == "published":
        assert again.read_bytes() == written.read_bytes()
    else:
        weights = "adapter_model.safetensors"
        assert (again / weights).read_bytes() == (written / weights).read_bytes()


def test_several_become_one_of_their_ranks_together(small: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, scales = FORMS["kohya"](tmp_path / "a", pairs())
    two, _ = FORMS["diffusers"](tmp_path / "b", pairs())
    written = convert_lora([one, (two, 0.25)], expected_shapes(SMALL), tmp_path / "out", "peft")
    sums = {target: scale + 0.25 for target, scale in scales.items()}
    check_merged(small, written, by_hand(pairs(), sums))
    ranks = json.loads((written / "adapter_config.json").read_text())["rank_pattern"]
    assert ranks[CONV] == 8


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    path, _ = FORMS["published"](tmp_path / "x", pairs())
    shapes = expected_shapes(SMALL)
    out = convert_lora(path, shapes, tmp_path / "a.safetensors", "published")
    with pytest.raises(CheckpointError, match="already exists"):
        convert_lora(path, shapes, out, "published")
    convert_lora(path, shapes, out, "published", overwrite=True)
    for wrong in (tmp_path, tmp_path / "folder"):
        with pytest.raises(CheckpointError, match="one file"):
            convert_lora(path, shapes, wrong, "published")
    convert_lora(path, shapes, tmp_path / "peft", "peft")
    with pytest.raises(CheckpointError, match="holds an adapter already"):
        convert_lora(path, shapes, tmp_path / "peft", "peft")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["dora_scale"], "DoRA"),
        (["lora_magnitude_vector"], "DoRA"),
        (["lora_magnitude_vector.default.weight"], "DoRA"),
        (["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"], "LoHa"),
        (["lokr_w1", "lokr_w2_a", "lokr_w2_b"], "LoKr"),
        (["oft_blocks"], "OFT"),
        (["lora_mid.weight"], "LoCon with a middle matrix"),
        (["diff"], "full difference"),
        (["lora_B.bias"], "LoRA with biases"),
        (["lora_embedding_A"], "embedding LoRA"),
    ],
)
def test_other_kinds_are_named_and_refused(
    small: Path, tmp_path: Path, keys: list[str], kind: str
) -> None:
    path, _ = FORMS["A/B without a config"](tmp_path, pairs())
    extra = {f"lora_unet_x.{key}": torch.zeros(2, 2) for key in keys}
    save_file(load_file(path) | extra, path)
    with pytest.raises(CheckpointError) as caught:
        load_model(small, lora=path)
    message = str(caught.value)
    assert f"is no plain LoRA but of the kind {kind} (lora_unet_x.{keys[0]}" in message
    assert "\n" not in message


def test_names_that_fit_no_module(small: Path, tmp_path: Path) -> None:
    path, _ = FORMS["kohya"](tmp_path, pairs())
    foreign = {
        f"lora_unet_double_blocks_{n}_qkv.{half}": torch.zeros(2, 2)
        for n in range(5)
        for half in DOWN_UP
    }
    save_file(load_file(path) | foreign, path)
    with pytest.raises(CheckpointError) as caught:
        load_model(small, lora=path)
    first = ", ".join(f"lora_unet_double_blocks_{n}_qkv" for n in range(3))
    assert f"5 of 10 modules are not in this model: {first} and 2 more" in str(caught.value)
    assert "nothing was merged; problems: 1" in str(caught.value)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_every_module_is_found_by_its_flat_name(kind: str) -> None:
    weights = [
        name for name, shape in expected_shapes(CONFIGS[kind]).items()
        if name.endswith(".weight") and len(shape) > 1
    ]  # fmt: skip
    names = ModuleNames(weights)
    for weight in weights:
        module = module_name(weight)
        for written in (module, f"transformer.{module}", f"base_model.model.{module}"):
            assert names.find(written) == weight
        assert names.find("lora_unet_" + module.replace(".", "_")) == weight
    assert names.find("lora_unet_") is None
    assert names.find("") is None


def test_patterns_are_those_of_peft() -> None:
    values = {
        "layers.1.mlp.up_proj": 1.0,
        r".*\.up_proj": 2.0,
        "proj": 3.0,
        "mlp": 4.0,
        "a|b.mlp": 5,
    }
    patterns = Patterns(values)
    for module, value in [
        ("language_model.model.layers.1.mlp.up_proj", 1),
        ("layers.2.mlp.up_proj", 2),
        ("layers.2.up_proj", 2),
        ("x.mlp", 4),
        ("layers.2.mlp.down_proj", 9),
        ("xproj", 9),
    ]:
        assert patterns.get(module, 9.0) == value, module


def test_the_command_line_converts(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from neounify.cli.app import app

    base = write_checkpoint(tmp_path / "base", SMALL, random_weights(SMALL))
    path, scales = FORMS["kohya"](tmp_path, pairs())
    out = tmp_path / "adapter"
    arguments = ["convert", str(base), str(out), "--lora", f"{path}:0.5", "--lora-form"]
    result = CliRunner().invoke(app, [*arguments, "peft"])
    assert result.exit_code == 0, result.output
    check_merged(base, out, by_hand(pairs(), scales, 0.5))
    assert CliRunner().invoke(app, [*arguments, "other"]).exit_code != 0
    again = CliRunner().invoke(app, [*arguments, "peft"])
    assert again.exit_code != 0
