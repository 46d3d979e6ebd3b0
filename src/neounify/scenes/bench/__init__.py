"""SceneBench: unified models measured on synthetic scenes, every claim checked by a program.

`prompts` draws the cases, `perceive` finds the objects of an image, `checks` gives verdicts,
`category` and `report` count them with confidence intervals, `runners` and `run` ask a model
(`subject`), and `validation` measures the checker itself.
"""

from neounify.deprecation import moved
from neounify.evaluate.metrics import Rate, psnr, seam_ratio, ssim, wilson_interval
from neounify.image.contact_sheet import contact_sheet
from neounify.scenes.bench.category import Category, Example, Outcome, Score, score
from neounify.scenes.bench.checks import (
    EditVerdict,
    Verdict,
    check_caption,
    check_edit,
    check_facts,
    check_image,
    check_story,
    check_thought,
    check_vqa,
)
from neounify.scenes.bench.perceive import Percept, SeenObject, perceive
from neounify.scenes.bench.plan import PARTS, TASKS, BenchConfig
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
from neounify.scenes.bench.report import Report, write_folder
from neounify.scenes.bench.run import Findings, measure, quick_scores, run_scenebench
from neounify.scenes.bench.runners import names
from neounify.scenes.bench.subject import Painting, PipelineSubject, Subject, as_subject

__all__ = [
    "CATEGORIES",
    "PARTS",
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
    "check_image",
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

__getattr__ = moved(__name__, "neounify.scenes.bench.checks", {"check_picture": "check_image"})
