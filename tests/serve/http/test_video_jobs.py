"""Jobs of videos: what is kept of finished ones, how long, and in which order they go."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from neounify.config import VideoConfig
from neounify.config.presets import TINY
from neounify.flow.sampling import ImageSampling
from neounify.serve.http import video_jobs
from neounify.serve.http.video_jobs import VideoJobs
from neounify.tasks.image import ImageRequest

ABLE = TINY.replace(
    video=VideoConfig(tube_frames=4), capabilities=(*TINY.capabilities, "generate_video")
)


def asked(negative: str = "") -> ImageRequest:
    sampling = ImageSampling().resolve(ABLE, editing=False, video=True)
    return ImageRequest(
        prompt="x", width=64, height=32, frames=4, sampling=sampling, negative_prompt=negative
    )


async def _nothing(job: Any) -> None:
    job.file, job.status = b"12345678", "completed"


@pytest.mark.parametrize(("max_bytes", "kept"), [(100, 3), (18, 2), (1, 1)])
def test_old_files_make_room_for_new_ones(max_bytes: int, kept: int) -> None:

    async def work() -> int:
        jobs = VideoJobs(max_unfinished=9, max_bytes=max_bytes, seconds=10, clock=lambda: 5.0)
        request = asked()
        for _ in range(3):
            job = jobs.start("me", request, "x", _nothing)
            assert job.task is not None
            await job.task
        return len(jobs.of("me"))

    assert asyncio.run(work()) == kept


def test_the_video_that_is_completed_last_is_kept_the_longest() -> None:
    """Though it was asked for first."""

    async def work() -> list[str]:
        jobs, first_may_end = VideoJobs(max_unfinished=9, max_bytes=9, seconds=99), asyncio.Event()

        async def late(job: Any) -> None:
            await first_may_end.wait()
            await _nothing(job)

        first = jobs.start("me", asked(), "first", late)
        second = jobs.start("me", asked(), "second", _nothing)
        assert first.task is not None
        assert second.task is not None
        await second.task
        await asyncio.sleep(1.1)  # times are whole seconds
        first_may_end.set()
        await first.task
        return [job.prompt for job in jobs.of("me")]

    assert asyncio.run(work()) == ["first"]


def test_jobs_without_files_make_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A video that fails leaves a job with its prompts."""

    async def fail(job: Any) -> None:
        job.status = "failed"

    async def kept(max_bytes: int, prompt: str, negative: str) -> int:
        jobs = VideoJobs(max_unfinished=9, max_bytes=max_bytes, seconds=10, clock=lambda: 5.0)
        request = asked(negative)
        for _ in range(6):
            job = jobs.start("me", request, prompt, fail)
            assert job.task is not None
            await job.task
        return len(jobs.of("me"))

    monkeypatch.setattr(video_jobs, "MAX_FINISHED", 5)
    assert asyncio.run(kept(10**6, "x", "")) == 5
    assert asyncio.run(kept(200, "x" * 60, "y" * 40)) == 2


def test_finished_jobs_expire() -> None:

    now = 5.0

    async def work() -> tuple[int, int]:
        nonlocal now
        jobs = VideoJobs(max_unfinished=9, max_bytes=99, seconds=10, clock=lambda: now)
        request = asked()
        job = jobs.start("me", request, "x", _nothing)
        assert job.task is not None
        await job.task
        assert jobs.expiry(job) == 15
        before = len(jobs.of("me"))
        now = 15.0
        return before, len(jobs.of("me"))

    assert asyncio.run(work()) == (1, 0)
