"""Weights by one broadcast of flat buckets: NCCL, gloo where the servers run on a CPU.

The group lies outside torch's default group: its rank 0 is the sending rank, the others are the tensor-parallel ranks of
the servers. It is made again, under a new name, when the servers are others than before.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import uuid
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import TypeVar, cast
from urllib.parse import urlsplit

import torch
import torch.distributed as dist  # noqa: TID251 - the group that weights travel by
from torch import Tensor
from torch.distributed import TCPStore  # noqa: TID251 - as above # pyright: ignore[reportPrivateImportUsage] - public by documentation
from torch.distributed.distributed_c10d import (  # noqa: TID251 - as above
    Backend,
    GroupName,
    PrefixStore,
    _new_process_group_helper,  # the public function knows the default group only
    _world,
)

from megatron_distil.errors import EngineUnavailable, RolloutError
from megatron_distil.sync.plan import Bucket
from megatron_distil.sync.sink import ServedEngine, quiesce, together

GRACE_S = 5.0
"""How long the other calls may take to fail after the first one did."""
T = TypeVar("T")


class BroadcastSink:
    """Every server receives every bucket at the same time."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._engines: Sequence[ServedEngine] = ()
        self._members: tuple[tuple[str, int], ...] = ()
        self._name = ""
        self._group: dist.ProcessGroup | None = None

    async def open(self, engines: Sequence[ServedEngine]) -> None:
        """Pause, flush, open an update, everywhere; with a group that holds exactly these servers."""
        members = tuple((engine.name, engine.gen) for engine in engines)
        if self._group is None or members != self._members:
            await self._regroup(engines)
            self._members = members
        self._engines = engines
        await quiesce(engines)
        await together(engine.begin() for engine in engines)

    async def send(self, bucket: Bucket, tensors: Sequence[Tensor], version: int) -> None:
        """Announce the bucket to all, broadcast it, wait until all have loaded it."""
        group, name = self._group, self._name
        if group is None:
            raise AssertionError("open() makes the group")
        flat = torch.cat([tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in tensors])
        named = version if bucket.is_last else None
        await self._with_peers(
            lambda: _broadcast(flat, group),
            [engine.receive(name, bucket, named) for engine in self._engines],
        )

    async def close(self, version: int) -> None:
        """Close the update everywhere."""
        await together(engine.end() for engine in self._engines)

    async def _regroup(self, engines: Sequence[ServedEngine]) -> None:
        await self._leave()
        name = f"weights-{uuid.uuid4().hex}"  # a server may still know the group of an earlier trainer
        infos = [await engine.info() for engine in engines]
        backend = "nccl" if all(info.device.startswith("cuda") for info in infos) else "gloo"
        world_size = 1 + sum(info.tp_size for info in infos)
        address = _own_address(engines[0].url)
        timeout = timedelta(seconds=self._timeout_s)
        # Made here and not by torch's rendezvous: under torchrun that looks for the store of torchrun's own agent.
        store = TCPStore(address, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        joins: list[Awaitable[None]] = []
        offset = 1
        for engine, info in zip(engines, infos, strict=True):
            joins.append(
                engine.join_group(name, address, store.port, rank_offset=offset, world_size=world_size, backend=backend)
            )
            offset += info.tp_size
        self._group = await self._with_peers(lambda: _join(store, world_size, name, backend, timeout), joins)
        self._name = name

    async def _leave(self) -> None:
        """Best effort: what is left of a group whose member is gone cannot be taken down in order."""
        group, self._group = self._group, None
        if group is None:
            return
        for engine in self._engines:
            with contextlib.suppress(RolloutError):
                await engine.leave_group(self._name)
        with contextlib.suppress(RuntimeError, ValueError):
            dist.destroy_process_group(group)

    async def _with_peers(self, ours: Callable[[], T], theirs: Sequence[Awaitable[None]]) -> T:
        """Our half of a collective, in a thread, while the servers are told to do theirs.

        Raises:
            EngineUnavailable: the collective broke, or did not end in time. The group is given up.
            EngineReplyError: a server refused its half.
        """
        mine = asyncio.ensure_future(_in_thread(ours))
        calls = [asyncio.ensure_future(call) for call in theirs]
        everyone = [*calls, mine]
        _, late = await asyncio.wait(everyone, timeout=self._timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        if late:
            _, late = await asyncio.wait(late, timeout=GRACE_S)
        for task in late:
            task.cancel()
        # A server says more precisely what is wrong than the collective does.
        for call in calls:
            if call.done() and not call.cancelled() and (error := call.exception()) is not None:
                self._give_up()
                raise error
        if late:
            self._give_up()
            raise EngineUnavailable(f"broadcast to {self._describe()}: not done within {self._timeout_s:g} s")
        if (error := mine.exception()) is not None:
            self._give_up()
            raise EngineUnavailable(f"broadcast to {self._describe()}: {error}") from error
        return mine.result()

    def _give_up(self) -> None:
        """Forget a broken group without taking it down: that would wait for its dead member."""
        _abandoned.append(self._group)
        self._group = None

    def _describe(self) -> str:
        return ", ".join(engine.name for engine in self._engines) or "the servers"


_abandoned: list[dist.ProcessGroup | None] = []
"""Broken groups, kept from the destructor, which blocks while a peer is gone."""


def _join(store: TCPStore, world_size: int, name: str, backend: str, timeout: timedelta) -> dist.ProcessGroup:
    """Rank 0 of a group that torch's default group knows nothing of."""
    group, _ = _new_process_group_helper(
        world_size, 0, [], Backend(backend), PrefixStore(name, store), group_name=GroupName(name), timeout=timeout
    )
    if not isinstance(group, dist.ProcessGroup):
        raise AssertionError("the sender is rank 0 of its own group")
    _world.pg_group_ranks[group] = {index: index for index in range(world_size)}
    return group


def _broadcast(flat: Tensor, group: dist.ProcessGroup) -> None:
    if flat.is_cuda:
        with torch.cuda.device(flat.device):  # the device is a property of the thread
            dist.broadcast(flat, src=0, group=group)
            torch.cuda.current_stream().synchronize()
    else:
        dist.broadcast(flat, src=0, group=group)


async def _in_thread(work: Callable[[], T]) -> T:
    """In a daemon thread: one that hangs in a collective must not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if not done.done():
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(cast(T, result))

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - it is raised again where it is awaited
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="weights-broadcast", daemon=True).start()
    return await done


def _own_address(peer_url: str) -> str:
    """The address of this machine under which the peer sees it."""
    parts = urlsplit(peer_url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting sends nothing
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 1))
        return str(probe.getsockname()[0])
