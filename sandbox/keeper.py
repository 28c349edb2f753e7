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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from sandbox import cgroup, child, linux, wire

CPU_GRACE_MS = 20  # for faulthandler to print where the program was
NEVER_S = 1e6
READY_FD = 4
MAX_FD = 4096
_exit = os._exit  # a program may replace os._exit in its own process


@dataclass(frozen=True)
class Settings:
    """How a worker confines programs."""

    without: list[str]
    """Mechanisms that are off: those of higher levels."""
    read_only: list[str]
    workdir: str
    """Where programs start: the private /tmp of level 2, or an empty directory."""
    box: int | None
    """Descriptor of the worker's control group (level 3)."""

    def has(self, mechanism: str) -> bool:
        """Whether one of ``walls.LEVELS`` is used."""
        return mechanism not in self.without


@dataclass(frozen=True)
class Room:
    """What a keeper inherits from its zygote."""

    settings: Settings
    proc: int
    """Descriptor of the outer /proc."""
    pid_namespace: int | None
    filters: Mapping[bool, linux.Seccomp]
    """For children in a pid namespace; by whether they may fork."""


def filters() -> dict[bool, linux.Seccomp]:
    """Built once: a worker's children share them."""
    return {may_fork: linux.Seccomp(linux.build_filter(may_fork=may_fork)) for may_fork in (False, True)}


class Clocks(NamedTuple):
    """What the clocks of a test said at its end."""

    stopped_by: str | None
    run_delay_s: float
    setup_cpu_s: float = 0.0
    """Not the program's: used before it began, where that is a lot."""


class Started(NamedTuple):
    """The process of a test."""

    pid: int
    ready: int
    """Descriptor; becomes readable when the process is confined."""
    at: float
    """Of ``time.monotonic``."""


