"""SceneBench: unified models measured on the world of scenes, every claim checked by a program.

`prompts` says what is asked, `perceive` sees what was painted, `checks` gives verdicts,
`similarity` measures pixels, `report` counts with confidence intervals, `run` does all of it with
a model, `folder` writes it down, and `validation` asks whether the checker itself is right.
"""

from neounify.evaluate.scenebench.category import Category, Example, Outcome
from neounify.evaluate.scenebench.checks import (
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
from neounify.evaluate.scenebench.folder import write_folder
from neounify.evaluate.scenebench.perceive import Percept, SeenObject, perceive
from neounify.evaluate.scenebench.plan import TASKS, BenchConfig, names
from neounify.evaluate.scenebench.prompts import (
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
from neounify.evaluate.scenebench.reconstruction import CopyCase, copy_cases
from neounify.evaluate.scenebench.report import (
    Rate,
    Report,
    Score,
    contact_sheet,
    score,
    wilson_interval,
)
from neounify.evaluate.scenebench.run import Findings, measure, quick_scores, run_scenebench
from neounify.evaluate.scenebench.similarity import psnr, seam_ratio, ssim
from neounify.evaluate.scenebench.subject import Painting, PipelineSubject, Subject, as_subject

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
