"""Low-rank adapters (LoRA): trained in place of the weights, stored in PEFT's format."""
