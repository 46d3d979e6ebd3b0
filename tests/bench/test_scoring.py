"""Judges on made scenes with known answers, and results of official scorers."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from neounify import services
from neounify.bench import (
    ADAPTERS,
    BenchError,
    Case,
    Plan,
    PromptFiles,
    begin,
    compare,
    judge,
    read_results,
    run,
)
from neounify.bench.result import Result
from neounify.errors import ConfigError
from neounify.post_train.rewards import RewardConfig
from neounify.services import BadAnswer
from support.bench import CASES, Painter, scene_of, solid
from support.services import say, service

GENEVAL = ADAPTERS["geneval"]
HOOK = RewardConfig(kind="program", name="support.bench:scene_judge", batch=5)


def made(folder: Path, wrong: Callable[[int], bool] = lambda number: False) -> list[Case]:
    """A run of GenEval whose prompts are scenes; some images are of another scene."""
    path = folder / "evaluation_metadata.jsonl"
    lines = [
        {"tag": case.category, "prompt": case.prompt, "number": number}
        for number, case in enumerate(CASES)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cases = GENEVAL.cases(PromptFiles(path), "mine", 2)
    numbers = {case.prompt: number for number, case in enumerate(CASES)}
    assert len(numbers) == len(CASES)

    def paint(job: Any) -> Any:
        number = numbers[job.prompt]
        return solid(1, 64) if wrong(number) else scene_of(CASES[number])

    begin(folder / "run", {"benchmark": "geneval"}, cases, path)
    run(GENEVAL, cases, Painter(paint), folder / "run", 0, Plan(folder=folder))
    return cases


def judged(cases: list[Case], folder: Path, config: RewardConfig = HOOK) -> Result:
    return judge(GENEVAL, cases, folder / "run", config, prompts=folder, programs=folder)


def test_a_hook_finds_exactly_the_wrong_images(tmp_path: Path) -> None:
    cases = made(tmp_path, lambda number: number % 3 == 0)
    result = judged(cases, tmp_path)
    assert result.values("correct") == {f"{n:05}": float(n % 3 != 0) for n in range(len(CASES))}
    assert result.parts == ["correct"], "a single part is the total"
    rows = {row["category"]: row for row in result.scores()}
    assert list(rows) == ["all", "mean of categories", "single_object", "two_object"]
    assert rows["all"]["correct"] == sum(n % 3 != 0 for n in range(len(CASES)))
    assert rows["mean of categories"]["mean"] == pytest.approx(
        np.mean([rows[name]["rate"] for name in ("single_object", "two_object")]), abs=1e-4
    )
    assert result.about["judge"] == {"kind": "program", "name": "support.bench:scene_judge"}
    assert len(result.cases[0].seeds) == 2
    assert str(tmp_path) not in json.dumps(result.to_json())


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = judged(made(tmp_path), tmp_path)
    result.write(tmp_path / "result.json")
    assert Result.read(tmp_path / "result.json").to_json() == result.to_json()
    assert "| all | 12 | 100.0 (75.8–100.0) |" in result.to_markdown()


PROGRAM = """\
import json, sys
with open(sys.argv[1], "a") as log:
    for line in sys.stdin:
        item = json.loads(line)
        print(item["record"]["number"], file=log)
        if item["record"]["number"] in map(int, sys.argv[2:]):
            sys.exit("cannot see this one")
        from PIL import Image
        size = Image.open(item["image"]).size
        print(json.dumps({"wide": size[0] / 64, "right": 1}))
