"""Inputs that cannot be computed are refused."""

import random

import pytest
import torch

from neounify.cache import SequenceCache
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import forward_und
from support.models import random_config, random_model


def test_an_input_without_tokens_is_refused() -> None:
    model = random_model(random_config(random.Random(0)), 0)
    cache = SequenceCache(model.config, 4, dtype=model.compute_dtype, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"at least one new token, got \[0\]"):
        forward_und(model, [ModelInput(cache, (), ())])
