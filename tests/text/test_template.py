"""Prompts: their structure on a byte tokenizer, their ids against the published ones."""

from collections.abc import Callable
from typing import Any

import pytest

from neounify.errors import PromptError
from neounify.text import (
    ImageSegment,
    Message,
    Prompt,
    TextSegment,
    Tokenizer,
    after_think_ids,
    byte_tokenizer,
    chat_prompt,
    default_system_message,
    image_prompt,
    images_only_prompt,
    interleave_prompt,
    place_images,
    unconditional_prompt,
)
from neounify.text.tokens import IMAGE_CONTEXT
from support.golden import golden_path, load_fixture, needs_golden

BYTES = byte_tokenizer()
CHECKPOINTS = ["tiny-dense", "tiny-moe", "tiny-pixelhead"]
COUNTS = {"a_512x512": 256, "b_672x416": 273, "c_320x224": 70}


def written(prompt: Prompt) -> str:
    """Spell a prompt with its special tokens; images are left out."""
    ids = prompt.ids([0] * prompt.n_images, BYTES.id(IMAGE_CONTEXT))
    return BYTES.decode(ids, skip_special=False)


@pytest.mark.parametrize(
    ("text", "images", "numbered", "expected"),
    [
        ("sky", 0, True, "sky"),
        ("sky", 1, True, "<image>\nsky"),
        ("sky", 2, True, "Image-1:<image>\nImage-2:<image>\nsky"),
        ("sky", 2, False, "<image>\n<image>\nsky"),
        ("a <image> sky", 1, True, "a <image> sky"),
        ("a <image> sky", 3, True, "<image>\n<image>\na <image> sky"),
        ("a <image> sky", 2, False, "<image>\na <image> sky"),
        ("", 2, False, "<image>\n<image>\n"),
    ],
)
def test_place_images(text: str, images: int, numbered: bool, expected: str) -> None:
    assert place_images(text, images, numbered=numbered) == expected


@pytest.mark.parametrize("numbered", [True, False])
def test_place_images_refuses_more_marks_than_images(numbered: bool) -> None:
    with pytest.raises(PromptError, match="2 <image> marks for 1 images"):
        place_images("<image> and <image>", 1, numbered=numbered)


def test_image_prompt() -> None:
    system = "<|im_start|>system\nPaint.<|im_end|>\n"
    turn = "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
    prompt = image_prompt(BYTES, "a cat", system="Paint.", think=False)
    assert written(prompt) == system + turn + "<think>\n\n</think>\n\n<img>"
    assert written(image_prompt(BYTES, "a cat", system="", think=True)) == turn + "<think>\n"


def test_interleave_prompt() -> None:
    turn = "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
    empty = interleave_prompt(BYTES, "a cat", system="", think=False)
    assert written(empty) == turn + "<think>\n\n</think>\n\n"
    assert written(interleave_prompt(BYTES, "a cat", system="", think=True)) == turn


def test_unconditional_and_images_only_prompts() -> None:
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert written(unconditional_prompt(BYTES)) == turn.format("") + "<img>"
    two = images_only_prompt(BYTES, 2, open_image=True)
    assert written(two) == turn.format("<img></img><img></img>") + "<img>"
    assert two.n_images == 2
    assert written(images_only_prompt(BYTES, 0, open_image=False)) == turn.format("")


def test_images_are_segments_numbered_over_the_whole_conversation() -> None:
    turns = [
        Message("user", "one <image> two <image>"),
        Message("assistant", "a mark here, <image>, is text"),
        Message("user", "<image>\nthree"),
    ]
    prompt = chat_prompt(BYTES, turns)
    images = [segment for segment in prompt.segments if isinstance(segment, ImageSegment)]
    assert images == [ImageSegment(0), ImageSegment(1), ImageSegment(2)]
    for index, segment in enumerate(prompt.segments):
        if isinstance(segment, ImageSegment):
            before, after = prompt.segments[index - 1], prompt.segments[index + 1]
            assert isinstance(before, TextSegment)
            assert isinstance(after, TextSegment)
            assert before.ids[-1] == BYTES.id("<img>")
            assert after.ids[0] == BYTES.id("</img>")
    assert "a mark here, <image>, is text" in written(prompt)


def test_prompt_ids_repeat_the_context_token_per_image() -> None:
    prompt = images_only_prompt(BYTES, 2, open_image=False)
    context = BYTES.id(IMAGE_CONTEXT)
    ids = prompt.ids([2, 3], context)
    opened, closed = BYTES.id("<img>"), BYTES.id("</img>")
    middle = [opened, context, context, closed, opened, context, context, context, closed]
    assert ids[ids.index(opened) : ids.index(opened) + 9] == middle
    with pytest.raises(PromptError, match="holds 2 images, 1 were given"):
        prompt.ids([2], context)


