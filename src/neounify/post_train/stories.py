"""Stories: groups of interleaved answers, whose text is sampled at temperature 1 and trained.

Both engines of inference take turns: all stories are decoded until each opens an image, those
images are denoised in one batch, and the text continues behind them. A prompt is read once per
group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neounify.config import TextSampling
from neounify.engine.generation import GenerationEngine
from neounify.engine.messages import (
    Append,
    Decode,
    Decoded,
    DecodedToken,
    Export,
    Exported,
    Failed,
    GenerateImages,
    ImageReady,
    LocalTransport,
    Prefill,
    Prefix,
    Release,
    SequenceName,
    new_number,
)
from neounify.flow.guidance import Branch
from neounify.flow.sampling import ResolvedSampling
from neounify.image.pixels import image_tokens, to_pil
from neounify.model.layout import Grid
from neounify.model.neo import NeoUnify
from neounify.post_train.answers import (
    TOKENS,
    Answers,
    answer_text,
    draw_seed,
    engine_answers,
    engine_behind,
    prompt_parts,
)
from neounify.post_train.policy import TokenPrompt, interleave_request
from neounify.post_train.prompts import PromptCase
from neounify.post_train.reward_kinds import Pixels
from neounify.post_train.rollout import START, noise_generator
from neounify.runtime.plan import UNLIMITED, plan_execution
from neounify.tasks.image import draw_noise, edit_images
from neounify.tasks.interleave import to_und_input, turn_prompt
from neounify.tasks.program import Processor
from neounify.text.tokens import IM_END, IMAGE_CLOSE, IMAGE_OPEN


def image_marks(processor: Processor) -> tuple[int, int]:
    """The ids of `<img>` and `</img>`."""
    return processor.token(IMAGE_OPEN), processor.token(IMAGE_CLOSE)


def story_prompts(
    model: NeoUnify,
    processor: Processor,
    cases: Sequence[PromptCase],
    sampling: ResolvedSampling,
    branch: Branch,
    *,
    think: bool,
) -> list[TokenPrompt]:
    """Prompts of one guidance branch as `Pipeline.interleave` has them."""
    prompts = []
    for case in cases:
        images = edit_images(processor, case.images) if case.images else []
        request = interleave_request(case, sampling, think=think)
        prompts.append(TokenPrompt.of(model, turn_prompt(processor, request, branch), images))
    return prompts


def sample_stories(
    model: NeoUnify,
    processor: Processor,
    cases: Sequence[PromptCase],
    prompts: Sequence[TokenPrompt],
    group: int,
    sampling: ResolvedSampling,
    *,
    max_new_tokens: int,
    max_images: int,
    think: bool,
    seed: int,
    iteration: int,
    attention: str = "auto",
) -> Answers:
    """`group` interleaved answers to each prompt, with images of the cases' size, which is one.

    Images are sampled with `sampling`. `max_new_tokens` bounds the text of a whole answer. Raises
    the errors of the engines.
    """
    every: dict[Branch, Sequence[TokenPrompt]] = {"cond": prompts}
    for branch in sampling.guidance.branches()[1:]:
        every[branch] = story_prompts(model, processor, cases, sampling, branch, think=think)
    rollout = _StoryRollout(
        model=model,
        processor=processor,
        prompts=every,
        group=group,
        sampling=sampling,
        case=cases[0],
        max_new_tokens=max_new_tokens,
        max_images=max_images,
        seed=seed,
        iteration=iteration,
        attention=attention,
    )
    rollout.run()
    stories = rollout.stories
    return Answers(
        cases=cases,
        group=group,
        prompts=prompts,
        tokens=[story.ids for story in stories],
        sampled=[torch.tensor(story.log_probs) for story in stories],
        texts=[_shown(processor, story) for story in stories],
        images=[[to_und_input(pixels, processor.dtype) for pixels in s.images] for s in stories],
        marks=image_marks(processor),
        parts=[_parts(processor, story) for story in stories],
    )


@dataclass(eq=False)
class _Story:
    """A story under way: its sequences, all sampled tokens, and its images [c, h, w]."""

    sample: int
    names: dict[Branch, SequenceName]
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    images: list[Float[Tensor, "c h w"]] = field(default_factory=list)


@dataclass(eq=False, kw_only=True)
class _StoryRollout:
    """Stories of a rollout, decoded and painted image by image; images have the size of `case`."""

    model: NeoUnify
    processor: Processor
    prompts: Mapping[Branch, Sequence[TokenPrompt]]
    group: int
    sampling: ResolvedSampling
    case: PromptCase
    max_new_tokens: int
    max_images: int
    seed: int
    iteration: int
    attention: str

    def __post_init__(self) -> None:
        model, case = self.model, self.case
        self.opens, self.closes = image_marks(self.processor)
        self.stops = frozenset((self.opens, self.processor.token(IM_END)))
        self.transport = LocalTransport()
        each = image_tokens(model.config, case.width, case.height) + 2
        self.room = self.max_new_tokens + self.max_images * each
        every = [prompt for several in self.prompts.values() for prompt in several]
        self.understanding = engine_behind(model, every, self.transport, self.group, self.room)
        plan = plan_execution(
            model.config, model.device, model.compute_dtype, attention=self.attention
        )
        plan = replace(plan, denoise_step_rows=UNLIMITED, slice_seconds=math.inf)
        self.generation = GenerationEngine(model, self.transport, plan)
        count = len(self.prompts["cond"]) * self.group
        self.stories = [
            _Story(sample, {branch: (new_number(), branch) for branch in self.prompts})
            for sample in range(count)
        ]

    def run(self) -> None:
        calls = {}
        for story in self.stories:
            call = new_number()
            calls[call] = story
            parts = {
                name: prompt_parts(self.prompts[b][story.sample // self.group], self.transport)
                for b, name in story.names.items()
            }
            rooms = dict.fromkeys(parts, self.room)
            then = self._decode(call, story)
            self.understanding.submit(Prefill(call, parts, rooms, then))
        while waiting := self._decoded(calls):
            self._paint(waiting)
            calls = {}
            for story in waiting:
                call = new_number()
                calls[call] = story
                self.understanding.submit(self._decode(call, story))

    def _decode(self, call: int, story: _Story) -> Decode:
        seed = draw_seed(self.seed, self.iteration, TOKENS, story.sample)
        text = TextSampling(temperature=1.0, seed=seed, logprobs=0)
        return Decode(call, story.names["cond"], text, self.stops, self.max_new_tokens)

    def _decoded(self, calls: Mapping[int, _Story]) -> list[_Story]:
        """Decode until every story has ended or opened an image; those that have, by sample."""
        waiting = []
        for call, answer in engine_answers(self.understanding):
            if isinstance(answer, DecodedToken):
                calls[call].ids.append(answer.id)
                log_prob = answer.logprobs.chosen if answer.logprobs else math.nan
                calls[call].log_probs.append(log_prob)
            elif isinstance(answer, Decoded):
                story = calls[call]
                if answer.stopped_by is not None:
                    story.ids.append(answer.stopped_by)
                if answer.stopped_by == self.opens and len(story.images) < self.max_images:
                    story.log_probs.append(math.nan)
                    waiting.append(story)
                else:
                    self.understanding.submit(Release(tuple(story.names.values())))
        return sorted(waiting, key=lambda story: story.sample)

    def _paint(self, stories: Sequence[_Story]) -> None:
        """Paint the open image of each story, and append it to its context."""
        opened = TokenPrompt(()).followed_by([self.opens])
        self._append([(story, opened) for story in stories])
        prefixes = self._exported(stories)
        case = self.case
        grid = Grid.of_pixels(case.height, case.width, self.model.config.token_size)
        calls = {}
        for story, known in zip(stories, prefixes, strict=True):
            # A function of story and image, whatever is painted beside it.
            place = (self.iteration, START, story.sample, len(story.images))
            generator = noise_generator(self.seed, *place)
            noise = draw_noise(self.model.config, case.width, case.height, generator)
            call = new_number()
            calls[call] = story
            reference = self.transport.pack({"noise": noise})
            self.generation.submit(
                GenerateImages(call, reference, grid, self.sampling, known, frozenset())
            )
        for call, pixels in self._images():
            calls[call].images.append(pixels)
        closed = []
        for story in stories:
            image = to_und_input(story.images[-1], self.processor.dtype)
            closed.append((story, TokenPrompt(()).with_image(self.model, image)))
        self._append([(s, prompt.followed_by([self.closes])) for s, prompt in closed])

    def _append(self, stories: Sequence[tuple[_Story, TokenPrompt]]) -> None:
        """Append to the sequences of each story that see its images."""
        for story, prompt in stories:
            visible = [name for branch, name in story.names.items() if branch != "uncond"]
            parts = {name: prompt_parts(prompt, self.transport) for name in visible}
            self.understanding.submit(Append(new_number(), parts))
        for _ in engine_answers(self.understanding):
            pass

    def _exported(self, stories: Sequence[_Story]) -> list[dict[Branch, Prefix | str]]:
        """Prefixes of all guidance branches of each story."""
        calls = {new_number(): story for story in stories}
        for call, story in calls.items():
            self.understanding.submit(Export(call, tuple(story.names.values())))
        exported = {
            call: answer.prefixes
            for call, answer in engine_answers(self.understanding)
            if isinstance(answer, Exported)
        }
        return [dict(zip(s.names, exported[call], strict=True)) for call, s in calls.items()]

    def _images(self) -> Iterator[tuple[int, Float[Tensor, "c h w"]]]:
        """Run the generation engine until nothing is left to do: (call, image) pairs."""
        engine = self.generation
        while engine.replies or engine.busy:
            replies, engine.replies = engine.replies, []
            for reply in replies:
                if isinstance(reply.answer, Failed):
                    raise reply.answer.exception()
                if isinstance(reply.answer, ImageReady):
                    (pixels,) = self.transport.take(reply.answer.pixels).values()
                    yield reply.call, pixels
            if engine.busy:
                engine.step()


def _segments(processor: Processor, story: _Story) -> list[str]:
    """The texts before, between and behind the images, without thoughts."""
    segments: list[list[int]] = [[]]
    opens, _ = image_marks(processor)
    for token in story.ids:
        if token == opens and len(segments) <= len(story.images):
            segments.append([])
        else:
            segments[-1].append(token)
    return [answer_text(processor, ids, thinking=False) for ids in segments]


def _shown(processor: Processor, story: _Story) -> str:
    return " <image> ".join(_segments(processor, story)).strip()


def _parts(processor: Processor, story: _Story) -> tuple[str | Pixels, ...]:
    """Texts and images in turn."""
    first, *texts = _segments(processor, story)
    parts: list[str | Pixels] = [first]
    images = to_pil(torch.stack(story.images)) if story.images else []
    for image, text in zip(images, texts, strict=True):
        parts += [np.asarray(image), text]
    return tuple(parts)
