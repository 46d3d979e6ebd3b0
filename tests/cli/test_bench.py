"""`bench`: a run, its score and a comparison from the command line, locally and over HTTP."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from neounify.bench import ADAPTERS
from neounify.bench.subjects import png
from support.bench import solid
from support.services import say, service

PROMPTS = "".join(f'{{"tag": "t{n % 2}", "prompt": "circle {n}"}}\n' for n in range(4))
RUN = ("bench", "run", "geneval", "--prompts", "evaluation_metadata.jsonl", "--samples", 1)


@pytest.fixture(autouse=True)
def prompts(tmp_path: Path) -> None:
    (tmp_path / "evaluation_metadata.jsonl").write_text(PROMPTS)
    (tmp_path / "hooks.py").write_text(
        "def judge(outputs, cases):\n"
        "    return [{'level': float(image.mean() / 255)} for image in outputs]\n"
    )


def test_a_run_from_start_to_comparison(run: Callable[..., Any], tmp_path: Path) -> None:
    first = (*RUN, "--steps", 1, "--size", "64x64", "--output")
    ran = run(*first, "out/a", "--shard", "0/2")
    assert ran.code == 0, ran.err
    assert "2 of 4 prompts finished, 2 left to other shards" in ran.err
    assert run(*first, "out/a", "--shard", "1/2").code == 0
    assert "4 of 4 prompts finished" in run(*first, "out/a").err
    other = run(*first, "out/b", "--seed", 1, "--json")
    assert other.json["finished"] == 4
    for name in ("out/a", "out/b"):
        scored = run("bench", "score", name, "--hook", "hooks:judge")
        assert scored.code == 0, scored.err
        assert "| mean of categories | 4 |" in scored.out
    result = json.loads((tmp_path / "out/a/result.json").read_text())
    assert len(result["about"]["model"]["fingerprint"]) == 64
    assert result["about"]["sampling"]["steps"] == 1
    assert {"neounify", "torch", "python"} <= set(result["about"]["versions"])
    compared = run("bench", "compare", "out/a", "out/b")
    assert compared.code == 0, compared.err
    assert compared.out.startswith("| category | part | n | A, % (95 %) |")
    assert len(run("bench", "compare", "out/a", "out/b", "--json").json["rows"]) == 3


def test_other_settings_in_the_same_folder(run: Callable[..., Any]) -> None:
    options = (*RUN, "--steps", 1, "--size", "64x64", "--limit", 1)
    assert run(*options).code == 0
    ran = run(*options, "--seed", 3)
    assert ran.code == 1
    assert "holds another run: seed differ" in ran.err


@contextmanager
def endpoint() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A service with OpenAI's routes; a request with "circle 2" is refused."""
    asked: list[tuple[str, Any]] = []
    image = base64.b64encode(png(solid(5, 64))).decode()

    def answer(handler: Any, number: int) -> None:
        asked.append((handler.path, handler.body))
        if b"circle 2" in handler.body:
            say(handler, 400, b"not this one")
        elif handler.path == "/v1/chat/completions":
            content = {"choices": [{"message": {"content": "The answer is B"}}]}
            say(handler, 200, json.dumps(content).encode())
        else:
            say(handler, 200, json.dumps({"data": [{"b64_json": image}]}).encode())

    with service(answer) as (url, _):
        yield f"{url}v1", asked


def test_an_endpoint_is_asked_and_what_it_refuses_is_counted(
    run_bare: Callable[..., Any], tmp_path: Path
) -> None:
    with endpoint() as (url, asked):
        ran = run_bare(*RUN, "--endpoint", url, "--endpoint-model", "m", "--output", "out/e")
    assert ran.code == 1
    assert "00002: status 400: not this one" in ran.err
    assert "1 prompts failed; the same command tries them again" in ran.err
    fields = json.loads(next(body for path, body in asked if path == "/v1/images/generations"))
    assert (fields["model"], fields["n"], fields["response_format"]) == ("m", 1, "b64_json")
    assert len(list((tmp_path / "out/e/images").glob("*/samples/*.png"))) == 3
    about = json.loads((tmp_path / "out/e/bench.json").read_text())
    assert about["model"] == {"endpoint": url, "model": "m"}


