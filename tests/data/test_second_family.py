"""Training documents of PixelUMM: the prompts of its inference, and what its answers learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from neounify.data.draws import GuidanceDropout
from neounify.data.encode import Encoded, Encoder
from neounify.data.loader import make_pack
from neounify.data.sample import DataError, Sample, SampleClip, SampleImage, SampleText, Turn
from neounify.flow.guidance import Branch
from neounify.flow.path import shift_time
from neounify.flow.sampling import ImageSampling
from neounify.model import Document, Image, Layout, Noise, Text
from neounify.model.parts import GEN
from neounify.tasks.image import ImageRequest, branch_prompt
from neounify.tasks.program import Processor
from neounify.text import Message, Tokenizer, chat_prompt, image_prompt, unconditional_prompt
from neounify.text.forms import PIXELUMM
from neounify.text.template import Prompt
from neounify.train.loss import LossConfig, add_noise
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


# --- clips ---


def _filmed(fps: float = 24.0, height: int = 32, width: int = 48) -> Turn:
    frames = np.random.default_rng(0).integers(0, 256, (8, height, width, 3), np.uint8)
    return Turn("assistant", (SampleClip(frames, "target", fps),))


@pytest.mark.parametrize("branch", ["cond", "uncond"])
@pytest.mark.parametrize("fps", [24.0, 16.0])
def test_a_clip_is_what_generation_runs_on(encoder: Encoder, branch: Branch, fps: float) -> None:
    """Ids of both branches of guidance, and the tubes' positions behind them."""
    dropout = GuidanceDropout(text=float(branch == "uncond"), all=0.0)
    prompt = "a red circle moves left"
    encoded = _encode(replace(encoder, dropout=dropout), "t2v", _user(prompt), _filmed(fps))
    request = ImageRequest(
        prompt=prompt,
        width=48,
        height=32,
        frames=8,
        fps=fps,
        sampling=ImageSampling().resolve(SMALL, editing=False, video=True),
    )
    processor = Processor(SMALL, encoder.tokenizer, None, torch.float32)
    ids = branch_prompt(processor, request, branch).ids([], -1)
    assert list(encoded.ids) == ids
    assert encoded.label_ids == ()
    behind = Layout([Document((Noise.of(request.grid(SMALL)),), start_t=len(ids))])
    trained = Layout([encoded.document])
    assert torch.equal(trained[GEN].positions, behind[GEN].positions)
    assert trained[GEN].positions[:, 0].unique().tolist() == [len(ids), len(ids) + 24 / fps]


def test_the_next_frames_are_what_generation_runs_on(encoder: Encoder) -> None:
    """The frames before stand in tubes with their times; no released model continues clips."""
    shown = SampleClip(np.stack([RED] * 5), "input", 8.0)
    turn = Turn("user", (shown, SampleText("go on")))
    encoded = _encode(encoder, "next_frames", turn, _filmed(8.0))
    kinds = [type(span) for span in encoded.document.spans]
    assert kinds == [Text, Image, Text, Image, Text, Noise]
    text = encoder.tokenizer.decode(encoded.ids, skip_special=False)
    pair = "<|vision_start|><|vision_end|>"
    assert text == (
        f"<|im_start|>user\n<0.0 seconds>{pair}<0.5 seconds>{pair}go on<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|><|vision_start|>"
    )


@pytest.mark.parametrize(("side", "shift"), [(256, 1.0), (272, 2.0), (656, 3.0)])
def test_times_of_clips_are_shifted_by_their_shorter_side(
    encoder: Encoder, side: int, shift: float
) -> None:
    wide = replace(encoder, target_pixels=(256, 10**7))
    clip = Turn("assistant", (SampleClip(np.zeros((4, side, side + 16, 3), np.uint8), "target"),))
    pack = make_pack([_encode(wide, "t2v", _user("a red circle"), clip)])
    plain = LossConfig(t_mean=0.0, t_std=1.0)
    shifts = replace(plain, side_shifts=((256, 1.0), (640, 2.0), (960, 3.0)))
    raw, shifted = (
        add_noise(pack, SMALL, config, torch.Generator().manual_seed(0)).t
        for config in (plain, shifts)
    )
    torch.testing.assert_close(shifted, shift_time(raw, shift))


def test_a_caption_that_generation_refuses_is_not_trained_on(encoder: Encoder) -> None:
    with pytest.raises(DataError, match="the prompt has 4,097 tokens, this model reads 4,096"):
        _encode(encoder, "t2v", _user("a" * 4097), _filmed())
    assert _encode(encoder, "t2v", _user("a" * 4096), _filmed()).label_ids == ()
