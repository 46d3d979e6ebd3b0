"""Training documents of PixelUMM: the prompts of its inference, and what its answers learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from neounify.data.encode import Encoded, Encoder, GuidanceDropout
from neounify.data.sample import Sample, SampleImage, SampleText, Turn
from neounify.model import Image, Noise, Text
from neounify.text import Message, Tokenizer, chat_prompt, image_prompt, unconditional_prompt
from neounify.text.forms import PIXELUMM
from neounify.text.template import Prompt
from support.pixelumm import SMALL, vision_tokenizer

RED = np.full((32, 48, 3), (200, 0, 0), np.uint8)
BLUE = np.full((48, 48, 3), (0, 0, 200), np.uint8)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder(
        config=SMALL,
        tokenizer=vision_tokenizer(tmp_path_factory.mktemp("tokenizer") / "files"),
        dropout=GuidanceDropout(text=0.0, all=0.0),
        target_pixels=(256, 10_000),
        input_pixels=(256, 10_000),
    )


def _encode(encoder: Encoder, task: str, *turns: Turn) -> Encoded:
    return encoder(Sample(task, turns, "one"), np.random.default_rng(0))


def _user(*parts: str | np.ndarray) -> Turn:
    known = [SampleText(p) if isinstance(p, str) else SampleImage(p, "input") for p in parts]
    return Turn("user", tuple(known))


def _ids(prompt: Prompt) -> list[int]:
    """Ids of a prompt's text alone."""
    return prompt.ids([0] * prompt.n_images, context_id=-1)


def _learnt(tokenizer: Tokenizer, encoded: Encoded) -> str:
    return tokenizer.decode(encoded.label_ids, skip_special=False)


PAINTED = Turn("assistant", (SampleImage(RED, "target"),))


def test_an_image(encoder: Encoder) -> None:
    encoded = _encode(encoder, "t2i", _user("a red circle"), PAINTED)
    wanted = image_prompt(
        encoder.tokenizer, "a red circle", system="", think=False, template=PIXELUMM
    )
    assert list(encoded.ids) == _ids(wanted)
    assert encoded.document.spans == (Text(len(encoded.ids)), Noise(2, 3))
    assert encoded.label_ids == ()


@pytest.mark.parametrize("drop", ["text", "all"])
def test_an_image_without_its_caption(encoder: Encoder, drop: str) -> None:
    dropout = GuidanceDropout(text=float(drop == "text"), all=float(drop == "all"))
    encoded = _encode(replace(encoder, dropout=dropout), "t2i", _user("a red circle"), PAINTED)
    assert list(encoded.ids) == _ids(unconditional_prompt(encoder.tokenizer, "", PIXELUMM))
    assert encoded.document.spans == (Text(len(encoded.ids)), Noise(2, 3))


@pytest.mark.parametrize("images", [(RED,), (RED, BLUE)])
def test_an_answer(encoder: Encoder, images: tuple[np.ndarray, ...]) -> None:
    """Two images have numbers, one has none; the fixed system message begins the conversation."""
    answer = Turn("assistant", (SampleText("red", loss=True),))
    encoded = _encode(encoder, "vqa", _user(*images, "What colour?"), answer)
    question = "<image>" * len(images) + "What colour?"
    wanted = chat_prompt(encoder.tokenizer, [Message("user", question)], template=PIXELUMM)
    assert list(encoded.ids[: len(_ids(wanted))]) == _ids(wanted)
    text = encoder.tokenizer.decode(encoded.ids, skip_special=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert ("Picture 2: " in text) == (len(images) == 2)
    assert _learnt(encoder.tokenizer, encoded) == "red<|im_end|>"
    grids = [span for span in encoded.document.spans if isinstance(span, Image)]
    assert encoded.label_rows[0] == len(_ids(wanted)) - 1 + sum(grid.length for grid in grids)


def test_an_edit_ends_with_the_noisy_image(encoder: Encoder) -> None:
    """No released model edits, but one may learn it: images have no numbers there."""
    encoded = _encode(encoder, "edit", _user(RED, BLUE, "Make it blue."), PAINTED)
    text = encoder.tokenizer.decode(encoded.ids, skip_special=False)
    marks = "<|vision_start|><|vision_end|>" * 2
    assert text == (
        f"<|im_start|>user\n{marks}Make it blue.<|im_end|>\n<|im_start|>assistant\n"
        "<|im_end|><|vision_start|>"
    )
    assert isinstance(encoded.document.spans[-1], Noise)
