"""Starts, watches, restarts and ends the processes of a node. Standard library only.

    python -m launchers.supervisor [--die-with-parent] PLAN.json

Services are kept alive and published in the registry; jobs run one after another. It ends with the jobs, and takes
everything along that it started, also when it is killed itself (``guard.py``). Without jobs it serves until it is ended.

    exit code   0 all jobs done · the code of the job that failed · 75 a service died too often, or the job found none
                2 a service calls its settings wrong · 130 Ctrl-C, or a job that was asked to stop · 143 SIGTERM
                76 another life has begun, and the files are its own: everything was killed at once
    Ctrl-C      the job saves and ends, services are ended; once more: everything is killed at once
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launchers.guard import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, prctl
from launchers.jobplan import Job, JobPlan, ServicePlan, from_json
from launchers.process import HOST, Process, ProcessError, free_port, healthy_answer, is_free, kill_strays, last_lines
from megatron_distil.registry import HEARTBEAT_S, Record, Registry, State

EXIT_SETTINGS, EXIT_UNAVAILABLE, EXIT_SUPERSEDED, EXIT_STOPPED = 2, 75, 76, 130
_KIND_BY_CODE = {EXIT_SETTINGS: "fatal", EXIT_UNAVAILABLE: "unavailable"}
"""First word of REASON: whether it makes sense to start the run again."""
_POLL_S = 0.1
_READY_POLL_S = 0.25
_RESTART_WINDOW_S = 600.0
_LONGEST_PAUSE_S = 30.0


class SupervisorError(Exception):
    """The run cannot go on. The text is all that the user needs; ``exit_code`` is what we end with."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Diary:
    """What happened, in a file and on the terminal."""

    def __init__(self, path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as the process

    def say(self, text: str) -> None:
        """One event."""
        self.note(text)
        with contextlib.suppress(OSError):  # whoever read it may be gone
            print(f"distil: {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """One event that is only of interest afterwards."""
        with contextlib.suppress(OSError):  # a shared folder that is away for a while ends nothing
            print(time.strftime("%F %T"), text, file=self._file)


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a supervisor works."""

    host: str = HOST
    """What services listen on and are asked at."""
    node: str = ""
    """What the scheduler calls it; empty: there is one machine."""
    is_alone: bool = True
    """No other supervisor works in the folders of the plan: STOP and REASON found there are of an earlier attempt."""
    is_first: bool = True
    """Of the supervisors that run a part of the same job each: this one says that it is done."""
    successor: Callable[[], str] = lambda: ""
    """The life that has begun in place of this one; empty: none has. Asked at every heartbeat and before every job."""
    parent: int = 0
    """Pid of what ends us when the job is over, and so must not be gone before; 0: there is no such thing."""


class Service:
    """One service: its process, and what the registry says of it."""

    def __init__(self, plan: ServicePlan, registry: Registry, diary: Diary, host: str) -> None:
        self.plan, self._registry, self._diary, self._host = plan, registry, diary, host
        self.process: Process | None = None
        self._record: Record | None = None
        self._gen = -1
        self._deaths: deque[float] = deque()
        self._deaths_in_a_row = 0
        self._log_start = 0

    async def run(self) -> None:
        """Keep it alive until cancelled.

        Raises:
            SupervisorError: it cannot be started, or died too often.
        """
        while True:
            self._gen += 1
            why = await self._live()
            self._publish_state("starting")
            await self._mourn(why)

    def heartbeat(self) -> None:
        """Write the record again."""
        if self._record is not None:
            self._publish_state(self._record.state)

    async def end(self) -> None:
        """Take it off the registry, then end it."""
        self._record = None
        process, self.process = self.process, None
        if process is not None:
            await process.end(grace_s=self.plan.stop_grace_s)
        self._registry.remove(self.plan.role, self.plan.name)

    async def _live(self) -> str:
        """From start to death. Returns what it died of."""
        plan = self.plan
        self._registry.clear_paused_name(plan.role, plan.name)
        port = self._port()
        started = time.monotonic()
        try:
            self.process = await self._start(port)
        except ProcessError as error:
            return str(error)
        self._record = Record(
            role=plan.role,
            name=plan.name,
            url=f"http://{self._host}:{port}",
            pid=self.process.pid,
            pgid=self.process.pid,
            state="starting",
            gen=self._gen,
            ts=time.time(),
            info=plan.info,
        )
        self.heartbeat()
        why = await self._until_ready(self.process, port, started)
        if not why:
            self._deaths_in_a_row = 0
            self._publish_state("ready")
            why = await self._until_dead(self.process, port)
        return why

    def _port(self) -> int:
        if not self.plan.port:
            return free_port(self._host)
        if is_free(self.plan.port, self._host):
            return self.plan.port
        raise SupervisorError(
            f"port {self.plan.port} of {self.plan.name} is in use on {self._host}. "
            "End the process that listens on it, or set the port to 0 to let a free one be chosen",
            EXIT_SETTINGS,
        )

    async def _start(self, port: int) -> Process:
        plan = self.plan
        command = [word.replace("{port}", str(port)) for word in plan.command]
        with _append(plan.log) as log:
            self._log_start = log.tell()
            env = _environment(plan.allowed_env)
            return await Process.start(command, cwd=plan.cwd, env={**env, **plan.env}, output=log)

    async def _until_ready(self, process: Process, port: int, started: float) -> str:
        """Empty when it is ready; else why it is not."""
        while (code := process.exit_code()) is None:
            if (answer := await self._answer(port, timeout_s=5.0)) is not None:
                facts = "".join(f", {key} {value}" for key, value in _facts(answer, self.plan.ready_facts))
                self._diary.say(
                    f"{self.plan.name} is ready after {time.monotonic() - started:.0f} s at {self._host}:{port}{facts}"
                )
                return ""
            if time.monotonic() - started > self.plan.start_timeout_s:
                await process.end(grace_s=0.0)
                return f"gave no health answer at {self.plan.health_path} within {self.plan.start_timeout_s:.0f} s"
            await asyncio.sleep(_READY_POLL_S)
        return _ended(code)

    async def _until_dead(self, process: Process, port: int) -> str:
        misses, next_probe = 0, time.monotonic() + self.plan.probe_every_s
        while (code := process.exit_code()) is None:
            await asyncio.sleep(_POLL_S)
            if time.monotonic() < next_probe:
                continue
            if self._is_paused() or await self._answers(port):
                misses = 0
            elif not self._is_paused():  # it may have been paused while we asked
                misses += 1
            if misses >= self.plan.probe_misses:
                await process.end(grace_s=0.0)
                return f"gave no health answer {misses} times in a row"
            next_probe = time.monotonic() + self.plan.probe_every_s
        return _ended(code)

    async def _answers(self, port: int) -> bool:
        return await self._answer(port, timeout_s=self.plan.probe_every_s) is not None

    async def _answer(self, port: int, *, timeout_s: float) -> str | None:
        return await healthy_answer(port, self.plan.health_path, timeout_s=timeout_s, host=self._host)

    def _is_paused(self) -> bool:
        return self._registry.is_paused(self.plan.role, self.plan.name)

    def _publish_state(self, state: State) -> None:
        if self._record is not None:
            fields = {**vars(self._record), "state": state, "ts": time.time()}
            self._record = Record(**fields)
            try:
                self._registry.write(self._record)
            except OSError as error:
                self._diary.say(f"{self.plan.name} cannot be published: {error}")

    async def _mourn(self, why: str) -> None:
        """Say what happened and wait until the next start, longer each time; or give up."""
        plan, now = self.plan, time.monotonic()
        code = self.process.exit_code() if self.process is not None else None
        self.process = None
        for line in last_lines(Path(plan.log), start=self._log_start):
            self._diary.say(f"  {plan.name} | {line}")
        if code == EXIT_SETTINGS:
            raise SupervisorError(f"{plan.name} calls its settings wrong (exit code 2); log: {plan.log}", EXIT_SETTINGS)
        self._deaths.append(now)
        self._deaths_in_a_row += 1
        while now - self._deaths[0] > _RESTART_WINDOW_S:
            self._deaths.popleft()
        if len(self._deaths) > plan.max_restarts:
            raise SupervisorError(
                f"{plan.name} died {len(self._deaths)} times within {_RESTART_WINDOW_S / 60:.0f} minutes, "
                f"last: {why}; log: {plan.log}",
                EXIT_UNAVAILABLE,
            )
        pause_s = min(0.5 * 2 ** (self._deaths_in_a_row - 1), _LONGEST_PAUSE_S)
        self._diary.say(f"{plan.name} {why}; start {self._gen + 1} in {pause_s:g} s")
        await asyncio.sleep(pause_s)


class Supervisor:
    """Everything that a plan asks for."""

    def __init__(self, plan: JobPlan, site: Site) -> None:
        self._plan, self._site = plan, site
        self._registry = Registry(plan.registry)
        self._diary = Diary(plan.log)
        self._services = [Service(service, self._registry, self._diary, site.host) for service in plan.services]
        self._job: tuple[Job, Process] | None = None
        self._done = {job.name: asyncio.Event() for job in plan.jobs}
        self._stopped_by: signal.Signals | None = None
        self._signalled = asyncio.Event()

    async def run(self) -> int:
        """Returns the exit code. Nothing that was started is left."""
        self._clean_registry()
        self._listen()
        tasks = [asyncio.create_task(self._heartbeats()), asyncio.create_task(self._signalled.wait())]
        tasks += [asyncio.create_task(self._serve(service)) for service in self._services]
        jobs = asyncio.create_task(self._run_jobs())
        try:
            await asyncio.wait([jobs, *tasks], return_when=asyncio.FIRST_COMPLETED)
            return await self._outcome(jobs, tasks)
        except SupervisorError as error:
            self._diary.say(str(error))
            self._say_reason(f"{_KIND_BY_CODE.get(error.exit_code, 'failed')} {error}")
            return error.exit_code
        finally:
            for task in (jobs, *tasks):
                task.cancel()
            await asyncio.gather(jobs, *tasks, return_exceptions=True)
            await asyncio.gather(self._end_job(), *(service.end() for service in self._services))
            kill_strays()

    async def _outcome(self, jobs: asyncio.Task[int], tasks: list[asyncio.Task[None]]) -> int:
        if self._stopped_by is not None:
            await self._stop_job()
            self._say_reason(f"stopped by {self._stopped_by.name}")
            return 128 + self._stopped_by
        if jobs.done():
            return jobs.result()
        for task in tasks:
            if task.done():
                task.result()
        raise RuntimeError("a task of the supervisor ended without a result")

    def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        wanted = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup: the user wants us to outlive the terminal
            wanted.append(signal.SIGHUP)
        for signum in wanted:
            loop.add_signal_handler(signum, self._on_signal, signum)

    def _clean_registry(self) -> None:
        if self._site.is_alone:
            self._registry.forget_end()
        for service in self._plan.services:
            self._registry.remove(service.role, service.name)

    async def _heartbeats(self) -> None:
        while True:
            self._give_way()
            for service in self._services:
                service.heartbeat()
            kill_strays()
            await asyncio.sleep(HEARTBEAT_S)

    def _give_way(self) -> None:
        """Kill everything when another life has begun: two would write into one folder, and this one is the lost one.

        Likewise when nobody is left who would end us: servers would keep their GPUs for ever.

        Raises:
            SupervisorError: one of the two has happened.
        """
        if life := self._site.successor():
            self._kill_now()
            raise SupervisorError(f"life {life} has begun; this one ends", EXIT_SUPERSEDED)
        if self._site.parent not in (0, os.getppid()):
            self._kill_now()
            raise SupervisorError("the slurmstepd of this step is gone, which would end it", EXIT_UNAVAILABLE)

    def _processes(self) -> Iterator[Process]:
        yield from (service.process for service in self._services if service.process is not None)
        if self._job is not None:
            yield self._job[1]

    async def _serve(self, service: Service) -> None:
        if service.plan.start_after:
            await self._done[service.plan.start_after].wait()
        await service.run()

    async def _run_jobs(self) -> int:
        for job in self._plan.jobs:
            if _is_done(job):
                self._diary.say(f"{job.name} was done before")
            else:
                code = await self._run_job(job)
                if code == 0:
                    _mark_done(job)
                if code != 0 or self._stopped_by is not None:
                    return code
            self._done[job.name].set()
        if not self._plan.jobs:
            await asyncio.Event().wait()
        if self._site.is_first:
            self._registry.say_reason("done")
        return 0

    async def _run_job(self, job: Job) -> int:
        self._give_way()
        if job.registry and self._site.is_alone:
            Registry(job.registry).forget_end()
        started = time.time()
        output = _append(job.log) if job.log else None
        try:
            process = await Process.start(job.command, cwd=job.cwd, env={**os.environ, **job.env}, output=output)
        except ProcessError as error:
            raise SupervisorError(str(error), 1) from error
        finally:
            if output is not None:
                output.close()
        self._job = job, process
        self._diary.note(f"{job.name} started, pid {process.pid}")
        code = await process.wait(float("inf")) or 0
        self._job = None
        self._diary.note(f"{job.name} ran {time.time() - started:.1f} s")
        return code if code == 0 or self._stopped_by is not None else self._explain(job, code, started)

    def _was_asked_to_stop(self, job: Job, code: int) -> bool:
        return (
            code in (EXIT_STOPPED, EXIT_UNAVAILABLE) and bool(job.registry) and Registry(job.registry).stop_requested()
        )

    def _explain(self, job: Job, code: int, started: float) -> int:
        """Tell why a job failed. Returns its exit code."""
        if self._was_asked_to_stop(job, code):
            self._diary.say(f"{job.name} has saved and ended, as it was asked to")
            self._registry.say_reason(f"stopped {job.name} was asked to")
            return code
        logs = [Path(job.log)] if job.log else sorted(Path(job.rank_logs).rglob("*.log")) if job.rank_logs else []
        for log in logs:
            if log.exists() and log.stat().st_mtime >= started:
                for line in last_lines(log):
                    self._diary.say(f"  {log.parent.name}/{log.name} | {line}")
        self._diary.say(f"{job.name} {_ended(code)}")
        self._say_reason(f"{_KIND_BY_CODE.get(code, 'failed')} {job.name} {_ended(code)}")
        return code

    def _say_reason(self, text: str) -> None:
        """With the node: of many, one is broken."""
        self._registry.say_reason(f"{text}, on {self._site.node}" if self._site.node else text)

    def _on_signal(self, signum: signal.Signals) -> None:
        if self._stopped_by is None:
            self._stopped_by = signum
            self._signalled.set()
        else:
            self._diary.say("killing everything")
            self._kill_now()

    def _kill_now(self) -> None:
        for process in self._processes():
            process.kill()

    async def _stop_job(self) -> None:
        """Let the job save and end; after its deadline end it."""
        if self._job is None:
            return
        job, process = self._job
        if job.registry:
            self._diary.say(
                f"stopping: {job.name} saves and ends (at most {job.stop_grace_s:.0f} s); Ctrl-C again: at once"
            )
            try:
                Registry(job.registry).request_stop()
            except OSError as error:
                self._diary.say(f"{job.name} cannot be asked to: {error}")
                await process.end(grace_s=0.0)
        else:
            self._diary.say(f"stopping {job.name}; Ctrl-C again: at once")
            process.signal(signal.SIGINT)
        if await process.wait(job.stop_grace_s) is None:
            self._diary.say(f"{job.name} did not end within {job.stop_grace_s:.0f} s")
        await process.end(grace_s=0.0)

    async def _end_job(self) -> None:
        """A service is gone for good: what the job was doing is lost."""
        if self._job is not None:
            await self._job[1].end(grace_s=5.0)


def _ended(code: int) -> str:
    return f"was killed by {signal.Signals(code - 128).name}" if 128 < code < 160 else f"ended with exit code {code}"


def _facts(answer: str, keys: tuple[str, ...]) -> list[tuple[str, str]]:
    try:
        table = json.loads(answer) if keys else {}
    except ValueError:
        return []
    return [(key, json.dumps(table[key])) for key in keys if key in table]


def _append(path: str) -> IO[bytes]:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return open(path, "ab")


def _environment(allowed: tuple[str, ...]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not allowed or name in allowed}


def _is_done(job: Job) -> bool:
    try:
        return bool(job.done_marker) and json.loads(Path(job.done_marker).read_text()) == list(job.command)
    except (OSError, ValueError):
        return False


def _mark_done(job: Job) -> None:
    if job.done_marker:
        path = Path(job.done_marker)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(list(job.command)))
        temporary.replace(path)


@contextlib.contextmanager
def _only_one(plan: JobPlan) -> Iterator[None]:
    """Two supervisors of one folder would take each other's records away."""
    Path(plan.registry).mkdir(parents=True, exist_ok=True)
    with open(Path(plan.registry) / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SupervisorError(
                f"another run works in {plan.registry}: end it, or choose another folder", EXIT_SETTINGS
            ) from None
        yield


def supervise(plan: JobPlan) -> int:
    """Run a plan in the foreground. Returns the exit code."""
    return _to_the_end(plan, Site(), _only_one(plan))


def supervise_part(plan: JobPlan, site: Site) -> int:
    """Run the plan of one of several nodes that share their folders. Returns the exit code."""
    return _to_the_end(plan, site, contextlib.nullcontext())


def _to_the_end(plan: JobPlan, site: Site, claim: AbstractContextManager[None]) -> int:
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        with claim:
            return asyncio.run(_run(plan, site))
    except SupervisorError as error:
        print(f"distil: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


async def _run(plan: JobPlan, site: Site) -> int:
    return await Supervisor(plan, site).run()


def main(argv: list[str]) -> int:
    """``argv``: the path of a plan, after ``--die-with-parent`` for those who must not leave us behind."""
    if argv[:1] == ["--die-with-parent"]:
        argv = argv[1:]
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if len(argv) != 1 or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 0 if argv in (["-h"], ["--help"]) else EXIT_SETTINGS
    try:
        plan = from_json(Path(argv[0]).read_text())
    except (OSError, ValueError) as error:
        print(f"distil: {argv[0]}: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    return supervise(plan)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
