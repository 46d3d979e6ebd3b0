"""How an image was made, in words: what provenance metadata is written from.

Without the prompt, and of a negative one only that there was one: an image is passed on more freely
than the words it was asked for with.
"""

from __future__ import annotations

from datetime import datetime, timezone

from neounify.pipeline.interleaving import InterleaveRequest
from neounify.pipeline.request import PaintRequest
from neounify.serve.events import Painted, Preview
from neounify.serve.http.answering import task_of


def facts_of(
    request: PaintRequest | InterleaveRequest, event: Preview | Painted, model: str
) -> dict[str, str]:
    """The facts of one image of a request; `preview` only where it is not finished."""
    sampling = request.sampling
    height, width = event.pixels.shape[-2:]
    facts = {
        "generator": "neounify",
        "model": model,
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
    if request.negative_prompt:
        facts["negative_prompt"] = "given"
    if isinstance(event, Preview):
        facts["preview"] = f"{event.step}/{event.steps}"
    return facts
