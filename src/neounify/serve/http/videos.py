"""/v1/videos: create, look at, download and delete videos, as OpenAI's API has it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import aclosing
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse, Response
from PIL.Image import Image
from pydantic import Field
from starlette.requests import Request

from neounify.config import ModelConfig
from neounify.errors import DeadlineExceeded, EngineDied, Overloaded
from neounify.provenance.metadata import write_packet
from neounify.serve.http.abilities import check_video_files, check_video_jobs
from neounify.serve.http.connections import (
    BoundedRoute,
    PiecesResponse,
    add_warnings,
    check_json_type,
)
from neounify.serve.http.deadline import Deadline
from neounify.serve.http.errors import INTERNAL, ApiError, bad_request, to_api_error
from neounify.serve.http.fields import (
    AnswerModel,
    ImageFields,
    LimitedText,
    Number,
    seeds_of,
)
from neounify.serve.http.images import form_values, validated
from neounify.serve.http.metadata import request_metadata
from neounify.serve.http.serving import ServerState, State, account_of
from neounify.serve.http.video_jobs import Status, VideoJob
from neounify.tasks.image import ImageRequest, check_prompts
from neounify.tasks.program import ClipFrames, FramesFinished, Preview
from neounify.tasks.video import after_clip, clip_shape
from neounify.video.clip import Video, video_bytes

log = logging.getLogger("neounify.serve")
router = APIRouter(
    tags=["videos"], route_class=BoundedRoute, dependencies=[Depends(check_video_jobs)]
)
PREVIEWS = 10
"""Previews of one frame while a video is generated."""
MAX_LISTED = 100
_RETRY_SECONDS = 5.0


# --- requests ---


class VideoBody(ImageFields):
    """A video to generate."""

    without_effect: ClassVar[frozenset[str]] = frozenset(("safety_identifier", "user"))
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "input_reference": (),
        "n": (1,),
        "quality": ("auto", "high", "standard"),
        "response_format": (),
    }

    model: str = Field("", max_length=200)
    prompt: LimitedText
    seconds: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="Length; rounded to whole tubes of frames."
    )
    frames: Annotated[int, Field(ge=1, le=10**9)] | None = Field(
        None, description="Number of frames, in place of `seconds`. Extension."
    )
    fps: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="Frames per second. Extension."
    )
    condition: str | None = Field(
        None,
        min_length=1,
        description="Clip to continue: a data URL, in JSON alone, or a URL. Extension.",
    )


async def read_video_request(
    body: VideoBody, owner: str, state: ServerState, warnings: list[str]
) -> ImageRequest:
    """The request of a video, checked; `warnings` gets those about the clip it continues.

    Raises ApiError, PromptError, RequestError, ImageError and Refused.
    """
    config, limits = state.service.config, state.config.limits
    config.check_can("generate_video")
    await check_video_files()
    state.check_model(body.model)
    if not body.prompt.strip():
        raise bad_request("prompt: is empty; describe the video", "prompt", "invalid_prompt")
    for name, asked in (
        ("stream", body.stream),
        ("think", bool(body.think)),
        ("partial_images", body.partial_images > 0),
        ("output_format", "output_format" in body.model_fields_set),
    ):
        if asked:
            raise bad_request(f"{name}: not supported for videos", name, "unsupported")
    if body.ratio is not None or body.pixels is not None:
        name = "size" if body.ratio is None else "aspect_ratio"
        raise bad_request(f"{name}: not supported for videos; give size as WIDTHxHEIGHT", name)
    frames, fps = _length(body, config, limits.output_frames)
    size = body.width_height or (None, None)
    shape = clip_shape(config, size, frames, fps)
    if shape.width * shape.height > limits.output_pixels:
        raise bad_request(
            f"size: {shape.width}x{shape.height} is {shape.width * shape.height} pixels, over this "
            f"server's {limits.output_pixels}",
            "size",
        )
    [seed] = seeds_of(body.seed, 1)
    request = ImageRequest(
        prompt=body.prompt,
        width=shape.width,
        height=shape.height,
        frames=shape.frames,
        fps=shape.fps,
        sampling=state.sampling(body, editing=False, steps=body.steps, video=True),
        seed=seed,
        negative_prompt=body.negative_prompt,
    )
    await asyncio.to_thread(check_prompts, state.service.processor, request)
    state.service.check_together([request])
    shown: Sequence[Image] = ()
    if body.condition is not None:  # what takes time comes after what does not
        from neounify.serve.http.input_videos import read_condition_url

        state.videos.check(owner)
        shown = await read_condition_url(body.condition, fps, state, owner, warnings)
        before = clip_shape(config, size, frames, fps, shown).condition
        request = replace(request, prompt=after_clip(before, body.prompt), condition=before)
    await state.check_prompt(filter(None, (body.prompt, body.negative_prompt)), shown)
    return request


def _length(body: VideoBody, config: ModelConfig, limit: int) -> tuple[int, float]:
    """Frames, and frames per second. Raises ApiError."""
    if body.seconds is not None and body.frames is not None:
        raise bad_request("seconds and frames: give one of them", "frames")
    defaults, tube = config.sampling.video, config.video.tube_frames if config.video else 1
    fps = defaults.fps if body.fps is None else body.fps
    frames = defaults.frames if body.frames is None else body.frames
    if body.seconds is not None:
        tubes = min(body.seconds * fps / tube, limit + 1)  # the product may be infinite
        frames = max(1, round(tubes)) * tube
    if frames > limit:
        asked = f"{frames} frames"
        if body.seconds is not None:
            asked = f"{body.seconds:g} seconds at {fps:g} frames per second"
        raise bad_request(
            f"{asked} are over this server's {limit} frames",
            "frames" if body.seconds is None else "seconds",
        )
    return frames, fps


async def _read_body(request: Request, state: ServerState) -> VideoBody:
    kind = request.headers.get("content-type")
    if (kind or "").partition(";")[0].strip().lower() == "multipart/form-data":
        async with request.form(max_files=1, max_fields=64) as form:
            return validated(VideoBody, form_values(form))
    check_json_type(kind, "send a video's fields as application/json or multipart/form-data")
    value = await request.json()
    if not isinstance(value, dict):
        raise bad_request(f"The body must be a JSON object, got {str(value)[:40]!r}.")
    return validated(VideoBody, value)


# --- generation ---


async def generate_video(job: VideoJob, deadline: Deadline, state: ServerState) -> None:
    """Generate the video of a job, whose state follows; its errors become the job's."""
    try:
        frames = await _frames(job, deadline, state)
        encode = partial(_encode, job, frames, state)
        job.thumbnail, job.file = await deadline.bound(state.videos.encoder.run_wanted(encode))
        job.progress, job.status = 100, "completed"
    except Exception as error:  # the job keeps what its request would have been answered
        job.error, job.status = to_api_error(error), "failed"
        if job.error is INTERNAL:
            log.error("%s could not be generated", job.id, exc_info=error)


