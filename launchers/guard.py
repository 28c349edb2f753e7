"""Runs one command and takes everything that descends from it along when it ends, or when the parent dies.

    python -I -S guard.py PARENT_PID PID_FD COMMAND...

Process groups are not enough: torchrun starts each worker in a session of its own, and a worker outlives a torchrun that
was killed. So the guard adopts orphans (PR_SET_CHILD_SUBREAPER) and kills whatever is left below it. It learns of the
death of its parent from the kernel (PR_SET_PDEATHSIG), also when that was SIGKILL; its child dies with it in the same way.

    SIGINT, SIGTERM    are passed on to the command's process group, which is continued first: it may be stopped
    SIGUSR2            kills the command and everything below it at once; also what the death of the parent sends

Writes the pid of the command, which leads a session and a group of its own, to PID_FD. Exit code: that of the command,
128 + n after signal n. Standard library only, and few of its modules: it is started once per process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
KILL_NOW = signal.SIGUSR2
_PASSED_ON = (signal.SIGINT, signal.SIGTERM)
_KILL_DEADLINE_S = 10.0


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process.

    Raises:
        OSError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def descendants(root: int) -> list[int]:
    """Every living process below ``root``."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _parent(pid: str) -> int | None:
    try:
        with open(f"/proc/{pid}/stat") as file:
            # the name in parentheses may hold anything; after it: state, parent
            state, parent = file.read().rpartition(")")[2].split()[:2]
    except (OSError, ValueError):
        return None
    return None if state == "Z" else int(parent)


def kill_descendants() -> None:
    """Kill and reap everything below this process; orphans that turn up meanwhile as well."""
    deadline = time.monotonic() + _KILL_DEADLINE_S
    while time.monotonic() < deadline:
        below = descendants(os.getpid())
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        while _reap_one() is not None:
            pass
        if not below:
            return
        time.sleep(0.01)


def _reap_one() -> tuple[int, int] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def _start(command: list[str], watched: set[signal.Signals]) -> int:
    guard = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(137)
        for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored_by_python, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"cannot run {command[0]}: {error}\n".encode())
    os._exit(127)


def _wait(child: int, watched: set[signal.Signals]) -> int:
    while True:
        signum = signal.sigwait(watched)
        if signum in _PASSED_ON:
            for wanted in (signal.SIGCONT, signum):
                try:
                    os.killpg(child, wanted)
                except OSError:
                    break
        elif signum == KILL_NOW:
            return 128 + signal.SIGKILL
        else:
            while (ended := _reap_one()) is not None:
                if ended[0] == child:
                    code = os.waitstatus_to_exitcode(ended[1])
                    return code if code >= 0 else 128 - code


def main(argv: list[str]) -> int:
    """Run ``argv[2:]`` and return its exit code."""
    parent, pid_fd, command = int(argv[0]), int(argv[1]), argv[2:]
    watched = {signal.SIGCHLD, KILL_NOW, *_PASSED_ON}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    for signum in watched:
        signal.signal(
            signum, signal.SIG_DFL
        )  # an ignored signal, as a shell's background job has it, cannot be waited for
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, KILL_NOW)
    if os.getppid() != parent:
        return 128 + signal.SIGKILL
    os.set_inheritable(pid_fd, False)
    child = _start(command, watched)
    os.write(pid_fd, f"{child}\n".encode())
    os.close(pid_fd)
    code = _wait(child, watched)
    kill_descendants()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
