"""What can this machine do? Every fact is tried for real in a throw-away child, never inferred from a version or sysctl.

python -m sandbox.probe      JSON: the facts, the level reached, what is missing for the next
"""

from __future__ import annotations

import errno
import json
import os
import platform
import select
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from sandbox import gvisor, linux, namespaces
from sandbox.box import Box, delegated
from sandbox.cgroup import Group
from sandbox.interpreter import READ_ONLY, UNPRIVILEGED
from sandbox.limits import DEFAULTS
from sandbox.walls import UNDER_GVISOR

LEVEL_NAMES = ("none", "confined", "namespaced", "namespaced+cgroup", "gvisor")
HIGHEST = UNDER_GVISOR
"""Of the levels that this service can run programs at. It is used only where it is asked for: it is slow."""
_TIMEOUT_MS = 5000
_GVISOR_TIMEOUT_S = 30
_ADVICE = {
    1: "a Linux kernel >= 5.13 with Landlock in its list of security modules (lsm=...,landlock), and no container "
    "profile that denies seccomp or the landlock_* calls",
    2: "user namespaces: sysctl user.max_user_namespaces > 0, kernel.unprivileged_userns_clone=1 (Debian), "
    "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu); in Docker or Kubernetes a seccomp profile that allows "
    "unshare, setns, mount, umount2, pivot_root and clone with namespace flags",
    3: "a directory of cgroup v2 that the service's user owns, named by SBX_CGROUP_ROOT, with memory, pids and cpu among "
    "its controllers and no process of its own: the service runs in a leaf beside the boxes of its workers",
    4: gvisor.ADVICE,
}


class Fact(NamedTuple):
    """One thing that was tried."""

    works: bool
    detail: str
    """What came back, or why it does not work."""


@dataclass(frozen=True)
class Probe:
    """What this machine can do."""

    level: int
    missing: Mapping[str, str]
    """Fact -> reason, for the next level."""
    facts: Mapping[str, Fact]
    kernel: str
    machine: str
    uid: int

    @property
    def name(self) -> str:
        """Name of the level."""
        return LEVEL_NAMES[self.level]

    def shortfall(self, wanted: int) -> str:
        """Why ``wanted`` is out of reach, and what would allow it."""
        lines = [f"isolation level {self.level} ({self.name}) is the best here; at least {wanted} is required"]
        following = wanted if wanted == HIGHEST else self.level + 1
        lines += [f"  - {fact}: {reason}" for fact, reason in _missing(self.facts, following).items()]
        lines += [f"Level {following} needs {_ADVICE[following]}."]
        return "\n".join([*lines, f"Or accept less with --min-level {self.level}."])


def probe() -> Probe:
    """Try everything but gVisor. Takes well under a second where nothing hangs."""
    facts = {action.__name__.strip("_"): _attempt(action) for action in _PROBES}
    level = max(level for level in range(HIGHEST) if not _missing(facts, level))
    unused = {"gvisor": f"used only if --level or --min-level is {HIGHEST}"}
    missing = _missing(facts, level + 1) if level + 1 < HIGHEST else unused
    return Probe(level, missing, facts, platform.release(), platform.machine(), os.getuid())


def with_gvisor(found: Probe) -> Probe:
    """The same, and gVisor tried: level 4 if a program that does nothing runs under it. Takes about a second."""
    fact = _attempt(_gvisor, _GVISOR_TIMEOUT_S * 1000)
    facts = {**found.facts, "gvisor": fact}
    return replace(found, level=HIGHEST, missing={}, facts=facts) if fact.works else replace(found, facts=facts)


def _missing(facts: Mapping[str, Fact], level: int) -> dict[str, str]:
    return {name: facts[name].detail for name in _NEEDED[level] if not facts[name].works}


def _attempt(action: Callable[[], object], timeout_ms: int = _TIMEOUT_MS) -> Fact:
    """Run ``action`` in a forked child."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = Fact(True, str(action()))
        except OSError as error:
            answer = Fact(False, f"{errno.errorcode.get(error.errno or 0, error.errno)}: {error.strerror}")
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the answer
            answer = Fact(False, repr(error))
        try:
            os.write(write, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(write)
    poll = select.poll()
    poll.register(read, select.POLLIN | select.POLLHUP)
    data = os.read(read, 65536) if poll.poll(timeout_ms) else b""
    if not data:
        os.kill(pid, signal.SIGKILL)
    os.close(read)
    os.waitpid(pid, 0)
    return Fact(*json.loads(data)) if data else Fact(False, "the probe died or hung")


def _in_child(action: Callable[[], object]) -> None:
    """Run ``action`` in a child of this process (needed after unshare(CLONE_NEWPID)); raise if it fails."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - a forked child may only exit
            os._exit(9)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError("refused in the child")


