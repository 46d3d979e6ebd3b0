"""Training documents hold exactly the prompts of inference, and learn exactly what it writes."""

from __future__ import annotations

import numpy as np
import pytest

from neounify.config.presets import SCENES
from neounify.data.draws import GuidanceDropout
from neounify.data.encode import Encoded, Encoder
from neounify.data.sample import DataError, Sample, SampleImage, SampleText, Turn
from neounify.model import Image, Noise, Text
from neounify.scenes.world import SceneDataset, scene_config
from neounify.text import (
    Message,
    byte_tokenizer,
    chat_prompt,
    image_prompt,
    images_only_prompt,
    interleave_prompt,
    unconditional_prompt,
)
from neounify.text.template import Prompt, after_think_ids

TOKENIZER = byte_tokenizer(["a red circle on a white background"] * 3, 300)
KEEP = GuidanceDropout(text=0.0, all=0.0)
ENCODER = Encoder(config=SCENES, tokenizer=TOKENIZER, system_message="Paint well.", dropout=KEEP)
RED = np.full((64, 64, 3), (200, 0, 0), np.uint8)
BLUE = np.full((64, 64, 3), (0, 0, 200), np.uint8)
GRID = 16


def encode(task: str, *turns: Turn, encoder: Encoder = ENCODER) -> Encoded:
    return encoder(Sample(task, turns, "one"), np.random.default_rng(0))


def user(*parts: str | np.ndarray) -> Turn:
    return Turn("user", tuple(_part(p, "input", loss=False) for p in parts))


def model(*parts: str | np.ndarray) -> Turn:
    return Turn("assistant", tuple(_part(p, "target", loss=True) for p in parts))


def _part(part: str | np.ndarray, role: str, *, loss: bool) -> SampleText | SampleImage:
    if isinstance(part, str):
        return SampleText(part, loss)
    return SampleImage(part, role)  # type: ignore[arg-type]


def flat(prompt: Prompt) -> list[int]:
    """Ids of a prompt's text alone."""
    return prompt.ids([0] * prompt.n_images, context_id=-1)


def trained_text(encoded: Encoded) -> str:
    return TOKENIZER.decode(encoded.label_ids, skip_special=False)


def test_text_to_image_is_the_prompt_of_inference() -> None:
    encoded = encode("t2i", user("a red circle"), model(RED))
    wanted = image_prompt(TOKENIZER, "a red circle", system="Paint well.", think=False)
    assert list(encoded.ids) == flat(wanted)
    assert encoded.document.spans == (Text(len(encoded.ids)), Noise(4, 4))
    assert encoded.label_ids == ()
    assert [t.tolist() for t in encoded.targets] == [RED.tolist()]
    assert encoded.images == ()


def test_thoughts_are_trained_up_to_their_closing_mark_and_no_further() -> None:
    encoded = encode(
        "t2i_think", user("a red circle"), model("<think>\nred circle\n</think>\n\n", RED)
    )
    wanted = image_prompt(TOKENIZER, "a red circle", system="Paint well.", think=True)
    thought = [*TOKENIZER.encode("red circle\n"), TOKENIZER.id("</think>")]
    assert list(encoded.ids) == [*flat(wanted), *thought, *after_think_ids(TOKENIZER)]
    assert trained_text(encoded) == "red circle\n</think>"
    assert encoded.label_rows[0] == len(flat(wanted)) - 1


def test_edits_show_the_source_and_end_with_the_noisy_target() -> None:
    encoded = encode("edit", user(RED, "\nMake it blue."), model(BLUE))
    wanted = image_prompt(TOKENIZER, "<image>\nMake it blue.", system="Paint well.", think=False)
    assert list(encoded.ids) == flat(wanted)
    assert [type(s) for s in encoded.document.spans] == [Text, Image, Text, Noise]
    assert encoded.images[0] is RED
    assert encoded.targets[0] is BLUE


def test_answers_are_trained_with_their_end() -> None:
    encoded = encode("vqa", user(RED, "\nWhat colour?"), model("red"))
    wanted = chat_prompt(TOKENIZER, [Message("user", "<image>\nWhat colour?")])
    assert list(encoded.ids[: len(flat(wanted))]) == flat(wanted)
    assert trained_text(encoded) == "red<|im_end|>"
    # The rows count the image's tokens too.
    assert encoded.label_rows[0] == len(flat(wanted)) - 1 + GRID
    assert list(encoded.label_rows) == list(
        range(encoded.label_rows[0], encoded.label_rows[-1] + 1)
    )


