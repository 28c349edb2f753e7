"""Inside of gVisor (level 4): the other end of the pipes, and a keeper for a kernel without pidfds, subreapers and schedstat.

The sentry offers neither Landlock nor mappable user namespaces. Here zygote and keeper are root *of the sentry*, a program is
another of its users, in a pid namespace of its own behind the same seccomp filter. The bridge reads payloads, so it is forked
away from the zygote before the first one comes.

CPU clocks advance in ticks of 10 ms while a thread may run: waiting for a core of the host counts.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any

from sandbox import frames, linux, namespaces, wire, zygote
from sandbox.gvisor import STACK_BYTES
from sandbox.keeper import CPU_GRACE_MS, Clocks, Keeper, Room, Settings, Started, exceeded

READY_S = 20.0
_HIDDEN = ("/dev/shm", "/dev/pts", "/sys", "/proc")  # gVisor mounts them whatever one asks for
_HUNG_UP = select.POLLHUP | select.POLLERR


class SentryKeeper(Keeper):
    """Runs tests one after the other, each in a new process and pid namespace."""

    def __init__(self, room: Room, service: socket.socket) -> None:
        super().__init__(room, service)
        if os.path.exists("/proc/self"):  # else a keeper before this one did it
            for path in _HIDDEN:
                linux.mount("none", path, "tmpfs", linux.MS_RDONLY, "mode=000,size=4096")
        self._ended, ended = os.pipe()
        os.set_blocking(ended, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # its end is told by a byte in the pipe
        signal.set_wakeup_fd(ended, warn_on_full_buffer=False)

    def _prepare(self, limits: dict[str, float], may_fork: bool) -> None:
        if may_fork:
            raise RuntimeError("only Python runs under gVisor")
        linux.unshare(linux.CLONE_NEWPID)  # of the children from here on; gVisor lets it be done again and again
        size = [f"size={int(limits['tmp_bytes'])}"] if self._settings.has("tmpfs.size") else []
        self._mount_tmp(",".join([*size, "mode=1777"]))

    def _clean_up(self) -> None:
        """Everything ended with the pid namespace; /tmp is looked at before the next test."""

    def _supervise(self, started: Started, limits: dict[str, float], group: object) -> Clocks:
        """Wait for the end of the child or of a budget. The program's clocks start when it is confined."""
        poll = select.poll()
        poll.register(started.ready, select.POLLIN)
        poll.poll(READY_S * 1000)
        clock = linux.process_cpu_clock(started.pid)
        base, cpu, at = _cpu_s(clock, 0.0), 0.0, time.monotonic()
        poll.unregister(started.ready)
        poll.register(self._ended, select.POLLIN)
        poll.register(self._service, select.POLLIN)  # nothing comes while a test runs but the end
        while True:
            wall = time.monotonic() - at
            rests = (limits["cpu_s"] - cpu, limits["wall_s"] - wall, max(limits["idle_s"] / 4, 0.05))
            events = dict(poll.poll(max(min(rests), 0.005) * 1000))
            if self._ended in events:
                os.read(self._ended, 4096)
                if os.waitid(os.P_PID, started.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    return Clocks(None, 0.0, base)
            wall = time.monotonic() - at
            cpu = _cpu_s(clock, cpu + base) - base
            is_gone = self._service.fileno() in events
            reason = "cancelled" if is_gone else exceeded(limits, cpu=cpu, wall=wall, idle=wall - cpu)
            if reason is None:
                continue
            if reason == "cpu":
                os.kill(started.pid, signal.SIGXCPU)
                time.sleep(CPU_GRACE_MS / 1000)
            os.kill(started.pid, signal.SIGKILL)
            return Clocks(reason, 0.0, base)

    def _become_child(
        self, message: dict[str, Any], inputs: list[int], outputs: list[int], ready: int, gate: int
    ) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message["limits"]["memory_bytes"] += STACK_BYTES
        super()._become_child(message, inputs, outputs, ready, gate)

    def _confine(self, may_fork: bool) -> None:
        os.setgroups([])
        os.setresgid(*[namespaces.INNER_ID] * 3)
        os.setresuid(*[namespaces.INNER_ID] * 3)
        linux.drop_capabilities()
        if self._settings.has("seccomp"):
            self._room.filters[may_fork].enforce()


def _cpu_s(clock: int, otherwise: float) -> float:
    with suppress(OSError):  # it has just ended
        return time.clock_gettime(clock)
    return otherwise


def main() -> None:
    """Serve until the pipe ends. Argument: settings as JSON."""
    settings = Settings(**json.loads(sys.argv[1]))
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        control.close()
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1):  # the pipes are the bridge's
            os.dup2(null, fd)
        zygote.serve(theirs, settings, SentryKeeper)
        os._exit(0)
    theirs.close()
    hello, _ = wire.receive(control)
    if not hello:
        sys.exit("the zygote did not start")
    frames.write(1, json.loads(hello))
    _pass_on(control)


def _pass_on(control: socket.socket) -> None:
    keeper: socket.socket | None = None
    while frame := frames.read(0):
        message, inputs = frame
        if message["op"] == "keeper":
            if keeper:
                keeper.close()
            keeper, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                wire.send(control, {"op": "keeper"}, [theirs.fileno()])
            continue
        assert keeper
        files = [_sealed_file(data) for data in inputs]
        wire.send(keeper, message["message"], files)
        _close(files)
        poll = select.poll()
        poll.register(keeper, select.POLLIN)
        poll.register(0, _HUNG_UP)
        if any(fd == 0 for fd, _ in poll.poll()):
            return
        data, outputs = wire.receive(keeper)
        record = json.loads(data) if data else {"error": "the keeper died"}
        frames.write(1, record, [wire.read_from_start(fd, os.fstat(fd).st_size) for fd in outputs])
        _close(outputs)


def _sealed_file(data: bytes) -> int:
    """As ``wire.sealed_file``, which opens its file anew by way of /proc: there is none here."""
    fd = os.memfd_create("in", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    fcntl.fcntl(fd, wire.F_ADD_SEALS, wire.ALL_SEALS)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _close(files: list[int]) -> None:
    for fd in files:
        os.close(fd)
