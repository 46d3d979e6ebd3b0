"""The second family in the pipeline: what it can do, in every mode, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import neounify
from neounify.config import VideoConfig
from neounify.errors import PromptError, RequestError
from neounify.image.pixels import fit_size
from neounify.lora import LoraConfig, add_lora, save_lora
from neounify.tasks.chat import read_conversation
from neounify.text import Message
from neounify.text.forms import TEMPLATES
from neounify.video.clip import Video
from support.golden import golden_path, needs_golden
from support.pixelumm import SMALL, saved

QUESTION = "Is <image 2> like <image 1>?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("pixelumm") / "model")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> neounify.Pipeline:
    return neounify.load(folder)


def _images() -> list[PIL.Image.Image]:
    numbers = np.random.default_rng(0)
    return [
        PIL.Image.fromarray(numbers.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for h, w in ((48, 32), (32, 64))
    ]


def test_chat_over_several_images(pipe: neounify.Pipeline) -> None:
    """Order and marks matter; a batch and a stream give the same answers."""
    images = _images()
    options: dict[str, Any] = {"max_new_tokens": 6, "repetition_penalty": 1.3, "logprobs": 0}
    answer = pipe.chat(QUESTION, images, **options)
    assert answer.logprobs != pipe.chat(QUESTION, images[::-1], **options).logprobs
    plain = pipe.chat("What is it?", images[0], **options)
    batch = pipe.chat_batch([QUESTION, "What is it?"], [images, images[0]], **options)
    assert [result.token_ids for result in batch] == [answer.token_ids, plain.token_ids]
    assert plain.prompt_tokens < answer.prompt_tokens
    with pytest.raises(PromptError, match="marks images 2, 1, but there are 1"):
        pipe.chat(QUESTION, images[0])


def test_messages_are_read_as_a_text_is(pipe: neounify.Pipeline) -> None:
    """Numbers count the images of one message, whose places go on from those before it."""
    form, images = pipe.processor.template, _images()
    alone = read_conversation(QUESTION, images, form)
    ask: list[Any] = [{"role": "user", "content": QUESTION}]
    parts = [{"type": "text", "text": text} for text in ("Is <image 2> like <im", "age 1>?")]
    asked: list[Any] = [ask, [Message("user", QUESTION)], [{"role": "user", "content": parts}]]
    for prompt in asked:
        assert read_conversation(prompt, images, form) == alone
    assert alone[1] == images[::-1]
    earlier = [{"role": "user", "content": "<IMAGE>?"}, {"role": "assistant", "content": "so"}]
    messages, ordered = read_conversation([*earlier, *ask], [images[0], *images], form)
    assert [message.text for message in messages] == ["<image>?", "so", "Is <image> like <image>?"]
    assert messages[2].image_numbers == (3, 2)
    assert ordered == [images[0], images[1], images[0]]
    answer = pipe.chat(QUESTION, images, max_new_tokens=2, logprobs=0)
    assert pipe.chat(ask, images, max_new_tokens=2, logprobs=0) == answer


@pytest.mark.parametrize(
    ("content", "images", "message"),
    [
        (QUESTION, 1, "marks images 2, 1, but there are 1"),
        (QUESTION, 3, "marks images by numbers, but not all: 1 of 3 have no mark"),
        ("<image 1> <image>", 2, "with numbers and without"),
        ("<IMAGE> <IMAGE>", 1, "2 <image> marks for 1 images"),
        ([{"type": "image", "image": 0}, {"type": "text", "text": QUESTION}], 2, "without a num"),
    ],
)
def test_marks_of_messages_that_are_wrong(content: Any, images: int, message: str) -> None:
    shown = [_images()[0]] * images
    if isinstance(content, list):
        content = [{**content[0], "image": shown[0]}, *content[1:]]
    with pytest.raises(PromptError, match=message):
        read_conversation([{"role": "user", "content": content}], shown, TEMPLATES["pixelumm"])


def test_images_are_generated(pipe: neounify.Pipeline) -> None:
    images = pipe.generate("a fox", seed=3, images_per_prompt=2).images
    assert [image.size for image in images] == [(64, 48)] * 2
    alone = pipe.generate("a fox", seed=3, negative_prompt="blurry").images[0]
    assert np.asarray(alone).tolist() != np.asarray(images[0]).tolist()


@pytest.mark.parametrize("memory", ["stream", "layers"])
def test_memory_modes_change_nothing(folder: Path, pipe: neounify.Pipeline, memory: Any) -> None:
    other = neounify.load(folder, memory=memory, plan="ignore")
    ids = [p.chat(QUESTION, _images(), max_new_tokens=4).token_ids for p in (pipe, other)]
    assert ids[0] == ids[1]
    pixels = [np.asarray(p.generate("a fox", seed=1).images[0]) for p in (pipe, other)]
    assert np.array_equal(pixels[0], pixels[1])


def test_quantised_weights(folder: Path, tmp_path: Path, pipe: neounify.Pipeline) -> None:
    """Quantised while loading, saved, and loaded again: the same codes."""
    small = neounify.load(folder, dtype="float32", quantise="int8")
    small.save(tmp_path / "int8")
    again = neounify.load(tmp_path / "int8", dtype="float32")
    images = [np.asarray(p.generate("a fox", seed=1).images[0]) for p in (small, again, pipe)]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
    assert again.config.family == "pixelumm"


@pytest.mark.parametrize("form", ["peft", "published"])
def test_loras_have_the_names_of_the_family(folder: Path, tmp_path: Path, form: Any) -> None:
    pipe = neounify.load(folder)
    pipe.model.requires_grad_(True)
    config = LoraConfig(rank=2, alpha=4)
    add_lora(pipe.model, config, 0)
    for name, parameter in pipe.model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    target = tmp_path / ("adapter" if form == "peft" else "adapter.safetensors")
    save_lora(pipe.model, config, target, form=form)
    file = target / "adapter_model.safetensors" if form == "peft" else target
    assert b"q_proj_moe_gen" in file.read_bytes()
    assert b"_mot_gen.lora" not in file.read_bytes()
    merged = neounify.load(folder, lora=target)
    images = [np.asarray(p.generate("a fox", seed=1).images[0]) for p in (pipe, merged)]
    assert np.abs(images[0].astype(int) - images[1]).max() <= 1
    plain = np.asarray(neounify.load(folder).generate("a fox", seed=1).images[0])
    assert np.abs(plain.astype(int) - images[1]).max() > 1


REFUSED: dict[str, tuple[Callable[[neounify.Pipeline], object], str]] = {
    "edit": (lambda p: p.edit("make it red", _images()[0]), "edit images"),
    "interleave": (lambda p: list(p.interleave("a story")), "write answers of text and images"),
    "think in chat": (lambda p: p.chat("why?", think=True), "think before answering"),
    "think in images": (lambda p: p.generate("a", think=True), "think before answering"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_it_was_not_trained_for_is_refused(kind: str, pipe: neounify.Pipeline) -> None:
    call, what = REFUSED[kind]
    with pytest.raises(RequestError) as refused:
        call(pipe)
    assert str(refused.value) == (
        f"this PixelUMM model was not trained to {what}; it can answer questions about text and "
        "images, generate images, generate videos, answer questions about videos"
    )


def test_saved_and_loaded_again(pipe: neounify.Pipeline, tmp_path: Path) -> None:
    pipe.save(tmp_path / "copy")
    again = neounify.load(tmp_path / "copy")
    assert again.config == pipe.config
    assert again.processor.system_message == ""
    assert np.array_equal(
        np.asarray(again.generate("a fox", seed=1).images[0]),
        np.asarray(pipe.generate("a fox", seed=1).images[0]),
    )


def test_video_questions_need_the_embedding_of_tubes(tmp_path: Path) -> None:
    config = SMALL.replace(
        video=VideoConfig(und=False), capabilities=("chat", "generate", "generate_video")
    )
    pipe = neounify.load(saved(tmp_path / "model", config))
    clip = Video(torch.zeros(8, 32, 48, 3, dtype=torch.uint8), Fraction(4))
    for tubes in (False, True):
        with pytest.raises(RequestError, match="not trained to answer questions about videos"):
            pipe.chat("what moves?", video=clip, tubes=tubes)


@needs_golden
def test_recorded_sizes() -> None:
    document = json.loads(golden_path("pixelumm", "fixtures", "common", "sizes.json").read_text())
    for height, width, use, *wanted in document["rows"]:
        video = SMALL.sampling.video
        bounds = (3136, 2_560_000)
        if use == "frame":
            bounds = (video.frame_min_pixels, video.frame_max_pixels)
        size = fit_size(height, width, multiple=16, min_pixels=bounds[0], max_pixels=bounds[1])
        assert list(size) == wanted
