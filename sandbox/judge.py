"""Verdicts, computed on plain data in the trusted process. Expected outputs never leave this side."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

PASSED, RAN, WRONG_ANSWER = "passed", "ran", "wrong_answer"
TIME_LIMIT, WALL_LIMIT, MEMORY_LIMIT, OUTPUT_LIMIT = "time_limit", "wall_limit", "memory_limit", "output_limit"
RUNTIME_ERROR, COMPILE_ERROR = "runtime_error", "compile_error"
PROFILES = ("native", "lcb", "sdpo")
"""Our own rules; those of LiveCodeBench's checker; those of SDPO's (arXiv:2601.20802)."""
PROFILE_LIMITS: Mapping[str, Mapping[str, float]] = {"native": {}, "lcb": {}, "sdpo": {"memory_bytes": 1 << 30}}
"""Where a harness has a limit of its own; all else are our defaults."""
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


def judge(
    record: Record, mode: str, expected: str | None, limits: Mapping[str, float], profile: str = "native"
) -> Judgement:
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
        return _judge_value(result, expected, profile)
    if profile == "lcb" and "exit" not in result:  # what it printed went down with its process
        return Judgement(RUNTIME_ERROR, "exit before the end of the program")
    if profile != "lcb" and record.exit:
        return Judgement(RUNTIME_ERROR, f"exit code {record.exit}")
    if expected is None:
        return Judgement(RAN)
    difference = _COMPARE_OUTPUT[profile](record.stdout.decode("utf-8", "replace"), expected)
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


def _judge_value(result: Mapping[str, Any], expected: str | None, profile: str) -> Judgement:
    if "value" not in result:
        return Judgement(RUNTIME_ERROR, "no result (exit before return)")
    try:
        got = decode(result["value"])
        shown = repr(got)[:MAX_SHOWN]
    except (ValueError, TypeError, RecursionError, AttributeError):
        return Judgement(RUNTIME_ERROR, "malformed result")
    if profile == "sdpo":
        try:
            sorted_json(got)
        except (TypeError, RecursionError) as error:
            return Judgement(RUNTIME_ERROR, str(error))
    if expected is None:
        return Judgement(RAN, got=shown)
    is_same = _COMPARE_VALUE[profile](got, json.loads(expected))
    return Judgement(PASSED if is_same else WRONG_ANSWER, got=shown)


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


def compare_words(output: str, expected: str) -> str:
    """SDPO's rule for standard output: one line of both, equal as text; one "-" at the end of the expected is no part of it.

    Source: lasgroup/SDPO, ``verl/utils/reward_score/feedback/code.py``, ``run_test_std``.
    """
    return "" if _one_line(output) == _one_line(without_dash(expected)) else "the outputs differ"


def without_dash(expected: str) -> str:
    """What SDPO expects of a printed answer."""
    text = expected.strip()
    return text[:-1].rstrip() if text.endswith("-") else text


def _one_line(text: str) -> str:
    return text.strip().replace("\n", " ").replace("\r", "")


def same_json(got: Any, expected: Any) -> bool:
    """SDPO's rule for functions: equal JSON texts, so 3.0 is not 3; tuples count as lists, keys as text."""
    try:
        return sorted_json(got) == sorted_json(expected)
    except (TypeError, RecursionError):
        return False


def sorted_json(value: Any) -> str:
    """The JSON text that SDPO compares.

    Raises:
        TypeError: the value is no JSON, such as a set.
    """
    return json.dumps(_as_json(value), sort_keys=True)


def _as_json(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    raise TypeError(f"Non-serializable result type: {type(value).__name__}")


_COMPARE_OUTPUT = {"native": compare_lines, "lcb": compare_lines, "sdpo": compare_words}
_COMPARE_VALUE = {"native": same_value, "lcb": same_value, "sdpo": same_json}


def outputs_digest(rows: Iterable[tuple[Record, Judgement]]) -> str:
    """SHA-256 of what a submission answered, test by test: submissions that answer the same have the same.

    An answer is what is compared: the printed lines without the space around them, the returned value, or the kind of
    the failure.
    """
    digest = hashlib.sha256()
    for record, judgement in rows:
        digest.update(hashlib.sha256(_answer(record, judgement)).digest())
    return digest.hexdigest()


def _answer(record: Record, judgement: Judgement) -> bytes:
    if judgement.verdict not in (PASSED, RAN, WRONG_ANSWER):
        return f"! {judgement.verdict}".encode()
    if judgement.got is not None:
        return b"= " + json.dumps(_result(record.result).get("value"), sort_keys=True).encode()
    lines = record.stdout.decode("utf-8", "replace").strip().split("\n")
    return b"> " + "\n".join(line.strip() for line in lines).encode()
