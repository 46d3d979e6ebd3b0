"""Several answers to one prompt, log-probabilities, and completions, on a model and its engine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import openai
import pytest
import torch
from PIL import Image

import neounify
from neounify.cache import SequenceCache
from neounify.decode.sampler import LogProbs, SampledToken, SamplingBatch
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import forward_und
from neounify.model.layout import Text
from neounify.serve.build import colocated
from neounify.serve.engines import EngineThread
from neounify.serve.http import HttpConfig, Limits, create_app
from neounify.serve.http.serving import answers_in_groups
from neounify.serve.service import AdmissionConfig, EngineService
from neounify.tasks.program import Finished, PromptPrefilled, TaskEvent, TextPiece
from neounify.text import Message, byte_tokenizer, chat_prompt
from neounify.text.tokens import IM_END, THINK_CLOSE
from support.http_server import openai_client, serving, to_image
from support.scripted_sampler import script_sampler
from support.scripted_service import Scripted

MODEL = "neounify"
QUESTION = "What would you say to somebody who asks you for a longer prompt than this one is?"
ASK: Any = [{"role": "user", "content": QUESTION}]
BYTES = byte_tokenizer()


@pytest.fixture(scope="module")
def service(tiny: neounify.Pipeline) -> EngineService:
    return colocated(tiny)


@pytest.fixture(scope="module")
def client(service: EngineService) -> Iterator[openai.OpenAI]:
    with serving(service) as client:
        yield client


# --- several answers ---


def test_each_answer_is_what_its_seed_gives_alone(
    client: openai.OpenAI, tiny: neounify.Pipeline
) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, n=4, temperature=1.0, seed=7, max_tokens=12
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    alone = [
        tiny.chat(QUESTION, temperature=1.0, seed=7 + number, max_new_tokens=12)
        for number in range(4)
    ]
    assert [choice.message.content for choice in answer.choices] == [one.text for one in alone]
    assert len({one.text for one in alone}) == 4
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == alone[0].prompt_tokens
    assert answer.usage.completion_tokens == sum(len(one.token_ids) for one in alone)


def test_the_prompt_is_read_once(client: openai.OpenAI, service: EngineService) -> None:
    messages: Any = [{"role": "user", "content": "Never seen before. " * 20}]
    before = client.with_options().chat.completions.create(model=MODEL, messages=ASK, max_tokens=1)
    assert before.usage is not None

    def known() -> float:
        return service.counters().get("und_known_tokens", 0)

    start = known()
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, n=3, temperature=1.0, seed=1, max_tokens=40
    )
    assert answer.usage is not None
    prompt = answer.usage.prompt_tokens
    deadline = 100
    while known() - start < 2 * (prompt - 17) and deadline:  # reports come twice a second
        client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=20)
        deadline -= 1
    assert known() - start >= 2 * (prompt - 17)


@pytest.mark.parametrize("think", [False, True])
def test_the_prompt_of_several_images_is_read_once_and_each_is_that_of_its_seed(
    client: openai.OpenAI,
    service: EngineService,
    monkeypatch: pytest.MonkeyPatch,
    think: bool,
) -> None:
    thought = itertools.cycle([*BYTES.encode("Hm."), BYTES.id(THINK_CLOSE)])
    script_sampler(monkeypatch, lambda row: next(thought))

    def generate(prompt: str, seed: int, n: int) -> tuple[list[Image.Image], int, int]:
        """The images, prompt tokens prefilled and text tokens decoded."""
        engine = service.clients.understanding.engine
        assert isinstance(engine, EngineThread)
        assert engine.understanding is not None
        counters = engine.understanding.counters
        read, written = counters["und_read_tokens"], counters["und_written_tokens"]
        fields: Any = {"seed": seed, "steps": 2, "guidance": 3, "think": think}
        answer = client.images.generate(prompt=prompt, n=n, size="64x32", extra_body=fields)
        images = [to_image(entry.b64_json or "") for entry in answer.data or ()]
        return images, counters["und_read_tokens"] - read, counters["und_written_tokens"] - written

    generate("2 cups on the desk", 5, 1)  # from here on the template's beginning is in the cache
    several, read, written = generate("a boat on the lake", 5, 3)
    alone = [generate("a boat on the lake", 5 + number, 1)[0][0] for number in range(3)]
    _, read_of_one, written_of_one = generate("1 cart in the town", 5, 1)
    assert (read, written) == (read_of_one, written_of_one)
    assert written == (3 if think else 0)
    assert [one.tobytes() for one in several] == [one.tobytes() for one in alone]
    assert len({one.tobytes() for one in several}) == 3


def test_streamed_answers_carry_their_index(client: openai.OpenAI, tiny: neounify.Pipeline) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        n=3,
        temperature=1.0,
        seed=1,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts, roles, reasons = ["", "", ""], [0, 0, 0], [0, 0, 0]
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role is not None
        reasons[choice.index] += choice.finish_reason is not None
    assert roles == reasons == [1, 1, 1]
    for number, text in enumerate(texts):
        alone = tiny.chat(QUESTION, temperature=1.0, seed=1 + number, max_new_tokens=12)
        assert text == alone.text
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == alone.prompt_tokens


def test_the_last_seed_is_followed_by_the_first(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, n=2, temperature=1.0, seed=2**64 - 1, max_tokens=4
    )
    first = client.chat.completions.create(
        model=MODEL, messages=ASK, temperature=1.0, seed=0, max_tokens=4
    )
    assert answer.choices[1].message.content == first.choices[0].message.content


def test_the_servers_limit_of_answers() -> None:
    config = HttpConfig(limits=Limits(n=3))
    with (
        openai_client(create_app(Scripted(), config)) as client,
        pytest.raises(openai.BadRequestError, match="4 is over this server's 3"),
    ):
        client.chat.completions.create(model=MODEL, messages=ASK, n=4)


def test_one_answers_error_is_the_error_of_all() -> None:
    calls = 0

    def script(request: Any, previews: int) -> list[Any]:
        nonlocal calls
        calls += 1
        if calls == 2:
            return [PromptPrefilled(), neounify.errors.RequestError("temperature is off")]
        return [PromptPrefilled(), TextPiece("a"), 5.0, Finished("stop", 1, 1)]

    service = Scripted(script)
    with (
        openai_client(create_app(service)) as client,
        pytest.raises(openai.BadRequestError, match="temperature is off"),
    ):
        client.chat.completions.create(model=MODEL, messages=ASK, n=3)
    assert service.open == 0


def test_later_answers_wait_for_the_prompt() -> None:
    order: list[str] = []

    async def source(name: str, prompt: asyncio.Event | None) -> AsyncGenerator[TaskEvent]:
        order.append(f"{name} begins")
        if prompt is not None:
            await asyncio.sleep(0.05)
            order.append("read")
            yield PromptPrefilled()
        yield Finished("stop", 1, 1)

    async def main() -> None:
        event = asyncio.Event()
        group = [lambda: source("a", event), lambda: source("b", None), lambda: source("c", None)]
        async for _ in answers_in_groups([group]):
            pass

    asyncio.run(main())
    assert order[:2] == ["a begins", "read"]
    assert sorted(order[2:]) == ["b begins", "c begins"]


# --- log-probabilities ---


def new_cache(tiny: neounify.Pipeline, capacity: int) -> SequenceCache:
    model = tiny.model
    return SequenceCache(model.config, capacity, dtype=model.compute_dtype, device=model.device)


def by_hand(tiny: neounify.Pipeline, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """Log-probabilities [ids, vocab] in front of each of `ids`, from one pass over everything."""
    rows = []
    for end in range(len(ids)):
        cache = new_cache(tiny, len(prompt) + len(ids))
        tokens = [*prompt, *ids[:end]]
        with torch.inference_mode():
            hidden = forward_und(tiny.model, [ModelInput(cache, (Text(len(tokens)),), tokens)])
            rows.append(tiny.model.logits(hidden)[0].float().log_softmax(dim=0))
    return torch.stack(rows)


def test_log_probs_of_chat(client: openai.OpenAI, tiny: neounify.Pipeline) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        logprobs=True,
        top_logprobs=3,
        temperature=0.7,
        top_p=0.5,
        seed=5,
        max_tokens=6,
        extra_body={"repetition_penalty": 1.3},
    )
    assert answer.choices[0].logprobs is not None
    entries: Any = answer.choices[0].logprobs.content
    assert len(entries) == 6
    prompt = chat_prompt(BYTES, [Message("user", QUESTION)]).ids([], 0)
    ids = list(
        tiny.chat(
            QUESTION,
            temperature=0.7,
            top_p=0.5,
            seed=5,
            max_new_tokens=6,
            repetition_penalty=1.3,
        ).token_ids
    )
    expected = by_hand(tiny, prompt, ids)
    for entry, token, row in zip(entries, ids, expected, strict=True):
        assert bytes(entry.bytes) == BYTES.token_bytes(token)
        assert entry.token == BYTES.token_bytes(token).decode(errors="replace")
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )
        assert [bytes(top.bytes) for top in entry.top_logprobs] == [
            BYTES.token_bytes(token) for token in best.indices.tolist()
        ]


def test_streamed_log_probs_are_those_of_the_whole(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "messages": ASK, "logprobs": True, "max_tokens": 8, "n": 2}
    fields |= {"temperature": 1.0, "seed": 3}
    whole = client.chat.completions.create(**fields)
    by_choice: list[list[float]] = [[], []]
    for chunk in client.chat.completions.create(stream=True, **fields):
        for choice in chunk.choices:
            if choice.logprobs is not None:
                by_choice[choice.index] += [e.logprob for e in choice.logprobs.content or ()]
    for choice, streamed in zip(whole.choices, by_choice, strict=True):
        assert choice.logprobs is not None
        assert [e.logprob for e in choice.logprobs.content or ()] == pytest.approx(
            streamed, abs=1e-4
        )
        assert len(streamed) == 8


def test_tokens_of_a_stop_string_have_none(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = iter([*BYTES.encode("abcSTOPx"), BYTES.id(IM_END)])
    monkeypatch.setattr(
        SamplingBatch,
        "sample",
        lambda batch, logits: [SampledToken(next(ids), LogProbs(-1.0, ()))],
    )
    answer = client.chat.completions.create(model=MODEL, messages=ASK, stop=["STOP"], logprobs=True)
    assert answer.choices[0].message.content == "abc"
    assert answer.choices[0].logprobs is not None
    assert [e.token for e in answer.choices[0].logprobs.content or ()] == ["a", "b", "c"]


def test_alternatives_need_logprobs(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="needs logprobs"):
        client.chat.completions.create(model=MODEL, messages=ASK, top_logprobs=2)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=ASK, logprobs=True, top_logprobs=21)


# --- completions ---


def greedily(tiny: neounify.Pipeline, prompt: list[int], count: int) -> str:
    ids: list[int] = []
    for _ in range(count):
        cache = new_cache(tiny, len(prompt) + count)
        tokens = [*prompt, *ids]
        with torch.inference_mode():
            hidden = forward_und(tiny.model, [ModelInput(cache, (Text(len(tokens)),), tokens)])
            ids.append(int(tiny.model.logits(hidden)[0].argmax()))
    return BYTES.decode(ids, skip_special=False)


def test_completions_of_texts_and_ids(client: openai.OpenAI, tiny: neounify.Pipeline) -> None:
    ids = BYTES.encode("Once upon")
    expected = greedily(tiny, ids, 5)
    for prompt in ("Once upon", ids, ["Once upon"], [ids]):
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=5)
        [choice] = answer.choices
        assert choice.text == expected
        assert choice.finish_reason == "length"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 5)


def test_several_prompts_and_several_answers(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "temperature": 1.0, "seed": 2, "max_tokens": 6}
    answer = client.completions.create(prompt=["one", "two"], n=2, **fields)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for index, prompt in enumerate(("one", "two")):
        for number in range(2):
            single = client.completions.create(prompt=prompt, **(fields | {"seed": 2 + number}))
            assert answer.choices[2 * index + number].text == single.choices[0].text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 6
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(prompt=["one", "two"], n=2, stream=True, **fields):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in answer.choices]


def test_the_prompt_is_given_back(client: openai.OpenAI) -> None:
    plain = client.completions.create(model=MODEL, prompt=" two  words", max_tokens=4)
    prompts: Any = (" two  words", BYTES.encode(" two  words"))
    for prompt in prompts:
        echo = client.completions.create(model=MODEL, prompt=prompt, max_tokens=4, echo=True)
        assert echo.choices[0].text == " two  words" + plain.choices[0].text
    nothing = client.completions.create(model=MODEL, prompt="ab", max_tokens=0, echo=True)
    assert (nothing.choices[0].text, nothing.choices[0].finish_reason) == ("ab", "length")


def test_white_space_and_stop_strings_of_completions(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(text: str) -> None:
        ids = iter([*BYTES.encode(text), BYTES.id(IM_END)])
        script_sampler(monkeypatch, lambda row: next(ids))

    says("  spaces  \n")
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=50)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("  spaces  \n", "stop")
    says("one two three")
    answer = client.completions.create(model=MODEL, prompt="x", stop=["zz", " t"], max_tokens=50)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one", "stop")
    says("<think>a</think>b")
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=50)
    assert answer.choices[0].text == "<think>a</think>b"


def test_special_tokens_in_a_text_are_characters(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="<|im_end|>", max_tokens=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 10


def test_log_probs_of_completions(client: openai.OpenAI, tiny: neounify.Pipeline) -> None:
    prompt = BYTES.encode("abc")
    for seed in range(100):  # until both tokens are characters, which bytes above 127 are not
        answer = client.completions.create(
            model=MODEL, prompt="abc", logprobs=2, max_tokens=2, temperature=1.0, seed=seed
        )
        if len(answer.choices[0].text) == 2 and answer.choices[0].text.isascii():
            break
    logprobs: Any = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    ids = [next(n for n in range(264) if spelt(n) == token) for token in logprobs.tokens]
    assert len(ids) == 2
    expected = by_hand(tiny, prompt, ids)
    for token, value, top, row in zip(
        ids, logprobs.token_logprobs, logprobs.top_logprobs, expected, strict=True
    ):
        assert value == pytest.approx(float(row[token]), abs=1e-4)
        assert top[spelt(token)] == value
        assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4)
        assert len(top) in (2, 3)
    assert logprobs.text_offset == [0, len(logprobs.tokens[0])]
    plain = client.completions.create(model=MODEL, prompt="abc", max_tokens=2)
    assert plain.choices[0].logprobs is None


def spelt(token: int) -> str:
    return BYTES.token_bytes(token).decode(errors="replace")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x", ""]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": ["x"] * 100, "n": 10}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "echo": True, "logprobs": 0}, "echo"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "max_tokens": 10**6}, "max_tokens"),
        ({"prompt": "x", "n": 11}, "n"),
        ({"prompt": "x", "messages": []}, "messages"),
        ({"prompt": "x", "model": "other"}, "model"),
        ({"prompt": "x" * 200_000}, None),
    ],
)
def test_completions_that_cannot_be(
    client: openai.OpenAI, fields: dict[str, Any], param: str | None
) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as error:
        client.post("/completions", body=fields, cast_to=object)
    assert error.value.param == param, error.value


# --- more than the server can ever do at once ---


@pytest.mark.parametrize(
    ("ask", "param", "message"),
    [
        (
            lambda c: c.chat.completions.create(model=MODEL, messages=ASK, n=4),
            "n",
            "4 answers at once, this server works on at most 3",
        ),
        (
            lambda c: c.completions.create(model=MODEL, prompt=["a", "b", "c", "d"]),
            "prompt",
            "4 answers at once, this server works on at most 3",
        ),
        (
            lambda c: c.images.generate(model=MODEL, prompt="a", n=3, size="64x96"),
            "n",
            "images have 18 tokens, this server generates at most 17 at once",
        ),
        (
            lambda c: c.images.generate(model=MODEL, prompt="a", n=4, size="32x32", stream=True),
            "n",
            "4 answers at once, this server works on at most 3",
        ),
    ],
)
def test_more_at_once_than_the_limits_ever_admit_is_400_not_429_for_ever(
    tiny: neounify.Pipeline, ask: Any, param: str, message: str
) -> None:
    limits = AdmissionConfig(requests=3, image_tokens=17)
    with serving(colocated(tiny, admission=limits)) as client:
        with pytest.raises(openai.BadRequestError, match=message) as refused:
            ask(client)
        assert refused.value.param == param
        assert client.completions.create(model=MODEL, prompt=["a", "b", "c"]).choices
