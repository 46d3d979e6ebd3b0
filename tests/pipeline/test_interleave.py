"""Interleaved answers: limits, previews, order of parts."""

from collections.abc import Sequence
from typing import Any

import PIL.Image
import pytest
import torch

import neounify
from neounify.engine.messages import Append, Failed, TextInput
from neounify.errors import ContextFullError, RequestError
from neounify.flow.sampling import ImageSampling
from neounify.model import NeoUnify
from neounify.pipeline import ImagePart, InterleavePart, PreviewPart, TextPart
from neounify.tasks.interleave import InterleaveRequest, turn_prompt
from neounify.text.template import Prompt, TextSegment
from support.prefilling import contiguous_engine, prefilled
from support.scripted_sampler import script_sampler

FEW: dict[str, Any] = {"width": 64, "height": 32, "steps": 2}


class Scripted:
    """Writes a given text, whatever the model predicts."""

    def __init__(self, pipe: neounify.Pipeline, text: str) -> None:
        ids = pipe.tokenizer.encode(text, allow_special=True)
        self.ids = iter([*ids, pipe.tokenizer.id("<|im_end|>")])

    def __call__(self, logits: torch.Tensor) -> int:
        return next(self.ids)


def story(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch, text: str, **options: Any
) -> list[InterleavePart]:
    script_sampler(monkeypatch, Scripted(pipe, text))
    return list(pipe.interleave("tell", **FEW | options))


def shape(parts: Sequence[InterleavePart]) -> str:
    """Text as it is, images as [], previews as dots."""
    marks = {PreviewPart: ".", ImagePart: "[]"}
    return "".join(part.text if isinstance(part, TextPart) else marks[type(part)] for part in parts)


def test_parts_come_in_order(pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = story(pipe, monkeypatch, "one<img> two<img>!")
    assert shape(parts) == "one..[] two..[]!"
    image = next(part for part in parts if isinstance(part, ImagePart))
    assert image.pixels.shape == (3, 32, 64)
    assert image.image.size == (64, 32)


def test_after_the_last_image_text_continues_and_a_further_one_ends(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shape(story(pipe, monkeypatch, "a<img>b<img>c", max_images=1)) == "a..[]b"
    assert shape(story(pipe, monkeypatch, "a<img>b", max_images=0)) == "a"


def test_token_limit_counts_the_text_of_the_whole_answer(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shape(story(pipe, monkeypatch, "abc<img>defgh", max_new_tokens=5)) == "abc..[]de"


def test_sizes_in_turn(pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = story(pipe, monkeypatch, "<img><img><img>", width=[32, 64], height=[64, 32])
    sizes = [part.image.size for part in parts if isinstance(part, ImagePart)]
    assert sizes == [(32, 64), (64, 32), (64, 32)]


def test_a_generated_image_changes_what_follows(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [
        next(p for p in reversed(story(pipe, monkeypatch, text)) if isinstance(p, ImagePart))
        for text in ("<img>", "<img> then <img>")
    ]
    assert not torch.allclose(images[0].pixels, images[1].pixels, atol=1e-4)


def test_input_images_set_the_size(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = PIL.Image.new("RGB", (100, 200), "red")
    parts = story(pipe, monkeypatch, "<img>", images=image, width=None, height=None)
    assert [p.image.size for p in parts if isinstance(p, ImagePart)] == [(64, 160)]


def test_same_seed_same_story(pipe: neounify.Pipeline) -> None:
    options: dict[str, Any] = {"seed": 3, "temperature": 1.0, "max_new_tokens": 20, **FEW}
    first, again = (
        "".join(p.text for p in pipe.interleave("tell", **options) if isinstance(p, TextPart))
        for _ in range(2)
    )
    assert first == again


def test_bad_input_is_refused_before_iterating(pipe: neounify.Pipeline) -> None:
    for options in ({"max_images": -1}, {"max_new_tokens": 0}, {"width": [32], "height": []}):
        with pytest.raises(RequestError):
            pipe.interleave("tell", **FEW | options)


@pytest.mark.parametrize(("room", "seen"), [(1, "a"), (2, "a..[]"), (4, "a..[]"), (5, "a..[]b")])
def test_the_answer_ends_where_the_context_does(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch, room: int, seen: str
) -> None:
    """`room` positions behind the prompt; an image takes three: <img>, itself and </img>."""
    request = InterleaveRequest(
        prompt="tell",
        sizes=[(64, 32)],
        sampling=ImageSampling().resolve(pipe.config, editing=True),
    )
    prompt = turn_prompt(pipe.processor, request, "cond")
    used = sum(len(s.ids) for s in prompt.segments if isinstance(s, TextSegment))
    model = NeoUnify(pipe.config.replace(max_positions=used + room)).eval()
    model.load_state_dict(pipe.model.state_dict())
    small = neounify.Pipeline(model, pipe.tokenizer)
    assert shape(story(small, monkeypatch, "a<img>b")) == seen


def test_appending_past_the_context_appends_nothing(pipe: neounify.Pipeline) -> None:
    engine, limit = contiguous_engine(pipe), pipe.config.max_positions
    prompt = Prompt((TextSegment((1,) * (limit - 1)),))
    [sequence] = prefilled(engine, [prompt], [[]])
    engine.submit(Append(7, {sequence.name: (TextInput((1, 1)),)}))
    failed = engine.replies[-1].answer
    assert isinstance(failed, Failed)
    with pytest.raises(
        ContextFullError, match=f"{limit + 1} positions long, the model reads {limit}"
    ):
        raise failed.exception()
    assert sequence.cache is not None
    assert sequence.cache.length == len(sequence.token_keys) == limit - 1
