"""Publication: the student on every server, or on none.

    pause(retract) -> flush -> open -> send all -> close -> verify -> resume

Nothing between may be skipped when something failed: a failed publication leaves the servers paused, and the next one
starts over. None ever serves a mixture, or tokens whose prefix was cached under other weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from megatron_distil.config.schema import RolloutConfig, SyncConfig
from megatron_distil.errors import EngineReplyError, EngineUnavailable, RegistryError, RolloutError, SyncError
from megatron_distil.registry import Record, Registry
from megatron_distil.sync.digest import Digests, first_difference
from megatron_distil.sync.disk import Snapshots, SnapshotWriter, load
from megatron_distil.sync.plan import Bucket, WeightSpec, check_bucket, plan_buckets, weight_spec
from megatron_distil.sync.sink import ServedEngine, ServedInfo, WeightSink, together

ROLE = "rollout"
ATTEMPTS = 3
RETRY_PAUSE_S = 1.0
LOCK_POLL_S = 0.2

Connect = Callable[[Record], ServedEngine]
OnFirstHead = Callable[[Callable[[], Awaitable[None]]], object]
"""Runs the work on the first replica's head; collective, and an error reaches every rank."""

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Publisher:
    """Fulfils ``protocols.Weights``. Collective: every trainer rank calls every method, in one order.

    Only the first head speaks to servers; the other ranks take part in the export.
    """

    registry: Registry
    connect: Connect
    sink: WeightSink
    snapshots: Snapshots | None
    """None: ``sync.snapshot`` is off. A disk sink needs it."""
    export: Callable[[], Iterator[tuple[str, Tensor]]]
    """Collective. The tensors count on the first head only."""
    manifest: Sequence[WeightSpec]
    """What ``export`` yields, in its order."""
    on_first_head: OnFirstHead
    sync: SyncConfig
    rollout: RolloutConfig

    _plan: tuple[Bucket, ...] = field(init=False)
    _round: _Round | None = field(init=False, default=None)
    _settled: set[tuple[str, int]] = field(init=False, default_factory=set[tuple[str, int]])
    _is_first: bool = field(init=False, default=True)
    _stopped: list[Record] = field(init=False, default_factory=list[Record])

    def __post_init__(self) -> None:
        self._plan = plan_buckets(self.manifest, self.sync.bucket_bytes)

    def publish(self, version: int) -> None:
        """Returns when every server that is up serves ``version``.

        A server that is lost on the way is left out: it comes back through ``Admission``, or at the next publication.

        Raises:
            SyncError: a server holds something else than was sent, or refuses it. The servers stay paused.
            EngineUnavailable: servers were lost again and again.
            RegistryError: too few servers registered or answered in time.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._publish(version)
            except (EngineUnavailable, EngineReplyError) as error:
                if attempt == ATTEMPTS:
                    if isinstance(error, EngineReplyError):
                        raise SyncError(f"version {version} was refused: {error}") from error
                    raise
                _log.warning("publication of version %d starts over: %s", version, error)
            else:
                self._is_first = False
                return

    def release(self) -> None:
        """With ``sync.idle_engines = "stop"``: stop the servers until the next publication."""
        if self.sync.idle_engines == "stop":
            self.on_first_head(self._stop)

    def close(self) -> None:
        """Not collective: nothing that this process stopped stays stopped."""
        while self._stopped:
            self._continue(self._stopped.pop())

    def _publish(self, version: int) -> None:
        try:
            self.on_first_head(partial(self._open, version))
            stream = self.export()
            for bucket in self._plan:
                tensors = list(islice(stream, len(bucket.weights)))
                self.on_first_head(partial(self._send, bucket, tensors))
            for name, _ in stream:  # on every rank
                raise SyncError(f"the export gave {name}, which is not in the manifest")
            self.on_first_head(partial(self._close, version))
        finally:
            if (unfinished := self._round) is not None:
                self._round = None
                if unfinished.writer is not None:
                    unfinished.writer.discard()

    # On the first head

    async def _open(self, version: int) -> None:
        self._continue_all()
        engines = await self._reachable()
        infos = [await engine.info() for engine in engines]
        is_due = self._is_first or version % self.sync.verify_every == 0
        writer = None if self.snapshots is None else self.snapshots.writer(version, self.manifest)
        self._round = _Round(version, engines, writer, _digests(infos) if is_due else None, is_due)
        for engine in engines:
            if (instance := (engine.name, engine.gen)) not in self._settled:
                await engine.settle()
                self._settled.add(instance)
        await self.sink.open(engines)

    async def _send(self, bucket: Bucket, named: Sequence[tuple[str, Tensor]]) -> None:
        check_bucket(bucket, [weight_spec(name, tensor.shape, tensor.dtype) for name, tensor in named])
        tensors = [tensor for _, tensor in named]
        current = self._current()
        if current.writer is not None:
            current.writer.add(bucket, tensors)
        if current.digests is not None:
            for name, tensor in named:
                current.digests.add(name, tensor)
        await self.sink.send(bucket, tensors, current.version)

    async def _close(self, version: int) -> None:
        current = self._current()
        if current.writer is not None:
            current.writer.commit()
            current.writer = None
        await self.sink.close(version)
        expected = None if current.digests is None else current.digests.result()
        await _verify(current.engines, version, expected, compare=current.is_due)
        await together(engine.resume() for engine in current.engines)
        self._round = None
        if self.snapshots is not None:
            self.snapshots.prune(version)

    def _current(self) -> _Round:
        if self._round is None:
            raise AssertionError("_open() comes first")
        return self._round

    async def _reachable(self) -> list[ServedEngine]:
        """The servers that answer. The first publication waits for all of them, later ones for one."""
        count = self.rollout.num_engines if self._is_first else 1
        deadline = time.monotonic() + self.rollout.start_timeout_s
        silent: set[tuple[str, int]] = set()
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            stopped = self.registry.stop_requested
            records = await asyncio.to_thread(
                partial(self.registry.wait_for, ROLE, count, timeout_s=left_s, stopped=stopped)
            )
            engines = [self.connect(record) for record in records]
            answers = await asyncio.gather(*(engine.weights_version() for engine in engines), return_exceptions=True)
            reachable: list[ServedEngine] = []
            for engine, answer in zip(engines, answers, strict=True):
                if not isinstance(answer, BaseException):
                    reachable.append(engine)
                elif isinstance(answer, RolloutError):
                    if (engine.name, engine.gen) not in silent:
                        _log.warning("%s is left out of the publication: %s", engine.name, answer)
                    silent.add((engine.name, engine.gen))
                else:
                    raise answer
            if len(reachable) >= count:
                return reachable
            if time.monotonic() > deadline:
                failures = "; ".join(str(answer) for answer in answers if isinstance(answer, RolloutError))
                raise RegistryError(
                    f"{len(reachable)} of {len(engines)} servers answer, the publication needs {count}: {failures}"
                )
            await asyncio.sleep(RETRY_PAUSE_S)

    async def _stop(self) -> None:
        for record in self.registry.live(ROLE):
            self.registry.mark_paused(record)
            self._stopped.append(record)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(record.pgid, signal.SIGSTOP)

    def _continue_all(self) -> None:
        """Also what an earlier attempt of the run stopped."""
        self.close()
        for record in self.registry.live(ROLE, state=None, stale_s=float("inf")):
            if self.registry.is_paused(ROLE, record.name):
                self._continue(record)

    def _continue(self, record: Record) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(record.pgid, signal.SIGCONT)
        self.registry.clear_paused(record)


@dataclass
class _Round:
    """One attempt of a publication, on the first head."""

    version: int
    engines: list[ServedEngine]
    writer: SnapshotWriter | None
    digests: Digests | None
    is_due: bool


@dataclass(frozen=True)
class Admission:
    """Brings one restarted server up, alone, at any time, from the snapshot of the current version. Any head may."""

    snapshots: Snapshots
    connect: Connect

    async def __call__(self, record: Record, version: int) -> None:
        """Returns when the server serves ``version``.

        Raises:
            EngineUnavailable: it does not answer, or there is no snapshot of the version.
            SyncError: it holds something else than the snapshot. It stays paused.
        """
        if not self.snapshots.path(version).is_dir():
            raise EngineUnavailable(f"{record.name}: there is no snapshot {self.snapshots.path(version)}")
        engine = self.connect(record)
        async with self._alone(record.name):
            if await engine.weights_version() != version or await engine.is_paused():
                await self._bring_up(engine, version)

    async def _bring_up(self, engine: ServedEngine, version: int) -> None:
        digests = _digests([await engine.info()])
        if digests is not None:
            for name, tensor in self.snapshots.read(version):
                digests.add(name, tensor)
        await engine.settle()
        await load([engine], self.snapshots, version)
        await _verify([engine], version, None if digests is None else digests.result(), compare=True)
        await engine.resume()

    @contextlib.asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[None]:
        """Against the other heads: two loads at a time end a server. A lock dies with its process."""
        with (self.snapshots.folder / f".{name}.lock").open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(LOCK_POLL_S)
            yield


class NoEngines:
    """``protocols.Weights`` of a run that replays logged rollouts and has no servers."""

    def publish(self, version: int) -> None:
        """Nobody to publish to."""

    def release(self) -> None:
        """Nobody to stop."""


async def _verify(
    engines: Sequence[ServedEngine], version: int, expected: dict[str, str] | None, *, compare: bool
) -> None:
    """Every server says ``version`` and, if ``compare``, holds what was sent, or at least what the others hold."""
    for engine in engines:
        if (said := await engine.weights_version()) != version:
            raise SyncError(f"{engine.name}: says version {said}, was sent {version}")
    if not compare:
        return
    tables = await asyncio.gather(*(engine.checksums() for engine in engines))
    for engine, ranks in zip(engines, tables, strict=True):
        if expected is not None:
            if (difference := first_difference(expected, ranks[0])) is not None:
                raise SyncError(f"{engine.name}: version {version} differs at {difference}")
            continue
        if len(ranks) != len(tables[0]):
            continue  # another tensor-parallel size has other shards
        for rank, (ours, theirs) in enumerate(zip(ranks, tables[0], strict=True)):
            if (difference := first_difference(theirs, ours)) is not None:
                raise SyncError(
                    f"{engine.name}: version {version} differs from {engines[0].name} on tensor-parallel rank {rank} "
                    f"at {difference}"
                )


def _digests(infos: Sequence[ServedInfo]) -> Digests | None:
    """None where the servers' digests cannot be made from whole tensors: on a GPU, or sharded."""
    if any(info.device != "cpu" or info.tp_size != 1 for info in infos):
        return None
    dtypes = {info.dtype for info in infos}
    if len(dtypes) != 1:
        raise SyncError(f"the servers have different precisions: {', '.join(sorted(dtypes))}")
    dtype = getattr(torch, dtypes.pop(), None)
    return Digests(dtype) if isinstance(dtype, torch.dtype) else None
