"""Kinds of rewards: the checker of SceneBench, a service, a model that judges, OCR, known answers.

Each is a callable on a batch of outputs and their prompts; `rewards.py` combines them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from neounify.errors import ConfigError
from neounify.evaluate.metrics import levenshtein
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
from neounify.scenes.world.scene import SceneConfig
from neounify.services import BadAnswer, post_json

Pixels = UInt8[np.ndarray, "height width 3"]
Output = Pixels | str | tuple[str | Pixels, ...]
"""What is rewarded: an image, the text of an answer without its thought, or both in turn."""
Parts = Mapping[str, float]
TOTAL = "total"
"""A part that is the reward of its sample, the other parts being for the log."""


class Reward(Protocol):
    """A reward of a batch; one mapping of named parts in [0, 1] per output, in order."""

    def __call__(
        self, outputs: Sequence[Any], cases: Sequence[PromptCase], /
    ) -> Sequence[Parts]: ...


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

    It answers {"rewards": [{…}]}. Raises NoAnswer and BadAnswer as `services.post_json` does.
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
        answer = post_json(self.url, {"items": items}, timeout=self.timeout, retries=self.retries)
        rewards = answer.get("rewards")
        if not isinstance(rewards, list):
            raise BadAnswer('the answer has no list "rewards"')
        return rewards


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
    return max(0.0, 1 - levenshtein(a, b) / len(b))


def _item(output: Output) -> dict[str, Any]:
    """What a service gets of an output."""
    if isinstance(output, tuple):
        return {"parts": [_item(part) for part in output]}
    return {"text": output} if isinstance(output, str) else {"image": png_base64(output)}


def png_base64(image: Pixels) -> str:
    """An image as a PNG file in base64."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
