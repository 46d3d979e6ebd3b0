"""Stage 12: captions of targets by our own understanding engine, scored, the best one chosen.

Three captions are made of an image: a short one, a full one, and one of random length, the full one
sampled and cut at the end of a sentence. Each is scored by the hook of stage 10, or by the model:

    score = sum over the caption's tokens of  log p(token | image) - log p(token | no image),

how much more likely the image makes it: what is true adds to it, what is false takes away. The
share of old captions that stay, 5 %, is that of DALL·E 3 (Betker et al., "Improving Image
Generation with Better Captions", 2023).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from neounify.attention import select_for
from neounify.curate.hooks import call_hook, load_hook, read_number
from neounify.curate.recipe import Captions, CurateError, CurateRecipe
from neounify.curate.units import folder_digest
from neounify.data import Sample, SampleImage, SampleText, Turn
from neounify.data.encode import Encoder
from neounify.data.loader import make_pack
from neounify.errors import NeounifyError
from neounify.image.pixels import to_und_pixels
from neounify.model.neo import ModelBatch
from neounify.pipeline import Pipeline, load
from neounify.runtime import one_thread

OLD, SHORT, FULL, RANDOM = "old", "short", "full", "random"
TEMPERATURE = 0.7
_SENTENCE_END = re.compile(r"[.!?。！？]")


@dataclass(frozen=True)
class Captioned:
    """Captions of one image as (kind, text, score), the old one first, and the chosen text."""

    captions: tuple[tuple[str, str, float | None], ...]
    chosen: str


def wants_caption(sample: Sample, scores: Sequence[float] | None, recipe: CurateRecipe) -> bool:
    """Whether a kept sample is captioned: text to image, and of those that the recipe names."""
    stage = recipe.stages.captions
    if stage.model is None or not stage.enabled or sample.task != "t2i":
        return False
    if [image.role for image in sample.images] != ["target"]:
        return False
    return stage.of == "all" or any(s < recipe.stages.match.recaption for s in scores or ())


def caption_images(
    images: Sequence[Image.Image], samples: Sequence[Sample], recipe: CurateRecipe
) -> list[Captioned]:
    """Captions of some images, each as it would be alone. Raises CurateError."""
    stage = recipe.stages.captions
    assert stage.model is not None
    with one_thread():
        weights = folder_digest(Path(stage.model))
        pipeline = _pipeline(stage.model, weights, stage.device or "cpu")
        new = _made(pipeline, images, samples, stage, recipe.seed)
        results = []
        for image, sample, texts in zip(images, samples, new, strict=True):
            old = sample.text("user").strip()
            listed = [(OLD, old), *texts]
            scores = _scores(pipeline, image, [text for _, text in listed], recipe)
            results.append(_choose(sample, listed, scores, recipe))
    return results


def _made(
    pipeline: Pipeline,
    images: Sequence[Image.Image],
    samples: Sequence[Sample],
    stage: Captions,
    seed: int,
) -> list[list[tuple[str, str]]]:
    """(kind, text) of the captions of each image."""
    try:
        count = len(images)
        short = pipeline.chat_batch(
            [stage.short_question] * count, images, max_new_tokens=stage.short_tokens
        )
        full = pipeline.chat_batch(
            [stage.full_question] * count, images, max_new_tokens=stage.full_tokens
        )
        free = [
            pipeline.chat(
                stage.full_question,
                image,
                max_new_tokens=_length(sample, stage, seed),
                temperature=TEMPERATURE,
                seed=_draw(sample, seed, "sampling"),
            )
            for image, sample in zip(images, samples, strict=True)
        ]
    except NeounifyError as error:
        raise CurateError(f"stages.captions: {stage.model} cannot caption: {error}") from error
    kinds = ((SHORT, short), (FULL, full), (RANDOM, free))
    return [
        [(kind, text) for kind, answers in kinds if (text := whole_sentences(answers[at].text))]
        for at in range(count)
    ]


def whole_sentences(text: str) -> str:
    """A caption up to its last end of a sentence; all of it where there is none."""
    text = " ".join(text.split())
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else text


def _draw(sample: Sample, seed: int, use: str) -> int:
    """A number below 2^31 from seed and id, the same wherever the sample stands."""
    digest = hashlib.sha256(f"{seed}/{use}/{sample.id}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def _length(sample: Sample, stage: Captions, seed: int) -> int:
    low, high = sorted((stage.short_tokens, stage.full_tokens))
    return low + _draw(sample, seed, "length") % (high - low + 1)


def _scores(
    pipeline: Pipeline, image: Image.Image, texts: Sequence[str], recipe: CurateRecipe
) -> list[float | None]:
    match = recipe.stages.match
    if not match.enabled or match.hook is None:
        return list(likelihood_gains(pipeline, image, texts, recipe.stages.captions.full_question))
    hook = load_hook(match.hook, recipe.folder)
    values = call_hook(hook, [image] * len(texts), list(texts), read_number, match.timeout)
    return [None if isinstance(value, BaseException) else value for value in values]


@torch.inference_mode()
def likelihood_gains(
    pipeline: Pipeline, image: Image.Image, texts: Sequence[str], question: str
) -> list[float]:
    """Gain of each text by the image, in nats (see the module)."""
    model, processor = pipeline.model, pipeline.processor
    encoder = Encoder(
        config=pipeline.config,
        tokenizer=pipeline.tokenizer,
        system_message=processor.system_message,
    )
    rng = np.random.default_rng(0)
    seen = (SampleImage(image, "input"), SampleText(f"\n{question}"))
    documents = [
        encoder(_dialogue(parts, text), rng)
        for text in texts
        for parts in (seen, (SampleText(question),))
    ]
    pack = make_pack(documents)
    batch = ModelBatch(
        layout=pack.layout,
        attend=select_for(model, pipeline.attention).plan(pack.layout),
        ids=pack.ids.to(model.device),
        images=[
            to_und_pixels(Image.fromarray(p), kind=model.config.und_pixels).to(model.device)
            for p in pack.images
        ],
        logit_rows=pack.label_rows.to(model.device),
    )
    losses = torch.nn.functional.cross_entropy(
        model(batch).text.float(), pack.label_ids.to(model.device), reduction="none"
    )
    parts = losses.split([len(document.label_ids) for document in documents])
    sums = [float(part.sum()) for part in parts]
    return [without - with_it for with_it, without in zip(sums[::2], sums[1::2], strict=True)]


def _dialogue(parts: tuple[Any, ...], answer: str) -> Sample:
    return Sample("caption", (Turn("user", parts), Turn("assistant", (SampleText(answer, True),))))


def _choose(
    sample: Sample,
    listed: Sequence[tuple[str, str]],
    scores: Sequence[float | None],
    recipe: CurateRecipe,
) -> Captioned:
    """The best of the made captions for `share` of the samples, the old one for the others."""
    captions = tuple((k, t, s) for (k, t), s in zip(listed, scores, strict=True))
    new = [(score, text) for kind, text, score in captions if kind != OLD and score is not None]
    keeps = _draw(sample, recipe.seed, "caption") >= recipe.stages.captions.share * 2**31
    chosen = listed[0][1] if keeps or not new else max(new, key=lambda pair: pair[0])[1]
    return Captioned(captions, chosen)


@lru_cache(maxsize=1)
def _pipeline(folder: str, weights: str, device: str) -> Pipeline:
    """The model of a folder, whose files have this digest."""
    try:
        return load(folder, device=device, dtype="float32" if device == "cpu" else None)
    except NeounifyError as error:
        raise CurateError(f"stages.captions: {error}") from error
