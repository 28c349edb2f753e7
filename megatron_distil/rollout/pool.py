"""The servers that may be asked now: those of the registry that serve the current version of the weights.

One pool per replica's head. While a step is sampled, ``watch`` follows the registry: a server that restarted (its ``gen``
changed) has lost its weights and comes back alone, through ``admit``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from megatron_distil.errors import EngineReplyError, EngineUnavailable, SyncError
from megatron_distil.protocols import Engine
from megatron_distil.registry import Record, Registry

ROLE = "rollout"
POLL_S = 1.0
MAX_IMBALANCE = 16
"""The rollouts of a prompt go to one server, which has its prefix cached, until it has so many more than another."""

_log = logging.getLogger(__name__)


class PooledEngine(Engine, Protocol):
    """What the pool asks of an engine beside ``generate``."""

    async def weights_version(self) -> int | None:
        """The version that was last published to it."""
        ...

    async def is_paused(self) -> bool:
        """Whether new requests would wait."""
        ...


class Instance(NamedTuple):
    """One start of one server."""

    name: str
    gen: int


Admit = Callable[[Record, int], Awaitable[None]]
"""Brings a version to one server. Raises ``SyncError`` when the server then holds something else."""


class EnginePool:
    """Seats on servers. At most ``concurrency`` requests of this pool are in flight to one of them."""

    def __init__(
        self,
        registry: Registry,
        connect: Callable[[Record], PooledEngine],
        *,
        admit: Admit | None,
        concurrency: int,
        patience_s: float,
    ) -> None:
        """``admit=None``: a restarted server waits for the next publication."""
        self._registry = registry
        self._connect = connect
        self._admit = admit
        self._concurrency = concurrency
        self._patience_s = patience_s
        self._engines: dict[Instance, PooledEngine] = {}
        self._in_flight: dict[Instance, int] = {}
        self._home: dict[str, Instance] = {}
        self._refused: dict[Instance, str] = {}
        self._failures: dict[Instance, str] = {}
        self._served_at = 0.0
        self._doubted = asyncio.Event()
        self._waiters: deque[asyncio.Future[None]] = deque()

    async def watch(self, version: int) -> None:
        """Keep the pool up to date until cancelled. What it knew before is asked again.

        Raises:
            EngineUnavailable: there was no server for ``patience_s``.
        """
        self._engines.clear()
        self._home.clear()
        self._refused.clear()
        joining: set[str] = set()  # names: two instances of one server must not be brought up at a time
        self._failures.clear()
        self._served_at = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            while True:
                records = {Instance(r.name, r.gen): r for r in await asyncio.to_thread(self._registry.live, ROLE)}
                self._engines = {key: engine for key, engine in self._engines.items() if key in records}
                for key in records.keys() - self._engines.keys() - self._refused.keys():
                    if key.name not in joining:
                        joining.add(key.name)
                        task = tasks.create_task(self._join(key, records[key], version))
                        task.add_done_callback(lambda _, name=key.name: joining.discard(name))
                if self._engines:
                    self._served_at = time.monotonic()
                elif time.monotonic() - self._served_at > self._patience_s:
                    raise EngineUnavailable(f"no server for {self._patience_s:g} s: {self.describe()}")
                await self._pause()

    async def _pause(self) -> None:
        """Until something was doubted, or for ``POLL_S``; at least a tenth of it."""
        self._doubted.clear()
        await asyncio.sleep(POLL_S / 10)
        with contextlib.suppress(TimeoutError):
            if self._engines:
                await asyncio.wait_for(self._doubted.wait(), POLL_S)

    async def take(self, prompt_id: str) -> tuple[Instance, PooledEngine]:
        """A seat: waits until there is one. Give it back."""
        while (key := self._choose(prompt_id)) is None:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake(1)  # the seat that was meant for us is another's
                raise
        self._in_flight[key] = self._in_flight.get(key, 0) + 1
        return key, self._engines[key]

    def give(self, key: Instance) -> None:
        """Give a seat back."""
        self._in_flight[key] -= 1
        if not self._in_flight[key]:
            del self._in_flight[key]
        self._wake(1)

    def doubt(self, key: Instance, error: EngineUnavailable) -> None:
        """It failed: ask nothing of it until it has answered what it serves."""
        self._engines.pop(key, None)
        self._failures[key] = str(error)
        self._doubted.set()

    def describe(self) -> str:
        """For errors: every server that the registry knows, and why it cannot be asked."""
        records = self._registry.live(ROLE, state=None, stale_s=float("inf"))
        known = [self._describe(record) for record in records]
        return "; ".join(known) or f"no server has registered in {self._registry.folder}"

    def _describe(self, record: Record) -> str:
        key = Instance(record.name, record.gen)
        failure = self._refused.get(key) or self._failures.get(key)
        reason = "serves" if key in self._engines else failure or "no answer yet"
        return f"{record.name} ({record.url}): {record.state}, start {record.gen}, {reason}"

    async def _join(self, key: Instance, record: Record, version: int) -> None:
        engine = self._connect(record)
        try:
            if await engine.weights_version() != version or await engine.is_paused():
                if self._admit is None:
                    self._refused[key] = "waits for the next publication"
                    return
                _log.info("%s, start %d: gets version %d", key.name, key.gen, version)
                await _whole(self._admit(record, version))
        except EngineUnavailable as error:  # it is asked again while its record lives
            self._failures[key] = str(error)
            return
        except (EngineReplyError, SyncError) as error:
            _log.warning("%s, start %d, is left out: %s", key.name, key.gen, error)
            self._refused[key] = str(error)
            return
        self._engines[key] = engine
        self._served_at = time.monotonic()
        self._wake(len(self._waiters))

    def _choose(self, prompt_id: str) -> Instance | None:
        if not self._engines:
            return None
        least = min(self._engines, key=self._load)
        home = self._home.setdefault(prompt_id, least)
        if home in self._engines and self._load(home) < self._concurrency:
            if self._load(home) - self._load(least) <= MAX_IMBALANCE:
                return home
        elif home not in self._engines:
            self._home[prompt_id] = least
        return least if self._load(least) < self._concurrency else None

    def _load(self, key: Instance) -> int:
        return self._in_flight.get(key, 0)

    def _wake(self, count: int) -> None:
        while count and self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1


async def _whole(work: Awaitable[None]) -> None:
    """Cancelling waits for the end of ``work``: a server that loads would meet the next publication, and die of it."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen: the cancellation is what is raised
        raise
