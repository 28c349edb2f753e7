"""Verdicts, computed on plain data in the trusted process. Expected outputs never leave this side."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

PASSED, RAN, WRONG_ANSWER = "passed", "ran", "wrong_answer"
TIME_LIMIT, WALL_LIMIT, MEMORY_LIMIT, OUTPUT_LIMIT = "time_limit", "wall_limit", "memory_limit", "output_limit"
RUNTIME_ERROR, COMPILE_ERROR = "runtime_error", "compile_error"
MAX_DEPTH = 130
MAX_DIGITS = 50_000
MAX_SHOWN = 300
_MAX_LINE = 1_000_000

sys.set_int_max_str_digits(MAX_DIGITS)  # the same number in the child


@dataclass(frozen=True)
class Record:
    """What a test left behind. The bytes are untrusted."""

    exit: int
    """Negative: killed by that signal."""
    stopped_by: str | None
    """``cpu``, ``idle`` or ``wall``: the clock that stopped it."""
    cpu_s: float
    wall_s: float
    run_delay_s: float
    """Runnable, but not running."""
    max_rss_bytes: int
    stdout: bytes
    stdout_bytes: int
    stderr: bytes
    stderr_bytes: int
    result: bytes


class Judgement(NamedTuple):
    """What is said of one test."""

    verdict: str
    why: str = ""
    """One line without measured times: the text must not vary from run to run."""
    got: str | None = None
    """What a function returned, for people."""


def judge(record: Record, mode: str, expected: str | None, limits: Mapping[str, float]) -> Judgement:
    """Limits come first, so that a killed run can never pass. ``expected=None``: nothing is compared."""
    stopped = _over_limit(record, limits)
    if stopped:
        return stopped
    result = _result(record.result)
    exception, message = result.get("exception"), str(result.get("message"))[:200]
    if exception == "MemoryError" or record.exit == -9:
        return Judgement(MEMORY_LIMIT, "MemoryError" if exception else "killed by the kernel")
    if record.exit < 0:
        return Judgement(RUNTIME_ERROR, f"signal {-record.exit}")
    if exception:
        verdict = COMPILE_ERROR if result.get("phase") == "compile" else RUNTIME_ERROR
        return Judgement(verdict, f"{exception}: {message}"[:MAX_SHOWN])
    if mode == "functional":
        return _judge_value(result, expected)
    if record.exit:
        return Judgement(RUNTIME_ERROR, f"exit code {record.exit}")
    if expected is None:
        return Judgement(RAN)
    difference = compare_lines(record.stdout.decode("utf-8", "replace"), expected)
    return Judgement(WRONG_ANSWER, difference) if difference else Judgement(PASSED)


def _over_limit(record: Record, limits: Mapping[str, float]) -> Judgement | None:
    if record.stopped_by == "cpu" or record.cpu_s > limits["cpu_s"]:
        return Judgement(TIME_LIMIT, f"CPU time above {limits['cpu_s']:g} s")
    if record.stopped_by == "idle":
        return Judgement(WALL_LIMIT, f"idle for more than {limits['idle_s']:g} s")
    if record.stopped_by == "wall":
        return Judgement(WALL_LIMIT, f"wall time above {limits['wall_s']:g} s")
    if max(record.stdout_bytes, record.stderr_bytes) >= limits["output_bytes"]:
        return Judgement(OUTPUT_LIMIT, f"more than {limits['output_bytes']:.0f} bytes")
    return None


def _judge_value(result: Mapping[str, Any], expected: str | None) -> Judgement:
    if "value" not in result:
        return Judgement(RUNTIME_ERROR, "no result (exit before return)")
    try:
        got = decode(result["value"])
        shown = repr(got)[:MAX_SHOWN]
    except (ValueError, TypeError, RecursionError, AttributeError):
        return Judgement(RUNTIME_ERROR, "malformed result")
    if expected is None:
        return Judgement(RAN, got=shown)
    return Judgement(PASSED if same_value(got, json.loads(expected)) else WRONG_ANSWER, got=shown)


def _result(data: bytes) -> dict[str, Any]:
    try:
        result = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        result = None
    return result if isinstance(result, dict) else {"exception": "CorruptResult"}


def decode(value: Any, depth: int = 0) -> Any:
    """The inverse of ``child.encode``, with bounds."""
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode(item, depth + 1) for item in value]
    ((tag, body),) = value.items()
    match tag:
        case "i" if len(body) <= MAX_DIGITS:
            return int(body, 16)
        case "f":
            return float(body)
        case "t":
            return tuple(decode(item, depth + 1) for item in body)
        case "d":
            return {_hashable(decode(key, depth + 1)): decode(item, depth + 1) for key, item in body}
        case "s":
            return {_hashable(decode(item, depth + 1)) for item in body}
        case "b":
            return bytes.fromhex(body)
    raise ValueError("unknown tag, or an integer that is too long")


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def compare_lines(output: str, expected: str) -> str:
    """The first difference, empty if there is none.

    LiveCodeBench's rule for standard output: strip the whole, split on newline, strip the lines; two lines are equal
    as text, or if all their tokens are equal as decimal numbers.
    """
    got = [line.strip() for line in output.strip().split("\n")]
    want = [line.strip() for line in expected.strip().split("\n")]
    if len(got) != len(want):
        return f"expected {len(want)} lines, got {len(got)}"
    for number, (ours, theirs) in enumerate(zip(got, want, strict=True), 1):
        if ours != theirs and not _same_numbers(ours, theirs):
            return f"line {number} differs"
    return ""


def _same_numbers(got: str, want: str) -> bool:
    if len(got) >= _MAX_LINE:
        return False
    try:
        return [Decimal(token) for token in got.split()] == [Decimal(token) for token in want.split()]
    except (InvalidOperation, ValueError):
        return False


def same_value(got: Any, expected: Any) -> bool:
    """LiveCodeBench's rule for functions: only a top-level tuple counts as a list; then Python equality."""
    if isinstance(got, tuple):
        got = list(got)
    try:
        return bool(got == expected)
    except RecursionError:
        return False
