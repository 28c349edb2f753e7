"""Workers, and what happens to a request between its arrival and its answer."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from sandbox import answer, judge
from sandbox.answer import Answer, Tally
from sandbox.executor import Task, Worker, WorkerFault
from sandbox.interpreter import Interpreter
from sandbox.metrics import Metrics
from sandbox.refusal import Busy, Draining
from sandbox.request import PROTOCOL, Request, Test, parse
from sandbox.store import Answers
from sandbox.waiting import Job, Waiting

RUNS_PER_WORKER = 5000
ATTEMPTS = 2
"""A worker that dies takes a job with it once."""
LARGE_OUTPUT = 256 << 10
"""Above it the judge works beside the event loop."""
RESTART_PAUSE_S = 1.0
CANARY_S = 30.0
CANARY_AGE_S = 1.0
CANARY = parse({"code": "print(int(input()) + 1)", "tests": [{"input": "1\n", "output": "2"}], "prelude": False})


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """How programs are confined: in every answer."""

    level: int
    name: str
    missing: Mapping[str, str]
    """Fact -> reason, for the next level."""


class Service:
    """Runs requests. Not thread-safe: it belongs to one event loop, in the main thread."""

    def __init__(self, isolation: Isolation, interpreter: Interpreter, *, workers: int, queue: int) -> None:
        self.isolation = isolation
        self.metrics = Metrics()
        self.num_workers = workers
        self.interpreter = interpreter
        self.is_draining = False
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting = Waiting(queue)
        self._busy = 0
        self._open: dict[str, Job] = {}  # by digest: what waits or runs
        self._answers = Answers()
        self._canary: asyncio.Task[bool] | None = None
        self._canary_ok_at = float("-inf")

    @property
    def max_waiting(self) -> int:
        """Jobs that may wait for a worker."""
        return self._waiting.max_jobs

    async def start(self) -> None:
        """Start the workers.

        Raises:
            WorkerFault: they do not start.
        """
        workers = await asyncio.gather(*(self._start_worker() for _ in range(self.num_workers)))
        self._tasks = [asyncio.create_task(self._work(worker)) for worker in workers]

    async def submit(self, request: Request) -> Answer:
        """Run a request, join the one that is running, or replay what is known.

        Cancelled, it leaves the job to those who retry, or takes it back if the request says so.

        Raises:
            Busy, Draining, IdReused: it is not taken.
        """
        self._answers.claim(request.id, request.digest)
        known = self._answers.get(request.digest)
        if known:
            self.metrics.count("replayed")
            return {**known, "id": request.id, "replayed": True}
        job = self._open.get(request.digest)
        if job:
            self.metrics.count("joined")
        else:
            job = self._accept(request)
        return {**await self._answer_of(job, request), "id": request.id}

    async def submit_patiently(self, request: Request) -> Answer:
        """``submit``, but where the queue is full it waits.

        Raises:
            Draining, IdReused: it is not taken.
        """
        while True:
            try:
                return await self.submit(request)
            except Busy:
                try:
                    async with asyncio.timeout_at(request.deadline):
                        await self._waiting.room()
                except TimeoutError:
                    return self._late(request)

    async def is_ready(self) -> bool:
        """Whether a program passed through a worker just now."""
        if self.is_draining:
            return False
        if time.monotonic() - self._canary_ok_at < CANARY_AGE_S:
            return True
        if self._canary is None or self._canary.done():
            self._canary = asyncio.create_task(self._try_canary())
        return await asyncio.shield(self._canary)

    async def drain(self, deadline_s: float) -> None:
        """Finish what was accepted, for at most so long, then end the workers."""
        self.is_draining = True
        open_jobs = [job.done for job in self._open.values()]
        if open_jobs:
            await asyncio.wait(open_jobs, timeout=deadline_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for job in (*self._waiting.clear(), *self._open.values()):
            fault = answer.fault("the service ended before the program did")
            job.finish(self._complete(fault, job.request, reason="drain"))

    def metrics_text(self) -> str:
        """Prometheus text."""
        return self.metrics.text(
            {
                "queue_depth": len(self._waiting),
                "workers": self.num_workers,
                "workers_busy": self._busy,
                "isolation_level": self.isolation.level,
            }
        )

    # ---------------------------------------------------------------------------------------- clients
    def _accept(self, request: Request) -> Job:
        if self.is_draining:
            raise Draining("this service takes no new work; another one may")
        try:
            self._waiting.check_room()
        except Busy:
            self.metrics.count("rejected")
            raise
        job = self._open[request.digest] = self._enqueue(request)
        return job

    def _enqueue(self, request: Request) -> Job:
        job = Job(request, time.monotonic(), asyncio.get_running_loop().create_future())
        self._waiting.put(job)
        return job

    async def _answer_of(self, job: Job, request: Request) -> Answer:
        job.clients += 1
        try:
            async with asyncio.timeout_at(request.deadline):
                return await asyncio.shield(job.done)
        except TimeoutError:
            self._leave(job)
            return self._late(request)
        except asyncio.CancelledError:
            if request.cancel_on_disconnect:
                self._leave(job)
            raise

    def _leave(self, job: Job) -> None:
        """One client less; without any the job is taken back."""
        job.clients -= 1
        if job.clients or job.done.done():
            return
        self.metrics.count("cancelled")
        self._open.pop(job.request.digest, None)
        self._waiting.remove(job)
        if job.scope:
            job.scope.reschedule(asyncio.get_running_loop().time())
        job.finish(self._complete(answer.fault("cancelled"), job.request, reason="cancelled"))

    def _late(self, request: Request) -> Answer:
        fault = answer.fault(f"deadline: no verdict within {request.deadline_s:g} s")
        return self._complete(fault, request, reason="deadline", queue_s=time.monotonic() - request.received)

    async def _try_canary(self) -> bool:
        job = self._enqueue(CANARY)  # beyond the bound: a busy service is still a ready one
        try:
            async with asyncio.timeout(CANARY_S):
                said = await asyncio.shield(job.done)
        except TimeoutError:
            return False
        if said["status"] == "ok" and said["pass_all"]:
            self._canary_ok_at = time.monotonic()
            return True
        return False

    # ---------------------------------------------------------------------------------------- workers
    async def _work(self, first: Worker) -> None:
        """The life of one slot. A broken worker is replaced before the slot takes another job."""
        worker: Worker | None = first
        runs = 0
        try:
            while True:
                if worker is None:
                    worker, runs = await self._restart(), 0
                job = await self._waiting.take()
                self._busy += 1
                try:
                    worker = await self._do(job, worker)
                finally:
                    self._busy -= 1
                runs += len(job.request.tests)
                if worker and runs >= RUNS_PER_WORKER:
                    self.metrics.count("recycled")
                    await worker.stop()
                    worker = None
        finally:
            if worker:
                await worker.stop()

    async def _restart(self) -> Worker:
        while True:
            try:
                return await self._start_worker()
            except WorkerFault as error:
                self.metrics.count("start_failures")
                print(f"a worker did not start: {error}", file=sys.stderr, flush=True)
                await asyncio.sleep(RESTART_PAUSE_S)

    async def _start_worker(self) -> Worker:
        started = time.monotonic()
        worker = await Worker.start(self.isolation.level, self.interpreter)
        self.metrics.observe("worker_start_seconds", time.monotonic() - started)
        return worker

    async def _do(self, job: Job, worker: Worker | None) -> Worker | None:
        """Answer a job, whatever happens. Returns the worker, None if it broke or was stopped."""
        started = time.monotonic()
        said: Answer = {}
        for _ in range(ATTEMPTS):
            try:
                worker = worker or await self._start_worker()
                if job.done.done():  # nobody wanted to wait for it
                    return worker
                async with asyncio.timeout(None) as job.scope:
                    said = await self._run(worker, job.request)
                break
            except Exception as error:  # noqa: BLE001 - whatever went wrong, it was not the program
                job.scope = None
                if worker:
                    await worker.stop()
                worker = None
                if job.done.done():  # nobody wants it any more: that is what ended the run
                    return None
                self.metrics.count("faults")
                said = answer.fault(str(error) if isinstance(error, WorkerFault) else repr(error))
        queue_s, run_s = started - job.queued, time.monotonic() - started
        self.metrics.count("jobs")
        self.metrics.observe("queue_wait_seconds", queue_s)
        self.metrics.observe("run_seconds", run_s)
        said = self._complete(said, job.request, reason="fault", queue_s=queue_s, run_s=run_s)
        if self._open.get(job.request.digest) is job:  # a canary is not remembered
            del self._open[job.request.digest]
            self._answers.put(job.request.digest, said)
        job.finish(said)
        return worker

    async def _run(self, worker: Worker, request: Request) -> Answer:
        """One program on its tests.

        Raises:
            WorkerFault: a single test has no verdict; then none counts.
        """
        tally = Tally(request)
        for test in request.tests:
            record = await worker.run(_task(request, test))
            judgement, output = await _judged(record, request, test)
            self.metrics.count("tests", verdict=judgement.verdict)
            self.metrics.count("cpu_seconds", record.cpu_s)
            self.metrics.observe("test_seconds", record.wall_s)
            tally.add(test, record, judgement, output)
            if tally.is_over:
                break
        return tally.answer()

    def _complete(
        self, said: Answer, request: Request, *, reason: str, queue_s: float = 0.0, run_s: float = 0.0
    ) -> Answer:
        """What every answer says beside the verdicts. ``reason`` is counted if there are none."""
        if said["status"] != "ok":
            self.metrics.count("sandbox_errors", reason=reason)
        level = self.isolation
        return {
            "protocol": PROTOCOL,
            "id": request.id,
            **said,
            "queue_s": round(queue_s, 4),
            "run_s": round(run_s, 4),
            "replayed": False,
            "isolation": {"level": level.level, "name": level.name, "missing": sorted(level.missing)},
            "versions": {"python": self.interpreter.version, "judge": request.profile},
        }


def _task(request: Request, test: Test) -> Task:
    return Task(
        code=request.code,
        input=test.input,
        mode=request.mode,
        function=request.function,
        has_prelude=request.has_prelude,
        limits=request.limits,
        profile=request.profile,
        language=request.language,
    )


async def _judged(record: judge.Record, request: Request, test: Test) -> tuple[judge.Judgement, str]:
    """The judgement, and the digest of what the program answered."""

    def work() -> tuple[judge.Judgement, str]:
        judgement = judge.judge(record, request.mode, test.output, request.limits, request.profile)
        return judgement, judge.outputs_digest([(record, judgement)])

    is_large = len(record.stdout) + len(record.result) > LARGE_OUTPUT
    return await asyncio.to_thread(work) if is_large else work()
