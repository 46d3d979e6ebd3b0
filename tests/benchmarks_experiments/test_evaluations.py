"""The table of rules that save evaluations, on the bundled model and on a toy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.evaluations import Row, main, psnr_table, rules, scene_table, verdict

from neounify.cli.toy import toy_pipeline
from neounify.config.presets import TINY
from neounify.config.sampling import SolverName
from neounify.evaluate.intervals import Difference
from neounify.flow.sampling import ImageSampling
from support import pixelumm


def test_every_rule_is_one() -> None:
    for steps in (1, 8, 40, 50):
        for settings in rules(steps).values():
            ImageSampling(**settings)
    assert "ab2 15" in " ".join(rules(50))


@pytest.mark.parametrize("solver", ["euler", "ab2", "dpm2m", "unipc"])
def test_every_rule_samples_with_the_solver_of_its_name(solver: SolverName) -> None:
    """Whatever that of the checkpoint is, which full and fast sampling keep."""
    of_solver = replace(TINY.sampling, steps=50, solver=solver)
    table = rules(50, solver)
    for name, settings in table.items():
        used = ImageSampling(**settings).resolve(TINY.replace(sampling=of_solver), editing=False)
        shown = name.partition(": ")[2] or name
        assert shown.lower().startswith(f"{used.solver} {used.steps}"), name
    first = ImageSampling().resolve(TINY.replace(sampling=of_solver), editing=False)
    assert next(iter(table)).lower() == f"{first.solver} {first.steps} (reference)"


def test_a_claim_needs_its_interval() -> None:
    assert verdict(Difference(0.0, -0.009, 0.009)) == "yes"
    assert verdict(Difference(0.0, -0.011, 0.011)) == "open"
    assert verdict(Difference(-0.03, -0.05, -0.011)) == "no"


def test_cases_are_paired() -> None:
    rows = [
        Row("full", 80.0, right=(True, True, True, False)),
        Row("fast", 40.0, right=(False, False, True, True)),
    ]
    assert "| fast | 40.0 | 50.0 (15.0–85.0) | 4 | 2, 1 | -25.0 (" in scene_table(rows)
    rows = [Row("full", 8.0, decibels=(30.0, 40.0)), Row("fast", 4.0, decibels=(31.0, 20.0))]
    assert "| fast | 4.0 | 25.5 dB (20.0–31.0) | 2 | 1 |" in psnr_table(rows)


def test_scenes_of_a_guided_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    base = Path(__file__).parents[2] / "recipes" / "scenes-base"
    words = ["--model", str(base), "--world", "default", "--cases", "1", "--rules", "fast third"]
    main([*words, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["evaluations"], len(row["right"])) for row in rows] == [(80, 4), (24, 4)]
    assert "| fast third: ab2 12 | 24.0 |" in capsys.readouterr().out


def test_prompts_of_any_other_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy_pipeline(seed=0).save(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a boat\n\na cat\n", encoding="utf-8")
    words = ["--model", tmp_path / "model", "--prompts", prompts, "--size", "64x32"]
    main([*map(str, words), "--rules", "half", "reuse"])
    shown = capsys.readouterr().out
    assert "| fast half: Euler " in shown
    assert shown.count(" dB (") == 3


def test_a_file_of_another_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pixelumm.saved(tmp_path / "model")
    weights = (folder / "model.safetensors").rename(tmp_path / "weights.safetensors")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a boat\n", encoding="utf-8")
    words = ["--model", weights, "--config", folder, "--prompts", prompts, "--size", "32x32"]
    main([*map(str, words), "--rules", "fast third", "Euler"])
    shown = capsys.readouterr().out
    assert "| dpm2m 3 (reference) | 6.0 |" in shown
    assert "| fast third: dpm2m 1 | 2.0 |" in shown
