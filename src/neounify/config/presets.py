"""Sizes of the published models; a field that is left out has the published default."""

from dataclasses import replace

from neounify.config.families import FAMILIES, PIXELUMM
from neounify.config.model import (
    CheckpointDefaults,
    FlowConfig,
    MlpConfig,
    ModelConfig,
    VideoConfig,
    VideoDefaults,
)

U1_8B = ModelConfig(
    hidden_size=4096,
    num_layers=42,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151_936,
    und_mlp=MlpConfig(width=12_288),
    gen_mlp=MlpConfig(width=12_288),
    rope_theta=5e6,
    vision_hidden_size=1024,
)
"""SenseNova-U1 8B-MoT: dense, flow head."""

U1_A3B = ModelConfig(
    hidden_size=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    vocab_size=151_936,
    und_mlp=MlpConfig(
        width=0,
        num_experts=128,
        experts_per_token=8,
        expert_width=768,
        normalise_top_k=True,
        sparse=(True,) * 48,
    ),
    gen_mlp=MlpConfig(
        width=0,
        num_experts=32,
        experts_per_token=8,
        expert_width=768,
        normalise_top_k=True,
        sparse=(True,) * 48,
    ),
    rope_theta=1e7,
    vision_hidden_size=1024,
)
"""SenseNova-U1 A3B-MoT: sparse, flow head."""

BENCH = ModelConfig(
    hidden_size=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    vocab_size=8192,
    und_mlp=MlpConfig(width=1536),
    gen_mlp=MlpConfig(width=1536),
    vision_hidden_size=256,
)
"""The model the benchmarks time: small, but with the published proportions."""

TINY = ModelConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=264,
    und_mlp=MlpConfig(width=128),
    gen_mlp=MlpConfig(width=128),
    max_positions=8192,
    flow_head_width=256,
    vision_hidden_size=32,
    sampling=CheckpointDefaults(
        image_size=(128, 128),
        chat_min_pixels=64**2,
        chat_max_pixels=256**2,
        edit_min_pixels=64**2,
        edit_max_pixels=256**2,
        edit_max_total_pixels=512**2,
        steps=8,
    ),
)
"""A toy to try things with, for `text.byte_tokenizer`; it generates in a second, untrained."""

SCENES = ModelConfig(
    hidden_size=192,
    num_layers=6,
    num_heads=6,
    num_kv_heads=6,
    head_dim=32,
    vocab_size=512,
    und_mlp=MlpConfig(width=512),
    gen_mlp=MlpConfig(width=512),
    rope_theta=1e4,
    rope_theta_hw=100.0,
    max_positions=2048,
    patch_size=8,
    merge=2,
    vision_hidden_size=128,
    flow_head_width=512,
    flow=FlowConfig(noise_scale=3.0, noise_scale_base_tokens=16),
    sampling=CheckpointDefaults(
        image_size=(64, 64),
        chat_min_pixels=32**2,
        chat_max_pixels=256**2,
        edit_min_pixels=32**2,
        edit_max_pixels=256**2,
        edit_max_total_pixels=512**2,
        steps=40,
        guidance=2.5,
        shift=1.0,
    ),
)
"""The model bundled with the package: 64×64 images of scenes, 16 tokens each."""

PIXELUMM_8B = ModelConfig(
    **FAMILIES[PIXELUMM].profile,
    hidden_size=4096,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151_669,
    und_mlp=MlpConfig(width=12_288),
    gen_mlp=MlpConfig(width=12_288),
    max_positions=40_960,
)
"""PixelUMM 8B, its default checkpoint: dense, linear embeddings and heads, videos."""

MOTION = SCENES.replace(
    video=VideoConfig(tube_frames=4, und=True, position_fps=8.0),
    capabilities=("chat", "chat_video", "generate_video", "continue_video"),
    sampling=replace(
        SCENES.sampling,
        video=VideoDefaults(
            size=(64, 64),
            frames=8,
            fps=8.0,
            steps=40,
            guidance=2.5,
            shift=1.0,
            solver="euler",
            frame_min_pixels=32**2,
            frame_max_pixels=256**2,
            max_total_pixels=16 * 256**2,
            max_frames=16,
            sample_fps=8.0,
            tube_fps=8.0,
        ),
    ),
)
"""The bundled model's sizes for clips of 64×64 pixels: 16 tubes of 4 frames for half a second."""

PRESETS = {
    "8b": U1_8B,
    "a3b": U1_A3B,
    "pixelumm": PIXELUMM_8B,
    "bench": BENCH,
    "tiny": TINY,
    "scenes": SCENES,
    "motion": MOTION,
}
