"""Small checkpoints for tests, written without the code under test that saves them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from neounify.checkpoint import expected_shapes, to_published, write_config
from neounify.config import FlowConfig, MlpConfig, ModelConfig

SMALL = ModelConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=96,
    und_mlp=MlpConfig(width=48),
    gen_mlp=MlpConfig(width=48),
    vision_hidden_size=16,
    flow_head_width=24,
)
SPARSE_MLP = MlpConfig(
    width=48, num_experts=4, experts_per_token=2, expert_width=24, sparse=(True, False)
)
CONFIGS = {
    "dense": SMALL,
    "sparse": SMALL.replace(
        und_mlp=SPARSE_MLP,
        gen_mlp=MlpConfig(
            width=48, num_experts=3, experts_per_token=1, expert_width=40, sparse=(True, True)
        ),
    ),
    "pixel": SMALL.replace(image_head="pixel", flow_head_width=4096),
    "bias": SMALL.replace(attention_bias=True),
    "unequal": SMALL.replace(gen_mlp=MlpConfig(width=32)),
    "tied": SMALL.replace(tie_embeddings=True),
    "plain noise": SMALL.replace(flow=FlowConfig(noise_scale_embedding=False)),
}


def random_weights(
    config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Published name → values in about [-1, 1] for every tensor of a model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        to_published(name): (torch.rand(shape, generator=generator) * 2 - 1).to(dtype)
        for name, shape in expected_shapes(config).items()
    }


def write_checkpoint(folder: Path, config: ModelConfig, weights: dict[str, Tensor]) -> Path:
    """Write config.json and one model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(write_config(config)))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_sharded(
    folder: Path, config: ModelConfig, weights: dict[str, Tensor], count: int = 3
) -> Path:
    """The same in `count` shards, tensors dealt round robin, so that layers span shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(write_config(config)))
    weight_map = {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        shard = {key: weights[key] for key in sorted(weights)[number::count]}
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
