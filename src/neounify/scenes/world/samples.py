"""Training samples of synthetic scenes: an endless, randomly accessible data set.

Sample i of seed s is always the same, in any process and on any machine, so workers and ranks
shard it by index alone and a position in it is one number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from neounify.config.ranges import (
    STRICT,
    Count,
    Fraction,
    Positive,
    Range,
    Seed,
    check_names,
    check_weights,
)
from neounify.data.configs import DataConfig
from neounify.data.sample import (
    THINK_CLOSE,
    THINK_OPEN,
    DataError,
    Part,
    Sample,
    SampleImage,
    SampleText,
    Turn,
)
from neounify.data.sources import EndlessSource
from neounify.scenes.world.draw import chance, pick, pick_weighted, sample_rng
from neounify.scenes.world.edits import (
    KEEP_REQUESTS,
    Story,
    edit_thought,
    sample_edit,
    sample_story,
)
from neounify.scenes.world.facts import FULL_STYLE, CaptionStyle, facts_of
from neounify.scenes.world.language import caption, layout_text
from neounify.scenes.world.lexicon import LANGUAGES, Language
from neounify.scenes.world.phrasebook import (
    CAPTION_FORMS,
    KEEP_FORMS,
    NO_IMAGE,
)
from neounify.scenes.world.questions import (
    ask,
    ask_several,
    without_image,
)
from neounify.scenes.world.render import render
from neounify.scenes.world.scene import (
    MIN_SIDE,
    PRESETS,
    Scene,
    SceneConfig,
    Split,
    sample_scene,
    scene_config,
)
from neounify.scenes.world.wide import (
    WIDE_EDIT_WEIGHTS,
    draw_wide_question,
    say,
    wide_instruction,
    wide_prompt,
)

TASK_WEIGHTS: dict[str, float] = {
    "t2i": 0.35,
    "t2i_think": 0.1,
    "vqa": 0.2,
    "caption": 0.1,
    "edit": 0.1,
    "edit_think": 0.05,
    "interleave": 0.05,
    "text": 0.05,
}

CAPTION_REQUESTS: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "brief": ("Describe the picture briefly.", "What is in the picture?"),
        "full": ("Describe the picture in detail.", "Describe everything in the picture."),
    },
    "zh": {
        "brief": ("简单描述这张图片。", "图片里有什么？"),
        "full": ("详细描述这张图片。", "描述图片里的一切。"),
    },
}
KEEP_SHARE = 0.1
"""Share of edits that change nothing."""
MAX_QUESTIONS = 4
"""About one image, turn by turn: an image costs more tokens than a question."""
CAPTION_STYLES = {"brief": CaptionStyle(), "full": FULL_STYLE}
"""What an answer to each kind of caption request mentions."""


SceneSide = Annotated[int, AfterValidator(Range(MIN_SIDE))]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SceneData(DataConfig):
    """`kind = "scenes"`: synthetic scenes of a preset `world`; the rest is as in `SceneDataset`."""

    kind: Literal["scenes"] = "scenes"
    world: str = "default"
    tasks: dict[str, float] | None = None
    chinese: Fraction = 0.0
    wording: Fraction = 0.0
    side: Count | None = None
    sizes: tuple[tuple[SceneSide, SceneSide, Positive], ...] = ()
    """Widths, heights and weights."""
    seed: Seed = 0
    split: Split = "train"

    def __post_init__(self) -> None:
        check_names("world", [self.world], PRESETS)
        if self.tasks is not None:
            check_weights("tasks", self.tasks, tuple(TASK_WEIGHTS))
            if not any(self.tasks.values()):
                raise ValueError(f"tasks: one share must be above 0, got {self.tasks}")
        sizes = [size[:2] for size in self.sizes]
        if self.sizes and (self.side is not None or len(set(sizes)) != len(sizes)):
            raise ValueError(f"sizes: each once, and no side beside them; got {sizes}, {self.side}")

    def build(self) -> SceneDataset:
        return SceneDataset(
            self.seed,
            scene_config(self.world),
            self.tasks,
            split=self.split,
            side=self.side,
            chinese=self.chinese,
            wording=self.wording,
            sizes={(width, height): weight for width, height, weight in self.sizes} or None,
        )

    def unseen(self, seed: int) -> SceneDataset:
        world = scene_config(self.world)
        return SceneDataset(seed, world, chinese=self.chinese, wording=self.wording)

    def tasks_drawn(self) -> Collection[str]:
        return self.tasks or TASK_WEIGHTS

    def image_sizes(self) -> list[tuple[int, int]]:
        side = self.side or scene_config(self.world).side
        return [(height, width) for width, height, _ in self.sizes] or [(side, side)]


class SceneDataset(EndlessSource):
    """Samples of scenes without end, the same in any process.

    Args:
        seed: at least 0; samples of two seeds have nothing in common but chance.
        config: objects, colours, grid and sizes of the scenes.
        task_weights: share of each task, any positive scale; `TASK_WEIGHTS` by default.
        split: "train" never shows held-out combinations, "held_out" always, "any" as they come.
        side: pixels of the images, the config's by default.
        chinese: share of samples in Chinese, 0 to 1.
        wording: share of samples in wider wordings than the plain templates, 0 to 1; never in
            those held out for SceneBench.
        sizes: widths and heights of images in pixels with their weights; by default the one size
            of the config, or `side`.
    """

    def __init__(
        self,
        seed: int,
        config: SceneConfig,
        task_weights: Mapping[str, float] | None = None,
        *,
        split: Split = "train",
        side: int | None = None,
        chinese: float = 0.0,
        wording: float = 0.0,
        sizes: Mapping[tuple[int, int], float] | None = None,
    ) -> None:
        weights = dict(task_weights if task_weights is not None else TASK_WEIGHTS)
        unknown = set(weights) - set(TASK_WEIGHTS)
        if unknown:
            raise DataError(f"unknown tasks {sorted(unknown)}; tasks are {', '.join(TASK_WEIGHTS)}")
        if min(weights.values(), default=0) < 0 or not sum(weights.values()) > 0:
            raise DataError(f"task weights must be at least 0, and one above 0: {weights}")
        if seed < 0 or not 0 <= chinese <= 1 or not 0 <= wording <= 1:
            raise DataError(
                f"seed {seed} must be at least 0, chinese {chinese} and wording {wording} within "
                "0 to 1"
            )
        if sizes is not None and (side is not None or not sizes or min(sizes.values()) <= 0):
            raise DataError(f"sizes need weights above 0 and no side beside them: {sizes}, {side}")
        self.seed = seed
        self.config = config if side is None else replace(config, side=side)
        self.task_weights = weights
        self.split: Split = split
        self.chinese, self.wording = chinese, wording
        self._worlds = {self.config.sized(*size): weight for size, weight in (sizes or {}).items()}

    def draw(self, index: int) -> Sample:
        rng = sample_rng(self.seed, index)
        task = pick_weighted(rng, self.task_weights)
        language: Language = LANGUAGES[1] if chance(rng, self.chinese) else LANGUAGES[0]
        config = pick_weighted(rng, self._worlds) if self._worlds else self.config
        makers = _WIDE_MAKERS if self.wording and chance(rng, self.wording) else _MAKERS
        turns = makers[task](rng, config, language, self.split)
        return Sample(task, turns, id=f"scenes-{self.seed}-{index}")


def draw_style(rng: np.random.Generator) -> CaptionStyle:
    """A caption style as prompts have it: colours mostly, the rest now and then.

    The less a prompt says, the more is decided during denoising: those are the hard ones,
    and there must be enough of them.
    """
    return CaptionStyle(
        colour=chance(rng, 0.5),
        size=chance(rng, 0.25),
        background=chance(rng, 0.35),
        places=pick(rng, ("none", "none", "none", "relation", "cell")),
    )


Turns = tuple[Turn, ...]


def _turns(user: tuple[Part, ...], assistant: tuple[Part, ...]) -> Turns:
    return Turn("user", user), Turn("assistant", assistant)


def _thought(text: str) -> SampleText:
    return SampleText(f"{THINK_OPEN}{text}{THINK_CLOSE}", loss=True)


def _painted(scene: Scene, config: SceneConfig) -> SampleImage:
    return SampleImage(render(scene, config), "target")


def _shown(scene: Scene, config: SceneConfig) -> tuple[Part, ...]:
    return SampleImage(render(scene, config), "input"), SampleText("\n")


def _t2i(rng: np.random.Generator, config: SceneConfig, language: Language, split: Split) -> Turns:
    scene = sample_scene(rng, config, split=split)
    prompt = caption(facts_of(scene, config, draw_style(rng), rng), rng, language)
    return _turns((SampleText(prompt),), (_painted(scene, config),))


def _t2i_think(
    rng: np.random.Generator, config: SceneConfig, language: Language, split: Split
) -> Turns:
    scene = sample_scene(rng, config, split=split)
    prompt = caption(facts_of(scene, config, draw_style(rng), rng), rng, language)
    thought = _thought(layout_text(scene, config, language))
    return _turns((SampleText(prompt),), (thought, _painted(scene, config)))


def _vqa(rng: np.random.Generator, config: SceneConfig, language: Language, split: Split) -> Turns:
    scene = sample_scene(rng, config, split=split)
    count = int(rng.integers(1, MAX_QUESTIONS + 1))
    turns: list[Turn] = []
    for question in ask_several(scene, config, rng, count, language, split):
        shown = () if turns else _shown(scene, config)
        turns += _turns(
            (*shown, SampleText(question.text)), (SampleText(question.answer, loss=True),)
        )
    return tuple(turns)


def _caption(
    rng: np.random.Generator, config: SceneConfig, language: Language, split: Split
) -> Turns:
    scene = sample_scene(rng, config, split=split)
    detail = pick(rng, ("brief", "full"))
    request = pick(rng, CAPTION_REQUESTS[language][detail])
    answer = caption(facts_of(scene, config, CAPTION_STYLES[detail]), language=language)
    image, newline = _shown(scene, config)
    return _turns((image, newline, SampleText(request)), (SampleText(answer, loss=True),))


def _edit(rng: np.random.Generator, config: SceneConfig, language: Language, split: Split) -> Turns:
    if chance(rng, KEEP_SHARE):
        scene = sample_scene(rng, config, split=split)
        image, newline = _shown(scene, config)
        request = SampleText(pick(rng, KEEP_REQUESTS[language]))
        return _turns((image, newline, request), (_painted(scene, config),))
    edit = sample_edit(rng, config, None, language, split)
    image, newline = _shown(edit.source, config)
    return _turns((image, newline, SampleText(edit.instruction)), (_painted(edit.target, config),))


def _edit_think(
    rng: np.random.Generator, config: SceneConfig, language: Language, split: Split
) -> Turns:
    edit = sample_edit(rng, config, None, language, split)
    image, newline = _shown(edit.source, config)
    thought = _thought(edit_thought(edit, config, language))
    return _turns(
        (image, newline, SampleText(edit.instruction)), (thought, _painted(edit.target, config))
    )


def story_text(story: Story, number: int) -> str:
    """The text before image `number` of a story, from 0 up, with its line breaks."""
    return ("\n" if number else "") + story.steps[number].text + "\n"


def _interleave(
    rng: np.random.Generator, config: SceneConfig, language: Language, split: Split
) -> Turns:
    story = sample_story(rng, config, None, language, split)
    answer: list[Part] = []
    for number, step in enumerate(story.steps):
        answer += [SampleText(story_text(story, number), loss=True), _painted(step.scene, config)]
    return _turns((SampleText(story.request),), tuple(answer))


def _text(rng: np.random.Generator, config: SceneConfig, language: Language, split: Split) -> Turns:
    """A question about an image that is only described."""
    scene = sample_scene(rng, config, split=split)
    described = caption(facts_of(scene, config, FULL_STYLE), rng, language)
    question = ask(scene, config, rng, None, language, split)
    lead = "一张图片：" if language == "zh" else "A picture: "
    stop = "" if described.endswith(".") else ("。" if language == "zh" else ".")
    return _turns(
        (SampleText(f"{lead}{described}{stop}\n{question.text}"),),
        (SampleText(question.answer, loss=True),),
    )


def _wide_t2i(
    rng: np.random.Generator, config: SceneConfig, language: Language, split: Split
) -> Turns:
    scene = sample_scene(rng, config, split=split)
    text = wide_prompt(rng, facts_of(scene, config, draw_style(rng), rng), language)
    return _turns((SampleText(text),), (_painted(scene, config),))


def _wide_t2i_think(
    rng: np.random.Generator, config: SceneConfig, language: Language, split: Split
) -> Turns:
    scene = sample_scene(rng, config, split=split)
    text = wide_prompt(rng, facts_of(scene, config, draw_style(rng), rng), language)
    thought = _thought(layout_text(scene, config, language))
    return _turns((SampleText(text),), (thought, _painted(scene, config)))


def _wide_vqa(
    rng: np.random.Generator, config: SceneConfig, language: Language, split: Split
) -> Turns:
    scene = sample_scene(rng, config, split=split)
    turns: list[Turn] = []
    for _ in range(int(rng.integers(1, MAX_QUESTIONS + 1))):
        question = draw_wide_question(rng, scene, config, language, split)
        shown = () if turns else _shown(scene, config)
        turns += _turns(
            (*shown, SampleText(question.text)), (SampleText(question.answer, loss=True),)
        )
    return tuple(turns)


def _wide_caption(
    rng: np.random.Generator, config: SceneConfig, language: Language, split: Split
) -> Turns:
    scene = sample_scene(rng, config, split=split)
    detail = pick(rng, ("brief", "full"))
    known = (*CAPTION_REQUESTS[language][detail], *CAPTION_FORMS[language][detail])
    request = say(pick(rng, known), rng, "question", language, question=True, articles=False)
    answer = caption(facts_of(scene, config, CAPTION_STYLES[detail]), language=language)
    image, newline = _shown(scene, config)
    return _turns((image, newline, SampleText(request)), (SampleText(answer, loss=True),))


def _wide_edit(
    rng: np.random.Generator, config: SceneConfig, language: Language, split: Split
) -> Turns:
    if chance(rng, KEEP_SHARE):
        scene = sample_scene(rng, config, split=split)
        image, newline = _shown(scene, config)
        text = pick(rng, (*KEEP_REQUESTS[language], *KEEP_FORMS[language]))
        request = SampleText(say(text, rng, "edit", language))
        return _turns((image, newline, request), (_painted(scene, config),))
    edit = sample_edit(rng, config, pick_weighted(rng, WIDE_EDIT_WEIGHTS), language, split)
    image, newline = _shown(edit.source, config)
    request = SampleText(wide_instruction(rng, edit, config, language))
    return _turns((image, newline, request), (_painted(edit.target, config),))


def _wide_edit_think(
    rng: np.random.Generator, config: SceneConfig, language: Language, split: Split
) -> Turns:
    edit = sample_edit(rng, config, None, language, split)
    image, newline = _shown(edit.source, config)
    thought = _thought(edit_thought(edit, config, language))
    request = SampleText(wide_instruction(rng, edit, config, language))
    return _turns((image, newline, request), (thought, _painted(edit.target, config)))


def _wide_text(
    rng: np.random.Generator, config: SceneConfig, language: Language, split: Split
) -> Turns:
    """A question about an image that is not there."""
    scene = sample_scene(rng, config, split=split)
    if chance(rng, 0.15):
        requests = (*CAPTION_REQUESTS[language].values(), *CAPTION_FORMS[language].values())
        text = pick(rng, [text for some in requests for text in some])
        text = say(text, rng, "question", language, question=True)
        return _turns((SampleText(text),), (SampleText(NO_IMAGE[language], loss=True),))
    question = without_image(draw_wide_question(rng, scene, config, language, split))
    return _turns((SampleText(question.text),), (SampleText(question.answer, loss=True),))


_MAKERS = {
    "t2i": _t2i,
    "t2i_think": _t2i_think,
    "vqa": _vqa,
    "caption": _caption,
    "edit": _edit,
    "edit_think": _edit_think,
    "interleave": _interleave,
    "text": _text,
}
_WIDE_MAKERS = {
    **_MAKERS,
    "t2i": _wide_t2i,
    "t2i_think": _wide_t2i_think,
    "vqa": _wide_vqa,
    "caption": _wide_caption,
    "edit": _wide_edit,
    "edit_think": _wide_edit_think,
    "text": _wide_text,
}
