"""Adapters: nothing at first, the same merged as not, and back from disk through the pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from neounify.config import ModelConfig
from neounify.config.presets import SCENES
from neounify.errors import CheckpointError, ConfigError
from neounify.lora.layers import LoraConfig, LoraLinear, add_lora, merge_lora
from neounify.lora.peft import save_lora
from neounify.model import NeoUnify
from neounify.pipeline import Pipeline, load
from neounify.text import byte_tokenizer
from neounify.train.log import Log
from neounify.train.loop import Trainer
from neounify.train.recipe import recipe_from_table
from neounify.train.setup import build_setup
from neounify.train.state import saved_states
from neounify.train.weights import new_model

CONFIG = SCENES.replace(
    hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, flow_head_width=32
)
EVERYWHERE = LoraConfig(rank=3, alpha=5.0, modules=(*LoraConfig().modules, "linear1", "lm_head"))


def pipeline(model: NeoUnify) -> Pipeline:
    return Pipeline(model, byte_tokenizer(), system_message="")


def generated(pipe: Pipeline) -> torch.Tensor:
    return pipe.generate("a red circle", steps=2).pixels


def filled(config: LoraConfig = EVERYWHERE, base: ModelConfig = CONFIG) -> NeoUnify:
    """A model whose adapters do something."""
    model = new_model(base, 0)
    add_lora(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.lora_B.copy_(torch.randn(module.lora_B.shape, generator=generator) / 10)
    return model.eval()


def test_fresh_adapters_change_nothing_at_all() -> None:
    model = new_model(CONFIG, 0).eval()
    before = generated(pipeline(model))
    names = add_lora(model, EVERYWHERE)
    assert len(names) == 2 * 2 * 7 + 2 + 1 + 1
    assert torch.equal(generated(pipeline(model)), before)


def test_an_adapter_computes_its_formula() -> None:
    model = filled()
    layer = model.get_submodule("layers.0.und.qkv.q_proj")
    assert isinstance(layer, LoraLinear)
    x = torch.randn(4, 32)
    wanted = x @ (layer.weight + 5.0 / 3 * layer.lora_B @ layer.lora_A).T
    torch.testing.assert_close(layer(x), wanted)


def test_merged_is_the_same() -> None:
    model = filled()
    before = generated(pipeline(model))
    merge_lora(model)
    assert not any(isinstance(m, LoraLinear) for m in model.modules())
    torch.testing.assert_close(generated(pipeline(model)), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_pipeline_loads_what_was_saved(tmp_path: Path, rslora: bool) -> None:
    config = LoraConfig(rank=3, alpha=5.0, rslora=rslora, modules=EVERYWHERE.modules)
    pipeline(new_model(CONFIG, 0)).save(tmp_path / "base")
    model = filled(config)
    save_lora(model, config, tmp_path / "adapter", "base")
    loaded = load(tmp_path / "base", lora=tmp_path / "adapter")
    merge_lora(model)
    ours, theirs = model.state_dict(), loaded.model.state_dict()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value)
    half = load(tmp_path / "base", lora=(tmp_path / "adapter", 0.5)).model.state_dict()
    name = "layers.0.gen.qkv.q_proj.weight"
    base = new_model(CONFIG, 0).state_dict()[name]
    torch.testing.assert_close(half[name] - base, (ours[name] - base) / 2)


def test_the_file_is_as_peft_writes_it(tmp_path: Path) -> None:
    save_lora(filled(), EVERYWHERE, tmp_path / "a", "some/base")
    document = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (document["peft_type"], document["r"], document["lora_alpha"]) == ("LORA", 3, 5.0)
    target = "language_model.model.layers.0.self_attn.q_proj_mot_gen"
    assert target in document["target_modules"]
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert tensors[f"base_model.model.{target}.lora_A.weight"].shape == (3, 32)
    assert tensors[f"base_model.model.{target}.lora_B.weight"].shape == (32, 3)


def test_streams_and_modules_are_chosen() -> None:
    model = new_model(CONFIG, 0)
    names = add_lora(model, LoraConfig(rank=2, streams=("gen",), modules=("v_proj",)))
    assert names == ["layers.0.gen.qkv.v_proj", "layers.1.gen.qkv.v_proj"]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.{half}" for n in names for half in ("lora_A", "lora_B")}
    with pytest.raises(ConfigError, match="no layer"):
        add_lora(new_model(CONFIG, 0), LoraConfig(modules=("eyes",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only plain LoRA"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_alpha": "big"}, "not the config"),
        ({"lora_alpha": float("nan")}, "NaN or infinite"),
    ],
)
def test_wrong_adapters_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    pipeline(new_model(CONFIG, 0)).save(tmp_path / "base")
    save_lora(filled(), EVERYWHERE, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "base", lora=tmp_path / "a")


def test_pickled_adapters_and_those_of_other_models_are_refused(tmp_path: Path) -> None:
    pipeline(new_model(CONFIG, 0)).save(tmp_path / "base")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="pickles"):
        load(tmp_path / "base", lora=tmp_path / "bin")
    wide = CONFIG.replace(hidden_size=64)
    save_lora(filled(base=wide), EVERYWHERE, tmp_path / "wide")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load(tmp_path / "base", lora=tmp_path / "wide")


def test_a_stage_trains_adapters_and_resumes_exactly(tmp_path: Path) -> None:
    pipeline(new_model(CONFIG, 0)).save(tmp_path / "base")
    parsed = recipe_from_table(
        {
            "name": "tune",
            "workers": 0,
            "model": {"checkpoint": str(tmp_path / "base")},
            "stages": [
                {
                    "name": "tune",
                    "steps": 6,
                    "method": {"tokens_per_pack": 600},
                    "save_every": 2,
                    "ema": 0.5,
                    "lora": {"rank": 2},
                    "optimizer": {"learning_rate": 1e-2},
                }
            ],
        }
    )

    def trainer(folder: Path) -> Trainer:
        log = Log(folder, Console(quiet=True), tensorboard=False)
        return Trainer(parsed, build_setup(parsed, torch.device("cpu"), folder), folder, log)

    trainer(tmp_path / "whole").run()
    trainer(tmp_path / "cut").run(stop_after=3)
    again = trainer(tmp_path / "cut")
    again.resume(saved_states(again.states)[-1])
    again.run()
    whole = load(tmp_path / "whole" / "model").model.state_dict()
    cut = load(tmp_path / "cut" / "model").model.state_dict()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    tuned = load(tmp_path / "base", lora=tmp_path / "whole" / "adapter").model.state_dict()
    base = load(tmp_path / "base").model.state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(tuned[name], value)
    changed = {name for name in whole if not torch.equal(whole[name], base[name])}
    assert changed
    assert all("_proj" in name for name in changed)
