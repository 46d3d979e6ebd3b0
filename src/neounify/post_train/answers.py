"""Answers and thoughts: groups of texts of each prompt, sampled at temperature 1.

They come from the engine that serves chat, which reads a prompt once per group, in one batch. The
random numbers of a text are a function of (seed, iteration, sample).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neounify.cache import SequenceCache
from neounify.config import TextSampling
from neounify.engine.messages import (
    Answer,
    Decode,
    Decoded,
    DecodedToken,
    Failed,
    ImageInput,
    LocalTransport,
    Prefill,
    PromptInput,
    Release,
    SequenceName,
    TextInput,
    new_number,
)
from neounify.engine.understanding import UnderstandingEngine
from neounify.flow.guidance import Branch
from neounify.model.neo import NeoUnify
from neounify.post_train.policy import TokenPrompt, prefill_all
from neounify.post_train.prompts import PromptCase
from neounify.post_train.reward_kinds import Output, Pixels
from neounify.runtime.plan import plan_execution
from neounify.tasks.chat import chat_images, make_chat_request, prompt_of
from neounify.tasks.image import ImageRequest, branch_prompt, edit_images
from neounify.tasks.program import Processor
from neounify.text.template import after_think_ids
from neounify.text.tokens import IM_END, THINK_CLOSE, THINK_OPEN

TOKENS = 3
"""Purpose of the random numbers that tokens are drawn with."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Answers:
    """Texts of some prompts: `count` = prompts · group, those of a prompt together.

    `prompts` is one per case. `tokens` are those of each text, with the stop token that ended it;
    a text that its limit ended has none. `sampled` are the log-probabilities of all but the stop
    token as the engine had them, `old` those of all tokens in the first update, by sample.

    Interleaved answers have `images` [channels, height, width], normalised for the understanding
    stream: one for each `<img>` of their tokens, unless it is the last token. `marks` are the ids
    of `<img>`, which is sampled, and `</img>`, which is not. `parts` are texts and images in turn.
    """

    cases: Sequence[PromptCase]
    group: int
    prompts: Sequence[TokenPrompt]
    tokens: Sequence[Sequence[int]]
    sampled: Sequence[Float[Tensor, " n"]]
    old: dict[int, Float[Tensor, " n"]] = field(default_factory=dict)
    texts: Sequence[str] = ()
    """What is rewarded and shown; a saved state does not hold it."""
    images: Sequence[Sequence[Float[Tensor, "c h w"]]] = ()
    marks: tuple[int, int] | None = None
    parts: Sequence[tuple[str | Pixels, ...]] = ()
    """What is rewarded of interleaved answers; a saved state does not hold it."""

    @property
    def count(self) -> int:
        return len(self.tokens)

    def prompt_of(self, sample: int) -> TokenPrompt:
        """The prompt of a sample."""
        return self.prompts[sample // self.group]

    def outputs(self) -> Sequence[Output]:
        """The texts, or texts and images in turn."""
        return self.parts if self.marks is not None else self.texts

    def followed(self, model: NeoUnify, sample: int) -> tuple[TokenPrompt, list[int]]:
        """Prompt and answer without its last token, and the row before each token of the answer.

        A token is predicted from its row, counted from the first row of the prompt.
        """
        prompt, tokens = self.prompt_of(sample), self.tokens[sample]
        if self.marks is None:
            first = prompt.length - 1
            return prompt.followed_by(tokens[:-1]), list(range(first, first + len(tokens)))
        opens, closes = self.marks
        images = iter(self.images[sample])
        rows: list[int] = []
        text: list[int] = []
        for token in tokens:
            rows.append(prompt.length + len(text) - 1)
            text.append(token)
            if token == opens and len(rows) < len(tokens):
                prompt = prompt.followed_by(text).with_image(model, next(images))
                text = [closes]
        return prompt.followed_by(text[:-1]), rows

    def tokens_of(self, chosen: Sequence[int]) -> int:
        """Tokens of some texts."""
        return sum(len(self.tokens[i]) for i in chosen)

    def old_values(self, chosen: Sequence[int]) -> Any:
        """Log-probabilities of some texts in the first update, on the CPU."""
        return {i: self.old[i].cpu() for i in chosen if i in self.old}

    def take_old(self, chosen: Sequence[int], values: Any) -> None:
        """Keep the `old_values` that another rank has computed."""
        self.old.update(values)

    def tensors(self) -> dict[str, Tensor]:
        """What cannot be computed again, by name; NaN for log-probabilities that there are none."""
        pad = float("nan")
        old = [self.old.get(i, torch.full((len(t),), pad)) for i, t in enumerate(self.tokens)]
        tensors = {
            "ids": torch.tensor([i for ids in self.tokens for i in ids], dtype=torch.int64),
            "lengths": torch.tensor([len(ids) for ids in self.tokens], dtype=torch.int64),
            "decoded": torch.tensor([len(s) for s in self.sampled], dtype=torch.int64),
            "sampled": torch.cat(list(self.sampled)),
            "old": torch.cat([values.cpu() for values in old]),
        }
        if self.marks is not None:
            counts = [len(images) for images in self.images]
            tensors["image_counts"] = torch.tensor(counts, dtype=torch.int64)
            if images := [image for several in self.images for image in several]:
                tensors["images"] = torch.stack(images)
        return tensors

    def shown(self) -> Any:
        """Texts and parts."""
        return self.texts, self.parts

    def with_shown(self, shown: Any) -> Answers:
        """The answers with texts and parts."""
        texts, parts = shown
        return replace(self, texts=texts, parts=parts)


def draw_seed(seed: int, iteration: int, purpose: int, sample: int, step: int = 0) -> int:
    """A seed in [0, 2^63) for one purpose of a sample, independent of all others."""
    sequence = np.random.SeedSequence((seed, iteration, purpose, sample, step))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def rollout_seed(seed: int, *place: int) -> int:
    """A seed in [0, 2^63) for a rollout of an iteration, unlike those of other places and seeds.

    `place` is the rollout's index, and its micro-batch where rollouts are counted in each.
    """
    sequence = np.random.SeedSequence((seed, *place))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def restored_answers(
    cases: Sequence[PromptCase],
    prompts: Sequence[TokenPrompt],
    group: int,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    marks: tuple[int, int] | None = None,
) -> Answers:
    """The answers whose `tensors` were saved. Raises KeyError or ValueError for others."""
    lengths, decoded = tensors["lengths"].tolist(), tensors["decoded"].tolist()
    saved = (len(lengths), *(len(tensors[name]) for name in ("ids", "old", "sampled")))
    expected = (len(cases) * group, sum(lengths), sum(lengths), sum(decoded))
    if saved != expected:
        raise ValueError(f"(answers, tokens, old and sampled values) are {saved}, not {expected}")
    old = tensors["old"].to(device).split(lengths)
    tokens = [ids.tolist() for ids in tensors["ids"].split(lengths)]
    return Answers(
        cases=cases,
        group=group,
        prompts=prompts,
        tokens=tokens,
        sampled=tensors["sampled"].split(decoded),
        old={i: values for i, values in enumerate(old) if not values.isnan().any()},
        images=[] if marks is None else _saved_images(tokens, tensors, marks),
        marks=marks,
    )


def _saved_images(
    tokens: Sequence[Sequence[int]], tensors: Mapping[str, Tensor], marks: tuple[int, int]
) -> list[list[Tensor]]:
    """The images of each answer. Raises KeyError or ValueError where they are not as many."""
    counts = tensors["image_counts"].tolist()
    opened = [list(ids).count(marks[0]) for ids in tokens]
    last = [ids[-1] == marks[0] for ids in tokens]
    if len(counts) != len(opened) or not all(
        n - ends <= count <= n for n, ends, count in zip(opened, last, counts, strict=True)
    ):
        raise ValueError(f"the answers open other numbers of images than {counts}")
    if not any(counts):
        return [[] for _ in counts]
    if len(images := tensors["images"]) != sum(counts):
        raise ValueError(f"there are {len(images)} images of answers, not {sum(counts)}")
    return [list(several) for several in images.split(counts)]


# --- prompts ---


def chat_prompts(
    model: NeoUnify, processor: Processor, cases: Sequence[PromptCase], *, think: bool
) -> list[TokenPrompt]:
    """Prompts as `Pipeline.chat` has them. Raises PromptError and ImageError."""
    prompts = []
    for case in cases:
        form = processor.template
        request = make_chat_request(case.prompt, case.images, (), form, think=think)
        images = chat_images(processor, request)
        prompts.append(TokenPrompt.of(model, prompt_of(processor, request), images))
    return prompts


def thought_prompts(
    model: NeoUnify, processor: Processor, requests: Sequence[ImageRequest]
) -> list[TokenPrompt]:
    """Prompts of images that end with an open thought, as `Pipeline.generate` has them."""
    prompts = []
    for request in requests:
        images = edit_images(processor, request.images) if request.images else []
        thinking = branch_prompt(processor, replace(request, think=True), "cond")
        prompts.append(TokenPrompt.of(model, thinking, images))
    return prompts


def thought_prefixes(
    model: NeoUnify, processor: Processor, thoughts: Answers
) -> list[dict[Branch, SequenceCache]]:
    """KV caches of each sample's prompt and thought, up to the image that they open."""
    end, opening = processor.token(IM_END), after_think_ids(processor.tokenizer)
    inputs = []
    for sample, tokens in enumerate(thoughts.tokens):
        # As in inference: a thought that its limit or <|im_end|> ended is not closed.
        ids = [token for token in tokens if token != end]
        inputs.append(thoughts.prompt_of(sample).followed_by([*ids, *opening]).model_input(model))
    prefill_all(model, inputs)
    return [{"cond": cast(SequenceCache, item.cache)} for item in inputs]


def answer_text(processor: Processor, tokens: Sequence[int], *, thinking: bool) -> str:
    """The text of an answer without its thoughts; `thinking`: it begins inside of one."""
    marks = {processor.token(THINK_OPEN): True, processor.token(THINK_CLOSE): False}
    ids = []
    for token in tokens:
        thinking = marks.get(token, thinking)
        if not thinking:
            ids.append(token)
    return processor.tokenizer.decode(ids).strip()


# --- sampling ---


def sample_answers(
    model: NeoUnify,
    processor: Processor,
    cases: Sequence[PromptCase],
    prompts: Sequence[TokenPrompt],
    group: int,
    max_new_tokens: int,
    *,
    think: bool,
    thoughts_only: bool = False,
    seed: int,
    iteration: int,
) -> Answers:
    """`group` answers to each prompt; with `thoughts_only` a text ends with its thought.

    `think`: prompts end with an open thought. Raises the errors of the engine.
    """
    stops = {processor.token(IM_END)} | ({processor.token(THINK_CLOSE)} if thoughts_only else set())
    seeds = [draw_seed(seed, iteration, TOKENS, i) for i in range(len(prompts) * group)]
    decoded = _decode(model, prompts, group, seeds, frozenset(stops), max_new_tokens)
    tokens = [ids for ids, _ in decoded]
    texts = [
        processor.tokenizer.decode(token for token in ids if token not in stops).strip()
        if thoughts_only
        else answer_text(processor, ids, thinking=think)
        for ids in tokens
    ]
    sampled = [log_probs for _, log_probs in decoded]
    return Answers(
        cases=cases, group=group, prompts=prompts, tokens=tokens, sampled=sampled, texts=texts
    )


def _decode(
    model: NeoUnify,
    prompts: Sequence[TokenPrompt],
    group: int,
    seeds: Sequence[int],
    stops: frozenset[int],
    max_new_tokens: int,
) -> list[tuple[list[int], Float[Tensor, " n"]]]:
    """Tokens with their stop token, and log-probabilities without it, of each seed's text."""
    transport = LocalTransport()
    engine = engine_behind(model, prompts, transport, group, max_new_tokens)
    calls: dict[int, tuple[int, SequenceName]] = {}
    for sample, seed in enumerate(seeds):
        call, name = new_number(), (new_number(), "answer")
        calls[call] = (sample, name)
        sampling = TextSampling(temperature=1.0, seed=seed, logprobs=0)
        then = Decode(call, name, sampling, stops, max_new_tokens)
        parts = {name: prompt_parts(prompts[sample // group], transport)}
        engine.submit(Prefill(call, parts, {name: max_new_tokens}, then))
    ids: list[list[int]] = [[] for _ in seeds]
    log_probs: list[list[float]] = [[] for _ in seeds]
    for call, answer in engine_answers(engine):
        sample, name = calls[call]
        if isinstance(answer, DecodedToken):
            ids[sample].append(answer.id)
            log_probs[sample].append(answer.logprobs.chosen if answer.logprobs else math.nan)
        elif isinstance(answer, Decoded):
            if answer.stopped_by is not None:
                ids[sample].append(answer.stopped_by)
            engine.submit(Release((name,)))
    return [(tokens, torch.tensor(values)) for tokens, values in zip(ids, log_probs, strict=True)]


def engine_behind(
    model: NeoUnify,
    prompts: Sequence[TokenPrompt],
    transport: LocalTransport,
    copies: int,
    room: int,
) -> UnderstandingEngine:
    """The engine that serves text, with some prompts in its cache, which sequences then share.

    Blocks are for `copies` sequences of each prompt, with `room` tokens behind it.
    """
    plan = plan_execution(model.config, model.device, model.compute_dtype)
    rooms = [p.length + room + plan.kv_headroom + plan.kv_block_size for p in prompts]
    blocks = min(plan.kv_blocks, copies * sum(rooms) // plan.kv_block_size)
    plan = replace(plan, kv_blocks=blocks, prefill_step_rows=plan.prefill_rows)
    engine = UnderstandingEngine(model, transport, plan)
    first = {(new_number(), "prompt"): prompt for prompt in prompts}
    for name, prompt in first.items():
        engine.submit(Prefill(new_number(), {name: prompt_parts(prompt, transport)}, {name: 0}))
    for _ in engine_answers(engine):
        pass
    engine.submit(Release(tuple(first)))
    return engine


def engine_answers(engine: UnderstandingEngine) -> Iterator[tuple[int, Answer]]:
    """Run an engine until nothing is left to do; (call, answer) pairs. Raises a call's error."""
    while engine.replies or engine.busy:
        replies, engine.replies = engine.replies, []
        for reply in replies:
            if isinstance(reply.answer, Failed):
                raise reply.answer.exception()
            yield reply.call, reply.answer
        if engine.busy:
            engine.step()


def prompt_parts(prompt: TokenPrompt, transport: LocalTransport) -> tuple[PromptInput, ...]:
    """A prompt in the form that the engine takes, which uses up references to images."""
    parts: list[PromptInput] = []
    for piece in prompt.pieces:
        if piece.image is None or piece.grid is None:
            parts.append(TextInput(tuple(piece.ids)))
        else:
            pixels = piece.image.float().cpu().numpy()
            digest = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
            reference = transport.pack({"pixels": piece.image})
            parts.append(ImageInput(reference, digest, piece.grid))
    return tuple(parts)
