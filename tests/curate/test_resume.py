"""The same bytes whatever the workers; killed anywhere, a rerun does what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neounify.curate import CurateError, CurateRecipe, curate
from neounify.curate.executor import Inline, Pool
from support.curation import bytes_of, encoded, recipe_of, textured, write_samples

SAMPLES = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    samples = [
        (f"n{n:02d}", encoded(textured(n % 20), "JPEG", quality=95), f"a view of stone {n}")
        for n in range(SAMPLES)
    ]
    write_samples(folder, samples)
    return folder


def recipe_text(source: Path) -> str:
    return (
        "samples_per_unit = 3\n"
        f'[[sources]]\nname = "web"\nkind = "jsonl"\npath = "{source / "samples.jsonl"}"\n'
    )


def recipe(source: Path) -> CurateRecipe:
    return recipe_of({"web": source / "samples.jsonl"}, samples_per_unit=3)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    summary = curate(recipe(source), out)
    assert summary.kept == {"web": 20}
    return bytes_of(out)


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_bytes_do_not_depend_on_the_workers(
    workers: int, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    curate(recipe(source), tmp_path / "out", workers=workers)
    assert bytes_of(tmp_path / "out") == expected


@pytest.mark.parametrize("place", ["work", "table"])
def test_a_killed_run_is_finished_by_the_next(
    place: str, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out, text = tmp_path / "out", tmp_path / "recipe.toml"
    text.write_text(recipe_text(source))
    command = [sys.executable, "-m", "neounify", "curate", str(text), "--out", str(out)]
    run = subprocess.Popen([*command, "--workers", "1"], start_new_session=True)
    parts = _wait_for_parts(out / place, run)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    times = {path: path.stat().st_mtime_ns for path in parts}
    curate(recipe(source), out)
    assert bytes_of(out) == expected
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    assert not list(out.rglob(".*"))


def _wait_for_parts(folder: Path, run: subprocess.Popen[bytes]) -> list[Path]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        parts = [p for p in folder.glob("*.parquet") if not p.name.startswith(".")]
        if len(parts) >= 2:
            return parts
        assert run.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    raise AssertionError("no parts were written")


def test_a_second_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    curate(recipe(source), tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".tar", ".parquet")]
    times = {path: path.stat().st_mtime_ns for path in files}
    curate(recipe(source), tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in files} == times


def test_other_bounds_read_the_table_and_not_the_images(source: Path, tmp_path: Path) -> None:
    path = source / "samples.jsonl"
    settings: dict[str, Any] = {"measure": "all", "samples_per_unit": 3}
    curate(recipe_of({"web": path}, **settings), tmp_path / "out")
    measured = sorted((tmp_path / "out" / "work").glob("web-*.parquet"))
    times = [part.stat().st_mtime_ns for part in measured]
    stricter = {"geometry": {"min_side": 321}}
    summary = curate(recipe_of({"web": path}, stages=stricter, **settings), tmp_path / "out")
    assert summary.dropped == {"web": {"geometry.min_side": SAMPLES}}
    assert [part.stat().st_mtime_ns for part in measured] == times
    assert len(list((tmp_path / "out" / "table").glob("*.parquet"))) == SAMPLES // 3


def _square(number: int) -> int:
    return number * number


def _dies_once(number: int, mark: Path) -> int:
    if number == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def _dies(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


def test_a_worker_that_is_killed_loses_no_task(pool: Pool, tmp_path: Path) -> None:
    tasks = [(number, tmp_path / "mark") for number in range(12)]
    results = list(pool.run(_dies_once, tasks))
    assert sorted(results) == [(n, n * n) for n in range(12)]


def test_a_task_that_always_kills_its_worker_is_one_error(pool: Pool) -> None:
    with pytest.raises(CurateError, match="was killed 3 times"):
        list(pool.run(_dies, [(number,) for number in range(6)]))


def test_executors_give_the_same_results(pool: Pool) -> None:
    tasks = [(number,) for number in range(5)]
    assert sorted(pool.run(_square, tasks)) == list(Inline().run(_square, tasks))


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from neounify.curate.executor import Pool\n"
        "if __name__ == '__main__':\n"
        "    pool = Pool(1)\n"
        "    print(*(pid for _, pid in pool.run(os.getpid, [()])), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    program = tmp_path / "program.py"
    program.write_text(code)
    run = subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    worker = int(run.stdout.readline())
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


def test_a_folder_that_cannot_be_written_is_one_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(CurateError, match="out"):
        curate(recipe(source), tmp_path / "out")


def _kill_workers(pool: Pool) -> None:
    assert pool._pool is not None
    for process in list(pool._pool._processes.values()):
        process.kill()
        process.join()


def test_workers_that_are_killed_while_they_wait_are_replaced(pool: Pool) -> None:
    assert sorted(pool.run(_square, [(2,)])) == [(0, 4)]
    _kill_workers(pool)
    assert sorted(pool.run(_square, [(3,), (4,)])) == [(0, 9), (1, 16)]
    results = pool.run(_square, [(n,) for n in range(9)])
    first = [next(results)]
    _kill_workers(pool)
    assert sorted(first + list(results)) == [(n, n * n) for n in range(9)]


def test_a_curation_goes_on_where_a_worker_was_killed(tmp_path: Path) -> None:
    samples = [
        (f"n{n}", encoded(textured(n)), f"a view of {n} {tmp_path / f'mark-{n % 2}'}")
        for n in range(6)
    ]
    path = write_samples(tmp_path / "in", list(samples))
    marked = recipe_of(
        {"web": path},
        Path(__file__).parent,
        samples_per_unit=2,
        stages={"watermark": {"hook": "hooks_of_tests:dies_once"}, "text": {"similarity": 1.0}},
    )
    summary = curate(marked, tmp_path / "out", workers=2)
    assert summary.kept == {"web": 6}
    assert len(list(tmp_path.glob("mark-*"))) == 2
    assert not list((tmp_path / "out").rglob(".*"))
