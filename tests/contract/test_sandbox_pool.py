"""The trainer's client against services that are down, slow, wrong, busy or weak: a result or an error, never a false verdict."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from megatron_distil.config.schema import FeedbackConfig
from megatron_distil.errors import ConfigError, DataError, DistilError, SandboxRefused, SandboxUnavailable
from megatron_distil.feedback.code import SandboxPool, read_token
from megatron_distil.feedback.replica import FAULTS_TO_OPEN
from megatron_distil.feedback.wire import Capabilities, capabilities_of
from megatron_distil.http import Http, Peer
from megatron_distil.metrics.reduce import Totals
from megatron_distil.registry import Record, Registry
from megatron_distil.types import Case, CaseFile, Program, RunResult, Verdict

PROGRAM = Program(code="print(2)", tests=(Case("", "2"),))
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
QUICK = FeedbackConfig(budget_s=3.0, request_timeout_s=0.5)


class Fake:
    """A sandbox service that behaves as told."""

    def __init__(self, name: str, behave: Handler, *, level: int = 2, workers: int = 4, python: str = "3.11.2") -> None:
        self.name, self.ids, self.open, self.most_open = name, list[str](), 0, 0
        self.asked = list[str]()
        """Method and path of every request but those about its capabilities."""
        self.stored = dict[str, bytes]()
        self.headers = dict[str, str]()
        self._behave, self._level, self._workers, self._python = behave, level, workers, python

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.headers = dict(request.headers)
        isolation = {"level": self._level, "name": "", "missing": []}
        if request.path == "/v1/capabilities":
            versions = {"python": self._python, "judge": "1"}
            facts = {"protocol": 1, "isolation": isolation, "workers": self._workers, "versions": versions}
            return web.json_response(facts)
        if request.path == "/readyz" and not self.asked:
            return web.json_response({"protocol": 1, "ready": True, "isolation": isolation})
        self.asked.append(f"{request.method} {request.path}")
        if request.path == "/v1/run":
            self.ids.append((await request.json())["id"])
        if request.path.startswith("/v1/tests/"):
            return await self._store(request)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            return await self._behave(request)
        finally:
            self.open -= 1

    async def _store(self, request: web.Request) -> web.StreamResponse:
        name = request.path.rpartition("/")[2]
        if request.method == "PUT":
            await asyncio.sleep(0.05)
            self.stored[name] = await request.read()
        return web.Response(status=200 if name in self.stored else 404)

    async def start(self, registry: Registry) -> web.AppRunner:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        register(registry, self.name, runner.addresses[0][1])
        return runner


def register(registry: Registry, name: str, port: int) -> None:
    registry.write(Record("sandbox", name, f"http://127.0.0.1:{port}", os.getpid(), 0, "ready", 0, time.time() + 60))


async def well(request: web.Request, level: int = 2) -> web.StreamResponse:
    isolation = {"level": level, "name": "", "missing": []}
    if request.path == "/readyz":
        return web.json_response({"protocol": 1, "ready": True, "isolation": isolation})
    body = await request.json()
    row = {"index": 0, "verdict": "passed", "why": "", "stdout": "2\n", "stdout_bytes": 2, "stderr": "", "exit_code": 0}
    row |= {"signal": None, "cpu_s": 0.0, "wall_s": 0.0}
    answer = {"protocol": 1, "id": body["id"], "status": "ok", "ran": 1, "total": 1, "tests": [row], "feedback": ""}
    answer |= {"run_s": 0.25, "queue_s": 0.5, "outputs_digest": "d"}
    return web.json_response({**answer, "isolation": isolation})


async def weak(request: web.Request) -> web.StreamResponse:
    return await well(request, level=1)


async def hangs(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


async def faulty(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    return web.json_response(
        {"protocol": 1, "id": body["id"], "status": "sandbox_error", "detail": "died", "tests": []}
    )


async def garbage(_: web.Request) -> web.StreamResponse:
    return web.Response(text="<html>hello</html>")


async def empty_object(_: web.Request) -> web.StreamResponse:
    return web.json_response({})


async def refuses(_: web.Request) -> web.StreamResponse:
    return web.json_response({"protocol": 1, "error": {"code": "bad_request", "message": "fn: required"}}, status=400)


def status(code: int) -> Handler:
    async def behave(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {}}, status=code)

    return behave


def first(bad: Handler, times: int = 1) -> Handler:
    """Bad at first, then well."""
    left = times

    async def behave(request: web.Request) -> web.StreamResponse:
        nonlocal left
        left -= 1
        return await (bad if left >= 0 else well)(request)

    return behave


def busy(retry_after_s: float) -> Handler:
    async def behave(_: web.Request) -> web.StreamResponse:
        error = {"code": "busy", "message": "full", "retry_after_s": retry_after_s}
        return web.json_response({"error": error}, status=429)

    return behave


async def slow(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(0.05)
    return await well(request)


async def run(
    folder: Path, fakes: list[Fake], config: FeedbackConfig = QUICK, programs: int = 1, **more: Any
) -> list[RunResult | BaseException]:
    registry = Registry(folder)
    runners = [await fake.start(registry) for fake in fakes]
    try:
        async with Http() as http:
            pool = SandboxPool(http, registry, config, **more)
            return await asyncio.gather(*(pool.run(PROGRAM) for _ in range(programs)), return_exceptions=True)
    finally:
        for runner in runners:
            await runner.cleanup()


def outcome(folder: Path, *behaviours: Handler) -> tuple[RunResult | BaseException, list[Fake]]:
    fakes = [Fake(f"s{index}", behave) for index, behave in enumerate(behaviours)]
    (result,) = asyncio.run(run(folder, fakes))
    return result, fakes


def passed(result: RunResult | BaseException) -> bool:
    return isinstance(result, RunResult) and result.tests[0].verdict is Verdict.PASSED


@pytest.mark.parametrize("bad", [hangs, faulty, status(503), status(500), status(429)])
def test_another_service_is_tried_under_the_same_id(tmp_path: Path, bad: Handler) -> None:
    result, fakes = outcome(tmp_path, bad, well)
    assert passed(result)
    assert fakes[0].ids == fakes[1].ids


@pytest.mark.parametrize("bad", [hangs, faulty, status(503), status(429)])
def test_the_only_service_is_tried_again_under_the_same_id(tmp_path: Path, bad: Handler) -> None:
    result, (fake,) = outcome(tmp_path, first(bad, 2))
    assert passed(result)
    assert len(fake.ids) == 3
    assert len(set(fake.ids)) == 1


@pytest.mark.parametrize("bad", [hangs, faulty, status(503)])
def test_without_an_answer_there_is_no_verdict_and_an_end(tmp_path: Path, bad: Handler) -> None:
    started = time.monotonic()
    result, _ = outcome(tmp_path, bad)
    assert type(result) is SandboxUnavailable
    assert "s0" in str(result)
    assert time.monotonic() - started < 3.0 + 0.5 + 2.0


@pytest.mark.parametrize("bad", [garbage, empty_object, refuses, status(404), status(409)])
def test_what_is_wrong_for_ever_is_refused_at_once(tmp_path: Path, bad: Handler) -> None:
    result, (fake, other) = outcome(tmp_path, bad, bad)
    assert type(result) is SandboxRefused
    assert len(fake.ids) + len(other.ids) == 1


def test_a_service_below_the_accepted_isolation_is_refused_with_the_way_out(tmp_path: Path) -> None:
    result, _ = outcome(tmp_path, weak)
    assert type(result) is SandboxRefused
    assert "isolation level 1" in str(result)
    assert "feedback.min_isolation = 1" in str(result)


def checked(folder: Path, *fakes: Fake, **settings: Any) -> Mapping[str, Capabilities]:
    async def check() -> Mapping[str, Capabilities]:
        registry = Registry(folder)
        runners = [await fake.start(registry) for fake in fakes]
        try:
            async with Http() as http:
                return await SandboxPool(http, registry, FeedbackConfig(**settings)).check()
        finally:
            for runner in runners:
                await runner.cleanup()

    return asyncio.run(check())


def test_check_reports_what_every_service_is_and_refuses_a_weak_one(tmp_path: Path) -> None:
    known = checked(tmp_path, Fake("a", well), Fake("b", weak, level=1, workers=3), min_isolation=1)
    assert {name: (said.level, said.workers) for name, said in known.items()} == {"a": (2, 4), "b": (1, 3)}
    with pytest.raises(SandboxRefused, match=r"b \(http.*isolation level 1.*feedback\.min_isolation = 1"):
        checked(tmp_path, Fake("a", well), Fake("b", weak, level=1), min_isolation=2)


def test_services_that_judge_with_different_versions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SandboxRefused, match=r"b \(http.*judge 1, python 3\.12\.1, and a \(http.*python 3\.11\.2"):
        checked(tmp_path, Fake("a", well), Fake("b", well, python="3.12.1"))


def test_a_service_that_is_not_ready_fails_the_check(tmp_path: Path) -> None:
    register(Registry(tmp_path), "b", 9)  # nobody listens there
    with pytest.raises(SandboxUnavailable, match=r"b \(http"):
        checked(tmp_path, Fake("a", well))


@pytest.mark.parametrize(
    "facts", ["{}", "[]", '{"workers": 0, "versions": {}, "isolation": {"level": 2}}', "null", "x"]
)
def test_capabilities_that_are_none_are_refused(facts: str) -> None:
    with pytest.raises(SandboxRefused, match="s: capabilities"):
        capabilities_of(json.loads(facts) if facts != "x" else facts, service="s")


def test_no_service_at_all_says_where_it_looked(tmp_path: Path) -> None:
    (result,) = asyncio.run(run(tmp_path, [], FeedbackConfig(budget_s=0.5)))
    assert type(result) is SandboxUnavailable
    assert str(tmp_path) in str(result)


def test_a_restarted_service_is_found_under_its_new_address(tmp_path: Path) -> None:
    async def scenario() -> RunResult:
        registry = Registry(tmp_path)
        register(registry, "s0", 1)  # nobody listens there
        async with Http() as http:
            running = asyncio.create_task(SandboxPool(http, registry, FeedbackConfig(budget_s=20.0)).run(PROGRAM))
            await asyncio.sleep(0.5)
            runner = await Fake("s0", well).start(registry)
            try:
                return await running
            finally:
                await runner.cleanup()

    assert passed(asyncio.run(scenario()))


def test_load_goes_to_both_services_and_not_above_the_permits(tmp_path: Path) -> None:
    fakes = [Fake("a", slow, workers=8), Fake("b", slow, workers=2)]
    config = FeedbackConfig(concurrency=3, request_timeout_s=20.0)
    results = asyncio.run(run(tmp_path, fakes, config, programs=30))
    assert all(map(passed, results))
    assert [fake.most_open for fake in fakes] == [3, 2]
    assert [len(fake.ids) for fake in fakes] == [pytest.approx(18, abs=2), pytest.approx(12, abs=2)]


def test_waiting_for_a_seat_is_no_part_of_the_budget(tmp_path: Path) -> None:
    fakes = [Fake("a", slow, workers=1)]
    results = asyncio.run(run(tmp_path, fakes, FeedbackConfig(budget_s=0.4, request_timeout_s=0.4), programs=12))
    assert all(map(passed, results))  # the last of them waits for 0.55 s
    assert fakes[0].most_open == 1


def test_clients_share_the_workers_of_a_service(tmp_path: Path) -> None:
    fake = Fake("a", slow, workers=4)
    assert all(map(passed, asyncio.run(run(tmp_path, [fake], QUICK, programs=12, num_clients=2))))
    assert fake.most_open == 2


# --------------------------------------------------------------------------------------- the breaker
def test_a_service_that_fails_again_and_again_is_left_alone_until_it_is_ready(tmp_path: Path) -> None:
    is_up = False

    async def behave(request: web.Request) -> web.StreamResponse:
        return await (well if is_up else faulty if request.path == "/v1/run" else status(503))(request)

    async def scenario() -> tuple[list[str], list[str]]:
        nonlocal is_up
        registry = Registry(tmp_path)
        fake, other = Fake("a", behave, workers=1), Fake("b", slow, workers=1)
        runners = [await one.start(registry) for one in (fake, other)]
        try:
            async with Http() as http:
                pool = SandboxPool(http, registry, FeedbackConfig(budget_s=20.0, request_timeout_s=5.0))
                for _ in range(4):  # two at a time: one of them has to go to the service that fails
                    assert all(map(passed, await asyncio.gather(pool.run(PROGRAM), pool.run(PROGRAM))))
                before = list(fake.asked)
                is_up = True
                await asyncio.sleep(1.1)
                assert all(map(passed, await asyncio.gather(*(pool.run(PROGRAM) for _ in range(6)))))
                return before, fake.asked[len(before) :]
        finally:
            for runner in runners:
                await runner.cleanup()

    before, after = asyncio.run(scenario())
    assert before.count("POST /v1/run") == FAULTS_TO_OPEN
    assert after[0] == "GET /readyz"
    assert "POST /v1/run" in after


def test_a_busy_service_is_not_a_broken_one(tmp_path: Path) -> None:
    result, (fake,) = outcome(tmp_path, first(busy(0.01), FAULTS_TO_OPEN))
    assert passed(result)
    assert set(fake.asked) == {"POST /v1/run"}
    assert len(fake.ids) == FAULTS_TO_OPEN + 1


def test_a_busy_service_is_given_the_pause_that_it_asks_for(tmp_path: Path) -> None:
    started = time.monotonic()
    result, _ = outcome(tmp_path, first(busy(0.8)))
    assert passed(result)
    assert time.monotonic() - started > 0.8


# ------------------------------------------------------------------------------------ files of tests
def case_file(folder: Path) -> CaseFile:
    payload = b'[{"input": "", "output": "2"}]'
    sha256 = hashlib.sha256(payload).hexdigest()
    (folder / "cases.json").write_bytes(payload)
    return CaseFile(str(folder / "cases.json"), sha256, 1)


async def runs(folder: Path, fake: Fake, programs: Sequence[Program], **settings: Any) -> list[Any]:
    registry = Registry(folder / "registry")
    runner = await fake.start(registry)
    try:
        async with Http() as http:
            config = FeedbackConfig(**{"budget_s": 5.0, "request_timeout_s": 2.0} | settings)
            pool = SandboxPool(http, registry, config)
            return await asyncio.gather(*map(pool.run, programs), return_exceptions=True)
    finally:
        await runner.cleanup()


def test_tests_are_sent_once_however_many_programs_need_them(tmp_path: Path) -> None:
    cases, fake = case_file(tmp_path), Fake("a", well)
    programs = [Program(code=f"print({index})", case_file=cases) for index in range(8)]
    assert all(map(passed, asyncio.run(runs(tmp_path, fake, programs))))
    path = f"/v1/tests/{cases.sha256}"
    assert sorted(fake.asked) == sorted([f"HEAD {path}", f"PUT {path}", *["POST /v1/run"] * 8])
    assert fake.stored == {cases.sha256: Path(cases.path).read_bytes()}


def test_tests_that_are_there_are_not_sent(tmp_path: Path) -> None:
    cases, fake = case_file(tmp_path), Fake("a", well)
    fake.stored[cases.sha256] = b""
    assert all(map(passed, asyncio.run(runs(tmp_path, fake, [Program(code="", case_file=cases)]))))
    assert fake.asked == [f"HEAD /v1/tests/{cases.sha256}", "POST /v1/run"]


def test_tests_that_were_dropped_are_sent_again(tmp_path: Path) -> None:
    cases = case_file(tmp_path)
    fake = Fake("a", lambda request: forgets(request, fake))
    assert all(map(passed, asyncio.run(runs(tmp_path, fake, [Program(code="", case_file=cases)]))))
    assert [entry.split()[0] for entry in fake.asked] == ["HEAD", "PUT", "POST", "HEAD", "PUT", "POST"]


async def forgets(request: web.Request, fake: Fake) -> web.StreamResponse:
    """Loses its tests before the first program."""
    if fake.asked.count("POST /v1/run") == 1:
        fake.stored.clear()
    if not fake.stored:
        body = {"protocol": 1, "error": {"code": "tests_unknown", "message": "upload them"}}
        return web.json_response(body, status=404)
    return await well(request)


def test_a_file_that_is_gone_or_changed_ends_the_run_with_its_name(tmp_path: Path) -> None:
    cases = case_file(tmp_path)
    gone = cases._replace(path=str(tmp_path / "gone.json"))
    (one,) = asyncio.run(runs(tmp_path, Fake("a", well), [Program(code="", case_file=gone)]))
    assert isinstance(one, DataError)
    assert "gone.json: No such file" in str(one)
    Path(cases.path).write_bytes(b"[]")
    (one,) = asyncio.run(runs(tmp_path, Fake("a", well), [Program(code="", case_file=cases)]))
    assert isinstance(one, DataError)
    assert "is not what its name says" in str(one)


# ---------------------------------------------------------------------------------- tokens, metrics
def test_the_token_is_sent_and_shown_nowhere(tmp_path: Path) -> None:
    file, fake = tmp_path / "token", Fake("a", well)
    file.write_text("s3cret\n")
    file.chmod(0o600)
    assert all(map(passed, asyncio.run(runs(tmp_path, fake, [PROGRAM], token_file=str(file)))))
    assert fake.headers["Authorization"] == "Bearer s3cret"
    (refused,) = asyncio.run(runs(tmp_path, Fake("a", status(401)), [PROGRAM], token_file=str(file)))
    assert isinstance(refused, SandboxRefused)
    assert "s3cret" not in repr(refused) + repr(Peer("a", "u", SandboxUnavailable, SandboxRefused, "s3cret"))


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [("x", 0o644, "others may read it. Run chmod 600"), ("\n", 0o600, "empty"), (None, 0, "cannot be read")],
)
def test_a_token_file_that_is_none_is_refused(tmp_path: Path, text: str | None, mode: int, message: str) -> None:
    file = tmp_path / "token"
    if text is not None:
        file.write_text(text)
        file.chmod(mode)
    with pytest.raises(ConfigError, match=message):
        read_token(str(file))


def test_waits_runs_retries_and_faults_are_counted_by_service(tmp_path: Path) -> None:
    totals = Totals()
    fakes = [Fake("sandbox-0", faulty, workers=1), Fake("sandbox-1", well, workers=1)]
    results = asyncio.run(run(tmp_path, fakes, FeedbackConfig(budget_s=10.0), programs=1, add=totals.merge))
    assert all(map(passed, results))
    means = dict(totals.means())
    assert means.pop("feedback/seat_s") < 5.0
    assert means == {
        "feedback/queue_s": 0.5,
        "feedback/run_s": 0.25,
        "feedback/at_sandbox_1_queue_s": 0.5,
        "feedback/at_sandbox_1_run_s": 0.25,
        "feedback/at_sandbox_0_unavailable": 1.0,
        "feedback/at_sandbox_1_retries": 1.0,
        "feedback/retries": 1.0,
        "feedback/unavailable": 1.0,
    }


def test_an_outage_is_waited_out_once_and_not_by_every_program(tmp_path: Path) -> None:
    is_up = False

    async def behave(request: web.Request) -> web.StreamResponse:
        return await (well if is_up else status(503))(request)

    async def scenario() -> tuple[int, int, bool]:
        nonlocal is_up
        registry, fake = Registry(tmp_path), Fake("s0", behave)
        runner = await fake.start(registry)
        try:
            async with Http() as http:
                pool = SandboxPool(http, registry, FeedbackConfig(budget_s=1.5))
                asked: list[int] = []
                for _ in range(2):
                    with pytest.raises(SandboxUnavailable):
                        await pool.run(PROGRAM)
                    asked.append(len(fake.asked) - sum(asked))
                    await asyncio.sleep(1.5)
                is_up = True
                return asked[0], asked[1], passed(await pool.run(PROGRAM))
        finally:
            await runner.cleanup()

    during, after, is_well = asyncio.run(scenario())
    assert during > 1
    assert after == 1
    assert is_well


def test_both_errors_tell_the_launcher_what_to_do() -> None:
    assert (SandboxUnavailable.exit_code, SandboxRefused.exit_code) == (75, 1)
    assert issubclass(SandboxUnavailable, DistilError)
