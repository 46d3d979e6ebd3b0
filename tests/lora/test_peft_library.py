"""The real PEFT library and this package read each other's adapters. Skipped without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neounify.checkpoint import from_published, load_model, to_published
from neounify.lora import load_lora, lora_layers, merge_lora, save_lora
from neounify.lora.peft import convert_lora
from support.adapted import MODULES, adapted, everywhere, write_base
from support.checkpoint_folders import CONFIGS
from support.models import one_thread, random_model  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


class Tree(nn.Module):
    """The published code's names: every matrix as a layer, nested as its name says."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            *path, last, _ = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight.clone())
            module.add_module(last, layer)

    def forward(self, x: Tensor) -> Tensor:
        return x


def tree(kind: str) -> Tree:
    model = random_model(CONFIGS[kind], 0)
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return Tree({to_published(n): t for n, t in model.state_dict().items() if n in linear})


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", list(MODULES))
def test_peft_computes_the_same_with_our_file(
    peft: Any, kind: str, rslora: bool, tmp_path: Path
) -> None:
    config = everywhere(kind, rslora=rslora, dropout=0.5)
    model = adapted(kind, config)
    save_lora(model, config, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tree(kind), str(tmp_path / "adapter")).eval()
    base = theirs.get_base_model()
    for name, layer in lora_layers(model).items():
        other = base.get_submodule(to_published(f"{name}.weight").removesuffix(".weight"))
        assert hasattr(other, "lora_A")
        x = torch.randn(2, layer.in_features)
        plain = layer(x) if layer.bias is None else layer(x) - layer.bias
        torch.testing.assert_close(other(x), plain, rtol=1e-5, atol=1e-5)
    merge_lora(model)
    merged, state = theirs.merge_and_unload().state_dict(), model.state_dict()
    for published, tensor in merged.items():
        name = from_published(published) or ""
        torch.testing.assert_close(tensor, state[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj", "o_proj_mot_gen", "fm_head.0"], r".*mlp.*up_proj"])
def test_we_read_what_peft_writes(peft: Any, targets: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=7, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(tree("dense"), config)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ours = random_model(CONFIGS["dense"], 0)
    assert load_lora(ours, tmp_path / "adapter").alpha == 7
    base = write_base(tmp_path / "base", CONFIGS["dense"])
    loaded = load_model(base, lora=tmp_path / "adapter").state_dict()
    merge_lora(ours)
    state = ours.state_dict()
    for published, tensor in theirs.merge_and_unload().state_dict().items():
        name = from_published(published) or ""
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-5, atol=1e-5)


def test_peft_resumes_training_where_we_stopped(peft: Any, tmp_path: Path) -> None:
    save_lora(adapted(), everywhere(), tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(
        tree("dense"), str(tmp_path / "ours"), is_trainable=True
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            if "lora_" in name:
                parameter.mul_(2)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = random_model(CONFIGS["dense"], 0)
    load_lora(model, tmp_path / "theirs")
    for name, layer in lora_layers(adapted()).items():
        other = model.get_submodule(name)
        torch.testing.assert_close(other.lora_A, 2 * layer.lora_A)
        torch.testing.assert_close(other.lora_B, 2 * layer.lora_B)


def test_ranks_and_alphas_by_module(peft: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2,
        lora_alpha=7,
        target_modules=["q_proj", "up_proj", "fm_head.0"],
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 3, "fm_head.0": 4},
        alpha_pattern={"up_proj": 5, r".*layers\.1\.mlp\.up_proj": 11},
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(tree("dense"), config)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    base = write_base(tmp_path / "base", CONFIGS["dense"])
    loaded = load_model(base, lora=tmp_path / "adapter").state_dict()
    shapes = {name: tensor.shape for name, tensor in loaded.items()}
    convert_lora(tmp_path / "adapter", shapes, tmp_path / "ours", "peft")
    # Both are read anew: PEFT sorts its patterns while saving, and the first one counts.
    for folder in ("adapter", "ours"):
        model = peft.PeftModel.from_pretrained(tree("dense"), str(tmp_path / folder))
        for published, tensor in model.merge_and_unload().state_dict().items():
            name = from_published(published) or ""
            torch.testing.assert_close(loaded[name], tensor, rtol=1e-5, atol=1e-5)
