"""Provenance metadata of generated images and videos, from their requests."""

from __future__ import annotations

from datetime import datetime, timezone

from neounify.serve.http.config import HttpConfig
from neounify.serve.service import ServiceRequest
from neounify.tasks.chat import ChatRequest, CompletionRequest
from neounify.tasks.image import ImageRequest
from neounify.tasks.interleave import InterleaveRequest
from neounify.tasks.program import ImageFinished, Preview

MAX_PROMPT = 4000
"""Maximum characters of a prompt in metadata, so that two of them fit into a JPEG's."""


def task_of(request: ServiceRequest) -> str:
    """The name of the request's task in metrics and image metadata."""
    if isinstance(request, ChatRequest):
        return "chat"
    if isinstance(request, CompletionRequest):
        return "complete"
    if isinstance(request, InterleaveRequest):
        return "interleave"
    return "edit" if request.images else "generate"


def image_metadata(
    request: ImageRequest | InterleaveRequest, event: Preview | ImageFinished, config: HttpConfig
) -> dict[str, str]:
    """Provenance metadata of one image of a request; `preview` only for previews."""
    height, width = event.pixels.shape[-2:]
    metadata = request_metadata(request, event.index, (width, height), config)
    if isinstance(event, ImageFinished):
        metadata["evaluations"] = f"{event.evaluations:g}"
    if isinstance(event, Preview):
        metadata["preview"] = f"{event.step}/{event.steps}"
    return metadata


def request_metadata(
    request: ImageRequest | InterleaveRequest, index: int, size: tuple[int, int], config: HttpConfig
) -> dict[str, str]:
    """What is known of image or video `index` of a request, of `size` (width, height), before it.

    Without the text of prompts unless the operator wants it (`metadata_prompts`): an image is
    passed on more freely than the words it was asked for with.
    """
    sampling, seed = request.sampling, request.seed
    if isinstance(request, ImageRequest) and request.seeds:
        seed, index = request.seeds[index], 0  # the image is the first of its own seed
    metadata = {
        "generator": "neounify",
        "model": config.model_name,
        "task": task_of(request),
        "seed": str(seed),
        "index": str(index),
        "size": f"{size[0]}x{size[1]}",
        "steps": str(sampling.steps),
        "guidance": f"{sampling.guidance.text:g}",
        "image_guidance": f"{sampling.guidance.image:g}",
        "shift": f"{sampling.shift:g}",
        "solver": sampling.solver,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if config.metadata_prompts:
        metadata["prompt"] = request.prompt[:MAX_PROMPT]
    if request.negative_prompt:
        negative = request.negative_prompt[:MAX_PROMPT]
        metadata["negative_prompt"] = negative if config.metadata_prompts else "given"
    return metadata
