"""config.json: read as the specification says, written back unchanged, refused key by key."""

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from neounify.checkpoint import read_config, write_config
from neounify.config import (
    CheckpointDefaults,
    FlowConfig,
    MlpConfig,
    ModelConfig,
    VideoConfig,
    VideoDefaults,
)
from neounify.config.presets import PRESETS, U1_A3B
from neounify.errors import ConfigError
from support.checkpoint_folders import CONFIGS, SMALL
from support.golden import golden_path, needs_golden

Document = dict[str, Any]

DENSE: Document = {
    "model_type": "neo_chat",
    "downsample_ratio": 0.5,
    "vision_config": {"hidden_size": 16},
    "llm_config": {
        "model_type": "qwen3",
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 96,
        "intermediate_size": 48,
        "rope_theta": 5e6,
    },
}
"""Nothing but the keys that have no default."""

SPARSE_KEYS: Document = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
}


def document(**changes: Any) -> Document:
    """DENSE with changes: `llm=…` and `vision=…` go into the sections, None removes a key."""
    result = copy.deepcopy(DENSE)
    sections = {"llm": result["llm_config"], "vision": result["vision_config"], "top": result}
    for section, values in changes.items():
        for key, value in values.items():
            sections[section].pop(key, None)
            if value is not None:
                sections[section][key] = value
    return result


def test_defaults() -> None:
    assert read_config(DENSE) == ModelConfig(
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        vocab_size=96,
        und_mlp=MlpConfig(width=48),
        gen_mlp=MlpConfig(width=48),
        rms_norm_eps=1e-6,
        rope_theta=5e6,
        rope_theta_hw=1e4,
        attention_bias=False,
        tie_embeddings=False,
        patch_size=16,
        merge=2,
        vision_hidden_size=16,
        image_head="flow",
        flow=FlowConfig(
            noise_scale=1.0,
            noise_scale_mode="resolution",
            noise_scale_base_tokens=64,
            noise_scale_max=8.0,
            noise_scale_embedding=True,
        ),
    )


@needs_golden
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe", "tiny-pixelhead", "bench-dense"])
def test_published_configs_are_written_back_as_they_were(name: str) -> None:
    stored = json.loads(golden_path(name, "config.json").read_text())
    assert write_config(read_config(stored)) == stored


