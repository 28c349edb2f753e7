"""Entering the namespaces of level 2 and building the minimal root. Done once per worker."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Container, Iterable
from contextlib import suppress

from sandbox import linux

DEVICES = ("null", "zero", "full", "random", "urandom")
INNER_ID = 1000
NEW_ROOT = "/mnt"  # exists everywhere; only this process sees what is mounted there
HOST_NAME = "sandbox"
FLAGS = {
    "namespaces.user": linux.CLONE_NEWUSER,
    "namespaces.mount": linux.CLONE_NEWNS,
    "namespaces.net": linux.CLONE_NEWNET,
    "namespaces.ipc": linux.CLONE_NEWIPC,
    "namespaces.uts": linux.CLONE_NEWUTS,
    "namespaces.pid": linux.CLONE_NEWPID,
}


def enter(read_only: Iterable[str], proc: int, without: Container[str]) -> int | None:
    """Become pid 1 of new namespaces on a root of its own. Returns in the inner process.

    Args:
        read_only: trees of the host that are visible in the new root.
        proc: descriptor of the /proc that was there before.
        without: mechanisms that are off (``walls.LEVELS``).

    Returns:
        A descriptor of the inner process's pid namespace. Unprivileged setns to the initial one is refused, to this
        one it is not: that is how a keeper leaves the namespace of one test for the next.
    """
    uid, gid = os.getuid(), os.getgid()  # after unshare both read as the overflow id
    linux.unshare(sum(flag for name, flag in FLAGS.items() if name not in without))
    write_id_maps(uid, gid)
    if "namespaces.uts" not in without:
        with suppress(PermissionError):  # containers deny it to those without capabilities; there the name is their own
            socket.sethostname(HOST_NAME)  # the new namespace starts with the host's
    namespace = None if "namespaces.pid" in without else _become_first(proc)
    if "namespaces.mount" not in without:
        build_root(NEW_ROOT, read_only)
    return namespace


def _become_first(proc: int) -> int:
    pid = os.fork()
    if pid:  # the launcher mirrors the exit status of the inner process
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.closerange(3, 4096)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255)
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.open("self/ns/pid", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)


def write_id_maps(uid: int, gid: int) -> None:
    """Map one user and one group. The kernel reports errors of these files when they are closed."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{INNER_ID} {uid} 1"), ("gid_map", f"{INNER_ID} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def build_root(new: str, read_only: Iterable[str]) -> None:
    """A small read-only tmpfs with binds of ``read_only``, five devices and an empty /tmp."""
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("tmpfs", new, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,nr_inodes=256,mode=755")
    for path in read_only:
        _bind_read_only(path, new + path)
    os.makedirs(new + "/dev", exist_ok=True)
    for name in DEVICES:
        if os.path.exists(f"/dev/{name}"):  # apptainer --containall has no /dev/full
            _touch(f"{new}/dev/{name}")
            linux.mount(f"/dev/{name}", f"{new}/dev/{name}", None, linux.MS_BIND)
    os.makedirs(new + "/tmp", exist_ok=True)
    os.makedirs(new + "/.old")
    linux.pivot_root(new, new + "/.old")
    os.chdir("/")
    linux.umount_detach("/.old")
    os.rmdir("/.old")
    flags = linux.MS_BIND | linux.MS_REMOUNT | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV
    linux.mount(None, "/", None, flags)


def _bind_read_only(source: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source):  # /lib -> usr/lib and the like
        with suppress(FileExistsError):
            os.symlink(os.readlink(source), target)
        return
    if not os.path.exists(source):
        return
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        _touch(target)
    linux.mount(source, target, None, linux.MS_BIND | linux.MS_REC)
    flags = linux.MS_BIND | linux.MS_REMOUNT | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV | linux.MS_REC
    linux.mount(None, target, None, flags)


def _touch(path: str) -> None:
    with open(path, "w"):
        pass
