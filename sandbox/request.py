"""A request to run a program, checked. Everything that is wrong with it is wrong for ever: the client must not repeat it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sandbox import limits as limits_

PROTOCOL = 1
MODES = ("stdin", "functional")
MAX_TESTS = 1000
MAX_ID_CHARS = 200
_FIELDS = {"protocol", "id", "code", "mode", "fn", "tests", "limits", "stop_after", "prelude"}


class BadRequest(Exception):
    """The text is ``field: reason``."""


class Test(NamedTuple):
    """One run of the program."""

    input: str
    output: str | None
    """What is compared with; None: nothing."""


@dataclass(frozen=True)
class Request:
    """One program and its tests."""

    id: str
    """Says that two requests are the same attempt; the digest if the client gave none."""
    digest: str
    """Of all that decides the answer."""
    code: str
    mode: str
    function: str
    tests: tuple[Test, ...]
    limits: Mapping[str, float]
    stop_after: int
    """Failed tests after which the rest is not run."""
    has_prelude: bool


def parse(body: Any) -> Request:
    """Check a decoded body.

    Raises:
        BadRequest: names the field, the value and what would be right.
    """
    _need(isinstance(body, dict), "body", "not a JSON object")
    _need(body.get("protocol", PROTOCOL) == PROTOCOL, "protocol", f"{body.get('protocol')!r} is not {PROTOCOL}")
    unknown = sorted(set(body) - _FIELDS)
    _need(not unknown, unknown[0] if unknown else "", f"no such field; there are {', '.join(sorted(_FIELDS))}")
    code, mode, function = body.get("code"), body.get("mode", "stdin"), body.get("fn") or ""
    _need(isinstance(code, str), "code", "a string is required")
    _need(mode in MODES, "mode", f"{mode!r} is not 'stdin' or 'functional'")
    if mode == "functional":
        _need(isinstance(function, str) and function.isidentifier(), "fn", "an identifier is required")
    tests = _tests(body.get("tests"), mode)
    limits = limits_.complete(_limits(body.get("limits", {})))
    stop_after = body.get("stop_after", len(tests))
    _need(type(stop_after) is int and stop_after > 0, "stop_after", f"{stop_after!r} is not a positive integer")
    prelude = body.get("prelude", True)
    _need(isinstance(prelude, bool), "prelude", f"{prelude!r} is not true or false")
    content = [code, mode, function, tests, sorted(limits.items()), stop_after, prelude]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    key = body.get("id", digest)
    _need(
        isinstance(key, str) and 0 < len(key) <= MAX_ID_CHARS, "id", f"not a string of 1 to {MAX_ID_CHARS} characters"
    )
    return Request(key, digest, code, mode, function, tests, limits, stop_after, prelude)


def _need(condition: bool, field: str, reason: str) -> None:
    if not condition:
        raise BadRequest(f"{field}: {reason}")


def _tests(value: Any, mode: str) -> tuple[Test, ...]:
    _need(isinstance(value, list) and 0 < len(value) <= MAX_TESTS, "tests", f"a list of 1 to {MAX_TESTS} is required")
    tests: list[Test] = []
    for index, row in enumerate(value):
        where = f"tests[{index}]"
        _need(
            isinstance(row, dict) and isinstance(row.get("input"), str),
            where,
            "an object with a string input is required",
        )
        output = row.get("output")
        _need(output is None or isinstance(output, str), f"{where}.output", "not a string")
        if mode == "functional" and output is not None:  # a broken expected value is ours, never a wrong answer
            try:
                json.loads(output)
            except (ValueError, RecursionError) as error:
                raise BadRequest(f"{where}.output: not JSON: {error}") from error
        tests.append(Test(row["input"], output))
    return tuple(tests)


def _limits(value: Any) -> dict[str, float]:
    _need(isinstance(value, dict), "limits", "not an object")
    for name, number in value.items():
        where = f"limits.{name}"
        _need(name in limits_.DEFAULTS, where, f"no such limit; there are {', '.join(limits_.DEFAULTS)}")
        _need(type(number) in (int, float) and number > 0, where, f"{number!r} is not a positive number")
        ceiling = limits_.CEILINGS[name]
        _need(number <= ceiling, where, f"{number!r} is above this service's ceiling of {ceiling:g}")
    return value
