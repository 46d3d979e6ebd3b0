"""A run on two ranks when something is wrong: one message that names the rank, and all end."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from neounify.train.state import newest_whole_state, saved_states
from support.rank_recipes import SCENES, write_recipe

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
WITHIN = 300.0
"""Seconds in which ranks end: a minute, and their start on cores that may be busy."""


class Run:
    """Processes that form a run, without torchrun, which would end some for others' errors."""

    def __init__(self, folder: Path, recipes: Sequence[Path], **settings: Any) -> None:
        """One rank for each recipe; `settings`: fault, port, out, options, folders."""
        self.folder = folder
        port = settings.get("port") or free_port()
        fault = settings.get("fault")
        program = ["-m", "support.rank_program", fault] if fault else ["-m", "neounify"]
        options = ["--out", str(settings.get("out", folder / "out")), *settings.get("options", ())]
        self.processes = []
        for rank, recipe in enumerate(recipes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(recipes)}
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
            many = {**ranks, **place} if len(recipes) > 1 else {}
            paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
            added = {**many, "OMP_NUM_THREADS": 1, "PYTHONPATH": paths}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *program, "train", str(recipe), *options],
                    env={**os.environ, **{name: str(value) for name, value in added.items()}},
                    cwd=settings.get("folders", [None] * len(recipes))[rank],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def end(self, seconds: float = WITHIN) -> tuple[list[int], list[str]]:
        """Exit codes by rank and the lines that are errors, once all have ended."""
        until, codes, errors = time.monotonic() + seconds, [], []
        for process in self.processes:
            _, said = process.communicate(timeout=max(1.0, until - time.monotonic()))
            codes.append(process.returncode)
            errors += [line for line in said.splitlines() if line.startswith("error:")]
        return codes, errors

    def wait_for_step(self, step: int) -> bool:
        """Return when a step is logged; False where the run ended before."""
        while steps_of(self.folder / "out") < step:
            if any(process.poll() is not None for process in self.processes):
                return False
            time.sleep(0.05)
        return True


@contextmanager
def run(folder: Path, recipes: Sequence[Path], **settings: Any) -> Iterator[Run]:
    started = Run(folder, recipes, **settings)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.communicate()


def recipe(folder: Path, name: str = "r", *, steps: int = 4, data: str = SCENES) -> Path:
    """The path of a recipe of so many steps."""
    return write_recipe(folder / f"{name}.toml", steps=steps, data=data)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def logged(folder: Path) -> list[dict[str, Any]]:
    file = folder / "log.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return [line for line in whole if line["kind"] == "train"]


def steps_of(folder: Path) -> int:
    steps = logged(folder)
    return int(steps[-1]["step"]) if steps else 0


def check_alike(one: Path, other: Path, steps: int) -> None:
    """The same packs, and losses within 1e-6."""
    mine, theirs = logged(one), logged(other)
    assert [x["step"] for x in mine] == [x["step"] for x in theirs] == list(range(1, steps + 1))
    for a, b in zip(mine, theirs, strict=True):
        for name in ("samples", "images", "tokens"):
            assert a[name] == b[name]
        for name in ("text/loss", "image/loss"):
            assert a.get(name) == pytest.approx(b.get(name), rel=1e-6, abs=1e-6)


# --- what ranks see ---


def test_ranks_with_different_recipes(tmp_path: Path) -> None:
    recipes = [recipe(tmp_path), recipe(tmp_path, "other", steps=5)]
    with run(tmp_path, recipes) as started:
        codes, errors = started.end()
    assert codes == [1, 1]
    assert len(errors) == 1
    assert "the recipe: rank 0 and rank 1 see different ones" in errors[0]


