"""Input clips as one JPEG file for each frame, joined by commas in a data URL of video/jpeg.

Clients of vLLM that choose frames themselves send them so.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Collection
from functools import partial

from PIL.Image import Image, Resampling

from neounify.errors import ImageError, VideoError
from neounify.pipeline.videos import frame_choice, seen_frames
from neounify.serve.http.media import RequestImages
from neounify.serve.http.serving import ServerState
from neounify.tasks.clips import Frames, frame_bounds
from neounify.video.choice import Timeline

MAX_FILES = 10_000
"""Frames of such a clip, whether they are seen or not."""
FPS = 1.0
"""Frames per second where the caller names no rate."""
_HEAD = re.compile(r"\s*data:\s*video/jpeg\s*(;[^,]{0,200})?,", re.IGNORECASE | re.ASCII)


def is_jpeg_clip(url: str) -> bool:
    """Whether a URL holds a clip as JPEG files."""
    return _HEAD.match(url) is not None


class JpegClips:
    """Reader of the clips of one request, whose frames have the limits of its input images."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._area = frame_bounds(state.service.config, 1)[1]
        self._images = RequestImages(
            state.decoder, state.fetcher, state.results, state.config, self._area
        )

    async def read(self, url: str, fps: float | None, most: int, *, tubes: bool) -> Frames:
        """At most `most` frames, of `fps` a second, evenly where there are more.

        Raises VideoError for frames that are no images, of several sizes, or over the limits.
        """
        config = self._state.service.config
        count = url.count(",")  # one in front of each file
        if count > MAX_FILES:
            raise VideoError(f"the clip has {count} frames; at most {MAX_FILES} are read")
        rate = fps or FPS
        timeline = Timeline([number / rate for number in range(count)], count / rate)
        # Each of the frames is seen, but for the rule of tubes, which names a rate.
        choice = frame_choice(config, fps if tubes else rate, most, tubes)
        indices, in_tubes = choice.take(timeline)
        files = await asyncio.to_thread(_files, url, set(indices))
        images: dict[int, Image] = {}
        size: tuple[int, int] | None = None
        for index in sorted(files):
            try:
                image = await self._images.read_url(files.pop(index))
            except ImageError as error:
                raise VideoError(f"frame {index} of the clip: {error}") from error
            size = size or image.size
            if image.size != size:
                raise VideoError(
                    f"its frames change their size from {size[0]}x{size[1]} to "
                    f"{image.width}x{image.height}"
                )
            images[index] = await self._state.decoder.run(partial(_reduced, image, self._area))
        times = [timeline.times[index] for index in indices]
        return seen_frames(config, [images[index] for index in indices], times, in_tubes)


def _reduced(image: Image, area: int) -> Image:
    """The image with at most about `area` pixels, as the frames of video files are kept."""
    scale = math.sqrt(image.width * image.height / area)
    if scale <= 1:
        return image
    return image.resize(
        (max(1, int(image.width / scale)), max(1, int(image.height / scale))), Resampling.BOX
    )


def _files(url: str, wanted: Collection[int]) -> dict[int, str]:
    """The data URLs of the `wanted` files, by their number in a clip."""
    files, start = {}, url.index(",") + 1
    for number in range(max(wanted) + 1):
        end = url.find(",", start)
        end = len(url) if end < 0 else end
        if number in wanted:
            files[number] = f"data:image/jpeg;base64,{url[start:end]}"
        start = end + 1
    return files