class Keeper:
    """Runs tests one after the other, each in a new process."""

    def __init__(self, room: Room, service: socket.socket) -> None:
        self._room, self._service, self._settings = room, service, room.settings
        self._landlock: dict[bool, linux.Landlock] = {}  # by whether a program may start others
        self._num_tests = 0
        self._tmp: tuple[str, int] | None = None  # options of the mounted /tmp, and its ctime when it was new
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        if self._settings.has("undumpable"):
            linux.prctl(linux.PR_SET_DUMPABLE, 0)
        if self._settings.has("capabilities"):
            linux.drop_bounding_set()
        if self._room.pid_namespace is None and self._settings.has("orphans"):
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
        limits = self._clocked(message["limits"])
        may_fork = message["call"].get("language", "python") != "python"
        self._prepare(limits, may_fork)
        group = self._group(limits)
        outputs = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("stdout", "stderr", "result")]
        ready, ready_child = os.pipe()  # the child writes one byte when it is fully confined
        gate, gate_keeper = os.pipe()  # the child waits until it is in its control group
        init = _start_init() if may_fork and self._room.pid_namespace is not None else None
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os.close(gate_keeper)
            self._become_child(message, inputs, outputs, ready_child, gate)
        if group:
            group.add(pid)
        os.write(gate_keeper, b"g")
        for fd in (ready_child, gate, gate_keeper):
            os.close(fd)
        clocks = self._supervise(Started(pid, ready, started), limits, group)
        _, status, usage = os.wait4(pid, 0)
        if init is not None:  # its end is that of its namespace
            os.kill(init, signal.SIGKILL)
            os.waitpid(init, 0)
        record: dict[str, object] = {
            "exit": os.waitstatus_to_exitcode(status),  # negative: killed by that signal
            "stopped_by": clocks.stopped_by,  # None, cpu, idle, wall, cancelled
            "cpu_s": max(usage.ru_utime + usage.ru_stime - clocks.setup_cpu_s, group.cpu_s() if group else 0.0),
            "wall_s": time.monotonic() - started,
            "run_delay_s": clocks.run_delay_s,
            "max_rss_bytes": (group and group.peak_bytes()) or usage.ru_maxrss << 10,
        }
        if not os.read(ready, 1):  # our fault, not the program's: it never ran
            record["error"] = "setup failed: " + wire.read_from_start(outputs[1], 500).decode("utf-8", "replace")
        os.close(ready)
        if group:
            group.close()
        self._clean_up()
        return record, outputs

    def _clocked(self, limits: dict[str, float]) -> dict[str, float]:
        """A clock that is off never stops a program."""
        never = {f"{name}_s": NEVER_S for name in ("cpu", "idle", "wall") if not self._settings.has(f"clocks.{name}")}
        return {**limits, **never}

    def _prepare(self, limits: dict[str, float], may_fork: bool) -> None:
        if self._room.pid_namespace is not None:  # a pid namespace per test: its end kills every descendant
            linux.setns(self._room.pid_namespace, linux.CLONE_NEWPID)
            linux.unshare(linux.CLONE_NEWPID)
        if self._settings.has("namespaces.mount"):
            caps = {
                "tmpfs.size": f"size={int(limits['tmp_bytes'])}",
                "tmpfs.inodes": f"nr_inodes={int(limits['tmp_files'])}",
            }
            self._mount_tmp(",".join([*(text for name, text in caps.items() if self._settings.has(name)), "mode=1777"]))
        if may_fork not in self._landlock and self._settings.has("landlock") and linux.landlock_abi():
            self._landlock[may_fork] = self._rules(may_fork)

    def _group(self, limits: dict[str, float]) -> cgroup.Group | None:
        if self._settings.box is None:
            return None
        self._num_tests += 1
        return cgroup.Group(self._settings.box, f"test-{os.getpid()}-{self._num_tests}", limits)

    def _mount_tmp(self, options: str) -> None:
        """A new /tmp, unless the one that is there is as new: empty, and no entry was ever made in it.

        Its time of change alone does not tell: before Linux 6.13 a clock tick is all that it resolves.
        """
        if self._tmp:
            is_new = self._tmp == (options, os.stat("/tmp").st_ctime_ns) and not os.listdir("/tmp")
            if is_new or not self._settings.has("tmpfs.fresh"):
                return
            linux.umount_detach("/tmp")
            for rules in self._landlock.values():  # they name the old /tmp
                rules.close()
            self._landlock.clear()
        else:
            with suppress(OSError):  # a keeper before this one left its own
                linux.umount_detach("/tmp")
        linux.mount("tmpfs", "/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOATIME, options)
        self._tmp = options, os.stat("/tmp").st_ctime_ns

    def _rules(self, may_fork: bool) -> linux.Landlock:
        rules = linux.Landlock(linux.landlock_abi())
        trees = [path for path in self._settings.read_only if os.path.exists(path)]
        for path in (*trees, "/dev/null", "/dev/zero", "/dev/urandom"):
            if os.path.exists(path):
                rules.allow_read(path)
        if self._settings.has("namespaces.mount"):  # without a tmpfs there is no quota: no writes
            rules.allow_write("/tmp")
            trees.append("/tmp")
        if may_fork:
            for path in trees:
                rules.allow_execute(path)
        return rules

    def _clean_up(self) -> None:
        if self._room.pid_namespace is None and self._settings.has("orphans"):
            self._kill_orphans()
        if self._settings.has("namespaces.mount"):
            return
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
    def _supervise(self, started: Started, limits: dict[str, float], group: cgroup.Group | None) -> Clocks:
        pidfd = linux.pidfd_open(started.pid)
        try:
            return self._watch(started.pid, pidfd, limits, started.at, group)
        finally:
            os.close(pidfd)

    def _watch(
        self, pid: int, pidfd: int, limits: dict[str, float], started: float, group: cgroup.Group | None
    ) -> Clocks:
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
                return Clocks(None, sum(delays.values()))
            wall = time.monotonic() - started
            with suppress(OSError):  # it has just ended
                cpu = group.cpu_s() if group else time.clock_gettime(clock)
            tasks = tasks or f"{self._outer_pid(pid, pidfd)}/task"
            self._add_run_delays(tasks, delays)
            delay = sum(delays.values())
            reason = "cancelled" if events else exceeded(limits, cpu=cpu, wall=wall, idle=wall - cpu - delay)
            if reason is None:
                continue
            with suppress(OSError):
                if reason == "cpu":
                    linux.pidfd_send_signal(pidfd, signal.SIGXCPU)
                    poll.poll(CPU_GRACE_MS)
                linux.pidfd_send_signal(pidfd, signal.SIGKILL)
            return Clocks(reason, delay)

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
    def _become_child(
        self, message: dict[str, Any], inputs: list[int], outputs: list[int], ready: int, gate: int
    ) -> None:
        """Confine this process, then run the program. Never returns."""
        status = 97
        try:
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
            if not os.read(gate, 1):  # the keeper died before the line above
                return
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
            may_fork = call.get("language", "python") != "python"
            if may_fork and self._settings.has("seccomp") and not self._settings.has("namespaces.mount"):
                raise RuntimeError(f"{call['language']} starts processes: that needs isolation level 2")
            if may_fork in self._landlock:
                self._landlock[may_fork].move_up(16)
            kept = [fcntl.fcntl(fd, fcntl.F_DUPFD, 16) for fd in (data, *outputs, ready)]
            for target, fd in enumerate(kept):  # 0 input, 1 stdout, 2 stderr, 3 result, 4 ready
                os.dup2(fd, target)
            os.chdir(self._settings.workdir)
            child.set_limits(message["limits"], self._settings.without)
            self._confine(may_fork)
            if self._settings.has("descriptors"):
                os.closerange(READY_FD + 1, MAX_FD)
            os.write(READY_FD, b"r")
            os.close(READY_FD)
            status = child.run(source, **call)
        except BaseException as error:  # noqa: BLE001 - the keeper tells it from a program's by the missing byte
            with suppress(OSError):
                os.write(2, repr(error).encode())
        finally:
            _exit(status)

    def _confine(self, may_fork: bool) -> None:
        if self._settings.has("capabilities"):
            linux.drop_capabilities()
        if may_fork in self._landlock:
            self._landlock[may_fork].enforce()
        if not self._settings.has("seccomp"):
            linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        elif self._room.pid_namespace is not None:
            self._room.filters[may_fork].enforce()
        else:
            linux.Seccomp(linux.build_filter(os.getpid())).enforce()


def _start_init() -> int:
    """A process 1 that only reaps: as process 1, a program would ignore its own signals, and abort as if by a fault."""
    pid = os.fork()
    if pid:
        return pid
    try:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        os.closerange(0, MAX_FD)
        linux.drop_capabilities()
        while True:
            signal.pause()
    finally:
        _exit(1)


def exceeded(limits: dict[str, float], *, cpu: float, wall: float, idle: float) -> str | None:
    """Name of the first clock that ran out."""
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
