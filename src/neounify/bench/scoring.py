"""Scores of a run: judges, which see each output once, and metrics of answers.

Judgments are lines of scores/JUDGE.jsonl, appended as they come, so that a judge that costs money
is asked again only for what it has not judged.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from neounify.bench.adapter import Adapter
from neounify.bench.answers import METRICS
from neounify.bench.cases import BenchError, Case, Record
from neounify.bench.result import CaseScore, Result, versions
from neounify.bench.runner import (
    PATH,
    Progress,
    failures,
    finished,
    input_images,
    load_about,
    sample,
)
from neounify.errors import NeounifyError
from neounify.files import locked_folder, read_text
from neounify.post_train.prompts import PromptCase
from neounify.post_train.reward_judges import MAX_JUDGE_PROMPT_BYTES
from neounify.post_train.reward_kinds import TOTAL
from neounify.post_train.rewards import RewardConfig, Rewards, combined

SCORES = "scores"
MAX_UNREACHABLE = 3
"""Batches in a row in which nothing is judged after which a judge counts as unreachable."""
_UNCHANGING = ("weight", "timeout", "retries", "batch", "key_variable", "world")
"""Settings of a reward that do not change a score."""
_OF_TOTALS = ("weights", "minimum")
"""Settings that change the total, and not what a judge says."""
Key = tuple[str, int]
"""A case's id, and the number of one of its outputs."""
Judgments = dict[Key, dict[str, float]]