def test_ranks_with_different_data(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": f"Hello {number}"}]
        (folder / "data.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    path = recipe(tmp_path, data='{ kind = "jsonl", path = "data.jsonl" }')
    with run(tmp_path, [path, path], folders=folders) as started:
        codes, errors = started.end()
    assert codes == [1, 1]
    assert len(errors) == 1
    assert "the data: rank 0 and rank 1 see different ones" in errors[0]


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    path = recipe(tmp_path)
    with run(tmp_path, [path, path], folders=folders, out="out") as started:
        codes, errors = started.end()
    assert codes == [1, 1]
    assert len(errors) == 1
    assert "rank 1: " in errors[0]
    assert "must write into one folder" in errors[0]


def test_a_port_in_use(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with run(tmp_path, [path, path], port=port) as started:
            codes, errors = started.end()
    assert codes == [1, 1]
    assert any(f"rank 0 cannot join the others at 127.0.0.1:{port}" in line for line in errors)


# --- a rank that fails alone ---


def test_a_rank_out_of_memory(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    with run(tmp_path, [path, path], fault="memory") as started:
        codes, errors = started.end()
    assert codes == [1, 1]
    assert len(errors) == 1
    assert "rank 1: " in errors[0]
    assert "can't allocate memory" in errors[0]


def test_a_rank_that_is_stopped_for_a_while(tmp_path: Path) -> None:
    path = recipe(tmp_path, steps=8)
    with run(tmp_path, [path, path]) as started:
        assert started.wait_for_step(2)
        started.processes[1].send_signal(signal.SIGSTOP)
        time.sleep(20)
        started.processes[1].send_signal(signal.SIGCONT)
        assert started.end() == ([0, 0], [])
    alone = tmp_path / "alone"
    with run(alone, [path], out=alone / "out") as started:
        assert started.end() == ([0], [])
    check_alike(tmp_path / "out", alone / "out", 8)


KILLS = 10


@pytest.mark.timeout(3000)
def test_ranks_killed_at_any_time(tmp_path: Path) -> None:
    """Ten kills of either rank; what goes on, on one rank or two, trains as if none."""
    steps, kills, numbers = 5 + 8 * KILLS, 0, random.Random(0)
    path = recipe(tmp_path, steps=steps)
    options = ("--resume", "auto")
    for number in range(KILLS):
        size = 2 - number % 2
        with run(tmp_path, [path] * size, options=options) as started:
            if number in (3, 6):  # while the ranks start
                time.sleep(numbers.uniform(0, 4))
            elif not started.wait_for_step(steps_of(tmp_path / "out") + numbers.randint(1, 4)):
                break
            time.sleep(numbers.uniform(0, 0.2))
            started.processes[numbers.randrange(size)].send_signal(signal.SIGKILL)
            codes, errors = started.end()
        kills += -signal.SIGKILL in codes
        assert len(errors) <= 1
        assert all("connection" in line or "cannot join" in line for line in errors), errors
        states = saved_states(tmp_path / "out" / "states")
        assert all((state / "state.json").is_file() for state in states)
    assert kills == KILLS
    with run(tmp_path, [path, path], options=options) as started:
        assert started.end() == ([0, 0], [])
    alone = tmp_path / "alone"
    with run(alone, [path], out=alone / "out") as started:
        assert started.end() == ([0], [])
    check_alike(tmp_path / "out", alone / "out", steps)


# --- torchrun starts them again ---


def torchrun(
    folder: Path, *options: str, fault: str, ranks: int = 2, steps: int = 6
) -> subprocess.CompletedProcess[str]:
    """A run into folder/out that may be started again once, ended."""
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    program += ["--max-restarts", "1", "-m", "support.rank_program", fault]
    train = ["train", str(recipe(folder, steps=steps)), "--out", str(folder / "out"), *options]
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    added = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, *program, *train],
        env={**os.environ, **added},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )


def resumed_from(said: str) -> list[Path]:
    """The states that a run says it resumes from, in order."""
    words = "resuming from "
    lines = [" ".join(said.split())]
    return [Path(part.split()[0]) for line in lines for part in line.split(words)[1:]]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps, which others resume from."""
    folder = tmp_path_factory.mktemp("earlier")
    with run(folder, [recipe(folder, steps=3)]) as started:
        assert started.end() == ([0], [])
    return folder / "out"


def holding_another_run(folder: Path, earlier: Path) -> Path:
    """The states of a folder whose only one is of another run, of a step never reached here."""
    other = folder / "out" / "states" / "step-00000099"
    shutil.copytree(saved_states(earlier / "states")[-1], other)
    return other.parent


def test_torchrun_starts_again_from_the_newest_state(tmp_path: Path) -> None:
    done = torchrun(tmp_path, fault="once")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    assert [line["step"] for line in logged(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_restart_before_a_save_resumes_from_what_was_named(
    tmp_path: Path, earlier: Path, ranks: int
) -> None:
    """Not from the state of another run that the folder holds."""
    holding_another_run(tmp_path, earlier)
    named = saved_states(earlier / "states")[-1]
    done = torchrun(tmp_path, "--resume", str(named), fault="at once", ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert resumed_from(done.stderr) == [named, named]
    assert [line["step"] for line in logged(tmp_path / "out")] == [4, 5, 6]


def test_a_restart_resumes_from_what_its_own_launch_saved(tmp_path: Path, earlier: Path) -> None:
    states = holding_another_run(tmp_path, earlier)
    named = saved_states(earlier / "states")[-1]
    done = torchrun(tmp_path, "--resume", str(named), fault="once", steps=8)
    assert done.returncode == 0, done.stderr
    first, again = resumed_from(done.stderr)
    assert first == named
    assert again in (states / "step-00000005", states / "step-00000006")
    assert [line["step"] for line in logged(tmp_path / "out")] == [4, 5, 6, 7, 8]
    # What is newest is decided by when it was saved.
    assert newest_whole_state(states, pytest.fail) == states / "step-00000008"


def test_a_restart_does_not_resume_the_run_that_a_new_one_may_not_replace(
    tmp_path: Path, earlier: Path
) -> None:
    states = holding_another_run(tmp_path, earlier)
    done = torchrun(tmp_path, fault="none", ranks=1)
    assert done.returncode != 0
    assert done.stderr.count("already holds a run") == 2
    assert [path.name for path in saved_states(states)] == ["step-00000099"]
