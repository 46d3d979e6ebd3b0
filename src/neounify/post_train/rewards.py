"""Rewards: (outputs, cases) → named parts in [0, 1], and their combination.

A reward is a callable on a batch of images or of texts. `rewards` of a recipe lists any number:

    { kind = "scenes" }                                       the exact checker of SceneBench
    { kind = "program", name = "package.module:object" }      a callable, or what makes one
    { kind = "http", url = "http://127.0.0.1:9000/reward" }   a service
    { kind = "judge", checkpoint = "folder", question = "…" } a model that answers yes or no
    { kind = "vlm", url = "…/v1", prompt_file = "judge.txt" } a model behind OpenAI's chat route
    { kind = "command", command = "python score.py" }         a command, JSON lines in and out
    { kind = "ocr", reader = "package.module:object" }        images → texts, compared with `text`
    { kind = "answer" }                                       texts, compared with `answer`

A sample whose reward fails, takes too long or is no number in [0, 1] has none (NaN): it is left out
of the update and counted. Above a share of such samples the run stops (`RewardFailure`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass as checked_dataclass

from neounify.config.ranges import STRICT, Count, NonNegative, Positive, Range
from neounify.errors import ConfigError, NeounifyError
from neounify.plugins import load_callable, load_object
from neounify.post_train.prompts import PromptCase
from neounify.post_train.reward_judges import CommandReward, VlmReward, judge_key
from neounify.post_train.reward_kinds import (
    TOTAL,
    HttpReward,
    JudgeReward,
    OcrReward,
    Output,
    Parts,
    Reward,
    SceneReward,
    answer_reward,
)
from neounify.scenes.world.scene import scene_config
from neounify.services import HTTP, NoAnswer, in_thread

IMAGES_ONLY, TEXTS_ONLY = ("judge", "ocr"), ("answer",)
"""Kinds of rewards that have no other outputs."""
KINDS_OF_FIELDS = {
    "name": ("program",),
    "url": ("http", "vlm"),
    "checkpoint": ("judge",),
    "prompt_file": ("vlm",),
    "command": ("command",),
    "reader": ("ocr",),
}
"""Fields that these kinds need and others do not have."""
MAX_MESSAGES = 20
"""Messages of failed rewards that a report keeps."""


class RewardFailure(NeounifyError):
    """Too many samples have no reward."""


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardConfig:
    """One reward: its kind and fields, the `weight` of its mean part, and limits.

    `weights` are those of its parts by name, by default alike; `minimum` takes the least part in
    place of the mean. `timeout` is in seconds per batch, `retries` further attempts of a service.
    """

    kind: Literal["scenes", "program", "http", "judge", "vlm", "command", "ocr", "answer"] = (
        "scenes"
    )
    weight: Positive = 1.0
    weights: Mapping[str, NonNegative] | None = None
    minimum: bool = False
    timeout: Positive = 60.0
    retries: Annotated[int, AfterValidator(Range(0, 10))] = 2
    batch: Count = 64
    name: str | None = None
    url: str | None = None
    checkpoint: str | None = None
    question: str = 'Does the image show "{prompt}"? Answer yes or no.'
    model: str | None = None
    prompt_file: str | None = None
    scale: tuple[float, float] = (0.0, 1.0)
    key_variable: str | None = None
    command: str | None = None
    reader: str | None = None
    world: str = "default"

    def __post_init__(self) -> None:
        for key, kinds in KINDS_OF_FIELDS.items():
            is_set = bool(getattr(self, key))
            if is_set != (self.kind in kinds):
                verb = "has no" if is_set else "needs"
                raise ValueError(f'a reward of kind "{self.kind}" {verb} {key}')
        if not self.scale[0] < self.scale[1]:
            raise ValueError(f"scale must be [lowest, highest] of a judge, got {list(self.scale)}")
        if self.weights is not None and not any(self.weights.values()):
            raise ValueError("weights: at least one part must have a weight above 0")
        if self.url is not None and not self.url.startswith(HTTP):
            raise ValueError(f"url must begin with http:// or https://, got {self.url[:80]!r}")


def check_programs(configs: Sequence[RewardConfig], folder: Path | None) -> None:
    """Import the programs of rewards. Raises ConfigError for one that cannot be imported."""
    for config in configs:
        if name := config.name or config.reader:
            load_object(name, "reward", ConfigError, folder)


def build_reward(config: RewardConfig, folder: Path | None = None) -> Reward:
    """The reward of a config. Raises ConfigError for a program or model that cannot be loaded.

    Programs are imported from installed packages or from `folder`, that of the recipe.
    """
    builders: dict[str, Callable[[RewardConfig], Reward]] = {
        "scenes": lambda c: SceneReward(scene_config(c.world)),
        "program": lambda c: load_callable(
            str(c.name), "reward", "(outputs, cases)", ConfigError, folder
        ),
        "http": lambda c: HttpReward(str(c.url), c.timeout, c.retries),
        "judge": lambda c: JudgeReward(str(c.checkpoint), c.question),
        "vlm": lambda c: _vlm(c, folder),
        "command": lambda c: CommandReward(str(c.command), c.timeout),
        "ocr": lambda c: OcrReward(
            load_callable(str(c.reader), "reader", "(images)", ConfigError, folder)
        ),
        "answer": lambda c: answer_reward,
    }
    return builders[config.kind](config)


@dataclass(frozen=True, eq=False)
class Rewarded:
    """Rewards of a batch: `total` and `parts` by name, [outputs] each; NaN is no reward."""

    total: np.ndarray
    parts: dict[str, np.ndarray]
    failures: list[str] = field(default_factory=list)
    what: str = "outputs"
    """What was rewarded: images or answers."""

    @classmethod
    def joined(cls, several: Sequence[Rewarded]) -> Rewarded:
        """The rewards of several batches as those of one; a part that one lacks is NaN there."""
        parts = {
            name: np.concatenate(
                [one.parts.get(name, np.full(len(one.total), math.nan)) for one in several]
            )
            for name in dict.fromkeys(name for one in several for name in one.parts)
        }
        total = np.concatenate([one.total for one in several])
        what = next((one.what for one in several if len(one.total)), "outputs")
        return cls(total, parts, [message for one in several for message in one.failures], what)


class Rewards:
    """The weighted mean of several rewards, robust to each of them failing.

    `check` refuses a batch of which more than `max_failed` have no reward. With several rewards,
    parts and messages begin with the kind of theirs, and its number if others have it too.
    `folder` is where programs are looked for besides installed packages.
    """

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        max_failed: float = 0.2,
        folder: Path | None = None,
    ) -> None:
        self.configs, self.max_failed = list(configs), max_failed
        self.rewards = [build_reward(config, folder) for config in configs]
        kinds = [config.kind for config in configs]
        self.labels = [
            kind if kinds.count(kind) == 1 else f"{kind}-{kinds[:index].count(kind) + 1}"
            for index, kind in enumerate(kinds)
        ]
        self.failed = 0

    def check(self, rewarded: Rewarded) -> None:
        """Count samples without a reward. Raises RewardFailure for too many of them."""
        count, failed = len(rewarded.total), int(np.isnan(rewarded.total).sum())
        self.failed += failed
        if failed > self.max_failed * count:
            listed = "; ".join(dict.fromkeys(rewarded.failures))
            raise RewardFailure(
                f"{failed} of {count} {rewarded.what} have no reward (max_failed_rewards "
                f"{self.max_failed:g}): {listed[:1000]}"
            )

    def measure(self, outputs: Sequence[Output], cases: Sequence[PromptCase]) -> Rewarded:
        """The rewards of a batch, however many are missing."""
        total = np.zeros(len(outputs))
        parts: dict[str, np.ndarray] = {}
        failures: list[str] = []
        for label, config, reward in zip(self.labels, self.configs, self.rewards, strict=True):
            messages: list[str] = []
            rows = self._measure(config, reward, outputs, cases, messages)
            failures += [f"{label} reward{message}" for message in messages]
            names = dict.fromkeys(name for row in rows for name in row)
            for name in names:
                values = np.array([row.get(name, math.nan) for row in rows])
                key = name if len(self.configs) == 1 else f"{label}/{name}"
                parts[key] = values
            total += config.weight * np.array([combined(config, row) for row in rows])
        total /= sum(config.weight for config in self.configs)
        what = "images" if outputs and isinstance(outputs[0], np.ndarray) else "answers"
        return Rewarded(total, parts, failures[:MAX_MESSAGES], what)

    def _measure(
        self,
        config: RewardConfig,
        reward: Reward,
        outputs: Sequence[Output],
        cases: Sequence[PromptCase],
        failures: list[str],
    ) -> list[Parts]:
        rows: list[Parts] = []
        for start in range(0, len(outputs), config.batch):
            chunk = slice(start, start + config.batch)
            rows += self._batch(config, reward, outputs[chunk], cases[chunk], failures)
        return rows

    def _batch(
        self,
        config: RewardConfig,
        reward: Reward,
        outputs: Sequence[Output],
        cases: Sequence[PromptCase],
        failures: list[str],
    ) -> list[Parts]:
        """Parts of some outputs; a batch that fails by itself is tried again one by one."""
        try:
            rows = list(self._call(config, reward, outputs, cases))
            if len(rows) != len(outputs):
                raise ValueError(f"{len(rows)} rewards for {len(outputs)} outputs")
        except FutureTimeout:
            failures.append(f": no result after {config.timeout:g} s")
            return [{}] * len(outputs)
        except NoAnswer as error:
            failures.append(f": {error}")
            return [{}] * len(outputs)
        except Exception as error:  # a reward's own code may fail in any way
            if len(outputs) == 1:
                failures.append(f" of {cases[0].prompt[:80]!r}: {error!r}")
                return [{}]
            return [
                self._batch(config, reward, [output], [case], failures)[0]
                for output, case in zip(outputs, cases, strict=True)
            ]
        for number, (row, case) in enumerate(zip(rows, cases, strict=True)):
            if (problem := _problem(row, config.weights)) is not None:
                failures.append(f" of {case.prompt[:80]!r}: {problem}")
                rows[number] = {}
        return rows

    def _call(
        self,
        config: RewardConfig,
        reward: Reward,
        outputs: Sequence[Output],
        cases: Sequence[PromptCase],
    ) -> Sequence[Parts]:
        if config.kind not in ("program", "ocr"):  # ours end, or have a limit of their service
            return reward(outputs, cases)
        return in_thread(lambda: reward(outputs, cases)).result(config.timeout)


def _problem(row: Any, weights: Mapping[str, float] | None) -> str | None:
    """Error message of a row that is no reward, or lacks a part of `weights`; None for a reward."""
    if isinstance(row, Exception):
        return str(row)
    if not isinstance(row, Mapping) or not row:
        return f"expected named parts, got {str(row)[:80]}"
    for name, value in row.items():
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return f"{name} is no number: {str(value)[:80]}"
        if not 0 <= number <= 1:
            return f"{name} must be in [0, 1], got {number}"
    if missing := sorted(set(weights or ()) - set(row)):
        return f"weights name {', '.join(missing)}, its parts are {', '.join(row)}"
    return None


def combined(config: RewardConfig, row: Parts) -> float:
    """The reward of named parts by the weights of a config; NaN without parts."""
    if not row:
        return math.nan
    if config.weights is None and TOTAL in row:
        return float(row[TOTAL])
    weights = config.weights or dict.fromkeys(row, 1.0)
    if config.minimum:
        return min(float(row[name]) for name in weights)
    mean = sum(float(row[name]) * weight for name, weight in weights.items())
    return mean / sum(weights.values())


def _vlm(config: RewardConfig, folder: Path | None) -> VlmReward:
    path = (folder or Path()) / str(config.prompt_file)
    return VlmReward(
        str(config.url).rstrip("/"),
        config.model,
        VlmReward.read_prompt(path),
        config.scale,
        config.timeout,
        config.retries,
        judge_key(config.key_variable),
    )
