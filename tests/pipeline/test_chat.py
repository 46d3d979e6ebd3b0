"""Chat: streams, batches, stop strings, messages, seeds."""

import threading
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import neounify
from neounify.errors import Cancelled, PromptError, RequestError
from neounify.tasks.answer import AnswerText
from neounify.tasks.chat import ChatRequest, chat_images, read_conversation
from neounify.text import Message, Tokenizer, chat_prompt
from support.prefilling import contiguous_engine, prefilled


def example_image(seed: int = 0) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def test_streamed_pieces_are_the_answer(pipe: neounify.Pipeline) -> None:
    whole = pipe.chat("tell me", [example_image()], max_new_tokens=24)
    stream = pipe.chat("tell me", [example_image()], max_new_tokens=24, stream=True)
    assert "".join(stream) == whole.text
    assert stream.result == whole
    assert whole.finish_reason == "length"
    assert len(whole.token_ids) == 24


def test_batch_equals_one_by_one(pipe: neounify.Pipeline) -> None:
    prompts = ["hi", "a rather longer question than that", "and <image>?"]
    images: list[Any] = [[], [example_image(1), example_image(2)], [example_image(3)]]
    together = pipe.chat_batch(prompts, images, max_new_tokens=12)
    assert together == [
        pipe.chat(prompt, inputs, max_new_tokens=12)
        for prompt, inputs in zip(prompts, images, strict=True)
    ]
    assert pipe.chat_batch([]) == []


def test_sampling_is_repeatable_alone_and_in_a_batch(pipe: neounify.Pipeline) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.95}
    first = pipe.chat("hi", seed=1, **options)
    assert pipe.chat("hi", seed=1, **options) == first
    assert pipe.chat("hi", seed=2, **options) != first
    assert pipe.chat_batch(["other", "hi"], seed=1, **options)[1] == first


def test_stop_string_ends_the_answer(pipe: neounify.Pipeline) -> None:
    whole = pipe.chat("tell me", max_new_tokens=40, temperature=1.0, seed=4)
    stop = whole.text[5:8]
    cut = pipe.chat("tell me", max_new_tokens=40, temperature=1.0, seed=4, stop=[stop])
    assert cut.text == whole.text[: whole.text.find(stop)].rstrip()
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < 40


def test_messages_with_parts_equal_marks(pipe: neounify.Pipeline) -> None:
    marks = pipe.chat("<image> or <image>?", [example_image(1), example_image(2)], max_new_tokens=8)
    parts = [
        {"type": "image", "image": example_image(1)},
        {"type": "text", "text": " or "},
        {"type": "image", "image": example_image(2)},
        {"type": "text", "text": "?"},
    ]
    assert pipe.chat([{"role": "user", "content": parts}], max_new_tokens=8) == marks


def test_the_last_answer_is_continued(pipe: neounify.Pipeline) -> None:
    turns: list[Any] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "It is"},
    ]
    closed = pipe.chat([*turns, {"role": "user", "content": ""}], max_new_tokens=8)
    begun = pipe.chat(turns, max_new_tokens=8)
    tail = "<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    ids = pipe.tokenizer.encode(tail, allow_special=True)
    assert begun.prompt_tokens == closed.prompt_tokens - len(ids)
    assert begun.text == pipe.tokenizer.decode(begun.token_ids).rstrip()


@pytest.mark.parametrize(("continues", "shown"), [(True, " red"), (False, "red")])
def test_the_space_behind_a_beginning_counts(continues: bool, shown: str) -> None:
    class Stream:
        def put(self, token: int) -> str:
            return " red" if token == 0 else " "

        def flush(self) -> str:
            return ""

    text = AnswerText(Stream(), continues=continues)  # type: ignore[arg-type]
    assert "".join([text.put(0), text.put(1), text.flush()]) == shown


def test_images_of_earlier_answers_are_seen(pipe: neounify.Pipeline) -> None:
    def history(image: PIL.Image.Image) -> list[Any]:
        parts = [
            {"type": "text", "text": "Look: "},
            {"type": "image", "image": image},
            {"type": "text", "text": " there."},
        ]
        return [
            {"role": "user", "content": "<image>paint"},
            {"role": "assistant", "content": parts},
            {"role": "user", "content": "What is it? <image>"},
        ]

    def ask(image: PIL.Image.Image) -> torch.Tensor:
        messages, images = read_conversation(history(image), [example_image(1), example_image(2)])
        assert images == [example_image(1), image, example_image(2)]
        prompt = chat_prompt(pipe.tokenizer, messages)
        shown = chat_images(pipe.processor, ChatRequest(messages=messages, images=images))
        [sequence] = prefilled(contiguous_engine(pipe), [prompt], [shown])
        assert sequence.hidden is not None
        return sequence.hidden

    one, other = ask(example_image(3)), ask(example_image(4))
    assert torch.equal(one, ask(example_image(3)))
    assert not torch.allclose(one, other, atol=1e-3)


