"""The page on one's own data is run as it stands; what goes wrong is one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from neounify.bundled import bundled_model
from neounify.cli.app import app
from support.own_data import png, text_record, write_lines

PAGE = Path(__file__).parents[2] / "docs" / "own-data.md"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a clone, as far as the page needs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEOUNIFY_MODEL", raising=False)
    (tmp_path / "src" / "neounify" / "bundled").mkdir(parents=True)
    (tmp_path / "src" / "neounify" / "bundled" / "scenes").symlink_to(bundled_model())
    return tmp_path


def neounify(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.slow
def test_the_page_runs_as_it_stands(here: Path) -> None:
    names: dict[str, object] = {}
    commands = 0
    for language, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), names)
        elif language == "toml":
            (here / text.splitlines()[0].removeprefix("# ")).write_text(text, encoding="utf-8")
        else:
            for command in text.splitlines():
                words = [a or b for a, b in re.findall(r'"([^"]*)"|(\S+)', command)]
                result = neounify(*words[1:])
                assert result.exit_code == 0, f"{command}\n{result.output}"
                commands += 1
    assert commands == 12
    assert (here / "mine" / "wall.png").is_file()
    assert (here / "mine" / "bar.mp4").stat().st_size > 500
    assert "64x64, 8 frames, 32 tokens, to generate" in (here / "mine" / "clips.html").read_text()
    samples = {file.name for file in (here / "mine" / "clips-run" / "samples").iterdir()}
    assert {"step-00000004-clips.png", "step-00000004-1.mp4"} <= samples
    for folder in ("shards", "forms-run", "clips-run"):
        assert not (here / "mine" / folder / "skipped.txt").exists()
    assert "<mark>Nothing." in (here / "mine" / "preview.html").read_text(encoding="utf-8")
    lines = (here / "mine" / "run" / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records if r["kind"] == "train"] == [10, 20, 30]


def write_recipe(folder: Path, data: Path, **stage: object) -> Path:
    values = {"steps": 6, "tokens_per_pack": 128, "log_every": 2, "save_every": 2, **stage}
    settings = "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())
    recipe = folder / "r.toml"
    recipe.write_text(
        f'name = "r"\nworkers = 0\nkeep = 3\n[model]\ncheckpoint = "{bundled_model()}"\n'
        f'[[stages]]\nname = "s"\n{settings}\n[[stages.data]]\nkind = "jsonl"\npath = "{data}"\n'
    )
    return recipe


def test_damaged_samples_are_shown_once_and_counted(here: Path) -> None:
    damaged = ['{"conversations": [broken', text_record("c", imgae="a.png")]
    data = write_lines(here / "d.jsonl", [text_record("a"), *damaged, text_record("b")])
    result = neounify("train", str(write_recipe(here, data)), "--out", "run")
    assert result.exit_code == 0, result.output
    for line in ("line 2", "line 3"):
        assert result.stderr.count(f"skipped d.jsonl, {line}:") == 1
    assert 'did you mean "image"' in result.stderr
    assert "2 damaged samples skipped" in result.stderr
    assert "d.jsonl: 2 of 4 samples usable (50 %), 2 listed in skipped.txt" in result.stderr
    skipped = (here / "run" / "skipped.txt").read_text().splitlines()
    assert len(skipped) == 2
    records = [json.loads(x) for x in (here / "run" / "log.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "train"][-1]
    assert last["skipped"] == {"d.jsonl": 2}
    assert last["damaged_samples"] == 2 < last["damaged"]


def test_a_share_of_damaged_samples_above_that_of_the_recipe_ends_the_run(here: Path) -> None:
    damaged = [text_record("c", imgae="a.png"), text_record("c", tools="x")]
    data = write_lines(here / "d.jsonl", [text_record("a"), *damaged, text_record("b")])
    recipe = write_recipe(here, data)
    recipe.write_text(recipe.read_text() + "max_skipped = 0.4\n")
    result = neounify("train", str(recipe), "--out", "run")
    assert result.exit_code == 1
    words = "d.jsonl: 2 of 4 samples cannot be used (50.0%), more than max_skipped allows (40.0%)"
    assert words in result.stderr
    records = [json.loads(x) for x in (here / "run" / "log.jsonl").read_text().splitlines()]
    (counts,) = records[-1]["skipped_by_reason"].values()
    assert sorted(counts.values()) == [1, 1]
    assert neounify("report", "run").exit_code == 0
    page = (here / "run" / "report.html").read_text(encoding="utf-8")
    assert all(f"<td class=n>1<td>{reason}" in page for reason in counts)


def test_a_damaged_state_is_named_and_the_one_before_it_taken(here: Path) -> None:
    data = write_lines(here / "d.jsonl", [text_record(f"q{n}") for n in range(5)])
    recipe = str(write_recipe(here, data))
    assert neounify("train", recipe, "--out", "whole").exit_code == 0
    assert neounify("train", recipe, "--out", "run").exit_code == 0
    newest = here / "run" / "states" / "step-00000006" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1000])
    result = neounify("train", recipe, "--out", "run", "--resume", "auto")
    assert result.exit_code == 0, result.output
    assert "passed over: the training state step-00000006 is damaged" in result.stderr
    assert "step-00000004" in result.stderr
    one, two = (
        (here / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "run")
    )
    assert one == two
    for target in (".", "run", "run/states"):
        result = neounify("train", recipe, "--out", "run", "--export", target)
        assert "which is read; write to another folder" in result.stderr
    export = ("train", recipe, "--out", "run", "--export", "exported")
    assert neounify(*export).exit_code == 0
    again = neounify(*export)
    assert "exported is not empty; choose another folder, or add --overwrite" in again.stderr
    assert neounify(*export, "--overwrite").exit_code == 0
    alone = neounify("train", recipe, "--out", "run", "--overwrite")
    assert "--overwrite is for --export" in alone.stderr
    for state in (here / "run" / "states").iterdir():
        (state / "state.json").write_text("{")
    result = neounify("train", recipe, "--out", "run", "--resume", "auto")
    assert result.exit_code == 1
    assert "all 3 states" in result.stderr
    assert neounify("train", recipe, "--out", "run", "--export", "x").exit_code == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps([text_record("q")]), "one JSON array"),
        ("\n".join(json.dumps({"messages": []}) for _ in range(20)), '"messages"'),
        (json.dumps(text_record("word " * 300)), "Raise tokens_per_pack to at least"),
    ],
)
def test_data_that_is_all_wrong_ends_at_once_in_one_line(
    here: Path, content: str, words: str
) -> None:
    (here / "d.jsonl").write_text(content + "\n")
    for command in (("train", "--out", "run"), ("doctor",)):
        result = neounify(command[0], str(write_recipe(here, here / "d.jsonl")), *command[1:])
        assert result.exit_code == 1
        assert words in result.output
        assert "Traceback" not in result.output
    assert not (here / "run" / "log.jsonl").exists()


def test_images_larger_than_a_pack_are_reported_with_both_ways_out(here: Path) -> None:
    (here / "a.png").write_bytes(png(256, 256))
    data = write_lines(here / "d.jsonl", [text_record("x", "<image>", image="a.png")])
    result = neounify("train", str(write_recipe(here, data, tokens_per_pack=40)), "--out", "run")
    assert result.exit_code == 1
    for words in (
        "256x256 pixels has 256",
        "tokens_per_pack 40",
        "Raise tokens_per_pack",
        "target_pixels",
    ):
        assert words in result.stderr


@pytest.mark.parametrize("command", ["train", "doctor"])
def test_a_device_that_is_not_there_is_one_line(here: Path, command: str) -> None:
    data = write_lines(here / "d.jsonl", [text_record("q")])
    result = neounify(command, str(write_recipe(here, data)), "--device", "cudaa")
    assert result.exit_code == 1
    assert "device 'cudaa' cannot be used here" in result.stderr
    assert "Traceback" not in result.output


def test_a_time_that_is_no_time_is_refused(here: Path) -> None:
    data = write_lines(here / "d.jsonl", [text_record("q")])
    result = neounify("doctor", str(write_recipe(here, data)), "--seconds", "nan")
    assert result.exit_code == 2


def test_old_field_names_of_a_recipe_are_noted(here: Path) -> None:
    data = write_lines(here / "d.jsonl", [text_record("a")])
    recipe = write_recipe(here, data, noise_draws=2, most_nonfinite=3)
    result = neounify("doctor", str(recipe), "--stage", "none")
    assert result.exit_code == 2
    assert "stages.0: noise_draws is deprecated, use method.noise_draws" in result.stderr
    assert "stages.0: most_nonfinite is deprecated, use max_nonfinite" in result.stderr
