"""Prompts of the second family: their pieces, marks of images, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from neounify.errors import PromptError, TokenizerError
from neounify.text import Message, Prompt, Tokenizer, byte_tokenizer
from neounify.text.forms import PIXELUMM, marked
from neounify.text.template import (
    ImageSegment,
    chat_prompt,
    image_prompt,
    unconditional_prompt,
)
from support.pixelumm import vision_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return vision_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _text(tokenizer: Tokenizer, prompt: Prompt) -> str:
    parts = (
        f"[{segment.image}]"
        if isinstance(segment, ImageSegment)
        else tokenizer.decode(segment.ids, skip_special=False)
        for segment in prompt.segments
    )
    return "".join(parts)


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def test_a_question_about_one_image(tokenizer: Tokenizer) -> None:
    prompt = chat_prompt(tokenizer, [Message("user", "<image>What?")], template=PIXELUMM)
    assert _text(tokenizer, prompt) == (
        f"{SYSTEM}<|im_start|>user\n<|vision_start|>[0]<|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_several_images_are_announced(tokenizer: Tokenizer) -> None:
    """By the numbers of the text where it has some; frames of clips are not."""
    image = "<|vision_start|>[{}]<|vision_end|>"
    message = Message("user", "<image> or <image>?", image_numbers=(2, 1))
    prompt = chat_prompt(tokenizer, [message], template=PIXELUMM)
    wanted = f"user\nPicture 2: {image.format(0)} or Picture 1: {image.format(1)}?<|im_end|>"
    assert wanted in _text(tokenizer, prompt)
    turns = [Message("user", "<image>A"), Message("assistant", "b"), Message("user", "<image>C")]
    text = _text(tokenizer, chat_prompt(tokenizer, turns, template=PIXELUMM))
    assert f"user\nPicture 1: {image.format(0)}A" in text
    assert f"user\nPicture 2: {image.format(1)}C" in text
    text = _text(tokenizer, chat_prompt(tokenizer, turns, frames={0, 1}, template=PIXELUMM))
    assert "Picture" not in text


def test_a_system_message_replaces_the_usual_one(tokenizer: Tokenizer) -> None:
    prompt = chat_prompt(tokenizer, [Message("user", "a")], system="Be short.", template=PIXELUMM)
    assert _text(tokenizer, prompt).startswith(
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start"
    )


def test_prompts_of_images(tokenizer: Tokenizer) -> None:
    prompt = image_prompt(tokenizer, "a fox", system="", think=False, template=PIXELUMM)
    head, tail = (
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n<|im_end|><|vision_start|>",
    )
    assert _text(tokenizer, prompt) == f"{head}a fox{tail}"
    assert _text(tokenizer, unconditional_prompt(tokenizer, template=PIXELUMM)) == head + tail
    negative = unconditional_prompt(tokenizer, "blurry", PIXELUMM)
    assert _text(tokenizer, negative) == f"{head}blurry{tail}"


def test_typed_marks_stay_text(tokenizer: Tokenizer) -> None:
    prompt = image_prompt(tokenizer, "<|im_end|>", system="", think=False, template=PIXELUMM)
    ids = [token for segment in prompt.segments for token in getattr(segment, "ids", ())]
    assert ids.count(tokenizer.id("<|im_end|>")) == 2


def test_texts_beside_each_other_are_cut(tmp_path: Path) -> None:
    """A merge over the cut between the head of a turn and its text does not happen."""
    tokenizer = vision_tokenizer(tmp_path).extended(["\n\n" * 9, "ab ab"], 300)
    joined = tokenizer.encode("user\n\nx")
    cut = [*tokenizer.encode("user\n"), *tokenizer.encode("\nx")]
    assert joined != cut
    (segment,) = image_prompt(tokenizer, "\nx", system="", think=False, template=PIXELUMM).segments
    assert list(getattr(segment, "ids", ()))[1 : 1 + len(cut)] == cut


def test_a_prompt_that_is_too_long(tokenizer: Tokenizer) -> None:
    image_prompt(tokenizer, "x" * 4096, system="", think=False, template=PIXELUMM)
    message = "the prompt has 4,097 tokens, this model reads 4,096 at most"
    with pytest.raises(PromptError, match=message):
        image_prompt(tokenizer, "x" * 4097, system="", think=False, template=PIXELUMM)
    with pytest.raises(PromptError, match="the negative prompt has 4,097 tokens"):
        unconditional_prompt(tokenizer, "x" * 4097, PIXELUMM)


def test_marks() -> None:
    assert marked("<image 2> and <Image 1>", ["a", "b"]) == (
        "<image> and <image>",
        ["b", "a"],
        (2, 1),
    )
    assert marked("<IMAGE>, <image>", ["a", "b"]) == ("<image>, <image>", ["a", "b"], ())
    assert marked("nothing", ["a"]) == ("nothing", [], ())
    assert marked("<image 2>, <image 1>", "abc") == ("<image>, <image>", ["b", "a"], (2, 1))


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image> <image 1>", 2, "with numbers and without"),
        ("<image 1> <image 3>", 2, "the text marks images 1, 3, but there are 2"),
        ("<image 1> <image 3>", 3, "the text marks images 1, 3, but there are 3"),
        ("<image 1> <image 1>", 2, "marks images 1, 1, but there are 2"),
        ("<image 0>", 1, "marks images 0, but there are 1"),
        ("<image 1>", 0, "marks images 1, but there are 0"),
    ],
)
def test_marks_that_are_wrong(text: str, images: int, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        marked(text, range(images))


def test_a_tokenizer_without_the_marks(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path)
    with pytest.raises(TokenizerError, match=r"vision_start\|> <\|vision_end\|> are missing"):
        Tokenizer.from_folder(tmp_path, PIXELUMM.tokens)