"""


def command(folder: Path, *numbers: int) -> RewardConfig:
    (folder / "score.py").write_text(PROGRAM)
    words = [sys.executable, "score.py", "log.txt", *map(str, numbers)]
    return RewardConfig(kind="command", command=shlex.join(words), batch=4, timeout=60.0)


def test_a_command_judges_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cases = made(tmp_path)[:4]
    config = command(tmp_path, 2)
    result = judged(cases, tmp_path, config)
    assert result.values("wide") == {"00000": 1, "00001": 1, "00003": 1}
    assert "cannot see this one" in result.failures["00002"]
    (tmp_path / "log.txt").unlink()
    # The same judge by its settings, now able: it is asked for the rest alone.
    (tmp_path / "score.py").write_text(PROGRAM.replace("sys.exit", "print"))
    assert "00002" not in judged(cases, tmp_path, config).values("wide"), "a line too many"
    (tmp_path / "score.py").write_text(PROGRAM.replace("in map(int, sys.argv[2:])", "is None"))
    result = judged(cases, tmp_path, config)
    assert result.failures == {}
    assert set((tmp_path / "log.txt").read_text().split()) == {"2"}


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print('no json')", "wrote no JSON"),
        ("print('[]')", "expected named parts"),
        ("print('{\"a\": NaN}')", "must be in"),
        ("print('{\"a\": 7}')", "must be in"),
        ("raise SystemExit(3)", "ended with 3"),
        ("print('{\"a\": 1' + '0' * 400 + '}')", "a is no number"),
        ("print('x' * 2**24)", "writes more than 16777216 bytes"),
    ],
)
def test_commands_that_judge_nothing(program: str, message: str, tmp_path: Path) -> None:
    cases = made(tmp_path)[:1]
    words = [sys.executable, "-c", f"import sys; sys.stdin.read()\nfor _ in '12': {program}"]
    config = RewardConfig(kind="command", command=shlex.join(words), timeout=60.0)
    result = judged(cases, tmp_path, config)
    assert result.cases == ()
    assert message in result.failures["00000"]


def test_a_command_that_hangs_ends_with_its_children(tmp_path: Path) -> None:
    cases = made(tmp_path)[:1]
    script = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    words = shlex.join([sys.executable, "-c", script])
    config = RewardConfig(kind="command", command=words, timeout=0.5)
    assert "more than 0.5 s" in judged(cases, tmp_path, config).failures["00000"]


def test_a_command_that_never_stops_writing_ends(tmp_path: Path) -> None:
    cases = made(tmp_path)[:1]
    config = RewardConfig(kind="command", command="yes nonsense", timeout=60.0)
    assert "writes more than" in judged(cases, tmp_path, config).failures["00000"]


def test_what_is_kept_is_said(tmp_path: Path) -> None:
    cases = made(tmp_path)[:2]
    judged(cases, tmp_path)
    notes: list[str] = []
    done: list[int] = []
    judge(
        *(GENEVAL, cases, tmp_path / "run", HOOK),
        prompts=tmp_path,
        programs=tmp_path,
        progress=done.append,
        note=notes.append,
    )
    assert done == []
    (said,) = notes
    kept = re.fullmatch(r"4 outputs were judged before; remove (.+) to judge them again", said)
    assert kept is not None
    shutil.rmtree(kept[1])
    judge(
        *(GENEVAL, cases, tmp_path / "run", HOOK),
        prompts=tmp_path,
        programs=tmp_path,
        progress=done.append,
        note=notes.append,
    )
    assert (done, len(notes)) == ([4], 1)


# --- a model as judge ---


def chat(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def vlm(
    folder: Path, url: str, prompt: str = "Is it {{prompt}}? {1-10}", **more: Any
) -> RewardConfig:
    (folder / "judge.txt").write_text(prompt)
    return RewardConfig(
        kind="vlm", url=f"{url}v1", prompt_file="judge.txt", model="m", batch=2, **more
    )


def test_a_judge_behind_a_chat_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services.time, "sleep", lambda _: None)
    monkeypatch.setenv("JUDGE_KEY", "secret")
    cases, asked = made(tmp_path)[:3], []

    def answer(handler: Any, number: int) -> None:
        document = json.loads(handler.body)
        parts = document["messages"][0]["content"]
        asked.append((handler.path, handler.headers["Authorization"], parts[-1]["text"]))
        if number == 0:
            say(handler, 429)
        elif number == 1:
            say(handler, 500)
        elif f"it {cases[2].prompt}?" in parts[-1]["text"]:
            say(handler, 200, b"garbage")
        else:
            assert parts[0]["image_url"]["url"].startswith("data:image/png;base64,")
            say(handler, 200, chat('Well: {"score": 8, "note": "fine"}'))

    with service(answer) as (url, _):
        config = vlm(tmp_path, url, scale=(0.0, 10.0), key_variable="JUDGE_KEY")
        result = judged(cases, tmp_path, config)
    assert result.values("score") == {"00000": 0.8, "00001": 0.8}
    assert "not JSON" in result.failures["00002"]
    assert asked[-1][:2] == ("/v1/chat/completions", "Bearer secret")
    assert any(text == f"Is it {cases[0].prompt}? {{1-10}}" for _, _, text in asked)
    assert "secret" not in json.dumps(result.to_json())
    with service(lambda handler, _: say(handler, 200, chat("9"))) as (url, times):
        again = judged(cases[:2], tmp_path, config)
        assert again.values("score") == {"00000": 0.8, "00001": 0.8}
        assert not times, "what is judged is not judged again"


def test_another_prompt_is_another_judge(tmp_path: Path) -> None:
    cases = made(tmp_path)[:1]
    with service(lambda handler, number: say(handler, 200, chat(f"Score: {number}"))) as (url, _):
        first = judged(cases, tmp_path, vlm(tmp_path, url, scale=(0.0, 4.0)))
        second = judged(cases, tmp_path, vlm(tmp_path, url, "Else {{category}}", scale=(0.0, 4.0)))
    assert first.values("score") == {"00000": 0.125}
    assert second.values("score") == {"00000": 0.625}
    assert first.about["judge"]["prompt_sha256"] != second.about["judge"]["prompt_sha256"]


def test_a_judge_that_is_not_there_ends_early(tmp_path: Path) -> None:
    cases = made(tmp_path)
    config = vlm(tmp_path, "http://127.0.0.1:9/", retries=0)
    with pytest.raises(BenchError, match=r"scores nothing \(.*refused"):
        judged(cases, tmp_path, config)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ('{"score": [8, 6], "reasoning": "x"}', {"score_1": 8, "score_2": 6}),
        ('Sure.\n```json\n{"a": 1, "b": 0.5}\n```', {"a": 1, "b": 0.5}),
        ("Consistency: 2\nRealism: 1\nAesthetic Quality: 0", {"consistency": 2, "realism": 1}),
        ("Brief reasoning: No {change}.\n**Prompt Compliance**: 4", {"prompt_compliance": 4}),
        ("Final Score: **3**", {"final_score": 3}),
        ("**Score**:\n4", {"score": 4}),
        ("Score: -5", {"score": -5}),
        ("Yes, it does.", {"yes": 1}),
        ("no", {"yes": 0}),
    ],
)
def test_verdicts(text: str, numbers: dict[str, float]) -> None:
    from neounify.post_train.reward_judges import read_verdict

    verdict = read_verdict(text)
    assert {name: verdict[name] for name in numbers} == numbers


LONG = 2**22
"""The longest answer of a service."""


@pytest.mark.parametrize(
    "text",
    [
        *("", "I cannot say", "{" * 50, '{"note": "x"}'),
        *("\n" * LONG, "_" * LONG, "a " * (LONG // 2), "a:" * (LONG // 2), "{" * LONG),
    ],
    ids=lambda text: text[:8],
)
def test_no_verdict(text: str) -> None:
    from neounify.post_train.reward_judges import read_verdict

    with pytest.raises(BadAnswer, match="no number"):
        read_verdict(text)


def test_prompts_of_judges_that_name_nothing(tmp_path: Path) -> None:
    cases = made(tmp_path)[:1]
    for prompt in ("{{propmt}}", "{{record}}", "{{prompt.x}}"):
        with pytest.raises(ConfigError, match="is none of"):
            judged(cases, tmp_path, vlm(tmp_path, "http://127.0.0.1:9/", prompt))
    config = vlm(tmp_path, "http://127.0.0.1:9/", "{{record.absent}}")
    assert "has no 'absent'" in judged(cases, tmp_path, config).failures["00000"]
    with pytest.raises(ConfigError, match="holds no key"):
        judged(cases, tmp_path, vlm(tmp_path, "http://x/", key_variable="NO_SUCH_KEY"))


# --- official scorers ---


def test_results_of_geneval(tmp_path: Path) -> None:
    cases = made(tmp_path)
    lines = [
        {
            "filename": f"/elsewhere/images/{name}",
            "tag": "t",
            "correct": (number + sample) % 2 == 0,
            "reason": "",
        }
        for number, case in enumerate(cases[:-1])
        for sample, name in enumerate(case.files)
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = read_results(cases, tmp_path / "run", path)
    assert set(result.values("correct").values()) == {0.5}
    assert len(result.cases) == len(cases) - 1
    assert result.failures == {cases[-1].id: "no result"}
    for line, message in (
        ({"filename": "99999/samples/00000.png", "correct": True}, "belongs to no case"),
        ({"filename": "00000/samples/00000.png", "correct": True}, "is the second one"),
        ({"filename": "00011/samples/00000.png", "score": 7}, "score is 7, not from 0 to 1"),
        ({"filename": "00011/samples/00000.png", "score": 10**400}, "too large"),
        ({"filename": "00011/samples/00000.png", "score": math.nan}, "score is nan"),
        ({"filename": "00011/samples/00000.png", "note": "x"}, "no number and no truth value"),
    ):
        path.write_text("".join(json.dumps(item) + "\n" for item in [*lines, line]))
        with pytest.raises(BenchError, match=message):
            read_results(cases, tmp_path / "run", path)


def test_results_of_scorers_with_a_scale_of_their_own(tmp_path: Path) -> None:
    """As those of WISE, whose consistency, realism and quality are from 0 to 2."""
    cases = made(tmp_path)[:2]
    lines = [
        {"id": case.id, "consistency": 2, "realism": 1, "aesthetic_quality": 0, "year": 2025}
        for case in cases
    ]
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    weights = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}

    def read(path: Path) -> Result:
        return read_results(cases, tmp_path / "run", path, (0.0, 2.0), weights)

    result = read(path)
    assert result.values("total") == pytest.approx({case.id: 0.8 for case in cases})
    assert result.values("realism") == {case.id: 0.5 for case in cases}
    table = tmp_path / "scores.csv"
    table.write_text(
        "id,consistency,realism,aesthetic_quality,note\n"
        + "".join(f"{case.id},2,1,0.0,fine\n" for case in cases)
    )
    assert read(table).cases == result.cases
    with pytest.raises(BenchError, match="year is 2025, not from 0 to 2"):
        read_results(cases, tmp_path / "run", path, (0.0, 2.0))
    with pytest.raises(BenchError, match=r"has no number beauty: .*consistency"):
        read_results(cases, tmp_path / "run", path, (0.0, 2.0), {"beauty": 1.0})
    with pytest.raises(BenchError, match="has no number note"):
        read_results(cases, tmp_path / "run", table, (0.0, 2.0), {"note": 1.0})
    with pytest.raises(BenchError, match="weights must be"):
        read_results(cases, tmp_path / "run", path, (0.0, 2.0), {"realism": 0.0})
    with pytest.raises(BenchError, match="scale must be"):
        read_results(cases, tmp_path / "run", path, (2.0, 0.0))


def test_results_of_a_file_are_those_of_all_its_images(tmp_path: Path) -> None:
    """As those of DPG-Bench, whose scorer gives a prompt's four images one number."""
    (tmp_path / "a.txt").write_text("p")
    adapter = ADAPTERS["dpg"]
    cases = adapter.cases(PromptFiles(tmp_path), "mine")
    begin(tmp_path / "run", {"benchmark": "dpg"}, cases, tmp_path)
    run(adapter, cases, Painter(), tmp_path / "run", 0, Plan(folder=tmp_path))
    path = tmp_path / "results.jsonl"
    path.write_text('{"filename": "images/a.png", "score": 0.25}')
    assert read_results(cases, tmp_path / "run", path).values("score") == {"a": 0.25}