def _drop_root() -> None:
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(UNPRIVILEGED)
        os.setuid(UNPRIVILEGED)
        if os.getresuid() != (UNPRIVILEGED,) * 3:  # enroot's filter lets setuid "succeed" without effect
            raise RuntimeError("setuid had no effect")
        linux.prctl(linux.PR_SET_DUMPABLE, 1)  # setuid made /proc/self root's: uid_map would be EACCES


def _enter_user_namespace(further: int = 0) -> None:
    _drop_root()
    uid, gid = os.getuid(), os.getgid()  # read before unshare
    linux.unshare(linux.CLONE_NEWUSER)
    namespaces.write_id_maps(uid, gid)
    if further:
        linux.unshare(further)


def _user_namespace() -> None:
    _enter_user_namespace()


def _mount_in_userns() -> None:
    """Ubuntu 24.04 grants the namespace and refuses the mount in it."""
    _enter_user_namespace(linux.CLONE_NEWNS)
    namespaces.build_root(namespaces.NEW_ROOT, ["/usr"])


def _pid_namespace() -> None:
    _enter_user_namespace(linux.CLONE_NEWPID | linux.CLONE_NEWNS)

    def check() -> None:
        if os.getpid() != 1:
            raise RuntimeError("not pid 1")

    _in_child(check)


def _nested_pid_namespace() -> None:
    _enter_user_namespace(linux.CLONE_NEWPID)

    def nested() -> None:
        linux.unshare(linux.CLONE_NEWPID)
        _in_child(os.getpid)

    _in_child(nested)


def _net_namespace() -> None:
    _enter_user_namespace(linux.CLONE_NEWNET)


def _ipc_and_uts_namespaces() -> None:
    _enter_user_namespace(linux.CLONE_NEWIPC | linux.CLONE_NEWUTS)


def _landlock() -> str:
    abi = linux.landlock_abi()
    if not abi:
        raise OSError(errno.EOPNOTSUPP, "this kernel has no Landlock, or a profile denies it")
    _drop_root()
    rules = linux.Landlock(abi)
    rules.allow_read("/usr")
    rules.enforce()
    try:
        os.close(os.open("/etc/passwd", os.O_RDONLY))
    except PermissionError:
        return f"ABI {abi}"
    raise RuntimeError("Landlock did not deny")


def _seccomp() -> None:
    _drop_root()
    linux.Seccomp(linux.build_filter()).enforce()
    try:
        socket.socket().close()
    except PermissionError:
        return
    raise RuntimeError("the filter did not deny")


def _cgroup_v2() -> str:
    """A box, and in it a group that takes a process and lets it go."""
    parent = delegated()
    box = Box(parent)
    try:
        fd = box.open()
        group = Group(fd, "test", DEFAULTS)
        group.cpu_s()
        group.close()
        os.close(fd)
    finally:
        box.remove()
    return parent


def _schedstat() -> None:
    """Needed for no level: without it the time that a program waits for a core counts as idle."""
    with open("/proc/self/schedstat") as file:
        if len(file.read().split()) != 3:
            raise RuntimeError("has another form")


def _pidfd() -> None:
    os.close(linux.pidfd_open(os.getpid()))


def _gvisor() -> str:
    _drop_root()
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        gvisor.bundle(folder, ["/bin/true"], READ_ONLY, {})
        line = gvisor.command(folder)
        done = subprocess.run(line, capture_output=True, text=True, timeout=_GVISOR_TIMEOUT_S - 5, check=False)
    if done.returncode:
        raise RuntimeError(f"{line[0]} ends with status {done.returncode}: {done.stderr.strip()[-300:]}")
    return line[0]


_PROBES = (
    _user_namespace,
    _mount_in_userns,
    _pid_namespace,
    _nested_pid_namespace,
    _net_namespace,
    _ipc_and_uts_namespaces,
    _landlock,
    _seccomp,
    _cgroup_v2,
    _schedstat,
    _pidfd,
)
_NAMESPACED = (  # Landlock is not among them: the root of a mount namespace hides the files too
    "seccomp",
    "pidfd",
    "user_namespace",
    "mount_in_userns",
    "pid_namespace",
    "nested_pid_namespace",
    "net_namespace",
    "ipc_and_uts_namespaces",
)
_NEEDED = {
    0: (),
    1: ("seccomp", "pidfd", "landlock"),
    2: _NAMESPACED,
    3: (*_NAMESPACED, "cgroup_v2"),
    4: ("gvisor",),
}

if __name__ == "__main__":
    found = probe()
    found = replace(found, facts=with_gvisor(found).facts)
    print(json.dumps({**asdict(found), "name": found.name}, indent=1))
