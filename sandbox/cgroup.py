"""The control group of one test (level 3, cgroup v2). Used by the keeper, in the box of its worker (``box.py``).

A process can move itself to any group that its user may write, so no such file system is visible inside: the keeper
holds a descriptor of its box, the program none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress

PERIOD_US = 100_000
_EMPTY_S = 5.0


class Group:
    """One test in a group of its own: memory.peak cannot be reset before Linux 6.12."""

    def __init__(self, box: int, name: str, limits: Mapping[str, float]) -> None:
        """Make it below the directory ``box``.

        Raises:
            OSError: the box is gone, or lacks a controller.
        """
        os.mkdir(name, dir_fd=box)
        self._box, self._name = box, name
        self._fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=box)
        self._write("memory.max", memory_bytes(limits))
        self._write("memory.oom.group", 1)
        with suppress(FileNotFoundError):  # a kernel without swap accounting
            self._write("memory.swap.max", 0)
        self._write("pids.max", int(limits["pids"]))
        # one core: however many processes there are, their CPU time grows no faster than wall time
        self._write("cpu.max", f"{PERIOD_US} {PERIOD_US}")

    def add(self, pid: int) -> None:
        """Move a process into it."""
        self._write("cgroup.procs", pid)

    def cpu_s(self) -> float:
        """CPU time of everything that ran in it."""
        return int(self._fields("cpu.stat")["usage_usec"]) / 1e6

    def peak_bytes(self) -> int | None:
        """The most memory at a time, files in /tmp included; None before Linux 5.19."""
        with suppress(FileNotFoundError):
            return int(self._read("memory.peak"))
        return None

    def close(self) -> None:
        """Kill what is in it and remove it.

        Raises:
            OSError: something outlives SIGKILL.
        """
        self._write("cgroup.kill", 1)
        end = time.monotonic() + _EMPTY_S
        while self._fields("cgroup.events")["populated"] != "0" and time.monotonic() < end:
            time.sleep(0.002)
        os.close(self._fd)
        os.rmdir(self._name, dir_fd=self._box)

    def _fields(self, name: str) -> dict[str, str]:
        words = self._read(name).split()
        return dict(zip(words[::2], words[1::2], strict=True))

    def _read(self, name: str) -> str:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            return os.read(fd, 65536).decode()
        finally:
            os.close(fd)

    def _write(self, name: str, value: object) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            os.write(fd, str(value).encode())
        finally:
            os.close(fd)


def memory_bytes(limits: Mapping[str, float]) -> int:
    """What a group may hold: the program, its /tmp and its three outputs are all memory."""
    return int(limits["memory_bytes"] + limits["tmp_bytes"] + 3 * limits["output_bytes"])
