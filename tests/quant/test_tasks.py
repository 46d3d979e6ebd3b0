"""Every task of a quantised model, in one thread and in the service, whole and by stream."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

import neounify
from neounify.bundled import bundled_model
from neounify.checkpoint.quantised_layers import quant_modules
from neounify.evaluate.metrics import psnr
from neounify.flow.sampling import ImageSampling
from neounify.serve.build import colocated
from neounify.tasks.chat import make_chat_request
from neounify.tasks.image import ImageRequest
from support.serving import collect, serve

PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def plain() -> neounify.Pipeline:
    return neounify.load(bundled_model(), dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "int8"
    neounify.load(bundled_model(), dtype="stored", quantise="int8").save(path)
    return path


@pytest.fixture(scope="module")
def coded(folder: Path) -> neounify.Pipeline:
    pipe = neounify.load(folder, dtype="float32")
    assert len(quant_modules(pipe.model)) == 14 * pipe.config.num_layers
    return pipe


def test_images_edits_answers_and_stories(
    plain: neounify.Pipeline, coded: neounify.Pipeline
) -> None:
    images = [np.asarray(pipe.generate(PROMPT, seed=2).images[0]) for pipe in (plain, coded)]
    assert 30 < psnr(images[0], images[1]) < 100
    source = plain.generate(PROMPT, seed=2).images[0]
    edits = [
        np.asarray(pipe.edit("make the circle green", source, seed=1).images[0])
        for pipe in (plain, coded)
    ]
    assert 25 < psnr(edits[0], edits[1]) < 100
    answers = [pipe.chat("What colour is the circle?", [source]).text for pipe in (plain, coded)]
    assert answers[0] == answers[1]
    story = coded.interleave("Tell a story in two pictures with a red circle.", max_new_tokens=60)
    assert list(story)


def test_by_stream_and_in_layers_it_is_the_same(folder: Path, coded: neounify.Pipeline) -> None:
    expected = coded.generate(PROMPT, seed=2).pixels
    for memory in ("stream", "layers"):
        pipe = neounify.load(folder, dtype="float32", memory=memory)
        assert bool((pipe.generate(PROMPT, seed=2).pixels == expected).all()), memory


def test_the_service_gives_the_same(coded: neounify.Pipeline) -> None:
    sampling = ImageSampling().resolve(coded.config, editing=False)
    request = ImageRequest(prompt=PROMPT, width=64, height=64, sampling=sampling, seed=2)
    served = serve(colocated(coded), partial(collect, request=request))
    expected = coded.generate(PROMPT, width=64, height=64, seed=2).pixels
    assert served.images
    np.testing.assert_allclose(served.images[0].numpy(), expected[0].numpy(), atol=1e-4)
    question = make_chat_request("How many objects are there?", [], max_new_tokens=8)
    assert serve(colocated(coded), partial(collect, request=question)).text
