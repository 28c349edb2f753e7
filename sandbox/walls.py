"""The mechanisms that confine a program, by name, and the isolation level from which each is used."""

from __future__ import annotations

from collections.abc import Collection, Mapping

LEVELS: Mapping[str, int] = {
    "identity": 0,  # root gives its rights up
    "environment": 0,  # nothing of the service's is inherited
    "descriptors": 0,  # all above 3 are closed
    "undumpable": 0,  # the keeper: its memory and descriptors are nobody's to open
    "orphans": 0,  # what a test left running is killed
    "clocks.cpu": 0,
    "clocks.idle": 0,
    "clocks.wall": 0,
    "rlimits.as": 0,
    "rlimits.core": 0,
    "rlimits.cpu": 0,
    "rlimits.fsize": 0,
    "rlimits.memlock": 0,
    "rlimits.msgqueue": 0,
    "rlimits.nofile": 0,
    "rlimits.nproc": 0,
    "seccomp": 1,
    "landlock": 1,
    "namespaces.user": 2,
    "namespaces.mount": 2,
    "namespaces.pid": 2,
    "namespaces.net": 2,
    "namespaces.ipc": 2,
    "namespaces.uts": 2,
    "capabilities": 2,  # those of the user namespace are dropped
    "tmpfs.fresh": 2,  # a /tmp per test
    "tmpfs.inodes": 2,
    "tmpfs.size": 2,
    "cgroup": 3,
}
UNDER_GVISOR = 4
NOT_UNDER_GVISOR = frozenset(
    {
        "landlock",  # not known to its kernel, and only the bundle's trees are there
        "namespaces.user",
        "namespaces.mount",
        "namespaces.net",
        "namespaces.ipc",
        "namespaces.uts",
        "orphans",  # they end with the pid namespace
        "rlimits.msgqueue",
        "tmpfs.inodes",
        "cgroup",
    }
)
"""gVisor is the wall in their place, or its kernel has none of the kind."""


def absent(level: int, without: Collection[str]) -> list[str]:
    """The mechanisms that a worker of this level does not use.

    Raises:
        ValueError: ``without`` names none of them.
    """
    unknown = set(without) - LEVELS.keys()
    if unknown:
        raise ValueError(f"without: {sorted(unknown)} are no mechanisms; these are: {', '.join(LEVELS)}")
    off = {*without, *(name for name, lowest in LEVELS.items() if lowest > level)}
    if level == UNDER_GVISOR:
        return sorted(off | NOT_UNDER_GVISOR)
    if "namespaces.user" in off:  # an unprivileged user gets the others through it alone
        off |= {name for name in LEVELS if name.startswith(("namespaces.", "tmpfs.", "capabilities"))}
    if "namespaces.mount" in off:
        off |= {name for name in LEVELS if name.startswith("tmpfs.")}
    return sorted(off)
