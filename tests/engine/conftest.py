"""An untrained miniature."""

from __future__ import annotations

import pytest
import torch

import neounify
from neounify.config.presets import TINY
from neounify.model import NeoUnify
from neounify.text import byte_tokenizer


@pytest.fixture(scope="session")
def pipe() -> neounify.Pipeline:
    torch.manual_seed(0)
    model = NeoUnify(TINY).eval().requires_grad_(False)
    return neounify.Pipeline(model, byte_tokenizer(), system_message="Paint well.")
