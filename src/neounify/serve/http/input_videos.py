"""Input clips of requests: data URLs and fetched files, decoded within limits into frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from PIL.Image import Image

from neounify.errors import ImageError, RequestError, VideoError
from neounify.pipeline.videos import frame_choice, read_condition, read_file
from neounify.serve.http.abilities import check_video_files
from neounify.serve.http.errors import bad_request
from neounify.serve.http.fields import blame
from neounify.serve.http.media import data_url_bytes, is_data_url
from neounify.serve.http.media_choice import VideoChoice
from neounify.serve.http.serving import ServerState
from neounify.tasks.clips import NO_TUBES, Frames
from neounify.video.decode import VideoLimits

Result = TypeVar("Result")
MEMORY = 2 * 2**30
"""Bytes of the process that decodes a clip, at most."""


async def read_videos(
    sources: Sequence[tuple[str, str]], choice: VideoChoice, state: ServerState
) -> list[Frames]:
    """The clips of a request, from (field, URL) of each; together they have at most `video_frames`.

    Raises ApiError: for too many about `messages`, for one that cannot be read about its field,
    429 where the clips of too many requests are read.
    """
    limits, config = state.config.limits, state.service.config
    if len(sources) > limits.videos:
        raise bad_request(
            f"{len(sources)} videos in one request; at most {limits.videos} are read", "messages"
        )
    config.check_can("chat_video")
    await check_video_files()
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
    read = partial(
        read_file,
        config=config,
        fps=choice.fps,
        max_frames=most,
        tubes=choice.tubes,
        limits=VideoLimits(seconds=limits.video_seconds, memory=MEMORY),
        reserve=1,
    )
    videos = []
    with state.clip_decoder.reading():
        for field, url in sources:
            with blame(field):
                frames, _ = await _read_url(url, read, state)
                videos.append(frames)
    return videos


async def read_condition_url(url: str, fps: float | None, state: ServerState) -> list[Image]:
    """The frames of the clip at a URL, at `fps` a second, for a model that continues it.

    Raises ApiError about the field `condition`, 429 where the clips of too many requests are read.
    """
    limits, config = state.config.limits, state.service.config
    with blame("condition"):
        config.check_can("continue_video")
        read = partial(
            read_condition,
            config=config,
            fps=fps,
            max_frames=min(limits.video_frames, config.sampling.video.max_frames),
            limits=VideoLimits(seconds=limits.video_seconds, memory=MEMORY),
            reserve=1,
        )
        with state.clip_decoder.reading():
            return await _read_url(url, read, state)


async def _read_url(url: str, read: Callable[[bytes], Result], state: ServerState) -> Result:
    """What `read` makes of the file behind a URL, in the decoder. Raises VideoError, ApiError."""
    try:
        if is_data_url(url):
            return await state.clip_decoder.run(lambda: read(data_url_bytes(url, "video")))
        async with state.clip_fetcher.fetched(url) as file:
            return await state.clip_decoder.run(partial(read, file))
    except ImageError as error:
        problem = str(error)
    # A new error: the frames of the caught one's traceback hold the file.
    raise VideoError(problem)