async def _frames(job: VideoJob, deadline: Deadline, state: ServerState) -> torch.Tensor:
    """All frames [frames, height, width, 3].

    While the server is full or starts an engine again, the job waits.
    """
    while True:
        try:
            return await _attempt(job, deadline, state)
        except (Overloaded, EngineDied) as error:
            wait = min(to_api_error(error).retry_after or 0.0, _RETRY_SECONDS)
            if job.status != "queued" or wait >= deadline.left:
                raise
        except DeadlineExceeded as error:
            raise deadline.error from error
        await asyncio.sleep(wait)


async def _attempt(job: VideoJob, deadline: Deadline, state: ServerState) -> torch.Tensor:
    def admitted() -> None:
        job.status = "in_progress"

    frames = ClipFrames(job.request.frames)
    events: Any = state.service.answer(
        job.request, previews=PREVIEWS, deadline=deadline.left, admitted=admitted
    )
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Preview):
                job.thumbnail = await state.encode(job.described, event, "webp", bytes)
                job.progress = min(99, 100 * event.step // event.steps)
            elif isinstance(event, FramesFinished):
                await asyncio.to_thread(_check, event, state)
                frames.put(event)
                job.evaluations = event.evaluations
    return frames.whole()


def _check(event: FramesFinished, state: ServerState) -> None:
    """Show the first of the frames to the hooks. Raises Refused."""
    [image] = Video(event.frames[:1], Fraction(1)).images
    state.hooks.check_image(image)


def _encode(
    job: VideoJob, frames: torch.Tensor, state: ServerState, gone: threading.Event
) -> tuple[bytes, bytes]:
    """The files of the first frame and of the clip. Raises CancelledError once `gone` is set."""
    request = job.described
    video = Video(frames, Fraction(request.fps))
    metadata = request_metadata(request, 0, (request.width, request.height), state.config)
    metadata |= {"frames": str(request.frames), "fps": f"{request.fps:g}"}
    if job.evaluations is not None:
        metadata["evaluations"] = f"{job.evaluations:g}"
    first = Video(frames[:1], video.fps).images[0]
    thumbnail = state.hooks.encode_image(first, "webp", metadata)

    def wanted() -> Iterator[np.ndarray]:
        for frame in video.frames.cpu().numpy():
            if gone.is_set():
                raise CancelledError
            yield frame

    return thumbnail, video_bytes(wanted(), video.fps, write_packet(metadata))


# --- answers ---


class VideoObject(AnswerModel):
    """A video job, in OpenAI's words; `frames`, `fps`, `seed` and `evaluations` are extensions."""

    id: str
    object: Literal["video"]
    model: str
    status: Status
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    size: str
    seconds: str
    error: dict[str, Any] | None
    remixed_from_video_id: None
    frames: int
    fps: float
    seed: int
    evaluations: float | None


class VideoList(AnswerModel):
    """Videos of the caller."""

    object: Literal["list"]
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(AnswerModel):
    """Confirmation that a video is deleted, and its generation ended."""

    id: str
    object: Literal["video.deleted"]
    deleted: Literal[True]


def _object(job: VideoJob, state: ServerState) -> dict[str, Any]:
    request = job.request
    return {
        "id": job.id,
        "object": "video",
        "model": state.config.model_name,
        "status": job.status,
        "progress": job.progress,
        "created_at": job.created,
        "completed_at": job.completed,
        "expires_at": state.videos.expiry(job),
        "prompt": job.prompt,
        "size": f"{request.width}x{request.height}",
        "seconds": f"{request.frames / request.fps:g}",
        "error": None if job.error is None else job.error.body()["error"],
        "remixed_from_video_id": None,
        "frames": request.frames,
        "fps": request.fps,
        "seed": request.seed,
        "evaluations": job.evaluations,
    }


@router.post(
    "/v1/videos",
    summary="Generate a video",
    response_class=JSONResponse,
    responses={200: {"model": VideoObject}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                kind: {"schema": VideoBody.model_json_schema()}
                for kind in ("application/json", "multipart/form-data")
            },
        }
    },
)
async def create(request: Request, response: Response, state: State) -> dict[str, Any]:
    """Begins a job and answers at once; ask for its state until it is completed."""
    body = await _read_body(request, state)
    owner = account_of(request)
    warnings: list[str] = []
    reading = read_video_request(body, owner, state, warnings)
    wanted = await state.deadline(body).bound(reading)
    add_warnings(response, warnings)
    deadline = body.deadline_within(state.config.video_deadline)
    job = state.videos.start(
        owner, wanted, body.prompt, lambda job: generate_video(job, deadline, state)
    )
    return _object(job, state)


