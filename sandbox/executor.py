r"""One worker: a zygote, its current keeper, and the sockets to both. Trusted side; everything is awaited with a deadline.

async with await Worker.start(level=2, interpreter=interpreter.find()) as worker:
    record = await worker.run(Task(code="print(int(input()) + 1)", input="41\\n", limits=limits.complete({})))
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import socket
import subprocess
import tempfile
import zipfile
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from sandbox import limits as limits_
from sandbox import walls, wire
from sandbox.box import Box, delegated
from sandbox.builds import Builds
from sandbox.interpreter import UNPRIVILEGED, Interpreter, identity
from sandbox.judge import Record

START_S, GRACE_S, STOP_S = 60.0, 30.0, 5.0
RUNS_PER_KEEPER = 200
STDERR_CAP = 1 << 20
_INNER = (
    "__init__",
    "bridge",
    "cgroup",
    "child",
    "foreign",
    "frames",
    "gvisor",
    "keeper",
    "languages",
    "limits",
    "linux",
    "namespaces",
    "profiles",
    "syscalls",
    "wire",
    "zygote",
)
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # python -I would ignore it, and hashes would differ from worker to worker
    "PYTHONDONTWRITEBYTECODE": "1",
    "MALLOC_ARENA_MAX": "1",  # per-thread arenas eat RLIMIT_AS
}
# Deep recursion in the main thread is legitimate; the stack's size is fixed when a process starts.
_WITH_STACK = 'ulimit -S -s 1048576 2>/dev/null || ulimit -S -s "$(ulimit -H -s)" 2>/dev/null; exec "$@"'


class WorkerFault(Exception):
    """The sandbox failed; this says nothing about the program. The worker is of no more use."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One test of one program."""

    code: str
    input: str
    mode: str = "stdin"
    function: str = ""
    has_prelude: bool = False
    profile: str = "native"
    language: str = "python"
    seed: int = 0
    limits: Mapping[str, float] = field(default_factory=lambda: limits_.complete({}))