@needs_golden
def test_the_values_of_published_configs() -> None:
    def read(name: str) -> ModelConfig:
        return read_config(json.loads(golden_path(name, "config.json").read_text()))

    dense, moe, pixel = (read(name) for name in ("tiny-dense", "tiny-moe", "tiny-pixelhead"))
    assert (dense.hidden_size, dense.num_layers, dense.head_dim) == (64, 3, 32)
    assert (dense.num_heads, dense.num_kv_heads, dense.vocab_size) == (4, 2, 576)
    assert dense.und_mlp == dense.gen_mlp == MlpConfig(width=128)
    assert moe.und_mlp == MlpConfig(
        width=128,
        num_experts=8,
        experts_per_token=2,
        expert_width=48,
        normalise_top_k=True,
        sparse=(True,) * 3,
    )
    assert (moe.gen_mlp.num_experts, moe.gen_mlp.expert_width) == (4, 80)
    assert (pixel.image_head, pixel.flow.noise_scale_max) == ("pixel", 16.0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_writing_and_reading(name: str) -> None:
    written = json.loads(json.dumps(write_config(PRESETS[name])))
    assert read_config(written) == PRESETS[name]
    assert write_config(read_config(written)) == written


def test_every_kind_of_model_survives(any_config: ModelConfig) -> None:
    config = any_config.replace(flow_head_width=4096)
    assert read_config(json.loads(json.dumps(write_config(config)))) == config


def test_streams_of_different_widths() -> None:
    """Of a published config too, and back to one width."""
    config = read_config(DENSE)
    changed = config.replace(gen_mlp=MlpConfig(width=40))
    written = write_config(changed)
    assert written["neounify"]["gen_intermediate_size"] == 40
    assert read_config(written) == changed
    assert read_config(write_config(read_config(written).replace(gen_mlp=config.und_mlp))) == config


@pytest.mark.parametrize(
    "change",
    [
        {"normalise_top_k": True},
        {"sparse": (True, False)},
        {"num_experts": 0, "experts_per_token": 0, "expert_width": 0, "sparse": ()},
    ],
)
def test_what_cannot_be_stated_is_not_written(change: dict[str, Any]) -> None:
    sparse = CONFIGS["sparse"]
    config = sparse.replace(gen_mlp=dataclasses.replace(sparse.gen_mlp, **change))
    with pytest.raises(
        ConfigError,
        match=r"config\.json cannot state (gen_mlp MlpConfig|this config: gen: experts)",
    ):
        write_config(config)


def test_a_changed_config_keeps_what_it_does_not_know() -> None:
    original = document(top={"P_mean": -0.8, "downsample_ratio": [0.5]}, llm={"bos_token_id": 5})
    changed = read_config(original).replace(max_positions=77, flow=FlowConfig(noise_scale=2.0))
    written = write_config(changed)
    assert read_config(written) == changed
    assert (written["P_mean"], written["llm_config"]["bos_token_id"]) == (-0.8, 5)
    assert written["downsample_ratio"] == [0.5], "says the same, so it stays as it was"
    assert "max_position_embeddings" not in original["llm_config"], "the input is not touched"


def test_writing_does_not_share_the_stored_document() -> None:
    config = read_config(DENSE)
    write_config(config)["llm_config"]["hidden_size"] = 1
    assert write_config(config) == DENSE


def test_own_section() -> None:
    sampling = CheckpointDefaults(
        image_size=(64, 96),
        steps=8,
        guidance=1.0,
        trained_sizes=((64, 96), (96, 64)),
        trained_pixels=(4096, 8192),
    )
    config = SMALL.replace(sampling=sampling)
    written = json.loads(json.dumps(write_config(config)))
    assert written["neounify"]["sampling"]["image_size"] == [64, 96]
    assert written["neounify"]["flow_head_width"] == SMALL.flow_head_width
    assert read_config(written) == config


def test_what_only_this_package_states() -> None:
    """Fields that the published layout has no key for; a default is not written."""
    config = SMALL.replace(
        capabilities=("chat", "generate_video"),
        patch_embed="linear",
        image_head="linear",
        video=VideoConfig(tube_frames=2, und=True),
        flow=FlowConfig(t_eps_sampling=0.05, noise_draw="tokens", unipc_grid=10),
        sampling=CheckpointDefaults(
            image_size=(64, 64), solver="ab2", video=VideoDefaults(size=(64, 64), frames=8)
        ),
    )
    written = json.loads(json.dumps(write_config(config)))
    assert read_config(written) == config
    section = written["neounify"]
    assert section["flow"] == {"t_eps_sampling": 0.05, "noise_draw": "tokens", "unipc_grid": 10}
    assert "und_pixels" not in section["model"]
    plain = write_config(
        read_config(written).replace(**{f: getattr(SMALL, f) for f in vars(SMALL)})
    )
    assert plain == write_config(SMALL)


def test_null_is_a_value_of_optional_fields_alone() -> None:
    nulls = {"model": {"video": None}, "flow": {"t_eps_sampling": None}}
    assert read_config(document(top={"neounify": nulls})) == read_config(document())
    for section, key, kind in (
        ("sampling", "video", "video must be an object"),
        ("sampling", "steps", "steps must be a whole number"),
        ("sampling", "trained_sizes", "trained_sizes must be a list"),
        ("model", "template", "template must be text"),
        ("flow", "time_embedding", "time_embedding must be true or false"),
    ):
        with pytest.raises(ConfigError, match=f"{kind}.*, found None"):
            read_config(document(top={"neounify": {section: {key: None}}}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ('{"shift": 0.0005}', "sampling.shift must be from 0.001 to 1000, got 0.0005"),
        ('{"guidance": NaN}', "guidance must be a finite number, found nan"),
        ('{"image_guidance": 1e9}', "sampling.image_guidance must be from 0 to 1000, got 10000"),
        ('{"steps": 100000}', "sampling.steps must be from 1 to 1000, got 100000"),
    ],
)
def test_sampling_values_that_every_request_would_fail_with(values: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(document(top={"neounify": {"sampling": json.loads(values)}}))


@pytest.mark.parametrize("key", ["llm_hidden_size", "downsample_ratio"])
def test_values_stored_as_lists(key: str) -> None:
    value = {"llm_hidden_size": 32, "downsample_ratio": 0.5}[key]
    assert read_config(document(vision={key: [value]})) == read_config(DENSE)


def test_generation_experts_fall_back_to_the_understanding_ones() -> None:
    config = read_config(document(llm=SPARSE_KEYS))
    assert config.gen_mlp == config.und_mlp
    assert not config.und_mlp.normalise_top_k
    gen_keys = {"gen_num_experts": 3, "gen_num_experts_per_tok": 1, "gen_moe_intermediate_size": 7}
    gen = read_config(document(llm={**SPARSE_KEYS, **gen_keys})).gen_mlp
    assert (gen.num_experts, gen.experts_per_token, gen.expert_width) == (3, 1, 7)


@pytest.mark.parametrize(
    ("keys", "sparse"),
    [
        ({}, (True, True, True, True)),
        ({"mlp_only_layers": [1]}, (True, False, True, True)),
        ({"decoder_sparse_step": 2}, (False, True, False, True)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (False, True, False, False)),
    ],
)
def test_layers_of_the_understanding_stream_may_be_dense(
    keys: Document, sparse: tuple[bool, ...]
) -> None:
    config = read_config(document(llm={**SPARSE_KEYS, **keys}))
    assert config.und_mlp.sparse == sparse
    assert config.gen_mlp.sparse == (True,) * 4
    changed = config.replace(vocab_size=97)
    assert read_config(write_config(changed)) == changed


def test_a_sparse_preset_without_a_dense_width() -> None:
    assert U1_A3B.und_mlp.width == 0
    assert read_config(document(llm={**SPARSE_KEYS, "intermediate_size": None})).is_sparse


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "a list": (list, "must hold an object, found list"),
    "another model": (lambda: document(top={"model_type": "qwen3"}), "model_type is 'qwen3'"),
    "no model type": (lambda: document(top={"model_type": None}), "model_type is None"),
    "unknown architecture": (
        lambda: document(llm={"model_type": "llama"}),
        "'llama'; known are qwen3, qwen3_moe",
    ),
    "no llm": (lambda: document(top={"llm_config": None}), "no object 'llm_config'"),
    "no vision": (lambda: document(top={"vision_config": None}), "no object 'vision_config'"),
    "missing size": (
        lambda: document(llm={"vocab_size": None}),
        "vocab_size must be a whole number, found None",
    ),
    "text for a number": (
        lambda: document(llm={"num_hidden_layers": "4"}),
        "num_hidden_layers must be a whole number, found '4'",
    ),
    "true for a number": (
        lambda: document(llm={"num_hidden_layers": True}),
        "num_hidden_layers must be a whole number",
    ),
    "text for a flag": (
        lambda: document(top={"use_pixel_head": "yes"}),
        "use_pixel_head must be true or false",
    ),
    "text for a float": (
        lambda: document(llm={"rope_theta": "big"}),
        "rope_theta must be a finite number",
    ),
    "negative size": (lambda: document(llm={"vocab_size": -1}), "vocab_size must be at least 1"),
    "no layers": (lambda: document(llm={"num_hidden_layers": 0}), "num_layers must be at least"),
    "kv heads": (
        lambda: document(llm={"num_key_value_heads": 3}),
        "num_heads 4 must be a multiple of num_kv_heads 3",
    ),
    "head dim": (lambda: document(llm={"head_dim": 12}), "head_dim 12 must be a multiple of 8"),
    "vision hidden": (
        lambda: document(vision={"hidden_size": 18}),
        "vision hidden size 18 must be divisible by 4",
    ),
    "two hidden sizes": (
        lambda: document(vision={"llm_hidden_size": 64}),
        "llm_hidden_size 64 differs from llm_config.hidden_size 32",
    ),
    "two ratios": (
        lambda: document(vision={"downsample_ratio": 1}),
        "downsample_ratio is 0.5 but 1 in vision_config",
    ),
    "odd ratio": (
        lambda: document(top={"downsample_ratio": 0.4}),
        "downsample_ratio 0.4 must be 1, 1/2",
    ),
    "activation": (lambda: document(llm={"hidden_act": "gelu"}), "hidden_act 'gelu' is not"),
    "rope scaling": (
        lambda: document(llm={"rope_scaling": {"type": "yarn"}}),
        "rope_scaling .* is not supported",
    ),
    "sliding window": (
        lambda: document(llm={"use_sliding_window": True}),
        "use_sliding_window True is not supported",
    ),
    "channels": (lambda: document(vision={"num_channels": 4}), "num_channels 4 is not supported"),
    "time tokens": (
        lambda: document(top={"concat_time_token_num": 1}),
        "concat_time_token_num 1 is not supported",
    ),
    "noise mode": (
        lambda: document(top={"noise_scale_mode": "loud"}),
        "noise_scale_mode 'loud' is unknown; known are fixed",
    ),
    "noise scale": (lambda: document(top={"noise_scale": 0}), "noise_scale must be positive"),
    "no experts": (
        lambda: document(llm={**SPARSE_KEYS, "num_experts": None}),
        "num_experts must be a whole number",
    ),
    "too many experts per token": (
        lambda: document(llm={**SPARSE_KEYS, "num_experts_per_tok": 9}),
        "experts per token 9 must lie in 1..8",
    ),
    "dense layers": (
        lambda: document(llm={**SPARSE_KEYS, "mlp_only_layers": ["1"]}),
        "mlp_only_layers must be a list of layer numbers",
    ),
    "unknown sampling key": (
        lambda: document(top={"neounify": {"sampling": {"stepps": 3}}}),
        "neounify.sampling.stepps is unknown; known: image_size",
    ),
    "unknown solver": (
        lambda: document(top={"neounify": {"sampling": {"solver": "rk4"}}}),
        "sampling.solver 'rk4' is unknown; known are euler, ab2, dpm2m, unipc",
    ),
    "sampling size": (
        lambda: document(top={"neounify": {"sampling": {"image_size": [64]}}}),
        "must be \\(width, height\\), multiples of 32",
    ),
    "trained size of three": (
        lambda: document(top={"neounify": {"sampling": {"trained_sizes": [[64, 64, 64]]}}}),
        "neounify.sampling.trained_sizes must be a list of \\[width, height\\]",
    ),
    "trained size between tokens": (
        lambda: document(top={"neounify": {"sampling": {"trained_sizes": [[64, 65]]}}}),
        "sampling.trained_sizes .* multiples of 32",
    ),
    "trained pixels the wrong way": (
        lambda: document(top={"neounify": {"sampling": {"trained_pixels": [9, 4]}}}),
        "sampling.trained_pixels 9..4 is not a range",
    ),
    "unknown field of the model": (
        lambda: document(top={"neounify": {"model": {"depth": 3}}}),
        "neounify.model.depth is unknown; known: ",
    ),
    "unknown field of the video": (
        lambda: document(top={"neounify": {"model": {"video": {"length": 3}}}}),
        "neounify.video.length is unknown; known: tube_frames",
    ),
    "capabilities as text": (
        lambda: document(top={"neounify": {"model": {"capabilities": "chat"}}}),
        "neounify.model.capabilities must be a list",
    ),
    "a number for a head": (
        lambda: document(top={"neounify": {"model": {"image_head": 3}}}),
        "neounify.model.image_head must be text, found 3",
    ),
    "sampling is a list": (
        lambda: document(top={"neounify": {"sampling": []}}),
        "sampling must be an object",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_configs_are_refused_by_key(kind: str) -> None:
    make, message = BAD[kind]
    with pytest.raises(ConfigError, match=message):
        read_config(make())
