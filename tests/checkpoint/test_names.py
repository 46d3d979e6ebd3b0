"""The name table, by inversion and against the published names themselves."""

import json
from collections.abc import Callable

import pytest

from neounify.checkpoint import expected_shapes, from_published, part_of, stream_of, to_published
from neounify.checkpoint.names import current_name
from neounify.config import ModelConfig
from neounify.config.presets import TINY
from support.golden import golden_path, needs_golden

GOLDEN_NAMES = ("tiny-dense", "tiny-moe", "tiny-pixelhead", "bench-dense")

PAIRS = {
    "embed_tokens.weight": "language_model.model.embed_tokens.weight",
    "lm_head.weight": "language_model.lm_head.weight",
    "und_norm.weight": "language_model.model.norm.weight",
    "gen_norm.weight": "language_model.model.norm_mot_gen.weight",
    "layers.0.und.qkv.input_norm.weight": "language_model.model.layers.0.input_layernorm.weight",
    "layers.10.gen.out.post_norm.weight": (
        "language_model.model.layers.10.post_attention_layernorm_mot_gen.weight"
    ),
    "layers.3.gen.qkv.q_proj.weight": (
        "language_model.model.layers.3.self_attn.q_proj_mot_gen.weight"
    ),
    "layers.3.und.out.o_proj.bias": "language_model.model.layers.3.self_attn.o_proj.bias",
    "layers.3.und.qkv.k_norm.weight": "language_model.model.layers.3.self_attn.k_norm.weight",
    "layers.3.gen.qkv.k_norm_hw.weight": (
        "language_model.model.layers.3.self_attn.k_norm_hw_mot_gen.weight"
    ),
    "layers.1.gen.out.mlp.gate_proj.weight": (
        "language_model.model.layers.1.mlp_mot_gen.gate_proj.weight"
    ),
    "layers.1.gen.out.mlp.router.weight": "language_model.model.layers.1.mlp_mot_gen.gate.weight",
    "layers.1.und.out.mlp.experts.12.down_proj.weight": (
        "language_model.model.layers.1.mlp.experts.12.down_proj.weight"
    ),
    "und_patch.patch.bias": "vision_model.embeddings.patch_embedding.bias",
    "gen_patch.merge.weight": ("fm_modules.vision_model_mot_gen.embeddings.dense_embedding.weight"),
    "timestep_embedder.linear1.weight": "fm_modules.timestep_embedder.mlp.0.weight",
    "noise_scale_embedder.linear2.bias": "fm_modules.noise_scale_embedder.mlp.2.bias",
    "image_head.linear2.weight": "fm_modules.fm_head.2.weight",
    "image_head.conv1.bias": "fm_modules.fm_head.conv1.bias",
}


@pytest.mark.parametrize(("ours", "published"), PAIRS.items())
def test_pairs_from_the_specification(ours: str, published: str) -> None:
    assert to_published(ours) == published
    assert from_published(published) == ours


def test_every_name_of_every_kind_of_model_inverts(any_config: ModelConfig) -> None:
    ours = list(expected_shapes(any_config))
    published = [to_published(name) for name in ours]
    assert [from_published(name) for name in published] == ours
    assert len(set(published)) == len(ours)


@needs_golden
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_every_published_name_inverts(name: str) -> None:
    published = json.loads(golden_path(name, "weights_spec.json").read_text())["tensors"]
    for tensor in published:
        ours = from_published(tensor)
        assert ours is not None, tensor
        assert to_published(ours) == tensor


@needs_golden
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_streams_follow_the_published_suffix(name: str) -> None:
    for tensor in json.loads(golden_path(name, "weights_spec.json").read_text())["tensors"]:
        ours = from_published(tensor)
        assert ours is not None
        gen = "_mot_gen" in tensor or tensor.startswith("fm_modules.")
        shared = "embed_tokens" in tensor or "lm_head" in tensor
        assert stream_of(ours) == ("shared" if shared else "gen" if gen else "und")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "lm_head.weight",
        "language_model.model.layers.01.input_layernorm.weight",
        "language_model.model.layers.٣.input_layernorm.weight",
        "language_model.model.layers.0.input_layernorm.bias",
        "language_model.model.layers.0.self_attn.q_proj_mot_gen_mot_gen.weight",
        "language_model.model.layers.0.mlp.gate.weight\n",
        "language_model_model.norm.weight",
        "fm_modules.fm_head.1.weight",
        "fm_modules.timestep_embedder.mlp.conv1.weight",
    ],
)
def test_other_names_are_not_of_this_layout(name: str) -> None:
    assert from_published(name) is None


@pytest.mark.parametrize("function", [to_published, stream_of, part_of])
def test_an_unknown_name_of_ours_is_a_key_error(function: Callable[[str], str]) -> None:
    with pytest.raises(KeyError, match=r"q_proj\.weight"):
        function("q_proj.weight")


@pytest.mark.parametrize(
    ("name", "stream", "part"),
    [
        ("layers.0.gen.qkv.q_proj.weight", "gen", "attention"),
        ("layers.0.und.qkv.q_norm_hw.weight", "und", "norm"),
        ("gen_norm.weight", "gen", "norm"),
        ("layers.0.und.out.mlp.up_proj.weight", "und", "mlp"),
        ("layers.0.gen.out.mlp.router.weight", "gen", "router"),
        ("layers.0.gen.out.mlp.experts.1.up_proj.weight", "gen", "experts"),
        ("und_patch.patch.weight", "und", "patch embedding"),
        ("gen_patch.patch.weight", "gen", "patch embedding"),
        ("timestep_embedder.linear1.bias", "gen", "timestep"),
        ("noise_scale_embedder.linear1.bias", "gen", "noise scale"),
        ("image_head.linear1.bias", "gen", "image head"),
        ("embed_tokens.weight", "shared", "embedding"),
        ("lm_head.weight", "shared", "lm head"),
    ],
)
def test_streams_and_parts(name: str, stream: str, part: str) -> None:
    assert (stream_of(name), part_of(name)) == (stream, part)


def test_names_of_earlier_versions() -> None:
    """Streams had no halves; names of now stay."""
    for name in expected_shapes(TINY):
        old = name.replace(".qkv.", ".").replace(".out.", ".")
        assert current_name(old) == current_name(name) == name
    assert current_name("layers.0.und.q_proj.lora_A") == "layers.0.und.qkv.q_proj.lora_A"