def test_a_conversation_learns_every_answer() -> None:
    encoded = encode("text", user("one?"), model("1"), user("two?"), model("2"))
    wanted = chat_prompt(
        TOKENIZER, [Message("user", "one?"), Message("assistant", "1"), Message("user", "two?")]
    )
    assert list(encoded.ids[: len(flat(wanted))]) == flat(wanted)
    assert trained_text(encoded) == "1<|im_end|>2<|im_end|>"


def test_stories_learn_text_marks_and_end_and_show_every_image_again() -> None:
    encoded = encode("interleave", user("Tell."), model("first\n", RED, "\nthen\n", BLUE))
    wanted = interleave_prompt(TOKENIZER, "Tell.", system="", think=False)
    assert list(encoded.ids[: len(flat(wanted))]) == flat(wanted)
    assert trained_text(encoded) == "first\n<img>\nthen\n<img><|im_end|>"
    kinds = [type(s) for s in encoded.document.spans]
    assert kinds == [Text, Noise, Image, Text, Noise, Image, Text]
    assert [i is j for i, j in zip(encoded.images, encoded.targets, strict=True)] == [True, True]


def test_noise_draws_share_a_document() -> None:
    encoder = Encoder(config=SCENES, tokenizer=TOKENIZER, dropout=KEEP, noise_draws=3)
    encoded = encode("t2i", user("a"), model(RED), encoder=encoder)
    assert encoded.document.spans[1:] == (Noise(4, 4),) * 3
    assert len(encoded.targets) == 3


@pytest.mark.parametrize("task", ["t2i", "edit", "interleave"])
def test_dropout_of_everything_leaves_the_unconditional_prompt(task: str) -> None:
    encoder = Encoder(
        config=SCENES, tokenizer=TOKENIZER, dropout=GuidanceDropout(text=0.0, all=1.0)
    )
    shown = (RED,) if task == "edit" else ()
    text = ("words\n",) if task == "interleave" else ()
    encoded = encode(task, user(*shown, "x"), model(*text, BLUE), encoder=encoder)
    assert list(encoded.ids) == flat(unconditional_prompt(TOKENIZER))
    assert encoded.label_ids == ()
    assert encoded.images == ()
    assert encoded.targets[0] is BLUE


def test_dropout_of_text_leaves_the_images() -> None:
    encoder = Encoder(
        config=SCENES, tokenizer=TOKENIZER, dropout=GuidanceDropout(text=1.0, all=0.0)
    )
    encoded = encode("edit", user(RED, "\nx"), model(BLUE), encoder=encoder)
    assert list(encoded.ids) == flat(images_only_prompt(TOKENIZER, 1, open_image=True))
    assert [type(s) for s in encoded.document.spans] == [Text, Image, Text, Noise]


def test_reading_tasks_are_never_dropped() -> None:
    encoder = Encoder(
        config=SCENES, tokenizer=TOKENIZER, dropout=GuidanceDropout(text=0.5, all=0.5)
    )
    assert (
        trained_text(encode("vqa", user(RED, "\nx"), model("y"), encoder=encoder)) == "y<|im_end|>"
    )


def test_dropout_comes_as_often_as_asked() -> None:
    rng = np.random.default_rng(0)
    drops = [GuidanceDropout().draw(rng) for _ in range(20_000)]
    assert abs(drops.count("text") / 20_000 - 0.1) < 0.01
    assert abs(drops.count("all") / 20_000 - 0.1) < 0.01


def test_images_are_sized_for_the_model() -> None:
    odd = np.zeros((50, 90, 3), np.uint8)
    encoded = encode("edit", user(odd, "\nx"), model(odd))
    for pixels in (*encoded.images, *encoded.targets):
        assert pixels.shape[0] % 16 == pixels.shape[1] % 16 == 0
    encoder = Encoder(
        config=SCENES, tokenizer=TOKENIZER, dropout=KEEP, target_buckets=((64, 32), (32, 64))
    )
    assert encode("t2i", user("x"), model(odd), encoder=encoder).targets[0].shape == (32, 64, 3)


def test_a_text_longer_than_the_context_is_a_data_error() -> None:
    with pytest.raises(DataError, match="positions long"):
        encode("t2i", user("long " * 3000), model(RED))


def test_every_synthetic_sample_can_be_encoded() -> None:
    source = SceneDataset(0, scene_config("default"), chinese=0.3)
    for number in range(200):
        encoded = ENCODER(source[number], np.random.default_rng(number))
        assert encoded.length == len(encoded.ids) + GRID * (
            len(encoded.images) + len(encoded.targets)
        )