def judge_identity(config: RewardConfig, folder: Path) -> Record:
    """A judge as plain data: its settings that are not the default, and the hash of its prompt."""
    default = asdict(RewardConfig())
    identity = {
        name: value
        for name, value in asdict(config).items()
        if name not in _UNCHANGING and value != default[name]
    }
    identity["kind"] = config.kind
    if config.prompt_file:
        text = read_text(folder / config.prompt_file, MAX_JUDGE_PROMPT_BYTES, BenchError)
        identity["prompt_file"] = Path(config.prompt_file).name
        identity["prompt_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return dict(json.loads(json.dumps(identity)))


def judge(
    adapter: Adapter,
    cases: Sequence[Case],
    folder: Path,
    config: RewardConfig,
    *,
    prompts: Path,
    programs: Path,
    progress: Progress = lambda done: None,
    note: Callable[[str], None] = lambda text: None,
) -> Result:
    """Judge all finished outputs of a run that this judge has not judged, and sum up.

    `prompts` is the folder of the input images, `programs` that of hooks and judges' prompts.
    Raises BenchError when nothing is judged `MAX_UNREACHABLE` batches in a row.
    """
    identity = judge_identity(config, programs)
    said = {key: value for key, value in identity.items() if key not in _OF_TOTALS}
    name = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
    rewards = Rewards([config], max_failed=1.0, folder=programs)
    log = folder / SCORES / name
    done = finished(folder)
    failed: dict[str, str] = {}
    with locked_folder(log):
        judged = _read_judgments(log / "judgments.jsonl")
        left = [
            (case, number)
            for case in cases
            if case.id in done
            for number in range(case.samples)
            if (case.id, number) not in judged
        ]
        kept, silent = len(judged), 0
        if kept:
            note(f"{kept} outputs were judged before; remove {log} to judge them again")
        with (log / "judgments.jsonl").open("ab") as file:
            if file.tell():
                file.write(b"\n")  # ends a line that a kill has cut off
            for start in range(0, len(left), config.batch):
                chunk = left[start : start + config.batch]
                new, reasons = _judge(adapter, chunk, folder, rewards, prompts)
                for (case, number), parts in new.items():
                    line = json.dumps({"id": case, "sample": number, "parts": dict(parts)})
                    file.write(line.encode() + b"\n")
                file.flush()
                judged |= new
                failed |= reasons
                silent = 0 if new else silent + 1
                if silent == MAX_UNREACHABLE:
                    reason = next(iter(failed.values()))
                    raise BenchError(f"the judge scores nothing ({reason}); what it scored is kept")
                progress(kept + start + len(chunk))
    totals = {key: parts | {TOTAL: _total(config, parts)} for key, parts in judged.items()}
    return sum_up(cases, folder, identity, totals, failures(folder) | failed)


def _total(config: RewardConfig, parts: Mapping[str, float]) -> float:
    """The total of what a judge said. Raises BenchError for weights of parts that it has not."""
    if missing := sorted(set(config.weights or ()) - set(parts)):
        raise BenchError(f"weights name {', '.join(missing)}; the parts are {', '.join(parts)}")
    return combined(config, parts)


def _judge(
    adapter: Adapter,
    chunk: Sequence[tuple[Case, int]],
    folder: Path,
    rewards: Rewards,
    prompts: Path,
) -> tuple[Judgments, dict[str, str]]:
    """Parts of some outputs, and the reasons of those without."""
    outputs: list[Any] = []
    prompt_cases: list[PromptCase] = []
    keys: list[Key] = []
    failed: dict[str, str] = {}
    for case, number in chunk:
        try:
            output = sample(adapter, case, folder, number)
            prompt_cases.append(_prompt_case(case, output, prompts))
        except NeounifyError as error:
            failed[case.id] = str(error)[:500]
            continue
        outputs.append(output)
        keys.append((case.id, number))
    rewarded = rewards.measure(outputs, prompt_cases)
    judged: Judgments = {}
    reasons = iter(rewarded.failures)
    for number, key in enumerate(keys):
        parts = {name: float(values[number]) for name, values in rewarded.parts.items()}
        parts = {name: value for name, value in parts.items() if not math.isnan(value)}
        if math.isnan(rewarded.total[number]):
            failed[key[0]] = next(reasons, rewarded.failures[-1] if rewarded.failures else "")
        elif parts:
            judged[key] = parts
    return judged, failed


def _prompt_case(case: Case, output: Any, prompts: Path) -> PromptCase:
    height, width = output.shape[:2] if isinstance(output, np.ndarray) else (1, 1)
    return PromptCase(
        prompt=case.prompt,
        width=width,
        height=height,
        category=case.category,
        images=input_images(case, prompts),
        record=case.record,
    )


def _read_judgments(path: Path) -> Judgments:
    judged: Judgments = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            judged[record["id"], record["sample"]] = record["parts"]
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a kill: the output is judged again
    return judged


def score_answers(cases: Sequence[Case], folder: Path, metric: str) -> Result:
    """The result of a run of questions."""
    judged: Judgments = {}
    by_id = {case.id: case for case in cases}
    for name, record in finished(folder).items():
        for number, answer in enumerate(record["answers"]):
            judged[name, number] = {metric: METRICS[metric](answer, by_id[name].record)}
    return sum_up(cases, folder, {"kind": "metric", "metric": metric}, judged, failures(folder))


def sum_up(
    cases: Sequence[Case],
    folder: Path,
    judge: Record,
    judged: Judgments,
    failed: Mapping[str, str],
) -> Result:
    """The result of judgments; a case counts only if all its samples are judged.

    A single part is no total as well.
    """
    done = finished(folder)
    scores: list[CaseScore] = []
    reasons = dict(failed)
    for case in cases:
        rows = [judged[case.id, n] for n in range(case.samples) if (case.id, n) in judged]
        if len(rows) < case.samples:
            reasons.setdefault(case.id, "not finished" if case.id not in done else "not judged")
            continue
        reasons.pop(case.id, None)
        names = list(dict.fromkeys(name for row in rows for name in row))
        if len(names) == 2 and TOTAL in names and all(len(set(r.values())) == 1 for r in rows):
            names.remove(TOTAL)
        parts = {
            n: statistics.fmean(r[n] for r in rows) for n in names if all(n in r for r in rows)
        }
        seeds = tuple(done[case.id]["seeds"]) if case.id in done else ()
        scores.append(CaseScore(case.id, case.category, parts, seeds))
    about = load_about(folder) | {"judge": judge, "versions": versions()}
    del about["format"], about[PATH]  # a place on a machine
    return Result(about, tuple(scores), reasons)
