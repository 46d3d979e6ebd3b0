"""Copies over sources: the keeper, chains, texts, evaluation sets, tables of earlier curations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neounify.curate import CurateError, curate
from neounify.curate.copies import Decisions, greedy
from neounify.curate.texts import language_of, measure_text, signature, similarity
from support.curation import (
    encoded,
    reasons_of,
    recipe_of,
    table_of,
    textured,
    write_samples,
)

WORDS = [f"word{number}" for number in range(400)]


def document(seed: int, length: int = 200) -> list[str]:
    return [str(word) for word in np.random.default_rng(seed).choice(WORDS, length)]


def test_the_largest_file_of_the_first_source_is_kept(tmp_path: Path) -> None:
    image = textured(1)
    small = encoded(image.crop((2, 2, 318, 318)), "PNG")
    one = write_samples(tmp_path / "one", [("a", small, "a view of one")])
    two = write_samples(tmp_path / "two", [("b", encoded(image), "a view of two")])
    three = write_samples(tmp_path / "three", [("c", encoded(image), "a view of three")])
    curate(recipe_of({"one": one, "two": two, "three": three}), tmp_path / "out")
    rows = {row["id"]: row for row in table_of(tmp_path / "out")}
    assert rows["b"]["verdict"] == "kept"
    assert (rows["a"]["reason"], rows["a"]["copy_of"]) == ("near.copy", "two/b")
    assert (rows["c"]["reason"], rows["c"]["copy_of"]) == ("exact.copy", "two/b")


def test_a_chain_is_cut_around_its_keepers() -> None:
    decisions = Decisions(np.zeros(4, np.int16), np.full(4, -1), np.full(4, np.nan))
    chain = np.array([(0, 1, 20), (1, 2, 20), (2, 3, 20)])
    greedy(chain[:, :2], chain[:, 2], np.arange(4), decisions, "near.copy")
    assert list(decisions.alive) == [True, False, True, False]
    assert list(decisions.copy_of) == [-1, 0, -1, 2]


def test_text_copies_are_found_and_strangers_are_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples: list[tuple[str, bytes | None, str]] = []
    for number in range(100):
        words = document(number)
        samples.append((f"a{number}", None, " ".join(words)))
        words[int(rng.integers(200))] = "changed"
        samples.append((f"b{number}", None, " ".join(words).upper() + "!"))
    path = write_samples(tmp_path / "in", samples)
    curate(recipe_of({"web": path}), tmp_path / "out")
    reasons = reasons_of(tmp_path / "out")
    count = sum(reasons[f"b{number}"] == "text.copy" for number in range(100))
    assert count >= 99
    assert all(reasons[f"a{number}"] is None for number in range(100))


def test_questions_about_one_image_are_copies_only_if_they_are_alike(tmp_path: Path) -> None:
    content = encoded(textured(3))
    words = " ".join(document(1, 30))
    samples = [("a", content, words), ("b", content, words), ("c", content, "How many stones?")]
    path = write_samples(tmp_path / "in", samples, role="input")
    other = write_samples(tmp_path / "other", [("d", encoded(textured(4)), words)], role="input")
    curate(recipe_of({"web": path, "more": other}), tmp_path / "out")
    expected = {"a": None, "b": "text.copy", "c": None, "d": None}
    assert reasons_of(tmp_path / "out") == expected


def test_samples_of_evaluation_sets_are_dropped(tmp_path: Path) -> None:
    question = " ".join(document(7, 40))
    test_set = write_samples(
        tmp_path / "test",
        [("e", encoded(textured(1)), "what evaluation asks for"), ("f", None, question)],
    )
    resized = encoded(textured(1).resize((400, 400)), "PNG")
    samples = [
        ("seen", resized, "another text of it"),
        ("asked", encoded(textured(2)), question),
        ("new", encoded(textured(3)), "a new text of it"),
    ]
    path = write_samples(tmp_path / "in", samples)
    sets = [{"kind": "jsonl", "path": str(test_set)}]
    stages = {"evaluation": {"sets": sets}, "quality": {"enabled": False}}
    curate(recipe_of({"web": path}, stages=stages), tmp_path / "out")
    expected = {"seen": "evaluation.image", "asked": "evaluation.text", "new": None}
    assert reasons_of(tmp_path / "out") == expected


def test_new_sources_are_compared_with_tables_of_earlier_ones(tmp_path: Path) -> None:
    first = write_samples(tmp_path / "first", [("a", encoded(textured(1)), "a view of one")])
    curate(recipe_of({"first": first}), tmp_path / "before")
    larger = encoded(textured(1).resize((400, 400)), "PNG")
    second = write_samples(
        tmp_path / "second",
        [("b", larger, "a view of it"), ("c", encoded(textured(2)), "a view of other")],
    )
    near = {"near": {"stored": [str(tmp_path / "before" / "table")]}}
    stages = {**near, "quality": {"enabled": False}}
    curate(recipe_of({"second": second}, stages=stages), tmp_path / "out")
    rows = table_of(tmp_path / "out")
    assert [row["reason"] for row in rows] == ["near.stored", None]
    assert rows[0]["copy_of"] == "stored/a"


def test_the_signature_estimates_similarity() -> None:
    errors = []
    for seed in range(60):
        words = document(seed, 300)
        changed = list(words)
        for at in np.random.default_rng(seed).integers(0, 300, seed % 20):
            changed[at] = "changed"
        pair = [" ".join(words), " ".join(changed)]
        runs = [{tuple(w[n : n + 5]) for n in range(296)} for w in (words, changed)]
        signatures = [np.frombuffer(signature(text) or b"", np.uint32) for text in pair]
        exact = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
        errors.append(float(similarity(*signatures)) - exact)
    # The standard error of 112 draws is at most 0.047.
    assert np.std(errors) < 0.06
    assert abs(np.mean(errors)) < 0.02


def test_measures_of_texts() -> None:
    row = measure_text("See https://a.example and www.b.example, see https://a.example")
    assert (row.urls, row.language) == (3, "en")
    assert measure_text("IMG_0012.JPG").file_name
    assert measure_text("dsc 42").file_name
    assert not measure_text("a photo.jpg of the sea").file_name
    assert measure_text("buy now " * 20).repetition > 0.9
    assert measure_text("a calm view of the sea").repetition == 0
    assert (measure_text("一只红色的猫").words, measure_text("一只红色的猫").language) == (6, "zh")


def test_languages_of_captions() -> None:
    captions = {
        "en": "two dogs sleep beside an old stove",
        "de": "ein Markt auf der Straße im Regen",
        "fr": "un bateau rouge sur un lac calme",
        "es": "un barco rojo en un lago tranquilo",
        "ru": "две собаки спят у старой печи",
        "uk": "сніг на дерев'яному мості",
        "ja": "夜の東京",
        "ko": "서울의 밤",
        "none": "12, 13!",
    }
    assert {language: language_of(text) for language, text in captions.items()} == {
        language: language for language in captions
    }
    assert language_of("Xq") == "none", "no feature of the model"


def test_an_unspaced_text_is_cut_in_characters() -> None:
    one, other = "今天天气很好我们去公园散步看花喝茶", "今天天气很好我们去公园散步看花喝酒"
    pair = [np.frombuffer(signature(text) or b"", np.uint32) for text in (one, other)]
    assert 0.6 < float(similarity(*pair)) < 1
    assert signature("…!") is None


def test_many_equal_texts_leave_one(tmp_path: Path) -> None:
    words = " ".join(document(11, 30))
    path = write_samples(tmp_path / "in", [(f"n{90 - n}", None, words) for n in range(80)])
    curate(recipe_of({"web": path}), tmp_path / "out")
    assert [name for name, reason in reasons_of(tmp_path / "out").items() if not reason] == ["n11"]


def test_many_like_texts_leave_one(tmp_path: Path) -> None:
    texts = []
    for number in range(80):
        words = document(12, 200)
        words[2 * number + 1] = f"other{number}"
        texts.append((f"n{90 - number}", None, " ".join(words)))
    path = write_samples(tmp_path / "in", list(texts))
    curate(recipe_of({"web": path}), tmp_path / "out")
    assert sum(reason is None for reason in reasons_of(tmp_path / "out").values()) == 1


def test_many_images_with_one_hash_leave_one(tmp_path: Path) -> None:
    pixels = np.asarray(textured(5, 256, 256))
    samples = []
    for number in range(70):
        changed = pixels.copy()
        changed[0, number, 0] ^= 1
        content = encoded(Image.fromarray(changed), "BMP")
        samples.append((f"n{90 - number}", content, f"stone {number}"))
    path = write_samples(tmp_path / "in", list(samples))
    curate(recipe_of({"web": path}), tmp_path / "out")
    reasons = reasons_of(tmp_path / "out")
    assert sum(reason is None for reason in reasons.values()) == 1
    assert sum(reason == "near.copy" for reason in reasons.values()) == 69


def test_a_copy_is_not_lost_with_a_keeper_whose_text_is_too_short(tmp_path: Path) -> None:
    large = textured(6, 400, 400)
    samples = [("large", encoded(large), "x"), ("small", encoded(textured(6, 360, 360)), "stones")]
    samples[1] = ("small", encoded(large.crop((2, 2, 398, 398))), "a view of stones")
    curate(recipe_of({"web": write_samples(tmp_path / "in", list(samples))}), tmp_path / "out")
    assert reasons_of(tmp_path / "out") == {"large": "near.copy", "small": None}


def test_equal_flat_images_of_an_evaluation_set_are_dropped(tmp_path: Path) -> None:
    """They have no sound hash; charts and pages are like them."""
    flat = encoded(Image.fromarray(np.full((300, 300, 3), 90, np.uint8)))
    path = write_samples(tmp_path / "in", [("chart", flat, "How many bars?")], role="input")
    test_set = write_samples(tmp_path / "test", [("e", flat, "Which is highest?")], role="input")
    sets = {"sets": [{"kind": "jsonl", "path": str(test_set)}]}
    curate(recipe_of({"web": path}, stages={"evaluation": sets}), tmp_path / "out")
    assert reasons_of(tmp_path / "out") == {"chart": "evaluation.image"}


def test_an_evaluation_set_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    path = write_samples(tmp_path / "in", [("a", encoded(textured(1)), "a fine view")])
    test_set = write_samples(tmp_path / "test", [("e", b"nothing", "a fine view")])
    sets = {"sets": [{"kind": "jsonl", "path": str(test_set)}]}
    with pytest.raises(CurateError, match="1 of 1 samples of source evaluation-0 cannot be read"):
        curate(recipe_of({"web": path}, stages={"evaluation": sets}), tmp_path / "out")
