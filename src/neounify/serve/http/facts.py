"""How an image was made, in words: what provenance metadata is written from.

Without the text of prompts unless the operator wants it (`metadata_prompts`): an image is passed on
more freely than the words it was asked for with.
"""

from __future__ import annotations

from datetime import datetime, timezone

from neounify.pipeline.interleaving import InterleaveRequest
from neounify.pipeline.request import PaintRequest
from neounify.serve.events import Painted, Preview
from neounify.serve.http.answering import task_of
from neounify.serve.http.settings import HttpSettings

MAX_PROMPT = 4000
"""Characters of a prompt that are written: two of them fit into a JPEG's metadata."""


def facts_of(
    request: PaintRequest | InterleaveRequest, event: Preview | Painted, settings: HttpSettings
) -> dict[str, str]:
    """The facts of one image of a request; `preview` only where it is not finished."""
    sampling = request.sampling
    height, width = event.pixels.shape[-2:]
    facts = {
        "generator": "neounify",
        "model": settings.model_name,
        "task": task_of(request),
        "seed": str(request.seed),
        "index": str(event.index),
        "size": f"{width}x{height}",
        "steps": str(sampling.steps),
        "guidance": f"{sampling.guidance.text:g}",
        "image_guidance": f"{sampling.guidance.image:g}",
        "shift": f"{sampling.shift:g}",
        "solver": sampling.solver,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if settings.metadata_prompts:
        facts["prompt"] = request.prompt[:MAX_PROMPT]
    if request.negative_prompt:
        negative = request.negative_prompt[:MAX_PROMPT]
        facts["negative_prompt"] = negative if settings.metadata_prompts else "given"
    if isinstance(event, Preview):
        facts["preview"] = f"{event.step}/{event.steps}"
    return facts
