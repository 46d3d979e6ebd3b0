"""Runs: layouts on disk, seeds, shards, resuming after kills, failures that are tried again."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from neounify.bench import (
    ADAPTERS,
    BenchError,
    Case,
    Plan,
    PromptFiles,
    begin,
    load_cases,
    run,
)
from neounify.bench.runner import finished, sample, sample_seed
from neounify.bench.subjects import Image, Job
from neounify.errors import PromptError
from neounify.files import FolderInUse, locked_folder
from neounify.services import NoAnswer
from support.bench import Painter, solid

GENEVAL = ADAPTERS["geneval"]


def geneval(folder: Path, number: int = 7) -> list[Case]:
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(f'{{"tag": "t", "prompt": "p{n}"}}\n' for n in range(number)))
    return GENEVAL.cases(PromptFiles(path), "mine", 2)


def go(cases: Sequence[Case], subject: Any, folder: Path, **plan: Any) -> Any:
    return run(GENEVAL, cases, subject, folder, 5, Plan(folder=folder, **plan))


def files(folder: Path) -> dict[str, bytes]:
    """The images of a run by name."""
    images = folder / "images"
    return {p.relative_to(images).as_posix(): p.read_bytes() for p in images.rglob("*.*")}


def test_outputs_have_the_names_that_the_scorer_reads(tmp_path: Path) -> None:
    cases = geneval(tmp_path, 2)
    summary = go(cases, Painter(), tmp_path / "run", batch_size=1)
    assert (summary.total, summary.finished, summary.failures) == (2, 2, {})
    assert sorted(files(tmp_path / "run")) == [
        f"0000{case}/{name}"
        for case in (0, 1)
        for name in ("metadata.jsonl", "samples/00000.png", "samples/00001.png")
    ]
    record = finished(tmp_path / "run")["00001"]
    assert record["seeds"] == [sample_seed(5, "00001", 0), sample_seed(5, "00001", 1)]
    image = PIL.Image.open(tmp_path / "run/images/00001/samples/00001.png")
    assert image.tobytes() == solid(record["seeds"][1]).tobytes()


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_and_batches_change_no_output(shards: int, tmp_path: Path) -> None:
    cases = geneval(tmp_path)
    whole = tmp_path / "whole"
    go(cases, Painter(), whole, batch_size=4)
    asked: list[str] = []
    for shard in range(shards):
        painter = Painter()
        go(cases, painter, tmp_path / "parts", shard=(shard, shards), batch_size=2)
        asked += [job.prompt for job in painter.jobs]
    assert files(tmp_path / "parts") == files(whole)
    assert sorted(asked) == sorted([c.prompt for c in cases] * 2), "each prompt once, two samples"


class Dies(Painter):
    """Killed while it makes its fourth image."""

    def images(self, jobs: Sequence[Job]) -> list[Image]:
        if len(self.jobs) >= 3:
            raise KeyboardInterrupt
        return super().images(jobs)


def test_a_run_that_was_killed_goes_on_where_it_ended(tmp_path: Path) -> None:
    cases, folder = geneval(tmp_path), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        go(cases, Dies(), folder, batch_size=1)
    log = folder / "log/0-of-1/log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"id": "00002", "see')  # cut off by the kill
    (folder / "images/00001/samples/00000.png").unlink()
    again = Painter()
    assert go(cases, again, folder, batch_size=1).finished == 7
    assert {job.prompt for job in again.jobs} == {f"p{n}" for n in range(1, 7)}
    go(cases, Painter(), tmp_path / "whole")
    assert files(folder) == files(tmp_path / "whole")
    rested = Painter()
    go(cases, rested, folder, shard=(0, 2))
    assert rested.jobs == [], "other shards do not repeat what is finished"


class Refuses(Painter):
    """Refuses some prompts, in a batch and alone."""

    def __init__(self, *prompts: str) -> None:
        super().__init__()
        self.prompts = prompts

    def images(self, jobs: Sequence[Job]) -> list[Image]:
        if bad := [job.prompt for job in jobs if job.prompt in self.prompts]:
            raise PromptError(f"{bad[0]} is refused")
        return super().images(jobs)


def test_a_case_that_fails_costs_itself_and_is_tried_again(tmp_path: Path) -> None:
    cases = geneval(tmp_path)
    summary = go(cases, Refuses("p2", "p5"), tmp_path / "run", batch_size=4)
    assert summary.finished == 5
    assert summary.failures == {"00002": "p2 is refused", "00005": "p5 is refused"}
    painter = Painter()
    assert go(cases, painter, tmp_path / "run").failures == {}
    assert {job.prompt for job in painter.jobs} == {"p2", "p5"}


def test_what_failed_is_tried_last(tmp_path: Path) -> None:
    """Cases that a model can never do must not keep it from the others."""
    cases = geneval(tmp_path)
    go(cases[:3], Refuses("p0", "p1"), tmp_path / "run")
    painter = Painter()
    go(cases, painter, tmp_path / "run", batch_size=1)
    asked = list(dict.fromkeys(job.prompt for job in painter.jobs))
    assert asked == ["p3", "p4", "p5", "p6", "p0", "p1"]


class Silent(Painter):
    """A service that never answers."""

    def images(self, jobs: Sequence[Job]) -> list[Image]:
        self.jobs += jobs
        raise NoAnswer("connection refused, 5 times")


def test_a_model_that_is_not_there_ends_the_run_early(tmp_path: Path) -> None:
    cases, silent = geneval(tmp_path), Silent()
    with pytest.raises(BenchError, match=r"gives no answer \(connection refused.*same command"):
        go(cases, silent, tmp_path / "run", batch_size=1)
    assert len(silent.jobs) == 2 * 3
    assert go(cases, Painter(), tmp_path / "run").finished == 7


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    cases, folder = geneval(tmp_path), tmp_path / "run"
    about = {"benchmark": "geneval", "seed": 5, "model": {"fingerprint": "a"}}
    begin(folder, about, cases, tmp_path / "one")
    begin(folder, about, cases, tmp_path / "moved")
    for change, named in (
        ({"model": {"fingerprint": "b"}}, "model differ"),
        ({"seed": 6}, "seed differ"),
    ):
        with pytest.raises(BenchError, match=named):
            begin(folder, about | change, cases, tmp_path)
    with pytest.raises(BenchError, match="cases differ"):
        begin(folder, about, cases[:3], tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    cases, folder = geneval(tmp_path), tmp_path / "run"
    (folder / "images").mkdir(parents=True)
    with pytest.raises(BenchError, match="has images of something else"):
        begin(folder, {}, cases, tmp_path)
    (folder / "images").rmdir()
    begin(folder, {}, cases, tmp_path)
    (folder / "cases.jsonl").unlink()  # as a kill between the two files leaves it
    begin(folder, {}, cases, tmp_path)
    assert load_cases(folder) == cases


def test_two_processes_do_not_share_a_shard(tmp_path: Path) -> None:
    cases = geneval(tmp_path)
    with locked_folder(tmp_path / "run/log/0-of-1"), pytest.raises(FolderInUse):
        go(cases, Painter(), tmp_path / "run")


@pytest.mark.parametrize("options", [{"shard": (2, 2)}, {"shard": (-1, 2)}, {"batch_size": 0}])
def test_plans_that_cannot_be_run(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BenchError):
        Plan(folder=tmp_path, **options)


# --- grids, edits, interleaved answers ---


def test_a_grid_holds_the_samples_row_by_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("prompt")
    adapter, folder = ADAPTERS["dpg"], tmp_path / "run"
    cases = adapter.cases(PromptFiles(tmp_path), "mine")
    run(adapter, cases, Painter(), folder, 0, Plan(folder=tmp_path))
    image = np.asarray(PIL.Image.open(folder / "images/a.png"))
    assert image.shape == (16, 16, 3)
    parts = [np.asarray(solid(sample_seed(0, "a", n))) for n in range(4)]
    assert (image[:8, 8:] == parts[1]).all()
    assert (image[8:, :8] == parts[2]).all()
    for number, part in enumerate(parts):
        assert (sample(adapter, cases[0], folder, number) == part).all()


def test_lossless_webp_of_oneig(tmp_path: Path) -> None:
    path = tmp_path / "OneIG-Bench.csv"
    path.write_text("category,id,prompt_en\nPortrait,001,p\n")
    adapter, folder = ADAPTERS["oneig"], tmp_path / "run"
    cases = adapter.cases(PromptFiles(path), "mine")
    run(adapter, cases, Painter(), folder, 0, Plan(folder=tmp_path))
    with PIL.Image.open(folder / "images/human/mine/001.webp") as image:
        assert image.format == "WEBP"
    first = sample(adapter, cases[0], folder, 0)
    assert (first == np.asarray(solid(sample_seed(0, "human/001", 0)))).all()


def test_an_edit_sees_its_input_and_keeps_a_copy(tmp_path: Path) -> None:
    record = {"task_type": "t", "key": "k", "instruction": "i", "instruction_language": "en"}
    (tmp_path / "info.jsonl").write_text(json.dumps(record | {"image": "in.png"}))
    solid(77).save(tmp_path / "in.png")
    adapter, folder = ADAPTERS["gedit"], tmp_path / "run"
    cases = adapter.cases(PromptFiles(tmp_path / "info.jsonl"), "mine")
    painter = Painter(lambda job: job.images[0].transpose(PIL.Image.Transpose.ROTATE_90))
    run(adapter, cases, painter, folder, 0, Plan(folder=tmp_path))
    source = PIL.Image.open(folder / "images/mine/fullset/t/en/k_SRCIMG.png")
    assert source.tobytes() == solid(77).tobytes()
    assert (folder / "images/mine/fullset/t/en/k.png").is_file()


def test_outputs_that_fit_no_file_fail_their_case(tmp_path: Path) -> None:
    (tmp_path / "OneIG-Bench.csv").write_text(
        "category,id,prompt_en\nPortrait,1,odd\nPortrait,2,large\nPortrait,3,fine\n"
    )
    adapter, folder = ADAPTERS["oneig"], tmp_path / "run"
    cases = adapter.cases(PromptFiles(tmp_path), "mine")

    def paint(job: Job) -> Image:
        if job.prompt == "large":
            return PIL.Image.new("RGB", (8192, 1))
        return solid(1, 8 + (job.prompt == "odd" and job.seed % 2))

    summary = run(adapter, cases, Painter(paint), folder, 3, Plan(folder=tmp_path))
    assert summary.finished == 1
    assert "make no grid" in summary.failures["human/1"]
    assert "WEBP has no image of (16384, 2) pixels" in summary.failures["human/2"]


@pytest.mark.parametrize("image", ["../in.png", "/etc/hostname", "absent.png", "bad.png"])
def test_inputs_that_cannot_be_read_fail_their_case(image: str, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    solid(1).save(tmp_path / "in.png")
    (folder / "bad.png").write_bytes(b"no image")
    item = {"id": image, "prompt": "p", "edit_type": "e"}
    (folder / "basic_edit.json").write_text(json.dumps({"1": item}))
    adapter = ADAPTERS["imgedit"]
    cases = adapter.cases(PromptFiles(folder / "basic_edit.json"), "mine")
    summary = run(adapter, cases, Painter(), tmp_path / "run", 0, Plan(folder=folder))
    assert list(summary.failures) == ["1"]
    assert image.split("/")[-1] in summary.failures["1"]


def test_an_interleaved_answer_is_the_record_with_its_output(tmp_path: Path) -> None:
    steps = [{"text": "<BEGIN> Go. <image>", "image": "in.png"}, {"text": "On.", "image": None}]
    wanted = {"output": [{"text": "x", "image": "o.jpg"}]}
    record = {"total_uid": "15", "meta_task_name": "m", "conversations": [{"input": steps}, wanted]}
    (tmp_path / "test_data.jsonl").write_text(json.dumps(record))
    solid(1).save(tmp_path / "in.png")
    adapter, folder = ADAPTERS["opening"], tmp_path / "run"
    cases = adapter.cases(PromptFiles(tmp_path / "test_data.jsonl"), "mine")
    painter = Painter()
    run(adapter, cases, painter, folder, 0, Plan(folder=tmp_path))
    assert painter.jobs[0].prompt == "Go.\nOn."
    assert len(painter.jobs[0].images) == 1
    place = folder / "images/mine_output"
    document = json.loads((place / "15.json").read_text())
    assert document == record | {
        "conversations": [
            {"input": steps},
            {
                "output": [
                    {"text": "First", "image": "15-o-0.jpg"},
                    {"text": "then", "image": "15-o-1.jpg"},
                    {"text": "end", "image": None},
                ]
            },
        ]
    }
    assert sorted(p.name for p in place.iterdir()) == ["15-o-0.jpg", "15-o-1.jpg", "15.json"]
    story = sample(adapter, cases[0], folder, 0)
    assert [part if isinstance(part, str) else part.shape for part in story] == [
        "First",
        (8, 8, 3),
        "then",
        (8, 8, 3),
        "end",
    ]


def test_a_full_disk_ends_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, folder = geneval(tmp_path), tmp_path / "run"
    written = 0

    def fill(path: Path, data: bytes) -> None:
        nonlocal written
        written += 1
        if written > 7:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        path.write_bytes(data)

    monkeypatch.setattr("neounify.bench.runner.write_bytes", fill)
    with pytest.raises(OSError, match="No space left"):
        go(cases, Painter(), folder, batch_size=1)
    assert len(finished(folder)) == 2, "three files each"
    monkeypatch.undo()
    painter = Painter()
    assert go(cases, painter, folder).finished == 7
    assert {job.prompt for job in painter.jobs} == {f"p{n}" for n in range(2, 7)}
