"""What a way of moving weights must do, and what it asks of a server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from megatron_distil.sync.plan import Bucket


class ServedInfo(Protocol):
    """What does not change while a server lives."""

    @property
    def tp_size(self) -> int:
        """Tensor-parallel size."""
        ...

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        ...

    @property
    def dtype(self) -> str:
        """Precision of its weights."""
        ...


class ServedEngine(Protocol):
    """A server, as a publication sees it. Each method is one call with a deadline; the order is the publisher's.

    Raises ``EngineUnavailable`` when the server does not answer, ``EngineReplyError`` when it refuses.
    """

    @property
    def name(self) -> str:
        """For errors."""
        ...

    @property
    def url(self) -> str:
        """Where it listens."""
        ...

    @property
    def gen(self) -> int:
        """Which start of the server this is."""
        ...

    async def info(self) -> ServedInfo:
        """Sizes and precision."""
        ...

    async def settle(self) -> None:
        """Once per instance, before its first publication."""
        ...

    async def pause(self) -> None:
        """Nothing is computed until ``resume``; requests wait."""
        ...

    async def flush(self) -> None:
        """No cached prefix survives. After ``pause``."""
        ...

    async def begin(self) -> None:
        """Open an update."""
        ...

    async def end(self) -> None:
        """Close the update."""
        ...

    async def update_from_disk(self, folder: str, version: int) -> None:
        """Load a folder."""
        ...

    async def join_group(
        self, group: str, address: str, port: int, *, rank_offset: int, world_size: int, backend: str
    ) -> None:
        """Returns when every member has joined."""
        ...

    async def leave_group(self, group: str) -> None:
        """Forget the group."""
        ...

    async def receive(self, group: str, bucket: Bucket, version: int | None) -> None:
        """Take a flat bucket from rank 0 of the group; ``version`` with the last one."""
        ...

    async def checksums(self) -> list[dict[str, str]]:
        """Digests per tensor-parallel rank."""
        ...

    async def weights_version(self) -> int | None:
        """The version that was last published to it."""
        ...

    async def is_paused(self) -> bool:
        """Whether new requests would wait."""
        ...

    async def resume(self) -> None:
        """Serve again."""
        ...


class WeightSink(Protocol):
    """Brings the buckets of a version into servers. Called on the sending rank only, in the order of the methods.

    After ``close`` every server is paused, has no cached prefix, and holds the version under its number.
    """

    async def open(self, engines: Sequence[ServedEngine]) -> None:
        """Make the servers ready to receive."""
        ...

    async def send(self, bucket: Bucket, tensors: Sequence[Tensor], version: int) -> None:
        """Returns when ``tensors`` may be overwritten."""
        ...

    async def close(self, version: int) -> None:
        """Everything was sent."""
        ...


async def quiesce(engines: Sequence[ServedEngine]) -> None:
    """Pause all, then flush all: no prefix survives the weights that made it."""
    await together(engine.pause() for engine in engines)
    await together(engine.flush() for engine in engines)


async def together(calls: Iterable[Awaitable[None]]) -> None:
    """All at once; waits for every one, then raises the first error."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
