"""Rewards: (outputs, cases) → named parts in [0, 1], and their combination.

A reward is a callable on a batch of images or of texts. `rewards` of a recipe lists any number:

    { kind = "scenes" }                                       the exact checker of SceneBench
    { kind = "program", name = "package.module:object" }      a callable, or what makes one
    { kind = "http", url = "http://127.0.0.1:9000/reward" }   a service
    { kind = "judge", checkpoint = "folder", question = "…" } a model that answers yes or no
    { kind = "ocr", reader = "package.module:object" }        images → texts, compared with `text`
    { kind = "answer" }                                       texts, compared with `answer`

A sample whose reward fails, takes too long or is no number in [0, 1] has none (NaN): it is left out
of the update and counted. Above a share of such samples the run stops (`RewardFailure`).
"""

from __future__ import annotations

import base64
import io
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import PIL.Image
from jaxtyping import UInt8
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass as checked_dataclass

from neounify.config.ranges import STRICT, Count, NonNegative, Positive, Range
from neounify.errors import ConfigError, NeounifyError
from neounify.plugins import load_object
from neounify.post_train.prompts import PromptCase
from neounify.scenes.bench.checks import (
    MIN_EDIT_PSNR,
    Verdict,
    check_caption,
    check_edit,
    check_image,
    check_story,
    check_vqa,
)
from neounify.scenes.bench.prompts import CaptionCase, VqaCase
from neounify.scenes.world.edits import SceneEdit, Story
from neounify.scenes.world.facts import SceneFacts
from neounify.scenes.world.scene import SceneConfig, scene_config

Pixels = UInt8[np.ndarray, "height width 3"]
Output = Pixels | str | tuple[str | Pixels, ...]
"""What is rewarded: an image, the text of an answer without its thought, or both in turn."""
Parts = Mapping[str, float]
IMAGES_ONLY, TEXTS_ONLY = ("judge", "ocr"), ("answer",)
"""Kinds of rewards that have no other outputs."""
MAX_RESPONSE_BYTES = 2**22
TOTAL = "total"
"""A part that is the reward of its sample, the other parts being for the log."""
MAX_MESSAGES = 20
"""Messages of failed rewards that a report keeps."""


class Reward(Protocol):
    """A reward of a batch; one mapping of named parts in [0, 1] per output, in order."""

    def __call__(
        self, outputs: Sequence[Any], cases: Sequence[PromptCase], /
    ) -> Sequence[Parts]: ...


class RewardFailure(NeounifyError):
    """Too many samples have no reward."""


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardConfig:
    """One reward: its kind and fields, the `weight` of its mean part, and limits.

    `weights` are those of its parts by name, by default alike; `minimum` takes the least part in
    place of the mean. `timeout` is in seconds per batch, `retries` further attempts of a service.
    """

    kind: Literal["scenes", "program", "http", "judge", "ocr", "answer"] = "scenes"
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
    reader: str | None = None
    world: str = "default"

    def __post_init__(self) -> None:
        of_kinds = {"program": "name", "http": "url", "judge": "checkpoint", "ocr": "reader"}
        for kind, key in of_kinds.items():
            is_set = bool(getattr(self, key))
            if is_set != (kind == self.kind):
                verb = "has no" if is_set else "needs"
                raise ValueError(f'a reward of kind "{self.kind}" {verb} {key}')
        if self.weights is not None and not any(self.weights.values()):
            raise ValueError("weights: at least one part must have a weight above 0")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
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
        "program": lambda c: _program(str(c.name), folder),
        "http": lambda c: HttpReward(str(c.url), c.timeout, c.retries),
        "judge": lambda c: JudgeReward(str(c.checkpoint), c.question),
        "ocr": lambda c: OcrReward(_program(str(c.reader), folder)),
        "answer": lambda c: answer_reward,
    }
    return builders[config.kind](config)


@dataclass(frozen=True, eq=False)
class Rewarded:
    """Rewards of a batch: `total` and `parts` by name, [outputs] each; NaN is no reward."""

    total: np.ndarray
    parts: dict[str, np.ndarray]
    failures: list[str] = field(default_factory=list)

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
        return cls(total, parts, [message for one in several for message in one.failures])