@router.get("/v1/videos", summary="List the caller's videos", response_model=VideoList)
async def list_videos(
    request: Request,
    state: State,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
    after: Annotated[str, Query(max_length=80)] = "",
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """Newest first, or oldest with `order=asc`; `after` is the last id of the page before."""
    jobs = state.videos.of(account_of(request))
    if order == "asc":
        jobs.reverse()
    ids = [job.id for job in jobs]
    if after and after not in ids:
        raise bad_request(f"after: there is no video {after!r}", "after")
    rest = jobs[ids.index(after) + 1 :] if after else jobs
    page = rest[:limit]
    return {
        "object": "list",
        "data": [_object(job, state) for job in page],
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "has_more": len(rest) > len(page),
    }


@router.get("/v1/videos/{video_id}", summary="The state of a video", response_model=VideoObject)
async def retrieve(video_id: str, request: Request, state: State) -> dict[str, Any]:
    """Queued, in progress with percent, completed, or failed with its error."""
    return _object(state.videos.get(video_id, account_of(request)), state)


@router.get(
    "/v1/videos/{video_id}/content",
    summary="Download a video",
    response_class=Response,
    responses={200: {"content": {"video/mp4": {}, "image/webp": {}}, "description": "The file"}},
)
async def content(
    video_id: str,
    request: Request,
    state: State,
    variant: Literal["video", "thumbnail", "spritesheet"] = "video",
) -> Response:
    """The MP4 of a completed video, or its thumbnail: while it is generated, the last preview."""
    job = state.videos.get(video_id, account_of(request))
    if variant == "spritesheet":
        raise bad_request("variant: video or thumbnail; there is no spritesheet", "variant")
    file = job.file if variant == "video" else job.thumbnail
    if file is None:
        raise ApiError(
            409,
            f"The video is {job.status.replace('_', ' ')}; it has no {variant} yet."
            if not job.is_finished
            else f"The video {job.status}; it has no {variant}.",
            code="not_ready",
        )
    kind = "video/mp4" if variant == "video" else "image/webp"
    return PiecesResponse(file, media_type=kind, headers={"Cache-Control": "private, no-cache"})


@router.delete("/v1/videos/{video_id}", summary="Delete a video", response_model=DeletedVideo)
async def delete(video_id: str, request: Request, state: State) -> dict[str, Any]:
    """Forgets the video; its generation ends within one step, its encoding within one frame."""
    state.videos.remove(video_id, account_of(request))
    return {"id": video_id, "object": "video.deleted", "deleted": True}