def test_an_edit_over_http_is_a_form(run_bare: Callable[..., Any], tmp_path: Path) -> None:
    solid(3, 64).save(tmp_path / "in.png")
    item = {"id": "in.png", "prompt": "make it red", "edit_type": "colour"}
    (tmp_path / "basic_edit.json").write_text(json.dumps({"7": item}))
    with endpoint() as (url, asked):
        ran = run_bare(
            *("bench", "run", "imgedit", "--prompts", "basic_edit.json", "--endpoint", url)
        )
    assert ran.code == 0, ran.err
    [(path, body)] = asked
    assert path == "/v1/images/edits"
    assert b'name="prompt"\r\n\r\nmake it red\r\n' in body
    assert png(solid(3, 64)) in body
    assert (tmp_path / "out/bench/images/7.png").is_file()


def test_questions_over_http_are_scored_at_once(
    run_bare: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [{"question": f"q{n}", "A": "x", "B": "y", "answer": "AB"[n % 2]} for n in range(4)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("bench", "run", "questions", "--prompts", "set.jsonl", "--output", "out/q")
    with endpoint() as (url, _):
        ran = run_bare(*options, "--endpoint", url, "--metric", "choice")
    assert ran.code == 0, ran.err
    assert "| all | 4 | 50.0 (15.0–85.0) |" in ran.out
    assert (tmp_path / "out/q/result.md").is_file()
    scored = run_bare("bench", "score", "out/q", "--hook", "hooks:judge")
    assert "which `bench run` has scored" in scored.err


def test_the_list_names_every_benchmark(run_bare: Callable[..., Any]) -> None:
    text = run_bare("bench", "list").out
    assert all(adapter.title in text for adapter in ADAPTERS.values())
    rows = run_bare("bench", "list", "--json").json["benchmarks"]
    assert [row["name"] for row in rows] == list(ADAPTERS)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("run", "genevil", "--prompts", "x"), 2, "no benchmark 'genevil'; known are geneval"),
        (("run", "geneval", "--prompts", "absent"), 1, "absent does not exist"),
        (("run", "geneval", "--prompts", "hooks.py"), 1, "not valid JSON"),
        (("run", "questions", "--prompts", "hooks.py"), 2, "questions needs --metric"),
        ((*RUN[1:], "--metric", "choice"), 2, "geneval has no --metric"),
        ((*RUN[1:], "--shard", "2/2"), 1, "from 0 to 1"),
        ((*RUN[1:], "--shard", "a"), 2, "is not I/N"),
        ((*RUN[1:], "--endpoint", "http://x", "--model", "."), 2, "not both"),
        ((*RUN[1:], "--endpoint", "localhost:1/v1"), 1, "begins with http:// or https://"),
        ((*RUN[1:], "--endpoint-model", "m"), 2, "need --endpoint"),
        (("score", "absent"), 1, "cannot be read"),
        (("compare", "absent", "absent"), 1, "cannot be read"),
    ],
)
def test_wrong_usage(
    run_bare: Callable[..., Any], words: tuple[Any, ...], code: int, message: str
) -> None:
    ran = run_bare("bench", *words)
    assert ran.code == code, ran.err
    assert message in ran.err


def test_official_results_with_their_scale(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run(*RUN, "--steps", 1, "--size", "64x64", "--limit", 2).code == 0
    lines = [{"id": f"0000{n}", "a": 2 - n, "b": 0, "year": 2025} for n in range(2)]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("bench", "score", "out/bench", "--results", "scores.jsonl", "--scale", "0,2")
    assert "year is 2025" in run(*words).err
    scored = run(*words, "--weights", "a=3,b=1", "--json")
    assert scored.code == 0, scored.err
    rows = {(row["category"], row["part"]): row for row in scored.json["scores"]}
    assert rows["all", "total"]["mean"] == pytest.approx(0.75 * 0.75, abs=1e-4)


def test_one_judge(run: Callable[..., Any]) -> None:
    assert run(*RUN, "--steps", 1, "--size", "64x64", "--limit", 1).code == 0
    for words, message in (
        ((), "give one judge: .* got none"),
        (("--hook", "a:b", "--command", "c"), "got hook, command"),
        (("--vlm", "http://x/v1"), "needs prompt_file"),
        (("--vlm", "http://x/v1", "--judge-prompt", "hooks.py", "--scale", "3,1"), "scale must be"),
        (("--hook", "absent:b"), "cannot be imported"),
        (("--hook", "hooks:judge", "--weights", "level"), "is not PART=WEIGHT"),
        (("--hook", "hooks:judge", "--weights", "beauty=1"), "weights name beauty"),
    ):
        ran = run("bench", "score", "out/bench", *words)
        assert ran.code in (1, 2)
        assert re.search(message, ran.err), ran.err
