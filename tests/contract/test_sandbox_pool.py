"""The trainer's client against services that are down, slow, wrong, busy or weak: a result or an error, never a false verdict."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from megatron_distil.config.schema import FeedbackConfig
from megatron_distil.errors import DistilError, SandboxRefused, SandboxUnavailable
from megatron_distil.feedback.code import SandboxPool
from megatron_distil.http import Http
from megatron_distil.registry import Record, Registry
from megatron_distil.types import Case, Program, RunResult, Verdict

PROGRAM = Program(code="print(2)", tests=(Case("", "2"),))
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
QUICK = FeedbackConfig(budget_s=3.0, request_timeout_s=0.5)


class Fake:
    """A sandbox service that behaves as told."""

    def __init__(self, name: str, behave: Handler) -> None:
        self.name, self.ids, self.open, self.most_open = name, list[str](), 0, 0
        self._behave = behave

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/run":
            self.ids.append((await request.json())["id"])
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            return await self._behave(request)
        finally:
            self.open -= 1

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
    answer = {"protocol": 1, "id": body["id"], "status": "ok", "ran": 1, "tests": [row], "feedback": "", "run_s": 0.0}
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


async def slow(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(0.05)
    return await well(request)


async def run(
    folder: Path, fakes: list[Fake], config: FeedbackConfig = QUICK, programs: int = 1
) -> list[RunResult | BaseException]:
    registry = Registry(folder)
    runners = [await fake.start(registry) for fake in fakes]
    try:
        async with Http() as http:
            pool = SandboxPool(http, registry, config)
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


def test_check_reports_the_lowest_level_and_refuses_a_weak_one(tmp_path: Path) -> None:
    async def check(least: int) -> int:
        registry = Registry(tmp_path)
        runners = [await Fake(name, behave).start(registry) for name, behave in (("a", well), ("b", weak))]
        try:
            async with Http() as http:
                return await SandboxPool(http, registry, FeedbackConfig(min_isolation=least)).check()
        finally:
            for runner in runners:
                await runner.cleanup()

    assert asyncio.run(check(1)) == 1
    with pytest.raises(SandboxRefused, match=r"b \(http"):
        asyncio.run(check(2))


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
    fakes = [Fake("a", slow), Fake("b", slow)]
    config = FeedbackConfig(concurrency=3, request_timeout_s=20.0)
    results = asyncio.run(run(tmp_path, fakes, config, programs=30))
    assert all(map(passed, results))
    assert [fake.most_open for fake in fakes] == [3, 3]
    assert {len(fake.ids) for fake in fakes} == {15}


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
                    asked.append(len(fake.ids) - sum(asked))
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
