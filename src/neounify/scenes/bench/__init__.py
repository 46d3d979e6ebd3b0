"""SceneBench: unified models measured on the world of scenes, every claim checked by a program.

`prompts` says what is asked, `perceive` sees what was painted, `checks` gives verdicts,
`similarity` measures pixels, `report` counts with confidence intervals, `run` does all of it with
a model, `folder` writes it down, and `validation` asks whether the checker itself is right.
"""

from neounify.scenes.bench.category import Category, Example, Outcome
from neounify.scenes.bench.checks import (
    EditVerdict,
    Verdict,
    check_caption,
    check_edit,
    check_facts,
    check_picture,
    check_story,
    check_thought,
    check_vqa,
)
from neounify.scenes.bench.folder import write_folder
from neounify.scenes.bench.perceive import Percept, SeenObject, perceive
from neounify.scenes.bench.plan import TASKS, BenchConfig, names
from neounify.scenes.bench.prompts import (
    CATEGORIES,
    CaptionCase,
    EditCase,
    PaintCase,
    StoryCase,
    VqaCase,
    caption_cases,
    categories,
    edit_cases,
    paint_cases,
    relation_yes_no_cases,
    story_cases,
    vqa_cases,
)
from neounify.scenes.bench.reconstruction import CopyCase, copy_cases
from neounify.scenes.bench.report import (
    Rate,
    Report,
    Score,
    contact_sheet,
    score,
    wilson_interval,
)
from neounify.scenes.bench.run import Findings, measure, quick_scores, run_scenebench
from neounify.scenes.bench.similarity import psnr, seam_ratio, ssim
from neounify.scenes.bench.subject import Painting, PipelineSubject, Subject, as_subject

__all__ = [
    "CATEGORIES",
    "TASKS",
    "BenchConfig",
    "CaptionCase",
    "Category",
    "CopyCase",
    "EditCase",
    "EditVerdict",
    "Example",
    "Findings",
    "Outcome",
    "PaintCase",
    "Painting",
    "Percept",
    "PipelineSubject",
    "Rate",
    "Report",
    "Score",
    "SeenObject",
    "StoryCase",
    "Subject",
    "Verdict",
    "VqaCase",
    "as_subject",
    "caption_cases",
    "categories",
    "check_caption",
    "check_edit",
    "check_facts",
    "check_picture",
    "check_story",
    "check_thought",
    "check_vqa",
    "contact_sheet",
    "copy_cases",
    "edit_cases",
    "measure",
    "names",
    "paint_cases",
    "perceive",
    "psnr",
    "quick_scores",
    "relation_yes_no_cases",
    "run_scenebench",
    "score",
    "seam_ratio",
    "ssim",
    "story_cases",
    "vqa_cases",
    "wilson_interval",
    "write_folder",
]