def test_chat_prompt_writes_every_turn() -> None:
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    text = (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert written(chat_prompt(BYTES, turns, system="s")) == text
    assert written(chat_prompt(BYTES, [Message("system", "s"), *turns])) == text
    assert written(chat_prompt(BYTES, turns, system="s", think=True)) == text + "<think>\n"


def test_neighbouring_text_is_tokenised_as_one() -> None:
    tokenizer = byte_tokenizer(["user\nA"] * 5 + ["\n\n\n"] * 5, 300)
    prompt = image_prompt(tokenizer, "\n\nA", system="", think=False)
    whole = tokenizer.encode("<|im_start|>user\n\n\nA<|im_end|>", allow_special=True)
    assert prompt.ids([], 0)[: len(whole)] == whole
    assert tokenizer.encode("user\n") + tokenizer.encode("\n\nA") != whole[1:-1]


def test_typed_special_tokens_stay_text() -> None:
    prompt = image_prompt(BYTES, "x<|im_end|><img>y", system="<|im_start|>", think=True)
    ids = prompt.ids([], 0)
    assert ids.count(BYTES.id("<|im_end|>")) == 2
    assert ids.count(BYTES.id("<|im_start|>")) == 3
    assert BYTES.id("<img>") not in ids


def test_after_think_ids() -> None:
    assert after_think_ids(BYTES) == [*BYTES.encode("\n\n"), BYTES.id("<img>")]


def test_default_system_message_is_a_short_paragraph() -> None:
    message = default_system_message()
    assert message == message.strip()
    assert 50 < len(message) < 500


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_a_prompt_is_needed(text: str) -> None:
    with pytest.raises(PromptError, match="a prompt is needed"):
        image_prompt(BYTES, text, system="s", think=False)
    with pytest.raises(PromptError, match="a prompt is needed"):
        interleave_prompt(BYTES, text, system="s", think=False)


def test_images_alone_are_a_prompt() -> None:
    assert image_prompt(BYTES, "<image>\n", system="", think=False).n_images == 1
    assert chat_prompt(BYTES, [Message("user", "<image>\n")]).n_images == 1


@pytest.mark.parametrize("bad", ["a\0b", "a\ud800", "\udfff"])
def test_text_that_is_not_text_is_refused(bad: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: image_prompt(BYTES, bad, system="", think=False),
        lambda: image_prompt(BYTES, "ok", system=bad, think=False),
        lambda: interleave_prompt(BYTES, bad, system="", think=False),
        lambda: Message("assistant", bad),
        lambda: chat_prompt(BYTES, [Message("user", "ok")], system=bad),
    ]
    for call in calls:
        with pytest.raises(PromptError, match="NUL and lone surrogates"):
            call()


@pytest.mark.parametrize(
    "roles",
    [
        ["system", "system", "user"],
        ["user", "assistant", "system", "user"],
        ["user", "user"],
        ["assistant", "user"],
        ["user", "system"],
        ["system"],
    ],
)
def test_every_turn_is_written_where_it_stands(roles: list[Any]) -> None:
    turns = [Message(role, f"{role[0]}{index}") for index, role in enumerate(roles)]
    text = "".join(f"<|im_start|>{t.role}\n{t.text}<|im_end|>\n" for t in turns)
    assert written(chat_prompt(BYTES, turns)) == text + "<|im_start|>assistant\n"
    first = "<|im_start|>system\nfirst<|im_end|>\n"
    actual = written(chat_prompt(BYTES, turns, system="first"))
    assert actual == first + text + "<|im_start|>assistant\n"


def test_empty_turns_are_written() -> None:
    turns = [Message("user", ""), Message("assistant", ""), Message("user", "")]
    turn = "<|im_start|>{}\n<|im_end|>\n"
    expected = "".join(turn.format(t.role) for t in turns) + "<|im_start|>assistant\n"
    assert written(chat_prompt(BYTES, turns)) == expected


def test_an_answer_that_is_begun_stays_open() -> None:
    turns = [Message("user", "What colour?"), Message("assistant", "It is")]
    prompt = "<|im_start|>user\nWhat colour?<|im_end|>\n<|im_start|>assistant\nIt is"
    assert written(chat_prompt(BYTES, turns)) == prompt
    with pytest.raises(PromptError, match="no thought can come before it"):
        chat_prompt(BYTES, turns, think=True)
    with pytest.raises(PromptError, match="list of messages is empty"):
        chat_prompt(BYTES, [])


def test_an_assistants_images_stand_at_their_offsets() -> None:
    answer = Message("assistant", "Once <image> then", image_offsets=(4, 17))
    assert answer.pieces == ["Once", " <image> then", ""]
    prompt = chat_prompt(BYTES, [Message("user", "<image>?"), answer, Message("user", "<image>")])
    assert prompt.n_images == 4
    images = [segment for segment in prompt.segments if isinstance(segment, ImageSegment)]
    assert images == [ImageSegment(n) for n in range(4)]
    turn = "<|im_start|>assistant\nOnce<img></img> <image> then<img></img><|im_end|>\n"
    assert turn in written(prompt)


@pytest.mark.parametrize("offsets", [(3, 1), (-1,), (3,)])
def test_offsets_out_of_place_are_refused(offsets: tuple[int, ...]) -> None:
    with pytest.raises(PromptError, match="must ascend within the text's 2 characters"):
        Message("assistant", "ab", image_offsets=offsets)
    with pytest.raises(PromptError, match="for assistant messages"):
        Message("system", "abcdef", image_offsets=offsets)


def test_an_interleaved_answer_reads_the_history() -> None:
    history = [Message("user", "a"), Message("assistant", "b", image_offsets=(1,))]
    prompt = interleave_prompt(BYTES, "<image>c", system="s", think=False, history=history)
    assert written(prompt) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<img></img><|im_end|>\n<|im_start|>user\n<img></img>c<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_a_negative_prompt_is_the_text_of_the_unconditional_turn() -> None:
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert written(unconditional_prompt(BYTES, "blurry")) == turn.format("blurry") + "<img>"
    one = images_only_prompt(BYTES, 1, open_image=True, negative="blurry")
    assert written(one) == turn.format("<img></img>\nblurry") + "<img>"
    with pytest.raises(PromptError, match="holds no images"):
        unconditional_prompt(BYTES, "a <image>")


def test_unknown_roles() -> None:
    with pytest.raises(PromptError, match="not 'robot'"):
        Message("robot", "x")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="must be text, not int"):
        Message("user", 3)  # type: ignore[arg-type]


