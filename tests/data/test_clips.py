"""Samples with clips: the prompts of inference, tubes, steps of t, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as PilImage

from neounify.config import VideoConfig
from neounify.config.presets import SCENES
from neounify.data.draws import GuidanceDropout
from neounify.data.encode import Encoded, Encoder
from neounify.data.records import sample_to_record
from neounify.data.sample import DataError, Part, Sample, SampleClip, SampleText, Turn
from neounify.model import Image, Noise, Text
from neounify.text import Message, byte_tokenizer, chat_prompt, image_prompt, unconditional_prompt
from neounify.text.clips import clip_text
from neounify.text.template import Prompt

TOKENIZER = byte_tokenizer(["a star moves to the left"] * 3, 300)
CONFIG = SCENES.replace(video=VideoConfig(tube_frames=4, und=True))
KEEP = GuidanceDropout(text=0.0, all=0.0)
ENCODER = Encoder(config=CONFIG, tokenizer=TOKENIZER, system_message="Paint well.", dropout=KEEP)
CLIP = np.random.default_rng(0).integers(0, 256, (8, 32, 48, 3), np.uint8)


def encode(task: str, *turns: Turn, encoder: Encoder = ENCODER) -> Encoded:
    return encoder(Sample(task, turns, "one"), np.random.default_rng(0))


def user(*parts: Part) -> Turn:
    return Turn("user", parts)


def model(*parts: Part) -> Turn:
    return Turn("assistant", parts)


def flat(prompt: Prompt) -> list[int]:
    """Ids of a prompt's text alone."""
    return prompt.ids([0] * prompt.n_images, context_id=-1)


@pytest.mark.parametrize(("fps", "step"), [(24.0, 1.0), (16.0, 1.5), (8.0, 3.0)])
def test_text_to_video_is_the_prompt_of_inference(fps: float, step: float) -> None:
    encoded = encode("t2v", user(SampleText("a star")), model(SampleClip(CLIP, "target", fps=fps)))
    wanted = image_prompt(TOKENIZER, "a star", system="Paint well.", think=False)
    assert list(encoded.ids) == flat(wanted)
    assert encoded.document.spans == (Text(len(encoded.ids)), Noise(2, 3, 2, step))
    np.testing.assert_array_equal(encoded.targets[0], CLIP)


def test_frames_given_as_images_are_the_same_clip() -> None:
    images = [PilImage.fromarray(frame) for frame in CLIP]
    turn = user(SampleText("a star"))
    one = encode("t2v", turn, model(SampleClip(CLIP, "target")))
    other = encode("t2v", turn, model(SampleClip(images, "target")))
    assert one.document == other.document
    np.testing.assert_array_equal(one.targets[0], other.targets[0])


def test_questions_show_tubes_with_their_times() -> None:
    clip = SampleClip(CLIP[:6], "input", fps=8.0)
    encoded = encode(
        "video_qa", user(clip, SampleText("Where to?")), model(SampleText("left", True))
    )
    wanted = flat(chat_prompt(TOKENIZER, [Message("user", clip_text([0.0, 0.5]) + "Where to?")]))
    assert list(encoded.ids[: len(wanted)]) == wanted
    assert TOKENIZER.decode(encoded.label_ids, skip_special=False) == "left<|im_end|>"
    tubes = [span for span in encoded.document.spans if isinstance(span, Image)]
    assert tubes == [Image(2, 3, 1)] * 2
    np.testing.assert_array_equal(encoded.images[0], CLIP[:4])
    np.testing.assert_array_equal(encoded.images[1], CLIP[[4, 5, 5, 5]])


def test_questions_show_frames_as_images_without_tubes() -> None:
    clip = SampleClip(CLIP[:2], "input", fps=1.0, tubes=False)
    turns = user(clip, SampleText("Where to?")), model(SampleText("left", True))
    plain = Encoder(config=SCENES, tokenizer=TOKENIZER, dropout=KEEP)
    for encoder in (ENCODER, plain):
        encoded = encode("video_qa", *turns, encoder=encoder)
        wanted = clip_text([0.0, 1.0]) + "Where to?"
        ids = flat(chat_prompt(TOKENIZER, [Message("user", wanted)]))
        assert list(encoded.ids[: len(ids)]) == ids
        assert [s for s in encoded.document.spans if isinstance(s, Image)] == [Image(2, 3)] * 2


