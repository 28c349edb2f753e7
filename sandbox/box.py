"""Where level 3 puts the processes of a worker: a box in a delegated directory of cgroup v2.

DELEGATED/             owned by the service's user; the service itself lives in a leaf beside the boxes
  sandbox-PID-N/       box of a worker
    worker/            zygote and keepers
    test-K/            one test (``cgroup.py``)
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from contextlib import suppress

from sandbox.interpreter import UNPRIVILEGED

VARIABLE = "SBX_CGROUP_ROOT"
CONTROLLERS = "+memory +pids +cpu"
NEEDED = {"memory.max", "pids.max", "cpu.max", "cgroup.kill"}
_EMPTY_S = 5.0
_numbers = itertools.count()


def delegated() -> str:
    """The directory: ``SBX_CGROUP_ROOT``, or for a plain user the group that this process is in.

    Raises:
        OSError: there is none; the text says why.
    """
    named = os.environ.get(VARIABLE)  # noqa: TID251 - a setting of the machine, as CUDA_VISIBLE_DEVICES is
    if named:
        return named
    if os.getuid() == 0:
        raise OSError(errno.ENOENT, f"as root only a directory that {VARIABLE} names is touched")
    with open("/proc/self/cgroup") as file:
        own = [line.strip()[3:] for line in file if line.startswith("0::")]
    with open("/proc/self/mountinfo") as file:
        mounts = [line.split()[4] for line in file if " - cgroup2 " in line]
    if not mounts or not own:
        raise OSError(errno.ENOENT, "no cgroup2 file system is mounted")
    return mounts[0] + own[0]


class Box:
    """The groups of one worker."""

    def __init__(self, parent: str) -> None:
        """Make it.

        Raises:
            OSError: the directory is not delegated, or lacks a controller.
        """
        _write(f"{parent}/cgroup.subtree_control", CONTROLLERS)
        self.path = f"{parent}/sandbox-{os.getpid()}-{next(_numbers)}"
        os.mkdir(self.path)
        try:
            missing = NEEDED - set(os.listdir(self.path))
            if missing:
                raise OSError(errno.ENOSYS, f"{parent} offers no {', '.join(sorted(missing))}")
            os.mkdir(f"{self.path}/worker")
            _write(f"{self.path}/cgroup.subtree_control", CONTROLLERS)
            if os.getuid() == 0:  # the keeper makes the groups of the tests
                for name in ("", "/cgroup.procs", "/cgroup.subtree_control"):
                    os.chown(self.path + name, UNPRIVILEGED, UNPRIVILEGED)
        except BaseException:
            self.remove()
            raise

    def open(self) -> int:
        """A descriptor of the directory."""
        return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def adopt(self, pid: int) -> None:
        """Move a worker's first process into it."""
        _write(f"{self.path}/worker/cgroup.procs", str(pid))

    def remove(self) -> None:
        """Kill what is in it, and remove it."""
        with suppress(OSError):
            _write(f"{self.path}/cgroup.kill", "1")
        end = time.monotonic() + _EMPTY_S
        while os.path.isdir(self.path) and time.monotonic() < end:
            for folder, _, _ in os.walk(self.path, topdown=False):
                with suppress(OSError):  # busy: something in it is still dying
                    os.rmdir(folder)
            time.sleep(0.002)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
