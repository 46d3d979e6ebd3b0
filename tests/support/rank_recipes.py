"""Recipes of one small stage for runs as processes, one for each rank."""

from __future__ import annotations

from pathlib import Path

SCENES = '{ kind = "scenes", world = "easy" }'
RECIPE = """
name = "r"
workers = WORKERS
[model]
preset = "scenes"
changes = { hidden_size = 32, num_layers = 2, num_heads = 2, num_kv_heads = 2, head_dim = 16 }
tokenizer = { samples = 50 }
[parallel]
streams = 4
[defaults]
method = { tokens_per_pack = 300 }
log_every = 1
sample_every = SAMPLE
save_every = 1
optimizer = { learning_rate = 1e-4 }
data = [DATA]
[[stages]]
name = "a"
steps = STEPS
packs_per_step = PACKS
"""


def write_recipe(
    path: Path,
    *,
    steps: int,
    packs: int = 4,
    workers: int = 0,
    sample_every: int = 1000,
    data: str = SCENES,
) -> Path:
    """Write the recipe of a stage of so many steps; its path."""
    values = {"STEPS": steps, "PACKS": packs, "WORKERS": workers, "SAMPLE": sample_every}
    text = RECIPE.replace("DATA", data)
    for name, value in values.items():
        text = text.replace(name, str(value))
    path.write_text(text)
    return path
