"""Synthetic scenes, generated from a seed: flat shapes, texts about them, and samples.

`world` draws scenes, `render` their pixels, `language` and `questions` write about them, `parse`
reads captions back, `edits` and `stories` change them, `samples` turns all of it into training
samples. Nothing is downloaded and nothing is stored.
"""

from neounify.scenes.world.draw import sample_rng
from neounify.scenes.world.edits import (
    EDIT_KINDS,
    SceneEdit,
    Story,
    StoryStep,
    edit_scene,
    edit_thought,
    sample_edit,
    sample_story,
)
from neounify.scenes.world.facts import (
    FULL_STYLE,
    CaptionStyle,
    ObjectFact,
    RelationFact,
    SceneFacts,
    facts_of,
)
from neounify.scenes.world.language import caption, layout_text, parse_layout
from neounify.scenes.world.lexicon import COLOURS, PLACES, SHAPES, SIZES
from neounify.scenes.world.parse import parse_caption
from neounify.scenes.world.questions import QUESTION_KINDS, Question, ask, check_answer
from neounify.scenes.world.render import render
from neounify.scenes.world.samples import TASK_WEIGHTS, SceneDataset
from neounify.scenes.world.scene import (
    PRESETS,
    Scene,
    SceneConfig,
    SceneObject,
    is_held_out,
    sample_scene,
    scene_config,
)

__all__ = [
    "COLOURS",
    "EDIT_KINDS",
    "FULL_STYLE",
    "PLACES",
    "PRESETS",
    "QUESTION_KINDS",
    "SHAPES",
    "SIZES",
    "TASK_WEIGHTS",
    "CaptionStyle",
    "ObjectFact",
    "Question",
    "RelationFact",
    "Scene",
    "SceneConfig",
    "SceneDataset",
    "SceneEdit",
    "SceneFacts",
    "SceneObject",
    "Story",
    "StoryStep",
    "ask",
    "caption",
    "check_answer",
    "edit_scene",
    "edit_thought",
    "facts_of",
    "is_held_out",
    "layout_text",
    "parse_caption",
    "parse_layout",
    "render",
    "sample_edit",
    "sample_rng",
    "sample_scene",
    "sample_story",
    "scene_config",
]
