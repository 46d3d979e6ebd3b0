"""Input clips of requests: data URLs and fetched files, decoded within limits into frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from PIL.Image import Image

from neounify.errors import ImageError, RequestError, VideoError
from neounify.pipeline.videos import frame_choice, read_condition, read_file
from neounify.serve.http.abilities import check_video_files
from neounify.serve.http.errors import bad_request
from neounify.serve.http.fields import blame
from neounify.serve.http.jpeg_clips import JpegClips, is_jpeg_clip
from neounify.serve.http.media import data_url_bytes, is_data_url
from neounify.serve.http.media_choice import VideoChoice
from neounify.serve.http.serving import ServerState
from neounify.tasks.clips import NO_TUBES, Frames
from neounify.video.decode import VideoLimits

Result = TypeVar("Result")
MEMORY = 2 * 2**30
"""Bytes of the process that decodes a clip, at most."""


async def read_videos(
    sources: Sequence[tuple[str, str]],
    choice: VideoChoice,
    state: ServerState,
    caller: str,
    warnings: list[str],
) -> list[Frames]:
    """The clips of a request, from (field, URL) of each; together they have at most `video_frames`.

    `warnings` gets what `read_file` warns of.
    Raises ApiError: for too many about `messages`, for one that cannot be read about its field,
    429 where the clips of too many requests are read, of the caller or in all.
    """
    limits, config = state.config.limits, state.service.config
    if len(sources) > limits.videos:
        raise bad_request(
            f"{len(sources)} videos in one request; at most {limits.videos} are read", "messages"
        )
    config.check_can("chat_video")
    await check_video_files()
    share = limits.video_frames // len(sources)
    if choice.max_frames > share:
        raise bad_request(
            f"num_frames: {choice.max_frames} of each of {len(sources)} videos is over this "
            f"server's {limits.video_frames} of a request",
            "media_io_kwargs",
        )
    share = max(1, share)
    most = share if choice.all_frames else config.sampling.video.max_frames
    most = min(choice.max_frames or most, share)
    with blame("media_io_kwargs"):
        if choice.tubes and not config.sees_tubes:
            raise RequestError(NO_TUBES)
        frame_choice(config, choice.fps, most, choice.tubes)
    read = _limited(read_file, state, fps=choice.sampled_fps, max_frames=most, tubes=choice.tubes)
    jpegs = JpegClips(state)
    videos = []
    with state.clip_decoder.reading(caller):
        for field, url in sources:
            with blame(field):
                if is_jpeg_clip(url):
                    videos.append(await jpegs.read(url, choice.fps, most, tubes=choice.tubes))
                else:
                    warn = _about(field, warnings)
                    frames, _ = await _read_url(url, partial(read, warn=warn), state)
                    videos.append(frames)
    return videos


async def read_condition_url(
    url: str, fps: float | None, state: ServerState, caller: str, warnings: list[str]
) -> list[Image]:
    """The frames of the clip at a URL, at `fps` a second, for a model that continues it.

    `warnings` gets what `read_condition` warns of.
    Raises ApiError about the field `condition`, 429 where the clips of too many requests are read,
    of the caller or in all.
    """
    limits, config = state.config.limits, state.service.config
    with blame("condition"):
        config.check_can("continue_video")
        most = min(limits.video_frames, config.sampling.video.max_frames)
        warn = _about("condition", warnings)
        read = _limited(read_condition, state, fps=fps, max_frames=most, warn=warn)
        with state.clip_decoder.reading(caller):
            return await _read_url(url, read, state)


def _about(field: str, warnings: list[str]) -> Callable[[str], object]:
    """What adds a warning about a field."""
    return lambda text: warnings.append(f"{field}: {text}")


def _limited(
    read: Callable[..., Result], state: ServerState, **options: Any
) -> Callable[..., Result]:
    """A reader of files for the model, within the bounds of this server."""
    limits = VideoLimits(seconds=state.config.limits.video_seconds, memory=MEMORY)
    return partial(read, config=state.service.config, limits=limits, reserve=1, **options)


async def _read_url(url: str, read: Callable[[bytes], Result], state: ServerState) -> Result:
    """What `read` makes of the file behind a URL, in the decoder. Raises VideoError, ApiError."""
    try:
        if is_data_url(url):
            return await state.clip_decoder.run(lambda: read(data_url_bytes(url, "video")))
        return await _fetched(url, read, state)
    except (ImageError, VideoError) as error:
        kind = type(error) if isinstance(error, VideoError) else VideoError
        problem = str(error)
    # A new error: the frames of the caught one's traceback hold the file.
    raise kind(problem)


async def _fetched(url: str, read: Callable[[bytes], Result], state: ServerState) -> Result:
    """As `_read_url`; the file is fetched when its turn to be decoded has come."""
    async with state.clip_decoder.fetching, state.clip_fetcher.fetched(url) as file:
        return await state.clip_decoder.run(partial(read, file))