def test_images_left_over_go_behind_those_of_an_earlier_answer() -> None:
    answer = Message("assistant", "Look.", image_offsets=(0,))
    messages, images = read_conversation(
        [answer, Message("user", "?")], [example_image(1), example_image(2)]
    )
    assert [m.n_images for m in messages] == [1, 1]
    assert images == [example_image(1), example_image(2)]


def test_images_without_marks_go_in_front_of_the_first_question(pipe: neounify.Pipeline) -> None:
    history = [
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": "a boat"},
        {"role": "user", "content": "sure?"},
    ]
    marked = [{"role": "user", "content": "<image>\nwhat?"}, *history[1:]]
    images = [example_image()]
    assert pipe.chat(history, images, max_new_tokens=6) == pipe.chat(
        marked, images, max_new_tokens=6
    )


def test_typed_special_tokens_are_plain_text(pipe: neounify.Pipeline) -> None:
    plain = pipe.chat("hi<|im_end|><img>", max_new_tokens=1)
    assert plain.prompt_tokens > pipe.chat("hi", max_new_tokens=1).prompt_tokens + 10


def test_cancel(pipe: neounify.Pipeline) -> None:
    cancel = threading.Event()
    stream = pipe.chat("hi", max_new_tokens=100, stream=True, cancel=cancel)
    next(stream)
    cancel.set()
    with pytest.raises(Cancelled):
        list(stream)


def test_abandoned_stream_leaves_nothing_behind(pipe: neounify.Pipeline) -> None:
    stream = iter(pipe.chat("hi", max_new_tokens=100, stream=True))
    next(stream)
    del stream
    assert not torch.is_inference_mode_enabled()
    assert pipe.chat("hi", max_new_tokens=2).text is not None


def test_the_context_limit_ends_an_answer(pipe: neounify.Pipeline) -> None:
    long = "x" * (pipe.config.max_positions - 60)
    answer = pipe.chat(long, max_new_tokens=512)
    assert answer.finish_reason == "length"
    assert answer.prompt_tokens + len(answer.token_ids) == pipe.config.max_positions


@pytest.mark.parametrize(
    ("prompt", "options", "kind"),
    [
        ("", {}, PromptError),
        ([], {}, PromptError),
        ("<image>", {}, PromptError),
        ([{"role": "user"}], {}, PromptError),
        ([{"role": "robot", "content": "hi"}], {}, PromptError),
        ([{"role": "user", "content": [{"type": "sound"}]}], {}, PromptError),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            {"think": True},
            PromptError,
        ),
        (
            [{"role": "system", "content": [{"type": "image", "image": example_image()}]}],
            {},
            PromptError,
        ),
        ("hi", {"max_new_tokens": 0}, RequestError),
        ("hi", {"temperature": -1}, RequestError),
        ("hi", {"temperature": float("nan")}, RequestError),
        ("hi", {"top_p": 0}, RequestError),
        ("hi", {"top_k": -1}, RequestError),
        ("hi", {"stop": [""]}, RequestError),
        ("hi", {"repetition_penalty": 0}, RequestError),
    ],
)
def test_bad_input(
    pipe: neounify.Pipeline, prompt: Any, options: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        pipe.chat(prompt, **options)


def test_answer_text_holds_back_what_might_be_a_stop_string() -> None:
    pieces, stop = ["  a", " b", "EN", "X ", "E", "ND", "later"], ["END"]
    tokens = iter(pieces)

    class Stream:
        def put(self, token: int) -> str:
            return next(tokens)

        def flush(self) -> str:
            return ""

    text = AnswerText(Stream(), stop)  # type: ignore[arg-type]
    shown = [text.put(n) for n in range(len(pieces))]
    assert shown == ["a", " b", "", "ENX", "", "", ""]
    assert text.stopped
    assert text.flush() == ""


def test_answer_text_equals_decode_and_strip(pipe: neounify.Pipeline) -> None:
    tokenizer: Tokenizer = pipe.tokenizer
    ids = tokenizer.encode("  ünï 😀 \n two\n\n ")
    text = AnswerText(tokenizer.stream())
    assert "".join([*map(text.put, ids), text.flush()]) == "ünï 😀 \n two"
