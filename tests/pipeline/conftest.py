"""An untrained miniature for the tests of the tasks."""

import pytest
import torch

import neounify
from neounify.config.presets import TINY
from neounify.model import NeoUnify
from neounify.text import byte_tokenizer


@pytest.fixture(scope="session")
def pipe() -> neounify.Pipeline:
    torch.manual_seed(0)
    return neounify.Pipeline(NeoUnify(TINY).eval(), byte_tokenizer())
