"""The languages of programs, as a table: how each is compiled and run, and which limits differ.

Python runs in a fork of the worker's own interpreter. The others are programs of their own, started inside the same walls;
they need a file system of their own, so isolation level 2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, NamedTuple

from sandbox import limits as limits_

LOWEST_LEVEL, HIGHEST_LEVEL = 2, 3


class Language(NamedTuple):
    """One row. Commands are run in the private /tmp."""

    source: str
    """Name of the file that holds the program."""
    compile: tuple[str, ...] = ()
    """Makes the file ``program``; empty: there is nothing to make."""
    run: tuple[str, ...] = ()
    """Empty: the worker's own Python."""
    memory: Literal["address space", "data"] = "address space"
    """What is limited: an engine that reserves much and uses little is limited by its data."""
    stack_bytes: int = 1 << 30
    pids: int | None = None
    """Processes and threads; None: as many as the request allows."""
    memory_marks: tuple[str, ...] = ()
    """What it says on stderr when it ends for want of memory."""


LANGUAGES: Mapping[str, Language] = {
    "python": Language("solution.py"),
    "cpp": Language(
        "main.cpp",
        ("/usr/bin/g++", "-std=gnu++20", "-O2", "-pipe", "-fmax-errors=3", "-o", "program", "main.cpp"),
        ("./program",),
        stack_bytes=256 << 20,
        pids=1,
        memory_marks=("std::bad_alloc", "std::bad_array_new_length"),
    ),
    "javascript": Language(
        "main.js",
        run=("/usr/bin/node", "main.js"),
        memory="data",
        stack_bytes=8 << 20,  # of each of its threads
        memory_marks=("heap out of memory", "Array buffer allocation failed"),
    ),
}
COMPILE_LIMITS: Mapping[str, float] = {
    **limits_.DEFAULTS,
    "cpu_s": 20.0,
    "idle_s": 60.0,  # a compiler's driver waits for the compiler
    "wall_s": 60.0,
    "memory_bytes": 2 << 30,
    "output_bytes": 64 << 20,
    "tmp_bytes": 128 << 20,
}


def available(level: int = LOWEST_LEVEL) -> dict[str, str]:
    """By language, empty where it can be used, else the reason why not."""
    return {name: _reason(language, level) for name, language in LANGUAGES.items()}


def _reason(language: Language, level: int) -> str:
    if not language.run:
        return ""
    if level < LOWEST_LEVEL:
        return f"needs isolation level {LOWEST_LEVEL}, and this is level {level}"
    if level > HIGHEST_LEVEL:
        return f"only python runs at isolation level {level}"
    tools = [command[0] for command in (language.compile, language.run) if command and command[0].startswith("/")]
    missing = [tool for tool in tools if not os.access(tool, os.X_OK)]
    return f"{missing[0]} is not there" if missing else ""


def run_limits(language: Language, limits: Mapping[str, float]) -> dict[str, float]:
    """The limits of a test as the kernel is told them; ``data_bytes`` takes the place of the address space."""
    data = {"data_bytes": limits["memory_bytes"]} if language.memory == "data" else {}
    pids = limits["pids"] if language.pids is None else min(language.pids, limits["pids"])
    return {**limits, **data, "pids": pids}
