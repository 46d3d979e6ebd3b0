"""Input clips of requests: data URLs and fetched files, decoded within limits into frames."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from PIL.Image import Image

from neounify.errors import ImageError, RequestError, VideoError
from neounify.pipeline.videos import frame_choice, read_condition, read_file
from neounify.serve.http.chat_schema import VideoChoice
from neounify.serve.http.errors import bad_request
from neounify.serve.http.fields import blame
from neounify.serve.http.media import data_url_bytes, is_data_url
from neounify.serve.http.serving import ServerState
from neounify.tasks.clips import NO_TUBES, Frames
from neounify.video.decode import VideoLimits

MEMORY = 2 * 2**30
"""Bytes of the process that decodes a clip, at most."""


async def read_videos(
    sources: Sequence[tuple[str, str]], choice: VideoChoice, state: ServerState
) -> list[Frames]:
    """The clips of a request, from (field, URL) of each; together they have at most `video_frames`.

    Raises ApiError: for too many about `messages`, for one that cannot be read about its field.
    """
    limits, config = state.config.limits, state.service.config
    if len(sources) > limits.videos:
        raise bad_request(
            f"{len(sources)} videos in one request; at most {limits.videos} are read", "messages"
        )
    config.check_can("chat_video")
    share = limits.video_frames // len(sources)
    if (choice.num_frames or 0) > share:
        raise bad_request(
            f"num_frames: {choice.num_frames} of each of {len(sources)} videos is over this "
            f"server's {limits.video_frames} of a request",
            "media_io_kwargs",
        )
    most = min(choice.num_frames or config.sampling.video.max_frames, max(1, share))
    with blame("media_io_kwargs"):
        if choice.tubes and not config.sees_tubes:
            raise RequestError(NO_TUBES)
        frame_choice(config, choice.fps, most, choice.tubes)
    bounds = VideoLimits(seconds=limits.video_seconds, memory=MEMORY)
    videos = []
    for field, url in sources:
        with blame(field):
            file = await _read_url(url, state)
            read = partial(
                read_file,
                file,
                config,
                choice.fps,
                most,
                tubes=choice.tubes,
                limits=bounds,
                reserve=1,
            )
            frames, _ = await state.clip_decoder.run(read)
            videos.append(frames)
    return videos


async def read_condition_url(url: str, fps: float | None, state: ServerState) -> list[Image]:
    """The frames of the clip at a URL, at `fps` a second, for a model that continues it.

    Raises ApiError about the field `condition`.
    """
    limits, config = state.config.limits, state.service.config
    with blame("condition"):
        config.check_can("continue_video")
        file = await _read_url(url, state)
        read = partial(
            read_condition,
            file,
            config,
            fps,
            max_frames=min(limits.video_frames, config.sampling.video.max_frames),
            limits=VideoLimits(seconds=limits.video_seconds, memory=MEMORY),
            reserve=1,
        )
        return await state.clip_decoder.run(read)


async def _read_url(url: str, state: ServerState) -> bytes:
    """The file behind a URL. Raises VideoError."""
    try:
        if is_data_url(url):
            return await state.clip_decoder.run(lambda: data_url_bytes(url, "video"))
        return await state.clip_fetcher.fetch(url)
    except ImageError as error:
        problem = str(error)
    raise VideoError(problem)
