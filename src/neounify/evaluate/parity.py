"""Parity of two models of one config: a checkpoint and the same one quantised, say.

Weights are compared one at a time, from the files. Everything else is computed with both models on
the same input: text logits and clean images x̂ in one packed call per prompt, tokens after the
prefixes of the first model's greedy answers, images from the same noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image as PilImage
from torch import Tensor

from neounify.attention import select_for
from neounify.checkpoint.load import expected_shapes, stored_weights
from neounify.checkpoint.names import part_of
from neounify.checkpoint.reader import CheckpointFolder
from neounify.errors import RequestError
from neounify.evaluate.metrics import Rate, psnr
from neounify.flow.path import noise_scale
from neounify.flow.sampling import ImageSampling
from neounify.model import Document, Image, Layout, ModelBatch, Noise, Text
from neounify.model.layout import Grid, Span
from neounify.model.parts import UND
from neounify.pipeline import Pipeline
from neounify.tasks.chat import chat_images, make_chat_request, prompt_of
from neounify.tasks.image import ImageRequest, branch_prompt, draw_noise
from neounify.text.template import ImageSegment

TIMES = (0.1, 0.4, 0.7)
"""Times at which x̂ is compared, of z = (1 - t) · noise."""
ANSWER_TOKENS = 48
CPU = torch.device("cpu")

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Parity:
    """How far the second model is from the first.

    `weights` are ‖Ŵ - W‖ / ‖W‖ by part of the model, `formats` the formats of the second one's
    weights and how many have each; `logits` and `clean` (by t) are norms of differences relative to
    those of the first model, `tokens` the greedy tokens that agree; `psnr` is that of each image in
    dB, 100 for equal ones. `bench` has SceneBench rates of both by category.
    """

    weights: Mapping[str, float]
    formats: Mapping[str, int]
    logits: float | None
    clean: Mapping[float, float]
    tokens: Rate | None
    psnr: tuple[float, ...]
    bench: Mapping[str, tuple[Rate, Rate]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "weights": dict(self.weights),
            "formats": dict(self.formats),
            "logits": self.logits,
            "clean": {str(t): error for t, error in self.clean.items()},
            "tokens": None if self.tokens is None else self.tokens.to_json(),
            "psnr": list(self.psnr),
            "bench": {
                name: {"first": a.to_json(), "second": b.to_json()}
                for name, (a, b) in self.bench.items()
            },
        }

    def to_markdown(self) -> str:
        """The report as tables."""
        formats = ", ".join(f"{count} {name}" for name, count in self.formats.items())
        lines = [f"Weights of the second model: {formats}.", ""]
        lines += ["| | |", "|---|--:|"]
        lines += [f"| weight error, {part} | {_percent(e)} |" for part, e in self.weights.items()]
        lines += [f"| x̂ at t = {t:g} | {_percent(e)} |" for t, e in self.clean.items()]
        if self.logits is not None:
            lines.append(f"| logits | {_percent(self.logits)} |")
        if self.tokens is not None:
            agreeing = f"{self.tokens.correct} of {self.tokens.number}"
            lines.append(f"| greedy tokens that agree | {agreeing} ({self.tokens} %) |")
        if self.psnr:
            middle, low = statistics.median(self.psnr), min(self.psnr)
            lines.append(f"| PSNR of images, median; lowest | {middle:.1f}; {low:.1f} dB |")
        if self.bench:
            lines += ["", "| SceneBench, % (95 %) | first | second |", "|---|---|---|"]
            lines += [f"| {name} | {a} | {b} |" for name, (a, b) in self.bench.items()]
        return "\n".join(lines) + "\n"


def weight_errors(
    first: CheckpointFolder, second: CheckpointFolder, progress: Progress = lambda done: None
) -> tuple[dict[str, float], dict[str, int]]:
    """(‖Ŵ - W‖ / ‖W‖ by part, number of the second one's weights by format), read one by one.

    Raises RequestError for checkpoints of different shapes, and CheckpointError.
    """
    shapes = expected_shapes(first.config)
    expected = expected_shapes(second.config)
    if differing := {name for name, _ in shapes.items() ^ expected.items()}:
        name = min(differing)
        one, other = (f"{[*x[name]]}" if name in x else "none" for x in (shapes, expected))
        raise RequestError(
            f"{first.path.name} and {second.path.name} cannot be compared weight by weight: "
            f"{len(differing)} differ in shape, such as {name} with {one} and {other}"
        )
    for checkpoint in (first, second):
        checkpoint.check(shapes)
    others = stored_weights(second, shapes)
    off: dict[str, float] = {}
    norm: dict[str, float] = {}
    formats: dict[str, int] = {}
    for number, (name, ours) in enumerate(stored_weights(first, shapes).items(), start=1):
        theirs = others[name]
        a, b = (source.read(torch.float32, CPU) for source in (ours, theirs))
        part = part_of(name)
        off[part] = off.get(part, 0.0) + float((a - b).double().square().sum())
        norm[part] = norm.get(part, 0.0) + float(a.double().square().sum())
        label = theirs.codes.label if theirs.codes else str(theirs.info.dtype)[6:]
        formats[label] = formats.get(label, 0) + 1
        progress(number)
    errors = {part: math.sqrt(off[part] / norm[part]) if norm[part] else 0.0 for part in off}
    return errors, formats


@torch.inference_mode()
def output_errors(
    first: Pipeline, second: Pipeline, prompts: Sequence[str], size: tuple[int, int]
) -> tuple[float | None, dict[float, float]]:
    """(relative error of the logits, of x̂ by t) on prompts of images of `size` (width, height)."""
    off, norm = dict.fromkeys(("text", *TIMES), 0.0), dict.fromkeys(("text", *TIMES), 0.0)
    for number, prompt in enumerate(prompts):
        outputs = [_forward(pipe, prompt, size, number) for pipe in (first, second)]
        for (key, a), b in zip(outputs[0].items(), outputs[1].values(), strict=True):
            off[key] += float((a - b).square().sum())
            norm[key] += float(a.square().sum())
    errors = {key: math.sqrt(off[key] / norm[key]) for key in off if norm[key]}
    return errors.get("text"), {t: errors[t] for t in TIMES}


def _forward(
    pipe: Pipeline, prompt: str, size: tuple[int, int], seed: int
) -> dict[str | float, Tensor]:
    """Logits of the prompt's tokens ("text") and x̂ by t, float64."""
    model, (width, height) = pipe.model, size
    sampling = ImageSampling().resolve(pipe.config, editing=False)
    request = ImageRequest(prompt=prompt, width=width, height=height, sampling=sampling)
    segments = branch_prompt(pipe.processor, request, "cond").segments
    ids = [token for s in segments if not isinstance(s, ImageSegment) for token in s.ids]
    grid = Grid.of_pixels(height, width, pipe.config.token_size)
    noises = [Noise(grid.rows, grid.columns) for _ in TIMES]
    layout = Layout([Document((Text(len(ids)), *noises))])
    noise = draw_noise(pipe.config, width, height, torch.Generator().manual_seed(seed))[0]
    scale = noise_scale(grid.length, pipe.config.flow)
    batch = ModelBatch(
        layout=layout,
        attend=select_for(model).plan(layout),
        ids=torch.tensor(ids, device=model.device),
        z=torch.cat([(1 - t) * noise for t in TIMES]).to(model.device, model.compute_dtype),
        t=torch.tensor(TIMES, device=model.device),
        noise_scale=torch.full((len(TIMES),), scale, device=model.device),
        logit_rows=None if pipe.config.lm_head else torch.zeros(0, dtype=torch.int64),
    )
    output = model(batch, None if pipe.config.lm_head else lambda _, states: states)
    assert output.clean is not None
    clean = output.clean.double().cpu().split(grid.length)
    return {"text": output.text.double().cpu(), **dict(zip(TIMES, clean, strict=True))}


def greedy_agreement(
    first: Pipeline, second: Pipeline, questions: Sequence[tuple[str, PilImage.Image | None]]
) -> Rate:
    """How many tokens of the first model's greedy answers the second chooses after the same text.

    Questions are (text, image or None).
    """
    shown = [() if image is None else (image,) for _, image in questions]
    texts = [text for text, _ in questions]
    answers = first.chat_batch(texts, shown, max_new_tokens=ANSWER_TOKENS)
    correct = number = 0
    for text, images, answer in zip(texts, shown, answers, strict=True):
        expected = _choices(first, text, images, answer.token_ids)
        chosen = _choices(second, text, images, answer.token_ids)
        correct += int((expected == chosen).sum())
        number += len(chosen)
    return Rate(correct, number)


@torch.inference_mode()
def _choices(
    pipe: Pipeline, text: str, images: Sequence[PilImage.Image], answer: Sequence[int]
) -> Int[Tensor, " n"]:
    """The likeliest token after each prefix of an answer, the whole of it included."""
    model, request = pipe.model, make_chat_request(text, images, (), pipe.processor.template)
    prepared = [image.to(model.device) for image in chat_images(pipe.processor, request)]
    spans: list[Span] = []
    ids: list[int] = []
    for segment in prompt_of(pipe.processor, request).segments:
        if isinstance(segment, ImageSegment):
            spans.append(Image.of(model.token_grid(prepared[segment.image])))
        else:
            spans.append(Text(len(segment.ids)))
            ids += segment.ids
    if answer:
        spans.append(Text(len(answer)))
    layout = Layout([Document(tuple(spans))])
    tokens = torch.tensor([*ids, *answer], device=model.device)
    x = model.embed_und(layout, tokens, prepared)
    hidden = model.backbone(layout, {UND: x}, select_for(model).plan(layout))[UND]
    return model.logits(hidden[-len(answer) - 1 :]).argmax(-1).cpu()


def image_pairs(
    first: Pipeline, second: Pipeline, prompts: Sequence[str], size: tuple[int, int]
) -> list[tuple[PilImage.Image, PilImage.Image]]:
    """Images of the same prompts and noise by both models."""
    width, height = size
    seeds = list(range(len(prompts)))
    images = [
        pipe.generate(list(prompts), width=width, height=height, seed=seeds).images
        for pipe in (first, second)
    ]
    return list(zip(*images, strict=True))


def image_psnr(pairs: Sequence[tuple[PilImage.Image, PilImage.Image]]) -> tuple[float, ...]:
    """PSNR of each pair in dB, 100 for equal images."""
    return tuple(psnr(np.asarray(a), np.asarray(b)) for a, b in pairs)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