class Rewards:
    """The weighted mean of several rewards, robust to each of them failing.

    Raises RewardFailure when more than `max_failed` of a batch have no reward. With several
    rewards, parts and messages begin with the kind of theirs, and its number if others have it too.
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
        self._pool = ThreadPoolExecutor(max_workers=1)

    def __call__(self, outputs: Sequence[Output], cases: Sequence[PromptCase]) -> Rewarded:
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
            total += config.weight * np.array([_combined(config, row) for row in rows])
        total /= sum(config.weight for config in self.configs)
        failed = int(np.isnan(total).sum())
        self.failed += failed
        if failed > self.max_failed * len(outputs):
            listed = "; ".join(dict.fromkeys(failures))
            kind = "images" if isinstance(outputs[0], np.ndarray) else "answers"
            raise RewardFailure(
                f"{failed} of {len(outputs)} {kind} have no reward (max_failed_rewards "
                f"{self.max_failed:g}): {listed[:1000]}"
            )
        return Rewarded(total, parts, failures[:MAX_MESSAGES])

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
        """Parts of some outputs; a batch that fails is tried again one by one."""
        try:
            rows = list(self._call(config, reward, outputs, cases))
            if len(rows) != len(outputs):
                raise ValueError(f"{len(rows)} rewards for {len(outputs)} outputs")
        except FutureTimeout:
            failures.append(f": no result after {config.timeout:g} s")
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
        future = self._pool.submit(reward, outputs, cases)
        try:
            return future.result(config.timeout)
        except FutureTimeout:
            # The thread cannot be ended; the next batch must not wait for it.
            self._pool = ThreadPoolExecutor(max_workers=1)
            raise


def _problem(row: Any, weights: Mapping[str, float] | None) -> str | None:
    """Error message of a row that is no reward, or lacks a part of `weights`; None for a reward."""
    if not isinstance(row, Mapping) or not row:
        return f"expected named parts, got {str(row)[:80]}"
    for name, value in row.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            return f"{name} is no number: {str(value)[:80]}"
        if not 0 <= number <= 1:
            return f"{name} must be in [0, 1], got {number}"
    if missing := sorted(set(weights or ()) - set(row)):
        return f"weights name {', '.join(missing)}, its parts are {', '.join(row)}"
    return None


def _combined(config: RewardConfig, row: Parts) -> float:
    if not row:
        return math.nan
    if config.weights is None and TOTAL in row:
        return float(row[TOTAL])
    weights = config.weights or dict.fromkeys(row, 1.0)
    if config.minimum:
        return min(float(row[name]) for name in weights)
    mean = sum(float(row[name]) * weight for name, weight in weights.items())
    return mean / sum(weights.values())


# --- kinds ---


class SceneReward:
    """The checker of SceneBench: "strict" and "share", the share of attributes that are right.

    Questions have "strict" alone; the attributes of a story are its images and their number.

    An edit's parts are "strict", "achieved", half strict and half the share of the target's
    attributes, and "unchanged", the PSNR outside the edited region over the 30 dB that the
    benchmark asks for; its total is the least of the last two.
    """

    def __init__(self, world: SceneConfig) -> None:
        self.world = world

    def __call__(self, outputs: Sequence[Any], cases: Sequence[PromptCase]) -> list[Parts]:
        return [self._one(output, case) for output, case in zip(outputs, cases, strict=True)]

    def _one(self, output: Any, case: PromptCase) -> Parts:
        if isinstance(output, str):
            return self._text(output, case.target)
        if isinstance(output, tuple):
            return self._story(output, case)
        return self._image(output, case)

    def _text(self, text: str, target: Any) -> Parts:
        if isinstance(target, VqaCase):
            return {"strict": float(check_vqa(target.question, text).correct)}
        if isinstance(target, CaptionCase):
            return _split(check_caption(text, target.scene, self.world, target.style))
        raise TypeError("rewards of scenes need questions or captions of scenes")

    def _story(self, parts: tuple[str | Pixels, ...], case: PromptCase) -> Parts:
        if not isinstance(case.target, Story):
            raise TypeError("rewards of scenes need a story of scenes for text and images")
        images = [part for part in parts if not isinstance(part, str)]
        return _split(check_story(case.target, images, self.world.sized(case.width, case.height)))

    def _image(self, image: Pixels, case: PromptCase) -> Parts:
        world = self.world.sized(case.width, case.height)
        if isinstance(case.target, SceneFacts):
            return _split(check_image(case.target, image, world))
        if isinstance(case.target, SceneEdit):
            edited = check_edit(case.target, np.asarray(case.images[0]), image, world)
            right = edited.target.attributes.values()
            achieved = (edited.target.correct + sum(right) / len(right)) / 2
            elsewhere = edited.psnr_elsewhere
            unchanged = 1.0 if elsewhere is None else min(1.0, elsewhere / MIN_EDIT_PSNR)
            return {
                "strict": float(edited.correct),
                "achieved": achieved,
                "unchanged": unchanged,
                TOTAL: min(achieved, unchanged),
            }
        raise TypeError("rewards of scenes need paintings or edits of scenes")


def _split(verdict: Verdict) -> Parts:
    right = verdict.attributes.values()
    return {"strict": float(verdict.correct), "share": sum(right) / len(right)}


class HttpReward:
    """A service: POST of JSON with base64 PNGs or texts, prompts and records.

    It answers {"rewards": [{…}]}.

    A connection error or a status from 500 up is tried again after 0.5, 1, 2, … seconds.
    """

    def __init__(self, url: str, timeout: float, retries: int) -> None:
        self.url, self.timeout, self.retries = url, timeout, retries

    def __call__(self, outputs: Sequence[Output], cases: Sequence[PromptCase]) -> list[Parts]:
        items = [
            _item(output)
            | {"prompt": case.prompt, "category": case.category}
            | ({"record": dict(case.record)} if case.record else {})
            for output, case in zip(outputs, cases, strict=True)
        ]
        body = json.dumps({"items": items}).encode()
        document = json.loads(self._post(body))
        rewards = document.get("rewards") if isinstance(document, dict) else None
        if not isinstance(rewards, list):
            raise ValueError('the answer has no list "rewards"')
        return rewards

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(
            self.url, body, {"Content-Type": "application/json"}, method="POST"
        )
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    data: bytes = answer.read(MAX_RESPONSE_BYTES + 1)
                if len(data) > MAX_RESPONSE_BYTES:
                    raise ValueError(f"the answer has more than {MAX_RESPONSE_BYTES} bytes")
                return data
            except OSError as error:
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if refused or attempt == self.retries:
                    raise
                time.sleep(0.5 * 2**attempt)
        raise AssertionError  # the loop returns or raises


class JudgeReward:
    """A model of ours that is asked about each image: "yes" is 1 if its answer begins with yes."""

    def __init__(self, checkpoint: str, question: str) -> None:
        from neounify.pipeline import load

        try:
            question.format(prompt="")
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"question may hold {{prompt}} and nothing else in braces: {question!r}"
            ) from error
        self.question = question
        self.pipe = load(Path(checkpoint))

    def __call__(self, images: Sequence[Pixels], cases: Sequence[PromptCase]) -> list[Parts]:
        shown = [PIL.Image.fromarray(image) for image in images]
        questions = [self.question.format(prompt=case.prompt) for case in cases]
        answers = self.pipe.chat_batch(questions, shown, max_new_tokens=8)
        return [{"yes": float(a.text.strip().lower().startswith("yes"))} for a in answers]


class OcrReward:
    """Text in images: what `reader` reads, against `text` of the record (`text_similarity`)."""

    def __init__(self, reader: Callable[[Sequence[Pixels]], Sequence[str]]) -> None:
        self.reader = reader

    def __call__(self, images: Sequence[Pixels], cases: Sequence[PromptCase]) -> list[Parts]:
        texts = self.reader(images)
        return [
            {"text": text_similarity(text, str(case.record["text"]))}
            for text, case in zip(texts, cases, strict=True)
        ]


def answer_reward(texts: Sequence[str], cases: Sequence[PromptCase]) -> list[Parts]:
    """Answers against `answer` of the record: "strict" if alike, and `text_similarity` as "share".

    Case, outer punctuation and spaces do not count.
    """
    rows: list[Parts] = []
    for text, case in zip(texts, cases, strict=True):
        said, wanted = (
            " ".join(value.strip(" \n.!。").split()) for value in (text, case.record["answer"])
        )
        share = text_similarity(said, wanted)
        rows.append({"strict": float(said.lower() == wanted.lower()), "share": share})
    return rows


def text_similarity(text: str, wanted: str) -> float:
    """1 - Levenshtein distance / length of `wanted`, at least 0; case and spaces do not count."""
    a, b = ("".join(value.lower().split()) for value in (text, wanted))
    if not b:
        return float(not a)
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return max(0.0, 1 - row[-1] / len(b))


def _program(name: str, folder: Path | None) -> Any:
    """A callable of the user: the object itself, or what its class makes."""
    reward = load_object(name, "reward", ConfigError, folder)
    if isinstance(reward, type):
        try:
            reward = reward()
        except Exception as error:  # a class's own code may fail in any way
            raise ConfigError(f"{name}: calling it failed ({error})") from error
    if not callable(reward):
        raise ConfigError(f"{name}: a reward is a callable of (outputs, cases)")
    return reward


def _item(output: Output) -> dict[str, Any]:
    """What a service gets of an output."""
    if isinstance(output, tuple):
        return {"parts": [_item(part) for part in output]}
    return {"text": output} if isinstance(output, str) else {"image": _png(output)}


def _png(image: Pixels) -> str:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
