"""One guarded process, its port and its health answer. Standard library only; nothing here blocks longer than it says."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from launchers import guard

HOST = "127.0.0.1"
"""What everything listens on where there is one machine."""
PORTS = range(20000, 32000)
"""Below the range of ports that the kernel gives to outgoing connections."""
_START_TIMEOUT_S = 30.0
_POLL_S = 0.05
_SOMEWHERE = "10.255.255.255"


class ProcessError(Exception):
    """A process could not be started; the text says why."""


class Process:
    """A command below a guard of its own. Leads its own session and group; see ``guard.py`` for how it ends."""

    def __init__(self, popen: subprocess.Popen[bytes], pid: int) -> None:
        self._guard = popen
        self.pid = pid
        """Also its process group."""

    @classmethod
    async def start(
        cls, command: Sequence[str], *, cwd: str, env: Mapping[str, str], output: IO[bytes] | None
    ) -> Process:
        """Start ``command``; ``output=None``: it writes to our terminal.

        Raises:
            ProcessError: the working directory is missing, or the machine is out of processes.
        """
        reading, writing = os.pipe()
        argv = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(writing), *command]
        try:
            popen = _popen(argv, cwd, env, output, writing)
        except OSError as error:
            os.close(reading)
            raise ProcessError(f"cannot start {command[0]} in {cwd}: {error}") from error
        finally:
            os.close(writing)
        _guards.add(popen.pid)
        try:
            return cls(popen, await _read_pid(reading, command[0]))
        except BaseException:  # cancelled, or the guard did not come up
            popen.send_signal(guard.KILL_NOW)
            popen.wait(_START_TIMEOUT_S)
            _guards.discard(popen.pid)
            raise
        finally:
            os.close(reading)

    def exit_code(self) -> int | None:
        """None while it runs; 128 + n after signal n."""
        code = self._guard.poll()
        if code is not None:
            _guards.discard(self._guard.pid)
        return code if code is None or code >= 0 else 128 - code

    def signal(self, signum: signal.Signals) -> None:
        """Send SIGINT or SIGTERM to its group, which is continued first."""
        self._guard.send_signal(signum)

    def kill(self) -> None:
        """Kill it and everything below it; ``exit_code`` says when it is gone."""
        self._guard.send_signal(guard.KILL_NOW)

    async def end(self, *, grace_s: float) -> int:
        """SIGTERM, after ``grace_s`` SIGKILL, to it and to everything below it. Returns its exit code."""
        if grace_s > 0:
            self.signal(signal.SIGTERM)
            await self.wait(grace_s)
        if self.exit_code() is None:
            self.kill()
            if await self.wait(_START_TIMEOUT_S) is None:
                self._guard.kill()
        code = await self.wait(_START_TIMEOUT_S)
        return 128 + signal.SIGKILL if code is None else code

    async def wait(self, timeout_s: float) -> int | None:
        """Its exit code; None when it still runs after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while (code := self.exit_code()) is None and time.monotonic() < deadline:  # noqa: ASYNC110 - a child has no event
            await asyncio.sleep(_POLL_S)
        return code


def _popen(
    argv: list[str], cwd: str, env: Mapping[str, str], output: IO[bytes] | None, pid_fd: int
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=(pid_fd,),
        start_new_session=True,  # Ctrl-C comes to the supervisor alone
    )


_guards: set[int] = set()
"""Our children that are meant to be there."""


async def _read_pid(fd: int, name: str) -> int:
    os.set_blocking(fd, False)
    deadline, text = time.monotonic() + _START_TIMEOUT_S, b""
    while not text.endswith(b"\n"):
        try:
            piece = os.read(fd, 64)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise ProcessError(f"the guard of {name} did not start it within {_START_TIMEOUT_S:.0f} s") from None
            await asyncio.sleep(0.005)
            continue
        if not piece:
            raise ProcessError(f"the guard of {name} ended before it started it")
        text += piece
    return int(text)


def kill_strays() -> None:
    """Kill and reap what a killed guard has left: orphans become our children when we are a subreaper."""
    below = set(guard.descendants(os.getpid()))
    for pid in _guards:
        below -= {pid, *guard.descendants(pid)}
    for pid in below:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in _guards:
            os.waitpid(ended.si_pid, 0)


def routed_address() -> str:
    """The address that this machine would send to others from; empty: it has no route. A machine may have several.

    The kernel is asked, nothing is sent.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((_SOMEWHERE, 9))
        return str(probe.getsockname()[0])
    return ""


def free_port(host: str = HOST) -> int:
    """A port that nobody listens on at this address of ours.

    Raises:
        ProcessError: there is none.
    """
    for port in random.sample(PORTS, 200):
        if is_free(port, host):
            return port
    raise ProcessError(f"no free port: tried 200 of {PORTS.start}..{PORTS.stop - 1} on {host}")


def is_free(port: int, host: str = HOST) -> bool:
    """Whether a server could listen on ``port`` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
        return True


async def healthy_answer(port: int, path: str, *, timeout_s: float, host: str = HOST) -> str | None:
    """The body of the answer to ``GET path``; None unless its status is 200 and it is complete in time."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                # HTTP/1.0: the answer ends with the connection
                writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}:{port}\r\n\r\n".encode())
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None
    return body.decode(errors="replace") if head.split()[1:2] == [b"200"] else None


def last_lines(path: Path, *, start: int = 0, count: int = 15) -> list[str]:
    """The last lines that were written to ``path`` after byte ``start``; none when it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - 16384))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]
