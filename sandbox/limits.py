"""Limits of one test: names, defaults, floors and ceilings."""

from __future__ import annotations

from collections.abc import Mapping

DEFAULTS: Mapping[str, float] = {
    "cpu_s": 6.0,
    "idle_s": 12.0,  # waiting, not computing: 2 x cpu_s
    "wall_s": 70.0,  # the last resort: 10 x cpu_s + 10
    "memory_bytes": 512 << 20,
    "pids": 64,  # threads: a program is one process
    "output_bytes": 8 << 20,  # each output, and each file
    "tmp_bytes": 16 << 20,
    "tmp_files": 1024,
}
CEILINGS: Mapping[str, float] = {
    "cpu_s": 60.0,
    "idle_s": 120.0,
    "wall_s": 610.0,
    "memory_bytes": 4 << 30,
    "pids": 256,
    "output_bytes": 64 << 20,
    "tmp_bytes": 256 << 20,
    "tmp_files": 65536,
}
FLOORS: Mapping[str, float] = {
    "cpu_s": 0.05,  # below it the clock can stop a program before it has begun, and that is a fault of the sandbox
    "idle_s": 0.1,
    "wall_s": 0.1,
    "memory_bytes": 16 << 20,
    "pids": 1,
    "output_bytes": 1,
    "tmp_bytes": 4096,
    "tmp_files": 1,
}


def complete(given: Mapping[str, float], ceilings: Mapping[str, float] = CEILINGS) -> dict[str, float]:
    """Every limit. Idle and wall time follow the CPU time unless they are given; no default is above its ceiling."""
    defaults = {name: min(value, ceilings[name]) for name, value in following(DEFAULTS, given).items()}
    return {**defaults, **given}


def following(base: Mapping[str, float], given: Mapping[str, float]) -> dict[str, float]:
    """``base`` with what is given; idle and wall time follow the CPU time unless they are given."""
    cpu = given.get("cpu_s", base["cpu_s"])
    return {**base, "idle_s": 2 * cpu, "wall_s": 10 * cpu + 10, **given}


def is_whole(name: str) -> bool:
    """Whether a limit counts something: 0.5 of it would be 0, and 0 is no limit for a file system."""
    return not name.endswith("_s")
