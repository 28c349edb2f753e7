"""What an attack is: a program, the verdicts it may get, and the mechanisms that stop it.

A program that gets something it must not get prints BREACH or leaves a file at @TRACE@; the expected answer, files and
an environment variable hold a random FLAG-... text. An attack is answered when its verdict is one of those listed and
nothing of that shows up. It is seen to succeed once all mechanisms that it names are switched off.

Every program is bounded (some CPU seconds, 256 MiB, 20 processes, ...): a sandbox that does not hold costs seconds.
"""

from __future__ import annotations

import json
import secrets
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ANSWER = f"FLAG-{secrets.token_hex(6)}"  # the expected output: must never be visible to a program
ENVIRONMENT_SECRET = f"FLAG-{secrets.token_hex(6)}"  # in the environment of whoever starts the service
MARKS = ("BREACH", "FLAG-")

HARNESS = "judge.outside"
"""The verdict is made outside of the program's process, from plain data, with an answer that never enters it."""
PROCESS = "judge.process"
"""What the program does to its process is done to no judge."""
LIMITS = "judge.limits"
"""Limits come before the output."""
BOUNDS = "judge.bounds"
"""The decoder of results is bounded and fails into a verdict."""
SEALS = "seals"
"""Inputs are sealed memory files."""
OF_THE_JUDGE = (HARNESS, PROCESS, LIMITS, BOUNDS, SEALS)


@dataclass(frozen=True)
class Attack:
    name: str
    verdicts: tuple[str, ...]
    code: str
    stopped_by: tuple[str, ...] = ()
    """Of ``walls.LEVELS`` and ``OF_THE_JUDGE``; each alone is enough. Empty: a control."""
    mode: str = "stdin"
    fn: str = ""
    tests: tuple[tuple[str, str], ...] = (("1\n", ANSWER),)
    limits: Mapping[str, float] = field(default_factory=dict)
    level: int = 1
    """Lowest isolation level that promises this."""
    before: str = ""
    """A program that the same worker runs first."""
    lag_s: float = 0.0
    """It strikes so long after its end."""

    @property
    def every_limit(self) -> dict[str, float]:
        return {"wall_s": 120.0, "idle_s": 4.0, **self.limits}

    @property
    def body(self) -> dict[str, Any]:
        """The request."""
        tests = [{"input": test_input, "output": output} for test_input, output in self.tests]
        body = {"code": self.code, "mode": self.mode, "tests": tests, "limits": self.every_limit, "prelude": False}
        return {**body, "fn": self.fn} if self.fn else body

    def loot(self, texts: list[str]) -> str:
        """What it got, of all that it gave back; the lines that quote its source do not count."""
        source = {line.strip() for line in self.code.splitlines()}
        printed = "\n".join(line for line in "\n".join(texts).splitlines() if line.strip() not in source)
        return next((f"{mark} in {printed[-300:]!r}" for mark in MARKS if mark in printed), "")

    def findings(self, answer: Mapping[str, Any], level: int) -> list[str]:
        """What is wrong with an answer of the service."""
        if answer.get("status") != "ok":
            return [f"no verdict: {answer}"]
        if level < self.level:
            return []
        row = answer["tests"][-1]
        loot = self.loot([str(test[key]) for test in answer["tests"] for key in ("stdout", "stderr", "got")])
        found = [f"{row['verdict']} ({row['why']}), not one of {self.verdicts}"]
        return (found if row["verdict"] not in self.verdicts else []) + ([loot] if loot else [])


class Attacks(list[Attack]):
    """Grows by being called."""

    def __call__(self, name: str, verdicts: str, code: str, stopped_by: str = "", **options: Any) -> None:
        text = textwrap.dedent(code).strip("\n") + "\n"
        self.append(Attack(name, tuple(verdicts.split()), text, tuple(stopped_by.split()), **options))


def call(test_input: str = "1", expected: str = json.dumps(ANSWER), **options: Any) -> dict[str, Any]:
    """Options of a functional test of f."""
    return {"mode": "functional", "fn": "f", "tests": ((test_input, expected),), **options}