class _Channel:
    """A SEQPACKET socket in the event loop."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket, self._loop = sock, asyncio.get_running_loop()
        self._arrived: deque[tuple[bytes, list[int]]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_open = True
        self._loop.add_reader(sock, self._read)

    def send(self, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
        try:
            wire.send(self._socket, message, fds)
        except OSError as error:
            raise WorkerFault(f"cannot be reached: {error}") from error

    async def receive(self, timeout_s: float) -> tuple[dict[str, Any], list[int]]:
        if not self._arrived:
            if not self._is_open:
                raise WorkerFault("died")
            self._waiter = self._loop.create_future()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._waiter
            except TimeoutError as error:
                raise WorkerFault(f"no answer within {timeout_s:g} s") from error
            finally:
                self._waiter = None
        if not self._arrived:
            raise WorkerFault("died")
        data, fds = self._arrived.popleft()
        return json.loads(data), fds

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            self._stop_reading()
            self._socket.close()
        for _, fds in self._arrived:
            for fd in fds:
                os.close(fd)
        self._arrived.clear()

    def _read(self) -> None:
        try:
            data, fds = wire.receive(self._socket)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, fds = b"", list[int]()
        if data:
            self._arrived.append((data, fds))
        else:
            self._stop_reading()
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def _stop_reading(self) -> None:
        self._is_open = False
        self._loop.remove_reader(self._socket)


class Worker:
    """Runs one test at a time."""

    def __init__(
        self, process: subprocess.Popen[bytes], control: _Channel, workdir: str | None, box: Box | None
    ) -> None:
        self.process = process
        self._control, self._workdir, self._box = control, workdir, box
        self._keeper: _Channel | None = None
        self._runs = 0
        self._builds = Builds(self._send)

    @classmethod
    async def start(cls, level: int, interpreter: Interpreter, *, without: Collection[str] = ()) -> Worker:
        """Start a zygote. Must be called in the main thread: the zygote dies with the thread that started it.

        Args:
            level: isolation level.
            interpreter: the Python that runs programs.
            without: mechanisms of ``walls.LEVELS`` that tests switch off, to see that they matter.

        Raises:
            WorkerFault: it did not start.
        """
        absent = walls.absent(level, without)
        box = None if "cgroup" in absent else _box()
        box_fds = [box.open()] if box else []
        workdir = _empty_directory() if "namespaces.mount" in absent else None
        settings: dict[str, object] = {
            "without": absent,
            "read_only": interpreter.read_only,
            "workdir": workdir or "/tmp",
            "box": box_fds[0] if box_fds else None,
        }
        entry = "zygote"
        if level == walls.UNDER_GVISOR:
            entry, settings = "gvisor", _around(settings, interpreter)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        archive = wire.sealed_file(_archive(entry))
        arguments = [f"/proc/self/fd/{archive}", str(theirs.fileno()), json.dumps(settings)]
        try:
            process = subprocess.Popen(  # noqa: ASYNC220 - milliseconds, and a thread would take the zygote with it
                ["/bin/sh", "-c", _WITH_STACK, "sh", interpreter.path, "-s", "-S", *arguments],
                pass_fds=(archive, theirs.fileno(), *box_fds),
                env=_environment(absent),
                cwd="/",
                stdin=subprocess.DEVNULL,
                **({} if "identity" in absent else identity()),  # pyright: ignore[reportArgumentType, reportCallIssue]
            )
        except (OSError, subprocess.SubprocessError) as error:
            ours.close()
            if box:
                box.remove()
            raise WorkerFault(f"the zygote did not start: {error}") from error
        finally:
            theirs.close()
            for fd in (archive, *box_fds):
                os.close(fd)
        worker = cls(process, _Channel(ours), workdir, box)
        try:
            if box:
                box.adopt(process.pid)
                worker._control.send({"op": "start"})
            await worker._greet(absent)
            worker._new_keeper()
        except (WorkerFault, OSError) as error:
            await worker.stop()
            raise WorkerFault(f"the zygote did not start: {error}") from error
        except BaseException:
            await worker.stop()
            raise
        return worker

    async def run(self, task: Task) -> Record:
        """Run one test.

        Raises:
            WorkerFault: no verdict is possible. Stop this worker.
        """
        if task.language == "python":
            return await self._send(task)
        record = await self._builds.run(task)
        if record.result.startswith(b'{"fault"'):  # the program never ran, so that nobody else wrote there
            raise WorkerFault(record.result.decode("utf-8", "replace"))
        return record

    async def _send(self, task: Task, stage: Literal["compile", "run"] = "run") -> Record:
        if self._keeper is None or self._runs >= RUNS_PER_KEEPER:
            self._new_keeper()
        keeper = self._keeper
        assert keeper
        self._runs += 1
        call = {
            "mode": task.mode,
            "function": task.function,
            "has_prelude": task.has_prelude,
            "seed": task.seed,
            "profile": task.profile,
            "language": task.language,
            "stage": stage,
        }
        files: list[int] = []
        try:
            # a lone surrogate is the program's error, not ours
            files += (wire.sealed_file(text.encode("utf-8", "surrogatepass")) for text in (task.code, task.input))
            keeper.send({"call": call, "limits": dict(task.limits)}, files)
        finally:
            for fd in files:
                os.close(fd)
        message, outputs = await keeper.receive(task.limits["wall_s"] + GRACE_S)
        try:
            return _record(message, outputs)
        finally:
            for fd in outputs:
                os.close(fd)

    async def stop(self) -> None:
        """Everything that belongs to this worker ends with its zygote."""
        if self._keeper:
            self._keeper.close()
        self._control.close()
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self.process.wait, STOP_S)
        if self._box:
            await asyncio.to_thread(self._box.remove)
        if self._workdir:
            shutil.rmtree(self._workdir, ignore_errors=True)

    async def _greet(self, absent: Collection[str]) -> None:
        hello, _ = await self._control.receive(START_S)
        if "error" in hello:
            raise WorkerFault(str(hello["error"]))
        if "identity" not in absent and os.getuid() == 0 and 0 in hello["uids"]:
            raise WorkerFault("the user could not be dropped: setuid had no effect here")

    async def __aenter__(self) -> Worker:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def _new_keeper(self) -> None:
        if self._keeper:
            self._keeper.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._control.send({"op": "keeper"}, [theirs.fileno()])
        self._keeper, self._runs = _Channel(ours), 0


def _record(message: Mapping[str, Any], outputs: Sequence[int]) -> Record:
    if "error" in message:
        raise WorkerFault(str(message["error"]))
    if message["stopped_by"] == "cancelled" or len(outputs) != 3:
        raise WorkerFault("cancelled")
    stdout, stderr, result = outputs
    sizes = [os.fstat(fd).st_size for fd in outputs]
    return Record(
        **message,
        stdout=wire.read_from_start(stdout, sizes[0]),  # all of it is judged; ``output_bytes`` bounds it
        stdout_bytes=sizes[0],
        stderr=os.pread(stderr, STDERR_CAP, max(sizes[1] - STDERR_CAP, 0)),
        stderr_bytes=sizes[1],
        result=wire.read_from_start(result, sizes[2]),
    )


@cache
def _archive(entry: str) -> bytes:
    """The modules that run inside, so that no folder of ours must be readable there."""
    here = Path(__file__).parent
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in _INNER:
            archive.writestr(f"sandbox/{name}.py", (here / f"{name}.py").read_bytes())
        archive.writestr("__main__.py", f"from sandbox.{entry} import main\n\nmain()\n")
    return buffer.getvalue()


def _around(settings: Mapping[str, object], interpreter: Interpreter) -> dict[str, object]:
    """What ``gvisor.py`` is told: programs start in a /tmp of gVisor's, its bundle lies where they would start else."""
    inside = {**settings, "workdir": "/tmp"}
    return {"settings": inside, "python": interpreter.path, "folder": settings["workdir"]}


def _environment(absent: Collection[str]) -> dict[str, str]:
    inherited = os.environ if "environment" in absent else {}  # noqa: TID251 - never outside of a test
    return {**inherited, **_ENVIRONMENT}


def _box() -> Box:
    try:
        return Box(delegated())
    except OSError as error:
        raise WorkerFault(f"no control group for the worker: {error}") from error


def _empty_directory() -> str:
    """Where programs start below level 2. They may not write there from level 1 on."""
    path = tempfile.mkdtemp(prefix="sandbox-")
    if os.getuid() == 0:
        os.chown(path, UNPRIVILEGED, UNPRIVILEGED)
    return path
