"""Feeding: what cannot be fed is refused."""

import random

import pytest
import torch

from models import random_config, random_model
from neounify.cache import SequenceCache
from neounify.decode import Feed, feed


def test_a_feed_without_tokens_is_refused() -> None:
    model = random_model(random_config(random.Random(0)), 0)
    cache = SequenceCache(model.config, 4, dtype=model.dtype, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="at least one token"):
        feed(model, [Feed(cache, (), ())])
