"""The trusted supervisor of a worker: takes one test at a time, forks a child for it, watches its clocks.

A keeper never reads code, inputs or outputs: they pass through it as descriptors. If the service goes away, the keeper's
socket closes and everything below it is torn down.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from sandbox import child, linux, wire

CPU_GRACE_MS = 20  # for faulthandler to print where the program was
READY_FD = 4
MAX_FD = 4096
_exit = os._exit  # a program may replace os._exit in its own process


@dataclass(frozen=True)
class Settings:
    """How a worker confines programs."""

    is_namespaced: bool
    has_landlock: bool
    has_seccomp: bool
    read_only: list[str]
    workdir: str
    """Where programs start: the private /tmp of level 2, or an empty directory."""


@dataclass(frozen=True)
class Room:
    """What a keeper inherits from its zygote."""

    settings: Settings
    proc: int
    """Descriptor of the outer /proc."""
    pid_namespace: int | None
    filter: linux.Seccomp
    """For children in a pid namespace."""


class _Clocks(NamedTuple):
    stopped_by: str | None
    run_delay_s: float


class Keeper:
    """Runs tests one after the other, each in a new process."""

    def __init__(self, room: Room, service: socket.socket) -> None:
        self._room, self._service, self._settings = room, service, room.settings
        self._landlock: linux.Landlock | None = None
        self._tmp: tuple[str, int] | None = None  # options of the mounted /tmp, and its ctime when it was new
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
        if self._settings.is_namespaced:
            linux.drop_bounding_set()
        else:
            linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)

    def serve(self) -> None:
        """Until the service closes the socket."""
        while True:
            data, fds = wire.receive(self._service)
            if not data:
                return
            record, outputs = self._run(json.loads(data), fds)
            wire.send(self._service, record, outputs)
            for fd in (*fds, *outputs):
                os.close(fd)

    # ------------------------------------------------------------------------------------- one test
    def _run(self, message: dict[str, Any], inputs: list[int]) -> tuple[dict[str, object], list[int]]:
        limits = message["limits"]
        self._prepare(limits)
        outputs = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("stdout", "stderr", "result")]
        ready, ready_child = os.pipe()  # the child writes one byte when it is fully confined
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            self._become_child(message, inputs, outputs, ready_child)
        os.close(ready_child)
        pidfd = linux.pidfd_open(pid)
        try:
            clocks = self._watch(pid, pidfd, limits, started)
        finally:
            os.close(pidfd)
        _, status, usage = os.wait4(pid, 0)
        record: dict[str, object] = {
            "exit": os.waitstatus_to_exitcode(status),  # negative: killed by that signal
            "stopped_by": clocks.stopped_by,  # None, cpu, idle, wall, cancelled
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "wall_s": time.monotonic() - started,
            "run_delay_s": clocks.run_delay_s,
            "max_rss_bytes": usage.ru_maxrss << 10,
        }
        if not os.read(ready, 1):  # our fault, not the program's: it never ran
            record["error"] = "setup failed: " + wire.read_from_start(outputs[1], 500).decode("utf-8", "replace")
        os.close(ready)
        self._clean_up()
        return record, outputs

    def _prepare(self, limits: dict[str, float]) -> None:
        if self._room.pid_namespace is not None:  # a pid namespace per test: its end kills every descendant
            linux.setns(self._room.pid_namespace, linux.CLONE_NEWPID)
            linux.unshare(linux.CLONE_NEWPID)
            self._mount_tmp(f"size={int(limits['tmp_bytes'])},nr_inodes={int(limits['tmp_files'])},mode=1777")
        if self._landlock is None and self._settings.has_landlock:
            self._landlock = self._rules()

    def _mount_tmp(self, options: str) -> None:
        """A new /tmp, unless the one that is there is as new: no entry was ever made in it."""
        if self._tmp:
            if self._tmp == (options, os.stat("/tmp").st_ctime_ns):
                return
            linux.umount_detach("/tmp")
            if self._landlock:  # it names the old /tmp
                self._landlock.close()
                self._landlock = None
        linux.mount("tmpfs", "/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOATIME, options)
        self._tmp = options, os.stat("/tmp").st_ctime_ns

    def _rules(self) -> linux.Landlock | None:
        abi = linux.landlock_abi()
        if not abi:
            return None
        rules = linux.Landlock(abi)
        for path in (*self._settings.read_only, "/dev/null", "/dev/zero", "/dev/urandom"):
            if os.path.exists(path):
                rules.allow_read(path)
        if self._settings.is_namespaced:  # without a tmpfs there is no quota: no writes
            rules.allow_all("/tmp")
        return rules

    def _clean_up(self) -> None:
        if self._settings.is_namespaced:
            return
        self._kill_orphans()
        for name in os.listdir(self._settings.workdir):  # level 0 only: Landlock lets nobody write there
            path = os.path.join(self._settings.workdir, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)

    def _kill_orphans(self) -> None:
        """Without a pid namespace: as subreaper, kill whatever was re-parented to us."""
        for _ in range(200):
            pids = _read_at(self._room.proc, f"self/task/{os.getpid()}/children").split()
            if not pids:
                return
            for pid in map(int, pids):
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)

    # ---------------------------------------------------------------------------------------- clocks
    def _watch(self, pid: int, pidfd: int, limits: dict[str, float], started: float) -> _Clocks:
        """Wait for the end of the child or of a budget, and stop the child in the second case."""
        clock, cpu = linux.process_cpu_clock(pid), 0.0
        tasks, delays = "", dict[str, float]()
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(self._service, select.POLLRDHUP)  # a cancelled job must not burn its whole budget
        while True:
            wall = time.monotonic() - started
            # CPU time grows no faster than wall time on one core, so this sleep cannot overshoot by much
            rests = (limits["cpu_s"] - cpu, limits["wall_s"] - wall, max(limits["idle_s"] / 4, 0.05))
            events = dict(poll.poll(max(min(rests), 0.001) * 1000 + 1))
            if pidfd in events:
                return _Clocks(None, sum(delays.values()))
            wall = time.monotonic() - started
            with suppress(OSError):  # it has just ended
                cpu = time.clock_gettime(clock)
            tasks = tasks or f"{self._outer_pid(pid, pidfd)}/task"
            self._add_run_delays(tasks, delays)
            delay = sum(delays.values())
            reason = "cancelled" if events else _exceeded(limits, cpu=cpu, wall=wall, idle=wall - cpu - delay)
            if reason is None:
                continue
            with suppress(OSError):
                if reason == "cpu":
                    linux.pidfd_send_signal(pidfd, signal.SIGXCPU)
                    poll.poll(CPU_GRACE_MS)
                linux.pidfd_send_signal(pidfd, signal.SIGKILL)
            return _Clocks(reason, delay)

    def _add_run_delays(self, tasks: str, delays: dict[str, float]) -> None:
        """Seconds spent runnable but not running, per thread: the machine's fault, not the program's.

        Over all threads, the ended ones included: the process's own schedstat is its main thread's alone.
        """
        for thread in _list_at(self._room.proc, tasks):
            text = _read_at(self._room.proc, f"{tasks}/{thread}/schedstat")
            if text:
                delays[thread] = int(text.split()[1]) / 1e9

    def _outer_pid(self, pid: int, pidfd: int) -> int:
        """The child's pid as the retained /proc sees it: that /proc may belong to an outer pid namespace."""
        for line in _read_at(self._room.proc, f"self/fdinfo/{pidfd}").splitlines():
            if line.startswith("Pid:"):
                return int(line.split()[1])
        return pid

    # ------------------------------------------------------------------------- in the forked child
    def _become_child(self, message: dict[str, Any], inputs: list[int], outputs: list[int], ready: int) -> None:
        """Confine this process, then run the program. Never returns."""
        status = 97
        try:
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
            # if memory runs out, the kernel takes this process and not the service; raising needs no privilege,
            # but /proc/self belongs to root while the process is undumpable, which it inherits from the keeper
            linux.prctl(linux.PR_SET_DUMPABLE, 1)
            _write_at(self._room.proc, "self/oom_score_adj", "1000")
            os.setsid()
            code, data = inputs
            source = wire.read_from_start(code, os.fstat(code).st_size).decode("utf-8", "surrogatepass")
            call = message["call"]
            if call["mode"] == "functional":
                call["input"] = wire.read_from_start(data, os.fstat(data).st_size).decode("utf-8", "surrogatepass")
            if self._landlock:
                self._landlock.move_up(16)
            kept = [fcntl.fcntl(fd, fcntl.F_DUPFD, 16) for fd in (data, *outputs, ready)]
            for target, fd in enumerate(kept):  # 0 input, 1 stdout, 2 stderr, 3 result, 4 ready
                os.dup2(fd, target)
            os.chdir(self._settings.workdir)
            child.set_limits(message["limits"])
            self._confine()
            os.closerange(READY_FD + 1, MAX_FD)
            os.write(READY_FD, b"r")
            os.close(READY_FD)
            status = child.run(source, **call)
        except BaseException as error:  # noqa: BLE001 - the keeper tells it from a program's by the missing byte
            with suppress(OSError):
                os.write(2, repr(error).encode())
        finally:
            _exit(status)

    def _confine(self) -> None:
        if self._settings.is_namespaced:
            linux.drop_capabilities()
        if self._landlock:
            self._landlock.enforce()
        if not self._settings.has_seccomp:
            linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        elif self._settings.is_namespaced:
            self._room.filter.enforce()
        else:
            linux.Seccomp(linux.build_filter(os.getpid())).enforce()


def _exceeded(limits: dict[str, float], *, cpu: float, wall: float, idle: float) -> str | None:
    if cpu >= limits["cpu_s"]:
        return "cpu"
    if idle > limits["idle_s"]:
        return "idle"
    if wall > limits["wall_s"]:
        return "wall"
    return None


def _read_at(directory: int, path: str) -> str:
    """Text of a /proc file, empty if it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return ""
    try:
        return os.read(fd, 65536).decode()
    except OSError:
        return ""
    finally:
        os.close(fd)


def _list_at(directory: int, path: str) -> list[str]:
    """Names in a /proc directory, none if it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return []
    try:
        return os.listdir(fd)
    except OSError:
        return []
    finally:
        os.close(fd)


def _write_at(directory: int, path: str, text: str) -> None:
    with suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