def test_official_results_of_two_models_compare(tmp_path: Path) -> None:
    cases = made(tmp_path)
    results = []
    for name, right in (("a", True), ("b", False)):
        path = tmp_path / f"{name}.jsonl"
        lines = [{"filename": name, "correct": right} for case in cases for name in case.files]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        results.append(read_results(cases, tmp_path / "run", path))
    assert compare(*results).rows[0].difference.value == 1
    assert results[0].about["results"]["file"] == "a.jsonl"
    assert results[0].about["results"]["sha256"] != results[1].about["results"]["sha256"]


def test_an_image_that_was_damaged_has_no_score(tmp_path: Path) -> None:
    cases = made(tmp_path)[:2]
    (tmp_path / "run/images/00001/samples/00001.png").write_bytes(b"cut")
    result = judged(cases, tmp_path)
    assert list(result.values("correct")) == ["00000"]
    assert "not an image" in result.failures["00001"]
    (tmp_path / "run/images/00001/samples/00001.png").unlink()
    assert judged(cases, tmp_path).failures == {"00001": "not finished"}


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        ("support.rewards:none", "must be in"),
        ("support.rewards:sleeps", "no result after 0.05 s"),
        ("support.rewards:fails_on_black", "no light"),
    ],
)
def test_hooks_that_raise_hang_or_give_nan(hook: str, reason: str, tmp_path: Path) -> None:
    cases = made(tmp_path)[:2]
    black = PIL.Image.new("RGB", (8, 8))
    for name in cases[0].files:
        black.save(tmp_path / "run/images" / name)
    config = RewardConfig(kind="program", name=hook, timeout=0.05 if "sleeps" in hook else 60.0)
    result = judged(cases, tmp_path, config)
    assert reason in result.failures["00000"]
    assert [case.id for case in result.cases] == ["00001"] * (hook.endswith("black"))


def test_other_weights_ask_no_judge_again(tmp_path: Path) -> None:
    cases = made(tmp_path)[:2]
    text = "Consistency: 2\nRealism: 1\nAesthetic Quality: 0"
    with service(lambda handler, _: say(handler, 200, chat(text))) as (url, times):
        first = judged(cases, tmp_path, vlm(tmp_path, url, scale=(0.0, 2.0)))
        asked = len(times)
        weights = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}
        config = vlm(tmp_path, url, scale=(0.0, 2.0), weights=weights)
        second = judged(cases, tmp_path, config)
        assert len(times) == asked
        other = vlm(tmp_path, url, scale=(0.0, 2.0), weights={"beauty": 1.0})
        with pytest.raises(BenchError, match="name beauty; the parts are consistency"):
            judged(cases, tmp_path, other)
    assert set(first.values("total").values()) == {0.5}
    assert list(second.values("total").values()) == pytest.approx([0.8, 0.8])
    assert second.about["judge"]["weights"] == weights
