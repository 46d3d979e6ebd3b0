"""Model sizes that do not fit together are refused, each with a clear message."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from typing import Any

import pytest

from neounify.config import (
    CheckpointDefaults,
    FlowConfig,
    MlpConfig,
    ModelConfig,
    VideoConfig,
    VideoDefaults,
)
from neounify.config.families import FAMILIES
from neounify.config.presets import BENCH, MOTION, PIXELUMM_8B, PRESETS, SCENES, TINY, U1_8B, U1_A3B
from neounify.errors import ConfigError, RequestError
from neounify.text import BYTE_VOCAB_SIZE

SPARSE = MlpConfig(
    width=16, num_experts=4, experts_per_token=2, expert_width=8, sparse=(True, False)
)


def _sparse(**changes: Any) -> MlpConfig:
    return dataclasses.replace(SPARSE, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"num_layers": -1}, "num_layers must be at least 1"),
        ({"vocab_size": 0}, "vocab_size must be"),
        ({"merge": 0}, "merge must be"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"max_positions": 0}, "max_positions must be"),
        ({"num_kv_heads": 3}, "num_heads 4 must be a multiple of num_kv_heads 3"),
        ({"head_dim": 12}, "head_dim 12 must be a multiple of 8"),
        ({"vision_hidden_size": 30}, "vision hidden size 30 must be divisible by 4"),
        ({"image_head": "pixel", "hidden_size": 62}, r"hidden size \(62\) and a token side \(32\)"),
        ({"image_head": "pixel", "patch_size": 15, "merge": 1}, "token side"),
        ({"rope_theta": 0.0}, "rope_theta must be positive and finite, got 0.0"),
        ({"rope_theta": float("inf")}, "rope_theta must be positive and finite, got inf"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be positive"),
        ({"num_layers": 10**12}, "num_layers must be at most 1,000, got 1,000,000,000,000"),
        ({"hidden_size": 2**40}, "hidden_size must be at most 1,048,576"),
        ({"gen_mlp": MlpConfig(width=2**40)}, "gen: width must be at most 1,048,576"),
        ({"template": "chatml"}, "template 'chatml' is unknown; known are neo, pixelumm"),
        ({"capabilities": ()}, "capabilities must name what the model was trained for"),
        ({"und_mlp": MlpConfig(width=0)}, "the und MLP width must be at least 1, got 0"),
        ({"gen_mlp": _sparse(sparse=(True,))}, "gen: 1 layers are marked .*, expected 2"),
        ({"gen_mlp": _sparse(experts_per_token=5)}, "gen: experts per token 5 must lie in 1..4"),
        ({"und_mlp": _sparse(experts_per_token=0)}, "und: experts per token 0"),
        ({"und_mlp": _sparse(expert_width=0)}, "und: expert width 0 must be positive"),
        ({"sampling": CheckpointDefaults(image_size=(64, 100))}, r"\(64, 100\) must be .* of 32"),
        ({"sampling": CheckpointDefaults(image_size=(0, 32))}, "sampling.image_size"),
        ({"image_head": "round"}, "image_head 'round' is unknown; known are flow, pixel, linear"),
        ({"patch_embed": "mlp"}, "patch_embed 'mlp' is unknown; known are conv, linear"),
        ({"capabilities": ("sing",)}, "capability 'sing' is unknown; known are chat"),
        ({"capabilities": ("generate_video",)}, "without tubes generates no videos"),
        (
            {
                "video": VideoConfig(),
                "sampling": CheckpointDefaults(
                    video=VideoDefaults(size=(48, 64)), image_size=(64, 64)
                ),
            },
            r"video.size \(48, 64\) must be .* multiples of 32",
        ),
        ({"video": VideoConfig(tube_frames=10**9)}, "tube_frames must be at most 1,024"),
        ({"video": VideoConfig(tube_frames=5)}, "frames 96 must be a multiple of tube_frames 5"),
    ],
)
def test_inconsistent_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TINY.replace(**changes)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (FlowConfig, {"noise_scale": 0.0}, "noise_scale must be positive"),
        (FlowConfig, {"noise_scale_max": -1.0}, "noise_scale_max must be positive"),
        (FlowConfig, {"t_eps_training": 0.0}, "t_eps_training must be positive"),
        (CheckpointDefaults, {"chat_min_pixels": 10, "chat_max_pixels": 9}, "10..9"),
        (CheckpointDefaults, {"steps": 0}, "sampling.steps must be from 1 to 1000, got 0"),
        (CheckpointDefaults, {"steps": 1001}, "sampling.steps must be from 1 to 1000, got 1001"),
        (CheckpointDefaults, {"shift": 0.0}, "sampling.shift must be from 0.001 to 1000, got 0.0"),
        (
            CheckpointDefaults,
            {"shift": 0.0005},
            "shift must be from 0.001 to 1000, got 0.0005",
        ),
        (
            CheckpointDefaults,
            {"guidance": float("nan")},
            "sampling.guidance must be from 0 to 1000",
        ),
        (
            CheckpointDefaults,
            {"image_guidance": 1e9},
            "image_guidance must be from 0 to 1000",
        ),
        (CheckpointDefaults, {"trained_pixels": (2, 1)}, "trained_pixels 2..1 is not a range"),
        (FlowConfig, {"noise_draw": "rows"}, "noise_draw 'rows' is unknown; known are image"),
        (FlowConfig, {"first_time": 1.0}, "first_time must be at least 0 and below 1, got 1.0"),
        (VideoConfig, {"tube_frames": 0}, "tube_frames must be at least 1, got 0"),
        (VideoConfig, {"image_weights": True}, "tube_frames 4 must be 1, und false"),
        (
            VideoConfig,
            {"tube_frames": 1, "und": True, "image_weights": True},
            "image_weights are for tubes of one frame that are seen as images",
        ),
        (VideoConfig, {"position_fps": 0.0}, "position_fps must be positive"),
        (VideoDefaults, {"frame_min_pixels": 9, "frame_max_pixels": 8}, "9..8.* do not ascend"),
        (VideoDefaults, {"fps": 0.0}, "video.fps must be positive"),
        (VideoDefaults, {"steps": 0}, "video.steps must be from 1 to 1000, got 0"),
        (FlowConfig, {"noise_scale_mode": "loud"}, "'loud' is unknown; known are fixed, resolu"),
    ],
)
def test_values_out_of_range(kind: type, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**changes)


def test_every_field_has_a_sentence() -> None:
    """The docstring under each field, which readers and editors see."""
    for kind in (
        CheckpointDefaults,
        FlowConfig,
        MlpConfig,
        ModelConfig,
        VideoConfig,
        VideoDefaults,
    ):
        [body] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(body, ast.ClassDef)
        for field, after in itertools.pairwise(body.body):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(after, ast.Expr), ast.unparse(field)


def test_the_old_name_still_works_for_a_version() -> None:
    import neounify.config

    with pytest.warns(DeprecationWarning, match="use neounify.config.CheckpointDefaults"):
        assert neounify.config.SamplingConfig is CheckpointDefaults


def test_configs_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.hidden_size = 1  # type: ignore[misc]
    wider = TINY.replace(hidden_size=128)
    assert (TINY.hidden_size, wider.hidden_size) == (64, 128)
    assert wider.replace(hidden_size=64) == TINY


def test_sparse_layers() -> None:
    assert [SPARSE.is_sparse(layer) for layer in range(2)] == [True, False]
    assert not MlpConfig(width=8).is_sparse(7)
    # A dense width is needed only where a layer is dense.
    TINY.replace(und_mlp=_sparse(width=0, sparse=(True, True)))
    with pytest.raises(ConfigError, match="und MLP width"):
        TINY.replace(und_mlp=_sparse(width=0))


def test_bounds_of_edited_images() -> None:
    sampling = CheckpointDefaults()
    assert sampling.edit_bounds(1) == (512**2, 2048**2)
    assert sampling.edit_bounds(4) == (512**2, 2048**2)
    assert sampling.edit_bounds(5) == (512**2, 4096**2 // 5)
    assert sampling.edit_bounds(0) == sampling.edit_bounds(1)
    # From 65 on, the share of an image is below the minimum of one.
    assert sampling.edit_bounds(64) == (512**2, 512**2)
    assert sampling.edit_bounds(65) == (4096**2 // 65, 4096**2 // 65)
    assert sampling.edit_bounds(10**9) == (1, 1)


def _row(c: ModelConfig) -> tuple[object, ...]:
    return (
        c.num_layers,
        c.hidden_size,
        c.head_dim,
        c.num_heads,
        c.num_kv_heads,
        c.rope_theta,
        c.rope_theta_hw,
        c.vision_hidden_size,
        c.vocab_size,
        c.token_size,
    )


def test_published_sizes() -> None:
    assert _row(U1_8B) == (42, 4096, 128, 32, 8, 5e6, 1e4, 1024, 151_936, 32)
    assert U1_8B.und_mlp == U1_8B.gen_mlp == MlpConfig(width=12_288)
    assert _row(U1_A3B) == (48, 2048, 128, 32, 4, 1e7, 1e4, 1024, 151_936, 32)
    for mlp, experts in ((U1_A3B.und_mlp, 128), (U1_A3B.gen_mlp, 32)):
        assert (mlp.num_experts, mlp.experts_per_token, mlp.expert_width) == (experts, 8, 768)
        assert mlp.normalise_top_k
        assert all(mlp.is_sparse(layer) for layer in range(48))
    assert U1_A3B.is_sparse
    assert not U1_8B.is_sparse
    assert set(PRESETS.values()) == {U1_8B, U1_A3B, PIXELUMM_8B, BENCH, TINY, SCENES, MOTION}


def test_the_toy_fits_its_tokenizer() -> None:
    assert TINY.vocab_size == BYTE_VOCAB_SIZE


def test_a_refusal_is_one_sentence_about_what_the_model_can_do() -> None:
    model = TINY.replace(**FAMILIES["pixelumm"].profile)
    model.check_can("generate_video")
    with pytest.raises(RequestError) as refused:
        model.check_can("edit")
    assert str(refused.value) == (
        "this PixelUMM model was not trained to edit images; it can answer questions about text "
        "and images, generate images, generate videos, answer questions about videos"
    )


def test_constants_of_the_second_family() -> None:
    model = TINY.replace(**FAMILIES["pixelumm"].profile)
    assert (model.token_size, model.token_width, model.tube_width) == (16, 768, 3072)
    assert model.sampling.image_size == model.sampling.video.size == (832, 480)
    assert (model.sampling.chat_min_pixels, model.sampling.chat_max_pixels) == (3136, 2_560_000)
