"""The bundled model behind the HTTP API, and an untrained miniature."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
import torch

import neounify
from neounify.bundled import bundled_model
from neounify.config.presets import TINY
from neounify.model import NeoUnify
from neounify.serve.build import colocated
from neounify.serve.service import EngineService
from neounify.text import byte_tokenizer
from support.http_server import serving


@pytest.fixture(scope="session")
def bundled() -> neounify.Pipeline:
    return neounify.load(bundled_model(), dtype="float32")


@pytest.fixture(scope="session")
def bundled_service(bundled: neounify.Pipeline) -> EngineService:
    return colocated(bundled)


@pytest.fixture(scope="session")
def bundled_client(bundled_service: EngineService) -> Iterator[openai.OpenAI]:
    with serving(bundled_service) as client:
        yield client


@pytest.fixture(scope="session")
def tiny() -> neounify.Pipeline:
    torch.manual_seed(0)
    return neounify.Pipeline(NeoUnify(TINY).eval().requires_grad_(False), byte_tokenizer())
