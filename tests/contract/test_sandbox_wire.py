"""Trainer and sandbox share bytes, not code: both are held against the same files."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_distil.errors import DistilError, SandboxRefused, SandboxUnavailable
from megatron_distil.feedback import wire
from megatron_distil.types import Case, CaseFile, CaseResult, FeedbackOptions, Program, RunResult, Verdict
from sandbox import feedback, judge, limits, probe, request, service, store
from sandbox.executor import Task, WorkerFault
from sandbox.interpreter import Interpreter

FOLDER = Path(__file__).parent / "sandbox"
STDIN = Program(code="print(int(input()) + 1)", tests=(Case("1\n", "2"), Case("5\n", None)), test_timeout_s=2.5)
FUNCTIONAL = Program(
    code="def add(a, b):\n    return a + b\n",
    tests=(Case("1\n2", "3"),),
    mode="functional",
    function="add",
    has_prelude=True,
)


STORED = Program(
    code="print(1)",
    case_file=CaseFile("/data/tests/x.json", "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945", 3),
    memory_bytes=2**30,
    stop_after=2,
    stop_after_timeouts=1,
    profile="sdpo",
    feedback=FeedbackOptions(1, 500, False),
)


def golden(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text())


# ------------------------------------------------------------------------------------------- trainer
def test_the_trainer_sends_the_golden_requests() -> None:
    assert wire.request_of(STDIN, "7/p3/0", test_timeout_s=9.0) == golden("request")
    assert wire.request_of(FUNCTIONAL, "7/p4/1", test_timeout_s=6.0) == golden("request_functional")
    stored = wire.request_of(STORED, "7/p5/2", test_timeout_s=6.0, deadline_s=59.5)
    assert stored == golden("request_stored")


def test_a_run_that_was_cut_short_has_failed_as_often_as_it_may() -> None:
    reply = golden("reply_failed") | {"id": "7/p5/2", "total": 3}
    with pytest.raises(SandboxRefused, match="1 results of 3 tests, 1 failed"):
        wire.result_of(reply, STORED, request_id="7/p5/2", service="s")
    once = replace(STORED, stop_after=1)
    assert len(wire.result_of(reply, once, request_id="7/p5/2", service="s").tests) == 1


def test_the_trainer_reads_the_golden_capabilities() -> None:
    versions = {"python": "3.11.2", "code": "0f3a"}
    assert wire.capabilities_of(golden("capabilities"), service="s") == wire.Capabilities(2, 4, versions)


@pytest.mark.parametrize("payload", [b"", b"[]", b"3", b"x", b'{"error": 1}', b'{"error": {"code": []}}', b"[" * 99999])
def test_a_refusal_of_another_form_has_no_code(payload: bytes) -> None:
    assert wire.refusal_of(payload).retry_after_s == 0.0
    assert wire.refusal_of(payload).code != wire.TESTS_UNKNOWN


def test_the_trainer_reads_the_golden_replies() -> None:
    assert wire.result_of(golden("reply"), STDIN, request_id="7/p3/0", service="s") == RunResult(
        tests=(
            CaseResult(Verdict.PASSED, "2\n", 2, cpu_s=0.0041, wall_s=0.0062),
            CaseResult(Verdict.RAN, "6\n", 2, cpu_s=0.0039, wall_s=0.0058),
        ),
        feedback="",
        duration_s=0.0131,
        isolation=2,
        queue_s=0.0001,
        outputs_digest="da1b3276fc88d02e2d04ac10331f80162b4e5bb6450f0790d7ae6e773e2f3ff5",
    )
    failed = wire.result_of(golden("reply_failed"), FUNCTIONAL, request_id="7/p4/1", service="s")
    assert (failed.tests[0].verdict, failed.tests[0].exit_code, failed.isolation) == (Verdict.RUNTIME_ERROR, -11, 1)
    assert failed.tests[0].stderr.startswith("Fatal Python error")
    assert wire.isolation_of(golden("ready"), service="s") == 2


def test_a_fault_of_the_sandbox_is_unavailable_and_never_a_result() -> None:
    with pytest.raises(SandboxUnavailable, match=r"s: answer to 7/p3/0: the sandbox failed: died"):
        wire.result_of(golden("reply_fault"), STDIN, request_id="7/p3/0", service="s")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("status",), "fine", "status is 'fine'"),
        (("protocol",), 2, "protocol is 2"),
        (("id",), "other", "of request other"),
        (("tests",), [], "0 results of 2 tests"),
        (("tests",), None, "tests is 'None'"),
        (("ran",), 1, "number of results"),
        (("total",), 3, "number of tests"),
        (("outputs_digest",), None, "outputs_digest"),
        (("queue_s",), "soon", "queue_s"),
        (("tests", 0, "verdict"), "excellent", "unknown verdict 'excellent'"),
        (("tests", 0, "verdict"), "ran", "ran where an answer was expected"),
        (("tests", 1, "verdict"), "passed", "passed where no answer was expected"),
        (("tests", 0, "index"), 1, "not in the order"),
        (("tests", 0, "stdout"), 5, "stdout is '5', not str"),
        (("tests", 0, "stdout_bytes"), True, "stdout_bytes is 'True', not int"),
        (("tests", 0, "cpu_s"), -1, "cpu_s"),
        (("tests", 0, "signal"), "11", "signal"),
        (("tests", 0), "row", "is not an object"),
        (("isolation", "level"), "2", "level is '2'"),
        (("run_s",), None, "run_s"),
        (("feedback",), None, "feedback"),
    ],
)
def test_a_reply_that_is_not_the_protocol_is_refused_by_name(
    path: tuple[Any, ...], value: object, message: str
) -> None:
    reply = copy.deepcopy(golden("reply"))
    target = reply
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    with pytest.raises(SandboxRefused, match=message):
        wire.result_of(reply, STDIN, request_id="7/p3/0", service="s")


@pytest.mark.parametrize("reply", [None, [], "ok", 3, {}])
def test_no_reply_at_all_is_no_verdict(reply: object) -> None:
    with pytest.raises(DistilError):
        wire.result_of(reply, STDIN, request_id="7/p3/0", service="s")


# ------------------------------------------------------------------------------------------- sandbox
def test_the_sandbox_reads_the_golden_requests() -> None:
    parsed = request.parse(golden("request"))
    assert (parsed.id, parsed.code, parsed.mode) == ("7/p3/0", STDIN.code, "stdin")
    assert parsed.tests == (("1\n", "2"), ("5\n", None))
    assert (parsed.limits["cpu_s"], parsed.limits["idle_s"], parsed.limits["wall_s"]) == (2.5, 5.0, 35.0)
    stored = request.parse(
        golden("request_stored"), stored=lambda _: request.parse_tests([{"input": "", "output": "1"}] * 3)
    )
    assert (len(stored.tests), stored.stop_after, stored.profile, stored.deadline_s) == (3, 2, "sdpo", 59.5)
    assert stored.stop_after_timeouts == 1
    assert (stored.limits["memory_bytes"], stored.feedback) == (2**30, feedback.Options(1, 500, False, "sdpo"))
    functional = request.parse(golden("request_functional"))
    assert (functional.function, functional.has_prelude, functional.stop_after) == ("add", True, 1)


class Scripted:
    """A worker that answers with records, or breaks."""

    def __init__(self, records: list[judge.Record | WorkerFault]) -> None:
        self._records = records

    async def run(self, task: Task) -> judge.Record:
        record = self._records.pop(0)
        if isinstance(record, WorkerFault):
            raise record
        return record

    async def stop(self) -> None:
        """Nothing to stop."""


def record_of(row: dict[str, Any]) -> judge.Record:
    return judge.Record(
        exit=-row["signal"] if row["signal"] else row["exit_code"],
        stopped_by=None,
        cpu_s=row["cpu_s"],
        wall_s=row["wall_s"],
        run_delay_s=row["run_delay_s"],
        max_rss_bytes=row["max_rss_bytes"],
        stdout=row["stdout"].encode(),
        stdout_bytes=row["stdout_bytes"],
        stderr=row["stderr"].encode(),
        stderr_bytes=row["stderr_bytes"],
        result=b"{}",
    )


async def answer_of(
    monkeypatch: pytest.MonkeyPatch, name: str, records: list[judge.Record | WorkerFault], level: int
) -> Any:
    scripted = Scripted(records)

    async def start(*_: object) -> Scripted:
        return scripted

    monkeypatch.setattr(service.Worker, "start", start)
    missing = {"cgroups": ""} if level == 2 else {"mount_in_userns": ""}
    isolation = service.Isolation(level=level, name=probe.LEVEL_NAMES[level], missing=missing)
    running = service.Service(isolation, Interpreter("python", "3.11.2", ()), workers=1, queue=4)
    await running.start()
    try:
        return await running.submit(request.parse(golden(name)))
    finally:
        await running.drain(1.0)


@pytest.mark.parametrize(
    ("asked", "said", "level"), [("request", "reply", 2), ("request_functional", "reply_failed", 1)]
)
def test_the_sandbox_answers_with_the_golden_replies(
    monkeypatch: pytest.MonkeyPatch, asked: str, said: str, level: int
) -> None:
    wanted = golden(said)
    answer = asyncio.run(answer_of(monkeypatch, asked, [record_of(row) for row in wanted["tests"]], level))
    timed = {name: wanted[name] for name in ("queue_s", "run_s")}
    assert {**answer, **timed} == wanted
    assert list(answer) == list(wanted)


def test_a_worker_that_breaks_twice_gives_the_golden_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = golden("reply_fault")
    faults: list[judge.Record | WorkerFault] = [WorkerFault("died"), WorkerFault("died")]
    answer = asyncio.run(answer_of(monkeypatch, "request", faults, 2))
    assert {**answer, "queue_s": wanted["queue_s"], "run_s": wanted["run_s"]} == wanted


def test_a_fault_in_one_test_leaves_no_verdict_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    good = record_of(golden("reply")["tests"][0])
    records: list[judge.Record | WorkerFault] = [good, WorkerFault("x"), good, WorkerFault("y")]
    answer = asyncio.run(answer_of(monkeypatch, "request", records, 2))
    assert (answer["status"], answer["detail"], answer["tests"]) == ("sandbox_error", "y", [])
    assert not {"passed", "pass_all", "pass_fraction", "feedback"} & set(answer)


BAD = [
    ("body", []),
    ("protocol", {"protocol": 2}),
    ("code", {"code": None}),
    ("speed", {"speed": 1}),
    ("mode", {"mode": "both"}),
    ("fn", {"mode": "functional"}),
    ("tests", {"tests": []}),
    ("tests", {"tests": None}),
    ("tests[0]", {"tests": [1]}),
    ("tests[0].output", {"tests": [{"input": "", "output": 1}]}),
    ("tests[0].output", {"tests": [{"input": "1", "output": "{"}], "mode": "functional", "fn": "f"}),
    ("limits", {"limits": 3}),
    ("limits.speed", {"limits": {"speed": 1}}),
    ("limits.cpu_s", {"limits": {"cpu_s": 0}}),
    ("limits.cpu_s", {"limits": {"cpu_s": True}}),
    ("limits.cpu_s", {"limits": {"cpu_s": 1e9}}),
    ("limits.cpu_s", {"limits": {"cpu_s": float("nan")}}),
    ("stop_after", {"stop_after": "1"}),
    ("stop_after_timeouts", {"stop_after_timeouts": 0}),
    ("prelude", {"prelude": 1}),
    ("limits.cpu_s", {"limits": {"cpu_s": float("inf")}}),
    ("limits.cpu_s", {"limits": {"cpu_s": 10**400}}),
    ("limits.cpu_s", {"limits": {"cpu_s": 0.001}}),
    ("limits.tmp_files", {"limits": {"tmp_files": 0.5}}),
    ("limits.tmp_bytes", {"limits": {"tmp_bytes": -1}}),
    ("tests[0].ouput", {"tests": [{"input": "", "ouput": "1"}]}),
    ("tests_ref", {"tests_ref": "0" * 64}),
    ("stop_after", {"stop_after": 0}),
    ("language", {"language": "cobol"}),
    ("language", {"language": ["python"]}),
    ("profile", {"profile": "mine"}),
    ("profile", {"profile": {}}),
    ("feedback", {"feedback": []}),
    ("feedback.max_chars", {"feedback": {"max_chars": 0}}),
    ("feedback.max_chars", {"feedback": {"max_chars": 10**9}}),
    ("feedback.colour", {"feedback": {"colour": 1}}),
    ("feedback.profile", {"feedback": {"profile": "mine"}}),
    ("deadline_s", {"deadline_s": 0}),
    ("deadline_s", {"deadline_s": float("nan")}),
    ("deadline_s", {"deadline_s": 10**400}),
    ("deadline_s", {"deadline_s": True}),
    ("cancel_on_disconnect", {"cancel_on_disconnect": 1}),
    ("mode", {"mode": [[]]}),
    ("id", {"id": "x" * 201}),
    ("id", {"id": [1]}),
    ("id", {"id": ""}),
]


@pytest.mark.parametrize(("field", "change"), BAD, ids=[str(index) for index in range(len(BAD))])
def test_a_bad_request_is_refused_with_the_name_of_the_field(field: str, change: Any) -> None:
    good = {"code": "x", "tests": [{"input": "1", "output": "2"}]}
    with pytest.raises(request.BadRequest) as caught:
        request.parse({**good, **change} if isinstance(change, dict) else change)
    assert str(caught.value).startswith(f"{field}: ")


def test_everything_that_decides_the_answer_is_in_the_digest() -> None:
    plain: dict[str, Any] = {"code": "x", "tests": [{"input": "1", "output": "2"}]}
    others: list[dict[str, Any]] = [
        {"code": "y"},
        {"tests": [{"input": "1", "output": None}]},
        {"tests": [{"input": "2", "output": "2"}]},
        {"limits": {"cpu_s": 1}},
        {"limits": {"tmp_files": 1}},
        {"stop_after": 7},
        {"stop_after_timeouts": 7},
        {"prelude": False},
        {"mode": "functional", "fn": "f"},
        {"mode": "functional", "fn": "g"},
        {"profile": "lcb"},
        {"feedback": {"max_chars": 100}},
        {"feedback": {"profile": "sdpo"}},
    ]
    digests = [request.parse({**plain, **other}).digest for other in ({}, *others)]
    assert len(set(digests)) == len(digests)
    for same in ({"id": "b"}, {"deadline_s": 3}, {"cancel_on_disconnect": True}, {"profile": "native"}, {"limits": {}}):
        assert request.parse({**plain, **same}).digest == digests[0]


def test_every_verdict_of_the_judge_is_known_to_the_trainer() -> None:
    names = {value for name, value in vars(judge).items() if name.isupper() and isinstance(value, str)}
    assert names == set(Verdict)


def test_every_limit_has_a_ceiling() -> None:
    assert set(limits.DEFAULTS) == set(limits.CEILINGS)
    assert all(limits.DEFAULTS[name] <= limits.CEILINGS[name] for name in limits.DEFAULTS)
    longest = limits.complete({"cpu_s": limits.CEILINGS["cpu_s"]})
    assert all(longest[name] <= limits.CEILINGS[name] for name in longest)


def test_an_answer_is_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "Answers", lambda: store.Answers(max_entries=2))

    async def ask() -> list[bool]:
        good = record_of(golden("reply")["tests"][0])

        class Endless(Scripted):
            async def run(self, task: Task) -> judge.Record:
                return good

        async def start(*_: object) -> Endless:
            return Endless([])

        monkeypatch.setattr(service.Worker, "start", start)
        isolation = service.Isolation(level=2, name="namespaced", missing={})
        running = service.Service(isolation, Interpreter("python", "3", ()), workers=1, queue=4)
        await running.start()
        seen: list[bool] = []
        for code in ("a", "b", "c", "c", "a"):
            answer = await running.submit(request.parse({"code": code, "tests": [{"input": "", "output": "2"}]}))
            seen.append(answer["replayed"])
        await running.drain(1.0)
        return seen

    started = time.monotonic()
    assert asyncio.run(ask()) == [False, False, False, True, False]
    assert time.monotonic() - started < 10
