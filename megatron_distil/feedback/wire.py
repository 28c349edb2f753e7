"""What travels between the trainer and the sandbox, as bytes: pure functions, and every reply is checked.

The other side is ``sandbox/request.py`` and ``sandbox/service.py``. The two share no code; both are tested against the
files of ``tests/contract/sandbox``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from megatron_distil.errors import SandboxRefused, SandboxUnavailable
from megatron_distil.types import DEFAULT_FEEDBACK, CaseResult, Program, RunResult, Verdict

PROTOCOL = 1
RUN_PATH = "/v1/run"
READY_PATH = "/readyz"
CAPABILITIES_PATH = "/v1/capabilities"
TESTS_PATH = "/v1/tests"
TESTS_UNKNOWN = "tests_unknown"
T = TypeVar("T")


class Capabilities(NamedTuple):
    """What a service says of itself."""

    level: int
    """Of isolation."""
    workers: int
    """Programs that it runs at a time."""
    versions: Mapping[str, str]
    """Of all that decides a verdict: Python, judge."""


class Refusal(NamedTuple):
    """Why a service did not answer with a result."""

    code: str
    retry_after_s: float


def request_of(
    program: Program, request_id: str, *, test_timeout_s: float, deadline_s: float | None = None
) -> dict[str, object]:
    """The body of ``POST /v1/run``. The id makes a repeated request find the first one's answer.

    Args:
        program: what is to be run. What is as the service's defaults are is left out.
        request_id: the same for every attempt.
        test_timeout_s: CPU time of one test, unless the program says another.
        deadline_s: for the whole request, its wait for a worker included; None: there is none.
    """
    limits: dict[str, float] = {"cpu_s": program.test_timeout_s or test_timeout_s}
    if program.memory_bytes is not None:
        limits["memory_bytes"] = program.memory_bytes
    body: dict[str, object] = {
        "protocol": PROTOCOL,
        "id": request_id,
        "code": program.code,
        "mode": program.mode,
        "limits": limits,
        "prelude": program.has_prelude,
    }
    if program.case_file is None:
        body["tests"] = [{"input": test_input, "output": expected} for test_input, expected in program.tests]
    else:
        body["tests_ref"] = program.case_file.sha256
    if program.mode == "functional":
        body["fn"] = program.function
    if program.stop_after:
        body["stop_after"] = program.stop_after
    if program.stop_after_timeouts:
        body["stop_after_timeouts"] = program.stop_after_timeouts
    if program.profile != "native":
        body["profile"] = program.profile
    if program.feedback != DEFAULT_FEEDBACK:
        body["feedback"] = program.feedback._asdict()
    if deadline_s is not None:
        body["deadline_s"] = deadline_s
    return body


def result_of(reply: Any, program: Program, *, request_id: str, service: str) -> RunResult:
    """What a program did.

    Args:
        reply: a decoded answer with status 200.
        program: what was asked for.
        request_id: of the request.
        service: who answered, for messages.

    Raises:
        SandboxUnavailable: the sandbox says that it failed. No verdict: another one may have it.
        SandboxRefused: the reply is not what the protocol says; it is never read as a verdict.
    """
    where = f"{service}: answer to {request_id}"
    status = _field(reply, "status", str, where)
    if status == "sandbox_error":
        raise SandboxUnavailable(f"{where}: the sandbox failed: {reply.get('detail', 'it does not say how')}")
    _expect(status == "ok", where, f"status is {status!r}")
    protocol, answered = _field(reply, "protocol", int, where), _field(reply, "id", str, where)
    _expect(protocol == PROTOCOL, where, f"protocol is {protocol}, not {PROTOCOL}")
    _expect(answered == request_id, where, f"it is of request {answered}")
    rows = _field(reply, "tests", list, where)
    num_tests = program.num_tests
    _expect(0 < len(rows) <= num_tests, where, f"{len(rows)} results of {num_tests} tests")
    tests = tuple(_case(row, index, program, f"{where}, tests[{index}]") for index, row in enumerate(rows))
    _expect(len(tests) == _field(reply, "ran", int, where), where, "the number of results is not what it says")
    _expect(num_tests == _field(reply, "total", int, where), where, "the number of tests is not what was sent")
    failed = sum(test.verdict not in (Verdict.PASSED, Verdict.RAN) for test in tests)
    timeouts = sum(test.verdict in (Verdict.TIME_LIMIT, Verdict.WALL_LIMIT) for test in tests)
    is_cut = 0 < program.stop_after <= failed or 0 < program.stop_after_timeouts <= timeouts
    _expect(len(tests) == num_tests or is_cut, where, f"{len(tests)} results of {num_tests} tests, {failed} failed")
    return RunResult(
        tests=tests,
        feedback=_field(reply, "feedback", str, where),
        duration_s=_number(reply, "run_s", where),
        isolation=isolation_of(reply, service=service),
        queue_s=_number(reply, "queue_s", where),
        outputs_digest=_field(reply, "outputs_digest", str, where),
    )


def capabilities_of(reply: Any, *, service: str) -> Capabilities:
    """What ``GET /v1/capabilities`` says.

    Raises:
        SandboxRefused: it is not what the protocol says.
    """
    where = f"{service}: capabilities"
    workers, versions = _field(reply, "workers", int, where), _field(reply, "versions", dict, where)
    _expect(workers > 0, where, f"workers is {workers}")
    return Capabilities(
        level=isolation_of(reply, service=where),
        workers=workers,
        versions={str(name): str(version) for name, version in versions.items()},
    )


def refusal_of(payload: bytes) -> Refusal:
    """The code and the pause in a reply that is no result; an empty code and no pause where it is of another form."""
    try:
        error = json.loads(payload)["error"]
        code, pause = error["code"], error.get("retry_after_s", 0.0)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Refusal("", 0.0)
    is_pause = type(pause) in (int, float) and 0.0 <= pause < float("inf")
    return Refusal(str(code), float(pause) if is_pause else 0.0)


def isolation_of(reply: Any, *, service: str) -> int:
    """The isolation level in an answer of ``/v1/run`` or ``/readyz``.

    Raises:
        SandboxRefused: it has none.
    """
    return _field(_field(reply, "isolation", dict, service), "level", int, service)


def _case(row: Any, index: int, program: Program, where: str) -> CaseResult:
    _expect(_field(row, "index", int, where) == index, where, "results are not in the order of the tests")
    name = _field(row, "verdict", str, where)
    _expect(name in set(Verdict), where, f"unknown verdict {name!r}")
    verdict = Verdict(name)
    is_judged = program.case_file is not None or program.tests[index].expected is not None
    impossible = Verdict.RAN if is_judged else Verdict.PASSED
    _expect(
        verdict is not impossible, where, f"{verdict.value} where {'an' if is_judged else 'no'} answer was expected"
    )
    signal = row.get("signal")
    _expect(signal is None or type(signal) is int, where, f"signal is {signal!r}")
    return CaseResult(
        verdict=verdict,
        stdout=_field(row, "stdout", str, where),
        stdout_bytes=_field(row, "stdout_bytes", int, where),
        why=_field(row, "why", str, where),
        stderr=_field(row, "stderr", str, where),
        exit_code=-signal if signal else _field(row, "exit_code", int, where),
        cpu_s=_number(row, "cpu_s", where),
        wall_s=_number(row, "wall_s", where),
    )


def _expect(condition: bool, where: str, what: str) -> None:
    if not condition:
        raise SandboxRefused(f"{where}: {what}")


def _field(reply: Mapping[str, Any], name: str, kind: type[T], where: str) -> T:
    _expect(isinstance(reply, dict), where, f"{str(reply)[:200]!r} is not an object")
    value = reply.get(name)
    if type(value) is not kind:  # a bool is no int
        raise SandboxRefused(f"{where}: {name} is {str(value)[:200]!r}, not {kind.__name__}")
    return value


def _number(reply: Mapping[str, Any], name: str, where: str) -> float:
    value = reply.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise SandboxRefused(f"{where}: {name} is {str(value)[:200]!r}, not a duration")
    return float(value)
