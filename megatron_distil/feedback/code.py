"""Programs, run by the sandbox services of a run.

A program's faults are data in a ``RunResult``. Ours are errors: a service that is down, slow, busy or broken is tried again, on
another one if there is one, under the same id; what is left is ``SandboxUnavailable``, never a verdict.
"""

from __future__ import annotations

import asyncio
import contextlib
import stat
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_distil.config.schema import FeedbackConfig
from megatron_distil.errors import ConfigError, Problem, SandboxRefused, SandboxUnavailable
from megatron_distil.feedback.replica import SandboxReplica
from megatron_distil.feedback.wire import Capabilities
from megatron_distil.http import Http, attempts
from megatron_distil.metrics.names import metric_part
from megatron_distil.registry import Record, Registry
from megatron_distil.types import Program, RunResult, Sums

ROLE = "sandbox"
REFRESH_S = 5.0
"""How long the list of services is believed while nothing fails."""


class Instance(NamedTuple):
    """One start of one service."""

    name: str
    gen: int
    url: str


class SandboxPool:
    """All sandbox services of a run. Fulfils ``feedback.judge.Runner``. Belongs to one event loop.

    A service has at most as many programs of this pool as it has workers, shared with the other clients: what waits, waits here,
    where another service that becomes free can take it.
    """

    def __init__(
        self,
        http: Http,
        registry: Registry,
        config: FeedbackConfig,
        *,
        add: Callable[[Sums], None] = lambda _: None,
        num_clients: int = 1,
    ) -> None:
        """``num_clients``: pools that ask the same services; ``add`` counts waits, runs and faults."""
        self._http, self._registry, self._config = http, registry, config
        self._add, self._num_clients = add, num_clients
        self._token = read_token(config.token_file)
        self._known: dict[Instance, SandboxReplica] = {}
        self._live: list[SandboxReplica] = []
        self._believed_until = 0.0
        self._refreshing = asyncio.Lock()
        self._freed = asyncio.Condition()
        self._outage_since: float | None = None

    async def check(self) -> Mapping[str, Capabilities]:
        """What every service says of itself, by name.

        Raises:
            SandboxUnavailable: there is none, or one is not ready.
            SandboxRefused: one is below ``feedback.min_isolation``, or judges with other versions than another one.
        """
        self._known.clear()
        self._live, errors = await self._learn_all()
        if errors:
            raise errors[0]
        return {replica.name: replica.said for replica in self._live}

    async def run(self, program: Program) -> RunResult:
        """What the program did.

        Raises:
            SandboxUnavailable: no service gave an answer in attempts that began within ``feedback.budget_s``.
            SandboxRefused: a service refused the program, answered something else than the protocol says, runs programs at a
                lower isolation level than ``feedback.min_isolation``, or with other versions than another one.
        """
        request_id, tried = uuid.uuid4().hex, set[str]()
        seat: SandboxReplica | None = None
        queued = time.monotonic()
        with contextlib.suppress(SandboxUnavailable):  # the attempts say so
            seat = await self._seat(tried)  # a step holds many more programs than seats: no part of the budget
        started = time.monotonic()
        self._count("feedback/seat_s", started - queued)
        budget_s = self._budget()
        async for attempt in attempts(budget_s, SandboxUnavailable, _asked_pause):
            with attempt:
                try:
                    replica = seat or await self._seat(tried)
                    seat = None
                    return await self._attempt(replica, program, request_id, tried, until=started + budget_s)
                except SandboxUnavailable as error:
                    self._believed_until = 0.0
                    if not error.retry_after_s:
                        self._outage_since = self._outage_since or time.monotonic()
                    raise
        raise AssertionError("attempts() returns or raises")

    async def _attempt(
        self, replica: SandboxReplica, program: Program, request_id: str, tried: set[str], *, until: float
    ) -> RunResult:
        """One request; the seat is given back whatever happens."""
        name = metric_part(replica.name)
        is_repeated, left_s = bool(tried), until - time.monotonic()
        tried.add(replica.name)
        # an outage that was waited out leaves no budget, and one attempt
        timeout_s = min(self._config.request_timeout_s, left_s) if left_s > 0.0 else self._config.request_timeout_s
        try:
            result = await replica.run(program, request_id, timeout_s=timeout_s)
            self._check_level(replica, result.isolation)
        except SandboxUnavailable as error:
            replica.failed(error)
            self._count_total(f"feedback/at_{name}_unavailable", "feedback/unavailable")
            raise
        finally:
            await self._give(replica)
            if is_repeated:
                self._count_total(f"feedback/at_{name}_retries", "feedback/retries")
        self._outage_since = None
        for quantity, seconds in (("queue_s", result.queue_s), ("run_s", result.duration_s)):
            self._count(f"feedback/{quantity}", seconds)
            self._count(f"feedback/at_{name}_{quantity}", seconds)
        return result

    # ---- seats

    async def _seat(self, tried: set[str]) -> SandboxReplica:
        """A seat at the least busy service that has not failed this program; when all have, at any.

        Raises:
            SandboxUnavailable: no service can be asked now.
            SandboxRefused: as for ``run``.
        """
        while True:
            usable = await self._usable()
            fresh = [replica for replica in usable if replica.name not in tried]
            if not fresh:
                tried.clear()
            replica = self._free(fresh or usable)
            if replica is not None:
                replica.busy += 1
                return replica
            async with self._freed:
                if self._free(fresh or usable) is None:
                    with contextlib.suppress(TimeoutError):  # the list of services may have grown
                        await asyncio.wait_for(self._freed.wait(), REFRESH_S)

    def _free(self, replicas: Sequence[SandboxReplica]) -> SandboxReplica | None:
        free = [replica for replica in replicas if replica.busy < self._permits(replica)]
        return min(free, key=lambda replica: replica.busy) if free else None

    def _permits(self, replica: SandboxReplica) -> int:
        return max(1, min(replica.said.workers, self._config.concurrency) // self._num_clients)

    async def _give(self, replica: SandboxReplica) -> None:
        replica.busy -= 1
        async with self._freed:
            self._freed.notify_all()

    # ---- services

    async def _usable(self) -> list[SandboxReplica]:
        """Services that are known and trusted. One that failed too often is asked whether it is ready again."""
        is_old = time.monotonic() >= self._believed_until
        if is_old and not (self._live and self._refreshing.locked()):  # one program may wait for a service that hangs
            async with self._refreshing:
                if time.monotonic() >= self._believed_until:
                    self._live, errors = await self._learn_all()
                    if not self._live:
                        raise errors[0]
                    self._believed_until = time.monotonic() + REFRESH_S
        live = self._live
        if doubted := [replica for replica in live if not replica.is_trusted]:
            await asyncio.gather(*(replica.probe() for replica in doubted))
        usable = [replica for replica in live if replica.is_trusted]
        if not usable:
            known = "; ".join(replica.describe() for replica in live)
            raise SandboxUnavailable(f"no sandbox service can be asked: {known}")
        return usable

    async def _learn_all(self) -> tuple[list[SandboxReplica], list[SandboxUnavailable]]:
        """The services of the registry that answer, and what the others say."""
        records = self._registry.live(ROLE)
        if not records:
            raise SandboxUnavailable(f"no sandbox service is ready (registry: {self._registry.folder})")
        instances = [Instance(record.name, record.gen, record.url) for record in records]
        self._known = {instance: replica for instance, replica in self._known.items() if instance in instances}
        found: list[SandboxReplica] = []
        errors: list[SandboxUnavailable] = []
        for instance, record in zip(instances, records, strict=True):
            try:
                if instance not in self._known:
                    self._known[instance] = await self._learn(record)
                found.append(self._known[instance])
            except SandboxUnavailable as error:
                errors.append(error)
        return found, errors

    async def _learn(self, record: Record) -> SandboxReplica:
        replica = await SandboxReplica.known(self._http, record, self._config, self._token)
        self._check_level(replica, replica.said.level)
        for other in self._known.values():
            if other.said.versions != replica.said.versions:
                raise SandboxRefused(
                    f"{replica} judges with {_text(replica.said.versions)}, and {other} with "
                    f"{_text(other.said.versions)}: one program would get two verdicts. Start both from one image."
                )
        return replica

    def _check_level(self, replica: SandboxReplica, level: int) -> None:
        least = self._config.min_isolation
        if level < least:
            raise SandboxRefused(
                f"{replica} runs programs at isolation level {level}; this run accepts feedback.min_isolation = {least} or "
                f"more. GET {replica.url}/readyz says what is missing there; feedback.min_isolation = {level} accepts it "
                f"as it is."
            )

    # ---- small parts

    def _budget(self) -> float:
        """An outage is waited out once, not by every program of a step again: then each has one attempt."""
        outage_s = time.monotonic() - self._outage_since if self._outage_since else 0.0
        return max(self._config.budget_s - outage_s, 0.0)

    def _count(self, name: str, value: float) -> None:
        self._add(Sums(sums={name: (value, 1.0)}))

    def _count_total(self, *names: str) -> None:
        self._add(Sums(sums=dict.fromkeys(names, (1.0, 1.0))))


def _asked_pause(error: BaseException) -> float:
    return error.retry_after_s if isinstance(error, SandboxUnavailable) else 0.0


def _text(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def read_token(path: str) -> str:
    """The token in a file; empty where none is named.

    Raises:
        ConfigError: it cannot be read, others may read it, or it is empty.
    """
    if not path:
        return ""
    file = Path(path)
    try:
        is_open = stat.S_IMODE(file.stat().st_mode) & 0o077
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("feedback.token_file", path, f"cannot be read: {error}")]) from error
    if is_open:
        raise ConfigError([Problem("feedback.token_file", path, "others may read it", f"Run chmod 600 {path}.")])
    if not token:
        raise ConfigError([Problem("feedback.token_file", path, "it is empty", "Write the services' token into it.")])
    return token
