"""Programs, run by the sandbox services of a run.

A program's faults are data in a ``RunResult``. Ours are errors: a service that is down, slow or broken is tried again, on
another one if there is one, under the same id; what is left is ``SandboxUnavailable``, never a verdict.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter

from megatron_distil.config.schema import FeedbackConfig
from megatron_distil.errors import SandboxRefused, SandboxUnavailable
from megatron_distil.feedback import wire
from megatron_distil.http import Http, Peer, attempts
from megatron_distil.registry import Record, Registry
from megatron_distil.types import Program, RunResult

ROLE = "sandbox"
REFRESH_S = 5.0
"""How long the list of services is believed while nothing fails."""


class SandboxPool:
    """All sandbox services of a run. Fulfils ``feedback.judge.Runner``. Belongs to one event loop."""

    def __init__(self, http: Http, registry: Registry, config: FeedbackConfig) -> None:
        self._http, self._registry, self._config = http, registry, config
        self._services: list[Record] = []
        self._believed_until = 0.0
        self._busy: Counter[str] = Counter()
        self._permits: dict[str, asyncio.Semaphore] = {}
        self._outage_since: float | None = None

    async def check(self) -> int:
        """Ask every service whether it is ready. Returns the lowest isolation level.

        Raises:
            SandboxUnavailable: there is none, or one is not ready.
            SandboxRefused: one is below ``feedback.min_isolation``.
        """
        self._believed_until = 0.0
        return min([await self._level(record) for record in self._live()])

    async def run(self, program: Program) -> RunResult:
        """What the program did.

        Raises:
            SandboxUnavailable: no service gave an answer in attempts that began within ``feedback.budget_s``.
            SandboxRefused: a service refused the program, answered something else than the protocol says, or runs
                programs at a lower isolation level than ``feedback.min_isolation``.
        """
        request_id, tried = uuid.uuid4().hex, set[str]()
        async for attempt in attempts(self._budget(), on=SandboxUnavailable):
            with attempt:
                try:
                    result = await self._attempt(program, request_id, tried)
                except SandboxUnavailable:
                    self._believed_until = 0.0
                    self._outage_since = self._outage_since or time.monotonic()
                    raise
                self._outage_since = None
                return result
        raise AssertionError("attempts() returns or raises")

    async def _attempt(self, program: Program, request_id: str, tried: set[str]) -> RunResult:
        record = self._pick(tried)
        self._busy[record.name] += 1
        try:
            async with self._permits.setdefault(record.name, asyncio.Semaphore(self._config.concurrency)):
                tried.add(record.name)
                body = wire.request_of(program, request_id, test_timeout_s=self._config.test_timeout_s)
                timeout_s = self._config.request_timeout_s
                reply = await self._http.post(_peer(record), wire.RUN_PATH, body, timeout_s=timeout_s)
        finally:
            self._busy[record.name] -= 1
        result = wire.result_of(reply, program, request_id=request_id, service=record.name)
        self._check_isolation(result.isolation, record)
        return result

    async def _level(self, record: Record) -> int:
        reply = await self._http.get(_peer(record), wire.READY_PATH, timeout_s=self._config.request_timeout_s)
        level = wire.isolation_of(reply, service=record.name)
        self._check_isolation(level, record)
        return level

    def _check_isolation(self, level: int, record: Record) -> None:
        least = self._config.min_isolation
        if level < least:
            raise SandboxRefused(
                f"{record.name} ({record.url}) runs programs at isolation level {level}; this run accepts "
                f"feedback.min_isolation = {least} or more. GET {record.url}{wire.READY_PATH} says what is missing there; "
                f"feedback.min_isolation = {level} accepts it as it is."
            )

    def _pick(self, tried: set[str]) -> Record:
        """The least busy service that has not failed this program; when all have, the least busy one."""
        services = self._live()
        fresh = [record for record in services if record.name not in tried]
        if not fresh:
            tried.clear()
        return min(fresh or services, key=lambda record: self._busy[record.name])

    def _live(self) -> list[Record]:
        now = time.monotonic()
        if now >= self._believed_until:
            self._services = self._registry.live(ROLE)
            self._believed_until = now + REFRESH_S
        if not self._services:
            self._believed_until = 0.0
            raise SandboxUnavailable(f"no sandbox service is ready (registry: {self._registry.folder})")
        return self._services

    def _budget(self) -> float:
        """An outage is waited out once, not by every program of a step again: then each has one attempt."""
        outage_s = time.monotonic() - self._outage_since if self._outage_since else 0.0
        return max(self._config.budget_s - outage_s, 0.0)


def _peer(record: Record) -> Peer:
    return Peer(record.name, record.url, SandboxUnavailable, SandboxRefused)
