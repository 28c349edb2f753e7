"""Workers, a bounded queue in front of them, and the memory of recent answers."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sandbox import feedback, judge
from sandbox.executor import Task, Worker, WorkerFault
from sandbox.interpreter import Interpreter
from sandbox.request import PROTOCOL, Request, Test, parse

STDOUT_BYTES, STDERR_BYTES = 2000, 2000
RAN_STDOUT_BYTES = 64 << 10
"""Of a test that is not judged here: its output is the answer."""
RUNS_PER_WORKER = 5000
CACHE_ENTRIES, CACHE_BYTES = 4096, 64 << 20
ATTEMPTS = 2
"""A worker that dies takes a job with it once."""
LARGE_OUTPUT = 256 << 10
"""Above it the judge works beside the event loop."""
RESTART_PAUSE_S = 1.0
CANARY_S = 30.0
CANARY_AGE_S = 1.0
CANARY = parse({"code": "print(int(input()) + 1)", "tests": [{"input": "1\n", "output": "2"}], "prelude": False})

Answer = dict[str, Any]


class Busy(Exception):
    """The queue is full."""


class Draining(Exception):
    """No new work is taken."""


class IdReused(Exception):
    """The id belongs to a request with other content."""


@dataclass(eq=False)
class _Job:
    request: Request
    queued: float
    done: asyncio.Future[Answer]


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
        self.counters: Counter[str] = Counter()
        self.seconds = {"run": 0.0, "queue": 0.0, "cpu": 0.0}
        self._interpreter, self._num_workers, self._max_waiting = interpreter, workers, queue
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting: asyncio.Queue[_Job] = asyncio.Queue()
        self._busy = 0
        self._is_draining = False
        self._running: dict[str, _Job] = {}  # by digest
        self._ids: OrderedDict[str, str] = OrderedDict()  # id -> digest
        self._answers: OrderedDict[str, tuple[Answer, int]] = OrderedDict()  # by digest, with its size
        self._cached_bytes = 0
        self._canary: asyncio.Task[bool] | None = None
        self._canary_ok_at = float("-inf")

    async def start(self) -> None:
        """Start the workers.

        Raises:
            WorkerFault: they do not start.
        """
        workers = [await Worker.start(self.isolation.level, self._interpreter) for _ in range(self._num_workers)]
        self._tasks = [asyncio.create_task(self._work(worker)) for worker in workers]

    async def submit(self, request: Request) -> Answer:
        """Run a request, join the one that is running, or replay what is known.

        Raises:
            Busy, Draining, IdReused: it is not taken.
        """
        if self._ids.setdefault(request.id, request.digest) != request.digest:
            raise IdReused(f"id {request.id} was used for another request")
        self._ids.move_to_end(request.id)
        while len(self._ids) > 2 * CACHE_ENTRIES:
            self._ids.popitem(last=False)
        if request.digest in self._answers:
            self.counters["replayed"] += 1
            self._answers.move_to_end(request.digest)
            return {**self._answers[request.digest][0], "id": request.id, "replayed": True}
        job = self._running.get(request.digest)
        if job:
            self.counters["joined"] += 1
        else:
            if self._is_draining:
                raise Draining("this service takes no new work")
            if self._waiting.qsize() >= self._max_waiting:
                self.counters["rejected"] += 1
                raise Busy("the queue is full")
            job = self._running[request.digest] = self._enqueue(request)
        answer = await asyncio.shield(job.done)  # a client that hangs up takes no worker with it
        return {**answer, "id": request.id}

    async def is_ready(self) -> bool:
        """Whether a program passed through a worker just now."""
        if self._is_draining:
            return False
        if time.monotonic() - self._canary_ok_at < CANARY_AGE_S:
            return True
        if self._canary is None or self._canary.done():
            self._canary = asyncio.create_task(self._try_canary())
        return await asyncio.shield(self._canary)

    async def drain(self, deadline_s: float) -> None:
        """Finish what was accepted, for at most so long, then end the workers."""
        self._is_draining = True
        open_jobs = [job.done for job in self._running.values()]
        if open_jobs:
            await asyncio.wait(open_jobs, timeout=deadline_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        fault = _fault("the service ended before the program did")
        while self._waiting.qsize():
            _finish(self._waiting.get_nowait(), fault)
        for job in self._running.values():
            _finish(job, fault)

    def metrics(self) -> str:
        """Prometheus text."""
        lines = [
            f"sandbox_queue_depth {self._waiting.qsize()}",
            f"sandbox_workers {self._num_workers}",
            f"sandbox_workers_busy {self._busy}",
            f"sandbox_isolation_level {self.isolation.level}",
        ]
        for name, value in sorted(self.counters.items()):
            verdict = name.partition("verdict:")[2]
            label = f'tests_total{{verdict="{verdict}"}}' if verdict else f"{name}_total"
            lines.append(f"sandbox_{label} {value}")
        lines += [f"sandbox_{name}_seconds_total {value:.4f}" for name, value in self.seconds.items()]
        return "\n".join(lines) + "\n"

    def _enqueue(self, request: Request) -> _Job:
        job = _Job(request, time.monotonic(), asyncio.get_running_loop().create_future())
        self._waiting.put_nowait(job)
        return job

    async def _try_canary(self) -> bool:
        job = self._enqueue(CANARY)  # beyond the bound: a busy service is still a ready one
        try:
            async with asyncio.timeout(CANARY_S):
                answer = await asyncio.shield(job.done)
        except TimeoutError:
            return False
        if answer["status"] == "ok" and answer["pass_all"]:
            self._canary_ok_at = time.monotonic()
            return True
        return False

    # --------------------------------------------------------------------------------------- workers
    async def _work(self, first: Worker) -> None:
        """The life of one slot. A broken worker is replaced before the slot takes another job."""
        worker: Worker | None = first
        runs = 0
        try:
            while True:
                if worker is None:
                    worker, runs = await self._restart(), 0
                job = await self._waiting.get()
                self._busy += 1
                try:
                    worker = await self._do(job, worker)
                finally:
                    self._busy -= 1
                runs += len(job.request.tests)
                if worker and runs >= RUNS_PER_WORKER:
                    self.counters["recycled"] += 1
                    await worker.stop()
                    worker = None
        finally:
            if worker:
                await worker.stop()

    async def _restart(self) -> Worker:
        while True:
            try:
                return await Worker.start(self.isolation.level, self._interpreter)
            except WorkerFault as error:
                self.counters["start_failures"] += 1
                print(f"a worker did not start: {error}", file=sys.stderr, flush=True)
                await asyncio.sleep(RESTART_PAUSE_S)

    async def _do(self, job: _Job, worker: Worker | None) -> Worker | None:
        """Answer a job, whatever happens. Returns the worker, None if it broke."""
        answer: Answer = {}
        started = time.monotonic()
        for attempt in range(ATTEMPTS):
            try:
                worker = worker or await Worker.start(self.isolation.level, self._interpreter)
                answer = await self._run(worker, job.request)
                break
            except Exception as error:  # noqa: BLE001 - whatever went wrong, it was not the program
                if worker:
                    await worker.stop()
                worker = None
                self.counters["faults"] += 1
                answer = _fault(str(error) if isinstance(error, WorkerFault) else repr(error))
                if attempt + 1 == ATTEMPTS:
                    self.counters["sandbox_errors"] += 1
        answer = {
            "protocol": PROTOCOL,
            "id": job.request.id,
            **answer,
            "queue_s": round(started - job.queued, 4),
            "run_s": round(time.monotonic() - started, 4),
            "replayed": False,
            "isolation": {
                "level": self.isolation.level,
                "name": self.isolation.name,
                "missing": sorted(self.isolation.missing),
            },
            "versions": {"python": self._interpreter.version, "judge": "native"},
        }
        self.counters["jobs"] += 1
        self.seconds["run"] += answer["run_s"]
        self.seconds["queue"] += answer["queue_s"]
        if self._running.get(job.request.digest) is job:  # a canary is not remembered
            del self._running[job.request.digest]
            self._remember(job.request.digest, answer)
        _finish(job, answer)
        return worker

    def _remember(self, digest: str, answer: Answer) -> None:
        """A fault is never remembered: a retry runs again."""
        if answer["status"] != "ok":
            return
        size = len(json.dumps(answer))
        self._answers[digest] = answer, size
        self._cached_bytes += size
        while len(self._answers) > CACHE_ENTRIES or self._cached_bytes > CACHE_BYTES:
            _, (_, dropped) = self._answers.popitem(last=False)
            self._cached_bytes -= dropped

    async def _run(self, worker: Worker, request: Request) -> Answer:
        """One program on its tests.

        Raises:
            WorkerFault: a single test has no verdict; then none counts.
        """
        rows: list[dict[str, Any]] = []
        shown: list[feedback.Shown] = []
        failed = 0
        for index, test in enumerate(request.tests):
            task = Task(
                code=request.code,
                input=test.input,
                mode=request.mode,
                function=request.function,
                has_prelude=request.has_prelude,
                limits=request.limits,
            )
            record = await worker.run(task)
            judgement = await _judged(record, request, test)
            self.counters[f"verdict:{judgement.verdict}"] += 1
            self.seconds["cpu"] += record.cpu_s
            rows.append(_row(index, record, judgement))
            shown.append(_shown(index, test, record, judgement))
            failed += judgement.verdict not in (judge.PASSED, judge.RAN)
            if failed >= request.stop_after:
                break
        passed, total = sum(row["verdict"] == judge.PASSED for row in rows), len(request.tests)
        return {
            "status": "ok",
            "passed": passed,
            "ran": len(rows),
            "total": total,
            "pass_all": passed == total,
            "pass_fraction": passed / total,
            "tests": rows,
            "feedback": feedback.render(shown),
        }


async def _judged(record: judge.Record, request: Request, test: Test) -> judge.Judgement:
    arguments = (record, request.mode, test.output, request.limits)
    if len(record.stdout) + len(record.result) > LARGE_OUTPUT:
        return await asyncio.to_thread(judge.judge, *arguments)
    return judge.judge(*arguments)


def _row(index: int, record: judge.Record, judgement: judge.Judgement) -> dict[str, Any]:
    cap = RAN_STDOUT_BYTES if judgement.verdict == judge.RAN else STDOUT_BYTES
    return {
        "index": index,
        "verdict": judgement.verdict,
        "why": judgement.why,
        "got": judgement.got,
        "cpu_s": round(record.cpu_s, 4),
        "wall_s": round(record.wall_s, 4),
        "run_delay_s": round(record.run_delay_s, 4),
        "max_rss_bytes": record.max_rss_bytes,
        "exit_code": max(record.exit, 0),
        "signal": -record.exit if record.exit < 0 else None,
        "stdout": record.stdout[:cap].decode("utf-8", "replace"),
        "stdout_bytes": record.stdout_bytes,
        "stderr": record.stderr[-STDERR_BYTES:].decode("utf-8", "replace"),
        "stderr_bytes": record.stderr_bytes,
    }


def _shown(index: int, test: Test, record: judge.Record, judgement: judge.Judgement) -> feedback.Shown:
    return feedback.Shown(
        number=index + 1,
        verdict=judgement.verdict,
        why=judgement.why,
        input=test.input,
        expected=test.output or "",
        stdout=record.stdout[:STDOUT_BYTES].decode("utf-8", "replace"),
        stderr=record.stderr[-4 * STDERR_BYTES :].decode("utf-8", "replace"),
        got=judgement.got,
    )


def _fault(detail: str) -> Answer:
    """No partial verdicts that someone could take for a result."""
    return {"status": "sandbox_error", "detail": detail[:300], "tests": []}


def _finish(job: _Job, answer: Answer) -> None:
    if not job.done.done():
        job.done.set_result(answer)