class Published:
    """A golden checkpoint's tokenizer, system message and recorded ids."""

    def __init__(self, name: str) -> None:
        folder = golden_path(name)
        self.name = name
        self.tokenizer = Tokenizer.from_folder(folder)
        self.system = (folder / "system_message_generation.txt").read_text(encoding="utf-8")

    def check(self, prompt: Prompt, group: str, key: str, images: list[str]) -> None:
        """Compare with recorded ids, the images being the named ones."""
        context = self.tokenizer.id(IMAGE_CONTEXT)
        ids = prompt.ids([COUNTS[image] for image in images], context)
        assert ids == load_fixture(self.name, group)[0][key].flatten().tolist()


@pytest.fixture(scope="module", params=CHECKPOINTS)
def published(request: pytest.FixtureRequest) -> Published:
    return Published(request.param)


@needs_golden
def test_text_to_image_ids(published: Published) -> None:
    tokenizer, text = published.tokenizer, load_fixture(published.name, "t2i")[1]["prompt"]
    cond = image_prompt(tokenizer, text, system=published.system, think=False)
    published.check(cond, "t2i", "input_ids_cond", [])
    published.check(unconditional_prompt(tokenizer), "t2i", "input_ids_uncond", [])


@needs_golden
def test_think_ids(published: Published) -> None:
    tokenizer, arrays = published.tokenizer, load_fixture(published.name, "think")[0]
    assert after_think_ids(tokenizer) == arrays["closed.append_ids"].flatten().tolist()
    record = load_fixture("common", "tokenizer_ids")[1]["cases"]["t2i_cond_think"]
    text = record["text"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    prompt = image_prompt(tokenizer, text, system=published.system, think=True)
    assert prompt.ids([], 0) == record["tiny"]
    assert record["text"].endswith("<think>\n")


@needs_golden
@pytest.mark.parametrize("case", ["1img", "2img", "2img_auto"])
def test_editing_ids(published: Published, case: str) -> None:
    tokenizer, record = published.tokenizer, load_fixture(published.name, "it2i")[1]
    images = record["images"][case]
    text = place_images(record["prompts"][case], len(images), numbered=True)
    cond = image_prompt(tokenizer, text, system=published.system, think=False)
    published.check(cond, "it2i", f"{case}.cond.input_ids", images)
    images_only = images_only_prompt(tokenizer, len(images), open_image=True)
    published.check(images_only, "it2i", f"{case}.img_cond.input_ids", images)


@needs_golden
def test_interleave_ids(published: Published) -> None:
    tokenizer, record = published.tokenizer, load_fixture(published.name, "interleave")[1]
    text = place_images(record["prompt"], 1, numbered=True)
    cond = interleave_prompt(tokenizer, text, system=record["system_message"], think=False)
    published.check(cond, "interleave", "cond.input_ids", record["images"])
    images_only = images_only_prompt(tokenizer, 1, open_image=False)
    published.check(images_only, "interleave", "img_cond.input_ids", record["images"])
    published.check(unconditional_prompt(tokenizer), "interleave", "uncond.input_ids", [])


@needs_golden
def test_chat_ids(published: Published) -> None:
    tokenizer, record = published.tokenizer, load_fixture(published.name, "chat")[1]
    first = Message("user", place_images(record["question"], 1, numbered=False))
    published.check(chat_prompt(tokenizer, [first]), "chat", "turn1.input_ids", [record["image"]])
    turns = [first, Message("assistant", "A red boat."), Message("user", "And the colour?")]
    published.check(chat_prompt(tokenizer, turns), "chat", "turn2.input_ids", [record["image"]])
    text_only = chat_prompt(tokenizer, [Message("user", record["question"])])
    published.check(text_only, "chat", "text_only.input_ids", [])
