"""Jobs that generate videos: work that outlives its request, its state, and the file at the end."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

from neounify.serve.http.decoders import MediaThread
from neounify.serve.http.errors import ApiError
from neounify.tasks.image import ImageRequest

Result = TypeVar("Result")
MAX_FINISHED = 10_000
"""Finished jobs that are kept, those without files too."""
Status = Literal["queued", "in_progress", "completed", "failed"]


@dataclass(eq=False)
class VideoJob:
    """One video that is generated, or was; `owner` alone sees it. Times are Unix seconds."""

    owner: str
    request: ImageRequest
    prompt: str
    created: int
    id: str = field(default_factory=lambda: f"video_{secrets.token_urlsafe(24)}")
    status: Status = "queued"
    progress: int = 0
    """Percent of the denoising steps that are done."""
    completed: int | None = None
    error: ApiError | None = None
    file: bytes | None = None
    thumbnail: bytes | None = None
    """WebP of one frame: of the last preview while it is generated, of the first frame after it."""
    evaluations: float | None = None
    task: asyncio.Task[None] | None = None

    @property
    def described(self) -> ImageRequest:
        """The request in its metadata: with the caller's prompt, without the clip it continues."""
        return replace(self.request, prompt=self.prompt, condition=())

    @property
    def is_finished(self) -> bool:
        return self.status in ("completed", "failed")

    @property
    def size(self) -> int:
        """Bytes of its files, and characters of its prompts."""
        texts = len(self.prompt) + len(self.request.negative_prompt)
        return len(self.file or b"") + len(self.thumbnail or b"") + texts


class VideoEncoder(MediaThread):
    """The thread that encodes all videos of a server."""

    name = "encode"

    async def run_wanted(self, work: Callable[[threading.Event], Result]) -> Result:
        """The result of `work`, whose event is set when the caller no longer waits for it."""
        gone = threading.Event()
        try:
            return await self.run(partial(work, gone))
        finally:
            gone.set()


class VideoJobs:
    """All jobs of a server, oldest first: `max_unfinished` of an owner at a time.

    Finished ones are kept for `seconds`, the newest `max_bytes` of their files and MAX_FINISHED.
    """

    def __init__(
        self,
        *,
        max_unfinished: int,
        max_bytes: int,
        seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._max_unfinished, self._max_bytes = max_unfinished, max_bytes
        self._seconds, self._clock = seconds, clock
        self._jobs: dict[str, VideoJob] = {}
        self.encoder = VideoEncoder()

    def start(
        self,
        owner: str,
        request: ImageRequest,
        prompt: str,
        work: Callable[[VideoJob], Coroutine[Any, Any, None]],
    ) -> VideoJob:
        """Begin a job in the background. Raises ApiError 429 as `check` does."""
        self.check(owner)
        job = VideoJob(owner, request, prompt, int(self._clock()))
        self._jobs[job.id] = job
        job.task = asyncio.get_running_loop().create_task(self._run(job, work))
        return job

    def check(self, owner: str) -> None:
        """Raise ApiError 429 where the owner has as many unfinished jobs as may be."""
        unfinished = sum(job.owner == owner and not job.is_finished for job in self._jobs.values())
        if unfinished >= self._max_unfinished:
            raise ApiError(
                429,
                f"{unfinished} videos are being generated for you, this server's limit; wait for "
                "one or delete one.",
                kind="rate_limit_error",
                code="too_many_videos",
                retry_after=10.0,
            )

    async def _run(
        self, job: VideoJob, work: Callable[[VideoJob], Coroutine[Any, Any, None]]
    ) -> None:
        await work(job)
        job.request = replace(job.request, condition=())  # its frames are not needed any more
        job.completed = int(self._clock())
        self._drop_old()

    def get(self, job_id: str, owner: str) -> VideoJob:
        """The job. Raises ApiError 404 for one that is not there any more, or of others."""
        self._drop_old()
        job = self._jobs.get(job_id)
        if job is None or job.owner != owner:
            raise ApiError(404, f"There is no video {job_id[:80]!r}.", code="not_found")
        return job

    def of(self, owner: str) -> list[VideoJob]:
        """The owner's jobs, newest first."""
        self._drop_old()
        return [job for job in reversed(self._jobs.values()) if job.owner == owner]

    def remove(self, job_id: str, owner: str) -> None:
        """Forget a job, and end it if it runs. Raises ApiError 404 as `get` does."""
        job = self.get(job_id, owner)
        if job.task is not None:
            job.task.cancel()
        del self._jobs[job.id]

    def expiry(self, job: VideoJob) -> int | None:
        """Unix seconds at which a finished job is forgotten."""
        return None if job.completed is None else int(job.completed + self._seconds)

    async def close(self) -> None:
        """End all jobs."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._jobs.clear()
        self.encoder.close()

    def _drop_old(self) -> None:
        now = self._clock()
        finished = sorted(
            (job for job in self._jobs.values() if job.completed is not None),
            key=lambda job: job.completed or 0,
        )
        total = sum(job.size for job in finished)
        for number, job in enumerate(finished):
            expired = job.completed is not None and job.completed + self._seconds <= now
            full = total > self._max_bytes or len(finished) - number > MAX_FINISHED
            if expired or (full and job is not finished[-1]):
                total -= job.size
                del self._jobs[job.id]