def test_first_frames_are_the_condition_of_the_next() -> None:
    turns = (
        user(SampleClip(CLIP[:4], "input", fps=8.0), SampleText("go on")),
        model(SampleClip(CLIP[4:], "target", fps=8.0)),
    )
    encoded = encode("next_frames", *turns)
    text = clip_text([0.0]) + "go on"
    wanted = image_prompt(TOKENIZER, text, system="Paint well.", think=False)
    assert list(encoded.ids) == flat(wanted)
    kinds = [type(span) for span in encoded.document.spans]
    assert kinds == [Text, Image, Text, Noise]
    nothing = Encoder(
        config=CONFIG, tokenizer=TOKENIZER, dropout=GuidanceDropout(text=0.0, all=1.0)
    )
    dropped = encode("next_frames", *turns, encoder=nothing)
    assert list(dropped.ids) == flat(unconditional_prompt(TOKENIZER))
    assert dropped.document.spans[1:] == (Noise(2, 3, 1, 3.0),)
    images = Encoder(config=CONFIG, tokenizer=TOKENIZER, dropout=GuidanceDropout(text=1.0, all=0.0))
    shown = encode("next_frames", *turns, encoder=images)
    assert [type(span) for span in shown.document.spans] == [Text, Image, Text, Noise]


def test_noise_draws_stand_at_one_place() -> None:
    encoder = Encoder(config=CONFIG, tokenizer=TOKENIZER, dropout=KEEP, noise_draws=2)
    clip = SampleClip(CLIP, "target", fps=16.0)
    encoded = encode("t2v", user(SampleText("a star")), model(clip), encoder=encoder)
    assert encoded.document.spans[1:] == (Noise(2, 3, 2, 1.5),) * 2
    assert encoded.document.end_t == len(encoded.ids)


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), 24.0, "no frames"),
        (np.zeros((4, 4, 3), np.uint8), 24.0, r"\[4, 4, 3\], not \[frames"),
        (np.zeros((4, 4, 4, 3), np.float32), 24.0, "not uint8"),
        (CLIP, 0.0, "0.0 frames per second"),
        (CLIP, float("nan"), "nan frames per second"),
        ([CLIP[0], CLIP[0, :16]], 24.0, "several sizes"),
    ],
)
def test_what_is_no_clip_is_refused(frames: np.ndarray, fps: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        SampleClip(frames, "target", fps=fps)


def test_clips_that_a_model_has_no_tokens_for_are_refused() -> None:
    ask = user(SampleText("a star"))
    target, shown = SampleClip(CLIP, "target"), SampleClip(CLIP, "input")
    plain = Encoder(config=SCENES, tokenizer=TOKENIZER, dropout=KEEP)
    with pytest.raises(DataError, match="no embedding of tubes, and the sample a clip to generate"):
        encode("t2v", ask, model(target), encoder=plain)
    answer = model(SampleText("left", True))
    with pytest.raises(DataError, match=r"show it as images \(tubes=False\)"):
        encode("video_qa", user(shown), answer, encoder=plain)
    with pytest.raises(DataError, match="6 frames, not a multiple of 4"):
        encode("t2v", ask, model(SampleClip(CLIP[:6], "target")))
    with pytest.raises(DataError, match="ends its sample"):
        encode("interleave", ask, model(target, SampleText("a star", True)))
    short = Encoder(config=CONFIG.replace(max_positions=40), tokenizer=TOKENIZER, dropout=KEEP)
    with pytest.raises(DataError, match="positions long, the model has 40"):
        encode("t2v", ask, model(SampleClip(CLIP, "target", fps=0.5)), encoder=short)
    with pytest.raises(DataError, match="1 clips, but 0 paths"):
        sample_to_record(Sample("t2v", (ask, model(target))), [])
