"""Hooks: bounds, safety, what goes wrong in them, vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neounify.curate import CurateError, CurateRecipe, curate
from neounify.curate.hooks import load_hook
from support.curation import encoded, reasons_of, recipe_of, table_of, textured, write_samples

HERE = Path(__file__).parent


def hook(name: str, **settings: Any) -> dict[str, Any]:
    return {"hook": f"hooks_of_tests:{name}", **settings}


def recipe_with(
    folder: Path, texts: list[str], stages: dict[str, Any], **settings: Any
) -> CurateRecipe:
    samples = [(f"n{n}", encoded(textured(n)), text) for n, text in enumerate(texts)]
    path = write_samples(folder / "in", samples)
    return recipe_of({"web": path}, HERE, stages=stages, **settings)


def test_safety_drops_by_class_and_shows_nothing(tmp_path: Path) -> None:
    texts = ["a calm view", "a violent secret view", "never show this secret"]
    summary = curate(recipe_with(tmp_path, texts, {"safety": hook("safety")}), tmp_path / "out")
    assert summary.dropped == {"web": {"safety.bound": 1, "safety.never": 1}}
    rows = table_of(tmp_path / "out")
    assert dict(rows[0]["safety"][0]) == {"violence": 0.1, "minor_nudity": 0.0}
    assert rows[1]["safety"]
    assert not rows[2]["images"]
    assert rows[2]["safety"] is None
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "data:image" not in page
    assert "n2" not in page


def test_text_alone_is_checked_for_safety(tmp_path: Path) -> None:
    path = write_samples(
        tmp_path / "in",
        [("calm", None, "a long calm text of the sea"), ("bad", None, "a violent text of war")],
    )
    recipe = recipe_of({"web": path}, HERE, stages={"safety": hook("safety")})
    curate(recipe, tmp_path / "out")
    assert reasons_of(tmp_path / "out") == {"calm": None, "bad": "safety.bound"}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bounds_of_hooks(workers: int, tmp_path: Path) -> None:
    texts = ["a fine view 0.3", "a fine view 0.2", "a fine view 0.1"]
    stages = {
        "text": {"similarity": 1.0},
        "beauty": hook("Beauty", bound=3.0),
        "match": hook("match"),
    }
    curate(recipe_with(tmp_path, texts, stages), tmp_path / "out", workers=workers)
    assert reasons_of(tmp_path / "out") == {"n0": None, "n1": None, "n2": "match.bound"}
    assert [row["match"] for row in table_of(tmp_path / "out")] == [[0.3], [0.2], [0.1]]


def test_a_class_is_made_once() -> None:
    first = load_hook("hooks_of_tests:Beauty", HERE)
    assert load_hook("hooks_of_tests:Beauty", HERE) is first
    assert type(first).count == 1  # type: ignore[attr-defined]


def test_a_hook_that_fails_on_some_samples_drops_those_alone(tmp_path: Path) -> None:
    texts = ["one good view", "please raise now", "some nan value", "two hang here", "a last view"]
    stages = {"watermark": hook("odd", timeout=0.5)}
    curate(recipe_with(tmp_path, texts, stages), tmp_path / "out")
    rows = {row["id"]: row for row in table_of(tmp_path / "out")}
    assert [rows[f"n{n}"]["reason"] for n in (0, 4)] == [None, None]
    for number, why in ((1, "the text says so"), (2, "not finite"), (3, "longer than 0.5 s")):
        assert rows[f"n{number}"]["reason"] == "watermark.failed"
        assert why in rows[f"n{number}"]["detail"]


def test_a_broken_hook_is_one_error(tmp_path: Path) -> None:
    texts = [f"view number {n}" for n in range(9)]
    recipe = recipe_with(tmp_path, texts, {"watermark": hook("broken")})
    with pytest.raises(CurateError, match=r"failed on 9 of 9 images .* no weights here"):
        curate(recipe, tmp_path / "out")


@pytest.mark.parametrize("name", ["missing_module:hook", "hooks_of_tests:missing"])
def test_a_hook_that_cannot_be_loaded_is_one_error(name: str, tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, ["a fine view"], {"watermark": {"hook": name}})
    with pytest.raises(CurateError, match=name):
        curate(recipe, tmp_path / "out")


def test_like_vectors_are_copies(tmp_path: Path) -> None:
    texts = ["looking nearly", "looking north", "looking east"]
    curate(recipe_with(tmp_path, texts, {"embeddings": hook("vectors")}), tmp_path / "out")
    rows = table_of(tmp_path / "out")
    assert [row["reason"] for row in rows] == ["embeddings.bound", None, None]
    assert rows[0]["copy_of"] == "web/n1", "the larger file"
    assert rows[0]["distance"] == pytest.approx(1 - 0.99 / (0.99**2 + 0.1**2) ** 0.5, abs=1e-6)


def test_a_copy_of_an_unsafe_image_is_unsafe(tmp_path: Path) -> None:
    image = textured(1)
    samples = [
        ("large", encoded(image), "never show this"),
        ("copy", encoded(image.crop((2, 2, 318, 318))), "a secret view of it"),
    ]
    path = write_samples(tmp_path / "in", list(samples))
    recipe = recipe_of({"web": path}, HERE, stages={"safety": hook("safety")})
    summary = curate(recipe, tmp_path / "out")
    assert summary.dropped == {"web": {"safety.never": 2}}
    assert "data:image" not in (tmp_path / "out" / "report.html").read_text("utf-8")
    assert [row["images"] for row in table_of(tmp_path / "out")] == [[], []]


def test_the_largest_of_like_vectors_is_kept(tmp_path: Path) -> None:
    samples = [
        ("small", encoded(textured(1)), "looking north"),
        ("large", encoded(textured(2, 400, 400)), "looking nearly"),
    ]
    path = write_samples(tmp_path / "in", list(samples))
    recipe = recipe_of({"web": path}, HERE, stages={"embeddings": hook("vectors")})
    curate(recipe, tmp_path / "out")
    assert reasons_of(tmp_path / "out") == {"small": "embeddings.bound", "large": None}


def test_vectors_of_different_lengths_are_one_error(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, ["view 1", "a view 22"], {"embeddings": hook("uneven")})
    with pytest.raises(CurateError, match=r"vectors of \[6, 9\] values"):
        curate(recipe, tmp_path / "out")


def test_a_hook_that_always_hangs_is_one_error(tmp_path: Path) -> None:
    texts = [f"two hang here {n}" for n in range(12)]
    recipe = recipe_with(tmp_path, texts, {"watermark": hook("odd", timeout=0.05)})
    with pytest.raises(CurateError, match="8 calls one after the other"):
        curate(recipe, tmp_path / "out")


def test_a_hook_cannot_swallow_its_timeout(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, ["a view"], {"watermark": hook("stubborn", timeout=0.2)})
    curate(recipe, tmp_path / "out")
    (row,) = table_of(tmp_path / "out")
    assert (row["reason"], row["detail"]) == (
        "watermark.failed",
        "HookTimeout: took longer than 0.2 s",
    )
