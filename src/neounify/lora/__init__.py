"""Low-rank adapters (LoRA): trained in place of the weights, stored in PEFT's format."""

from neounify.lora.layers import (
    LoraConfig,
    LoraLinear,
    add_lora,
    lora_layers,
    merge_lora,
    merged_lora,
    trainable_only_lora,
    weight_name,
)
from neounify.lora.peft import convert_lora, load_lora, save_lora

__all__ = [
    "LoraConfig",
    "LoraLinear",
    "add_lora",
    "convert_lora",
    "load_lora",
    "lora_layers",
    "merge_lora",
    "merged_lora",
    "save_lora",
    "trainable_only_lora",
    "weight_name",
]
