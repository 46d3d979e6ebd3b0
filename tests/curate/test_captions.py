"""Captions by the bundled model of made scenes: better scores for what the image shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neounify.bundled import bundled_model
from neounify.curate import curate
from neounify.curate.captions import likelihood_gains, whole_sentences
from neounify.data.shards import ShardData
from neounify.image import read_image
from neounify.pipeline import load
from neounify.scenes.world.samples import SceneDataset
from neounify.scenes.world.scene import scene_config
from support.curation import encoded, recipe_of, table_of, write_samples

OPEN = {
    "geometry": {"min_side": 32},
    "quality": {"enabled": False},
    "near": {"min_quality": 100},
}
COUNT = 8
QUESTION = "Describe the image in detail."


def scenes(count: int) -> list[tuple[bytes, str]]:
    """Images of the world with their captions."""
    source = SceneDataset(5, scene_config("default"), {"t2i": 1.0})
    samples = [source[number] for number in range(count)]
    return [
        (encoded(Image.fromarray(s.images[0].pixels())), s.text("user").strip()) for s in samples
    ]


@pytest.fixture(scope="module")
def scenery() -> list[tuple[bytes, str]]:
    return scenes(COUNT)


def test_the_likelihood_prefers_the_caption_of_the_image(scenery: list[tuple[bytes, str]]) -> None:
    pipeline = load(bundled_model(), dtype="float32")
    images = [read_image(content) for content, _ in scenery]
    texts = [answer.text for answer in pipeline.chat_batch([QUESTION] * COUNT, images)]
    assert len(set(texts)) == COUNT
    gains = np.array([likelihood_gains(pipeline, image, texts, QUESTION) for image in images])
    assert np.array_equal(np.argmax(gains, axis=1), np.arange(COUNT))
    assert (np.diag(gains) > 10).all()


def test_wrong_captions_are_replaced_and_both_are_kept(
    scenery: list[tuple[bytes, str]], tmp_path: Path
) -> None:
    texts = [text for _, text in scenery]
    mixed = texts[1:] + texts[:1]
    samples = [(f"n{n}", content, mixed[n]) for n, (content, _) in enumerate(scenery)]
    path = write_samples(tmp_path / "in", samples)
    captions = {"model": str(bundled_model()), "share": 1.0}
    recipe = recipe_of({"web": path}, stages={**OPEN, "captions": captions}, samples_per_unit=4)
    curate(recipe, tmp_path / "out")
    rows = [row for row in table_of(tmp_path / "out") if row["verdict"] == "kept"]
    assert len(rows) == COUNT
    better = 0
    for row in rows:
        kinds = {caption["kind"]: caption for caption in row["captions"]}
        assert next(iter(kinds)) == "old"
        assert {"short", "full"} <= set(kinds)
        best = max((c for k, c in kinds.items() if k != "old"), key=lambda c: c["score"])
        assert row["caption"] == best["text"]
        better += best["score"] > kinds["old"]["score"]
    assert better >= COUNT - 1
    source = ShardData(path=str(tmp_path / "out" / "shards")).build()
    assert [source[n].text("user") for n in range(source.size)] == [row["caption"] for row in rows]


def test_a_share_keeps_its_old_caption(scenery: list[tuple[bytes, str]], tmp_path: Path) -> None:
    samples = [(f"n{n}", content, text) for n, (content, text) in enumerate(scenery)]
    path = write_samples(tmp_path / "in", samples)
    captions = {"model": str(bundled_model()), "share": 0.0}
    curate(recipe_of({"web": path}, stages={**OPEN, "captions": captions}), tmp_path / "out")
    rows = [row for row in table_of(tmp_path / "out") if row["verdict"] == "kept"]
    assert [row["caption"] for row in rows] == [text for _, text in scenery]


def test_captions_end_with_a_sentence() -> None:
    assert whole_sentences("A red boat. It lies  still. The la") == "A red boat. It lies still."
    assert whole_sentences("a red boat on the") == "a red boat on the"
