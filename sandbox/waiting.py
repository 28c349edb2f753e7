"""Jobs that wait for a worker: a bounded queue from which a job can be taken back."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from sandbox.refusal import Busy
from sandbox.request import Request

Answer = dict[str, Any]
MAX_CHARS = 256 << 20
"""Of code and tests that wait, beyond the first job."""


@dataclass(eq=False)
class Job:
    """A request that was accepted, and everyone who waits for its answer."""

    request: Request
    queued: float
    done: asyncio.Future[Answer]
    clients: int = 0
    """Who still wants it. One that hangs up without a word wants it still: its retry finds the answer."""
    scope: asyncio.Timeout | None = field(default=None)
    """Of the run; ended early when nobody wants the answer any more."""

    def finish(self, answer: Answer) -> None:
        """Give the answer to all, once."""
        if not self.done.done():
            self.done.set_result(answer)


class Waiting:
    """First come, first served."""

    def __init__(self, max_jobs: int) -> None:
        self.max_jobs = max_jobs
        self._jobs: deque[Job] = deque()
        self._arrivals = asyncio.Semaphore(0)
        self._departure = asyncio.Event()

    def __len__(self) -> int:
        return len(self._jobs)

    def check_room(self) -> None:
        """Whether one more job may wait.

        Raises:
            Busy: it may not.
        """
        if len(self._jobs) >= self.max_jobs:
            raise Busy(f"the queue is full: {len(self._jobs)} of {self.max_jobs} wait")
        waiting = sum(job.request.size for job in self._jobs)
        if waiting > MAX_CHARS:
            raise Busy(f"the queue is full: {waiting} characters wait, more than {MAX_CHARS}")

    async def room(self) -> None:
        """Wait until ``check_room`` is worth another try."""
        while True:
            try:
                return self.check_room()
            except Busy:
                self._departure.clear()
                await self._departure.wait()

    def put(self, job: Job) -> None:
        """Append a job, whether or not there is room."""
        self._jobs.append(job)
        self._arrivals.release()

    async def take(self) -> Job:
        """The next job, as soon as there is one."""
        while True:
            await self._arrivals.acquire()
            if self._jobs:  # else the job of this arrival was taken back
                return self._departed(self._jobs.popleft())

    def remove(self, job: Job) -> None:
        """Take a job back, if it still waits."""
        if job in self._jobs:
            self._jobs.remove(job)
            self._departed(job)

    def clear(self) -> list[Job]:
        """Take all."""
        jobs = list(self._jobs)
        self._jobs.clear()
        self._departure.set()
        return jobs

    def _departed(self, job: Job) -> Job:
        self._departure.set()
        return job
