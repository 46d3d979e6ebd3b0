"""SceneBench: unified models measured on the world of scenes, every claim checked by a program.

`prompts` says what is asked, `perceive` sees what was painted, `checks` gives verdicts,
`similarity` measures pixels, `report` counts with confidence intervals, and `validation` asks
whether the checker itself is right.
"""

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
from neounify.evaluate.scenebench.perceive import Percept, SeenObject, perceive
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
    story_cases,
    vqa_cases,
)
from neounify.evaluate.scenebench.report import (
    Rate,
    Report,
    Score,
    contact_sheet,
    score,
    wilson_interval,
)
from neounify.evaluate.scenebench.similarity import psnr, seam_ratio, ssim

__all__ = [
    "CATEGORIES",
    "CaptionCase",
    "EditCase",
    "EditVerdict",
    "PaintCase",
    "Percept",
    "Rate",
    "Report",
    "Score",
    "SeenObject",
    "StoryCase",
    "Verdict",
    "VqaCase",
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
    "edit_cases",
    "paint_cases",
    "perceive",
    "psnr",
    "score",
    "seam_ratio",
    "ssim",
    "story_cases",
    "vqa_cases",
    "wilson_interval",
]
