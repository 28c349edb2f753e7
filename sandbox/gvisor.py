"""Outside of gVisor (level 4): starts a worker under ``runsc`` and passes its messages on.

    service --SEQPACKET--> this process --pipes--> runsc: bridge --SEQPACKET--> zygote, keeper, child

Takes the place of a zygote, so that the service sees no difference. It ends with the service, and runsc with it.
"""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from sandbox import frames, linux, wire

RUNSC = ("/usr/local/bin/runsc", "/usr/bin/runsc")
ADVICE = "runsc, of gVisor, where every user can run it (Debian: apt-get install runsc), and user namespaces"
ARCHIVE = "/sandbox.zip"
_INSIDE = f"import sys; sys.path[0] = {ARCHIVE!r}; from sandbox.bridge import main; main()"
STACK_BYTES = 128 << 20
"""Of the main thread: gVisor's most, mapped at once, so that it counts as address space."""
_KEPT = (
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_ADMIN",
)  # of gVisor's kernel, not of the host's


def find() -> str:
    """Where runsc is.

    Raises:
        FileNotFoundError: nowhere.
    """
    for path in RUNSC:
        if os.access(path, os.X_OK):
            return path
    raise FileNotFoundError(errno.ENOENT, f"no runsc at {' or '.join(RUNSC)}")


def bundle(folder: str, arguments: Sequence[str], read_only: Sequence[str], environment: Mapping[str, str]) -> None:
    """Write to ``folder`` what runsc is to run: ``arguments`` on a root of ``read_only`` and of our archive, if there."""
    root = f"{folder}/rootfs"
    os.mkdir(root)
    os.mkdir(f"{folder}/state")
    mounts: list[dict[str, object]] = [{"destination": "/proc", "type": "proc", "source": "proc"}]
    if os.path.exists(f"{folder}{ARCHIVE}"):
        mounts.append(_bind(f"{folder}{ARCHIVE}", ARCHIVE))
    for path in read_only:
        if os.path.islink(path):  # /lib -> usr/lib and the like
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path):
            mounts.append(_bind(path, path))
    stack = {"type": "RLIMIT_STACK", "soft": STACK_BYTES, "hard": STACK_BYTES}
    process = {
        "user": {"uid": 0, "gid": 0},  # of the bridge, the zygote and the keeper; a program gets another
        "args": list(arguments),
        "env": [f"{name}={value}" for name, value in environment.items()],
        "cwd": "/",
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _KEPT),
        "rlimits": [stack],
        "noNewPrivileges": True,
    }
    spec = {
        "ociVersion": "1.0.0",
        "process": process,
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "sandbox",
        "mounts": mounts,
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")]},
    }
    with open(f"{folder}/config.json", "w") as file:
        json.dump(spec, file)


def _bind(source: str, target: str) -> dict[str, object]:
    return {"destination": target, "type": "bind", "source": source, "options": ["rbind", "ro"]}


def command(folder: str) -> list[str]:
    """The line that runs a bundle, as a plain user. Never with KVM: it hangs where it is emulated."""
    state = f"--root={folder}/state"
    flags = ["--rootless", "--network=none", "--ignore-cgroups", state]
    return [find(), *flags, "run", f"--bundle={folder}", f"worker-{os.getpid()}"]


class _Inside(NamedTuple):
    """What runs under runsc."""

    pid: int
    into: int
    out_of: int


def main() -> None:
    """Serve until the control socket closes. Arguments: descriptor of the control socket, settings as JSON."""
    control = socket.socket(fileno=int(sys.argv[1]))
    given = json.loads(sys.argv[2])
    folder = given["folder"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # the folder goes, whatever this process waits for
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        try:
            _work(control, given, folder)
        finally:  # the service's end closes the socket first and sends the signal then: not into the middle of removing
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _work(control: socket.socket, given: Mapping[str, Any], folder: str) -> None:
    try:
        shutil.copyfile(sys.argv[0], folder + ARCHIVE)
        settings = json.dumps(given["settings"])
        arguments = [given["python"], "-s", "-S", "-c", _INSIDE, settings]
        bundle(folder, arguments, given["settings"]["read_only"], os.environ)  # noqa: TID251 - the worker's own
        inside = _start(command(folder), f"{folder}/log")
    except OSError as error:
        wire.send(control, {"error": f"runsc: {error}"})
        return
    try:
        _serve(control, inside, folder)
    except BrokenPipeError:  # gVisor ended, or the service
        pass
    finally:
        os.kill(inside.pid, signal.SIGKILL)
        os.waitpid(inside.pid, 0)  # it writes to the folder while it lives


def _start(line: Sequence[str], log: str) -> _Inside:
    theirs_in, into = os.pipe()
    out_of, theirs_out = os.pipe()
    errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    pid = os.fork()
    if pid == 0:
        try:
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
            for target, fd in enumerate((theirs_in, theirs_out, errors)):
                os.dup2(fd, target)
            os.execv(line[0], [*line])
        finally:
            os._exit(127)
    for fd in (theirs_in, theirs_out, errors):
        os.close(fd)
    return _Inside(pid, into, out_of)


def _serve(control: socket.socket, inside: _Inside, folder: str) -> None:
    hello = _answer(inside)
    if hello is None:
        with open(f"{folder}/log", errors="replace") as log:
            wire.send(control, {"error": f"runsc ended: {log.read()[-2000:].strip()}"})
        return
    wire.send(control, {**hello[0], "uids": os.getresuid()})
    keeper: socket.socket | None = None
    while True:
        awaited = [control, *([keeper] if keeper else [])]
        poll = select.poll()
        for sock in awaited:
            poll.register(sock, select.POLLIN)
        ready = dict(poll.poll())
        if control.fileno() in ready:
            message, fds = wire.receive(control)
            if not message:
                return
            if keeper:
                keeper.close()
            keeper = socket.socket(fileno=fds[0])
            frames.write(inside.into, {"op": "keeper"})
        elif keeper:
            data, fds = wire.receive(keeper)
            if not data:
                keeper.close()
                keeper = None
            elif not _run(control, keeper, inside, json.loads(data), fds):
                return


def _run(
    control: socket.socket, keeper: socket.socket, inside: _Inside, message: Mapping[str, Any], fds: Sequence[int]
) -> bool:
    """One test. False if the service hung up, or gVisor ended."""
    inputs = [wire.read_from_start(fd, os.fstat(fd).st_size) for fd in fds]
    for fd in fds:
        os.close(fd)
    frames.write(inside.into, {"op": "run", "message": message}, inputs)
    poll = select.poll()
    poll.register(inside.out_of, select.POLLIN)
    for sock in (control, keeper):
        poll.register(sock, select.POLLRDHUP)
    if not all(event & select.POLLIN for _, event in poll.poll()):
        return False
    found = _answer(inside)
    if found is None:
        return False
    record, outputs = found
    files = [wire.sealed_file(output) for output in outputs]
    with suppress(BrokenPipeError):
        wire.send(keeper, record, files)
    for fd in files:
        os.close(fd)
    return True


def _answer(inside: _Inside) -> tuple[dict[str, Any], list[bytes]] | None:
    try:
        return frames.read(inside.out_of)
    except frames.Broken:
        return None
