"""One SGLang server: which path, which deadline, which record."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from megatron_distil.errors import EngineReplyError, EngineUnavailable, RolloutError
from megatron_distil.http import Http, Peer, attempts
from megatron_distil.protocols import SamplingSpec
from megatron_distil.registry import Record
from megatron_distil.rollout.sglang import wire
from megatron_distil.types import FinishReason, Ids, Prompt, Rollout, RolloutId

CONTROL_TIMEOUT_S = 10.0
"""Calls that a server answers at once, also while it is paused."""
ABORT_TIMEOUT_S = 2.0


class Deadlines(NamedTuple):
    """How long to wait."""

    request_s: float
    """``rollout.request_timeout_s``: one response."""
    publish_s: float
    """``sync.timeout_s``: one call of a publication."""


class FlatWeight(Protocol):
    """One tensor of a bucket."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> str: ...


class FlatBucket(Protocol):
    """Tensors that are broadcast as one run of bytes, in this order."""

    @property
    def weights(self) -> Sequence[FlatWeight]: ...


class SglangEngine:
    """Speaks to one *instance* of a server: after a restart there is a new object with a new ``gen``.

    Every method raises ``EngineUnavailable`` when the server does not answer, and ``EngineReplyError`` when it says no
    or nonsense.
    """

    def __init__(self, http: Http, record: Record, decode: wire.Decode, deadlines: Deadlines) -> None:
        self.record = record
        self._http = http
        self._peer = Peer(record.name, record.url, unavailable=EngineUnavailable, refused=EngineReplyError)
        self._decode = decode
        self._deadlines = deadlines
        self._info: wire.ServerInfo | None = None

    @property
    def name(self) -> str:
        """Name in the registry."""
        return self.record.name

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.record.url

    @property
    def gen(self) -> int:
        """Which start of the server this is."""
        return self.record.gen

    # Sampling and scoring

    async def generate(self, prompt: Prompt, spec: SamplingSpec, rollout_id: RolloutId) -> Rollout:
        """One response. Whoever gives up waiting frees the server: it is told to abort."""
        reply = await self._generate(wire.generate_body(prompt, spec, rollout_id), rollout_id)
        rollout = wire.rollout(reply, prompt, spec, rollout_id, self._decode)
        if rollout.finish is FinishReason.ABORT:
            raise EngineUnavailable(f"{self.name}: aborted {rollout_id} after {len(rollout.token_ids)} tokens")
        return rollout

    async def score(self, context_ids: Ids, response_ids: Ids, top_k: int, rollout_id: RolloutId) -> wire.Scores:
        """What its model says of a response behind a context. Whoever gives up waiting frees the server."""
        body = wire.score_body(context_ids, response_ids, top_k, rollout_id)
        reply = await self._generate(body, rollout_id)
        if wire.was_aborted(reply):
            raise EngineUnavailable(f"{self.name}: aborted the scores of {rollout_id}")
        return wire.scores(reply, context_ids, response_ids, top_k, rollout_id)

    async def abort(self, rollout_id: RolloutId) -> None:
        """Best effort: a server that cannot be told has nothing to stop, or stops when the connection breaks."""
        body = {"rid": wire.request_id(rollout_id)}
        with contextlib.suppress(RolloutError):
            await self._http.post(self._peer, "/abort_request", body, timeout_s=ABORT_TIMEOUT_S)

    # What it serves

    async def info(self) -> wire.ServerInfo:
        """Version, sizes and precision; asked once."""
        if self._info is None:
            self._info = wire.server_info(await self._get("/server_info"), self.name)
        return self._info

    async def weights_version(self) -> int | None:
        """The version that was last published to it; None: it has the weights that it was started with."""
        reply = await self._get("/model_info")
        return wire.version_of(reply.get("weight_version") if isinstance(reply, Mapping) else None)

    async def is_paused(self) -> bool:
        """Whether new requests would wait."""
        return await self._http.status(self._peer, "/ready", timeout_s=CONTROL_TIMEOUT_S) != 200

    async def checksums(self) -> list[dict[str, str]]:
        """Digests of the weights, per tensor-parallel rank, under the server's fused names."""
        reply = await self._publish("/weights_checker", {"action": "checksum"})
        return wire.checksums(reply, self.name)

    # Publication, in the order in which it is called

    async def settle(self) -> None:
        """Once per instance: exempt what start-up allocated from garbage collection.

        On a CPU ``flush`` collects garbage, and that walks every object of the process: 0.4 s before, 5 ms after.
        """
        await self._publish("/freeze_gc", {})

    async def pause(self) -> None:
        """Running requests go back to the queue, new ones wait. Their prefixes are computed again afterwards."""
        await self._publish("/pause_generation", {"mode": "retract"})

    async def flush(self) -> None:
        """Drop every cached prefix. After ``pause``.

        Refused for milliseconds after a reply, so it is asked again. Without the query ``timeout``: with it the server
        waits for the requests that the pause holds back (0.5.21, managers/scheduler_components/flush_wrapper.py).
        """
        async for attempt in attempts(CONTROL_TIMEOUT_S, on=EngineReplyError):
            with attempt:
                await self._publish("/flush_cache", {})

    async def begin(self) -> None:
        """Open a weight update. One that an earlier publisher left open is ended first."""
        try:
            await self._publish("/begin_weight_update", {})
        except EngineReplyError:
            await self.end()
            await self._publish("/begin_weight_update", {})

    async def end(self) -> None:
        """Close the weight update."""
        await self._publish("/end_weight_update", {})

    async def update_from_disk(self, folder: str, version: int) -> None:
        """Load a folder in Hugging Face's format. The path is the server's: absolute, on a file system that it sees."""
        body = {
            "model_path": folder,
            "weight_version": str(version),
            "flush_cache": False,  # done before; with requests in the batch it would end the server
            "abort_all_requests": False,
        }
        _accepted(await self._publish("/update_weights_from_disk", body), self.name)

    async def join_group(
        self, group: str, address: str, port: int, *, rank_offset: int, world_size: int, backend: str
    ) -> None:
        """Returns when every member has joined: call it while the sender joins."""
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group,
            "backend": backend,
        }
        _accepted(await self._publish("/init_weights_update_group", body), self.name)

    async def leave_group(self, group: str) -> None:
        """Free the server's end of a group."""
        _accepted(await self._publish("/destroy_weights_update_group", {"group_name": group}), self.name)

    async def receive(self, group: str, bucket: FlatBucket, version: int | None) -> None:
        """Take one flat bucket from the sender of the group; returns when it was loaded. ``version`` with the last one."""
        body = {
            "names": [weight.name for weight in bucket.weights],
            "dtypes": [weight.dtype for weight in bucket.weights],
            "shapes": [list(weight.shape) for weight in bucket.weights],
            "group_name": group,
            "load_format": "flattened_bucket",
            "flush_cache": False,
            "abort_all_requests": False,
            "weight_version": None if version is None else str(version),
        }
        _accepted(await self._publish("/update_weights_from_distributed", body), self.name)

    async def resume(self) -> None:
        """Go on with what waits, and take new requests."""
        await self._publish("/continue_generation", {})

    async def _generate(self, body: Mapping[str, Any], rollout_id: RolloutId) -> Any:
        try:
            return await self._http.post(self._peer, "/generate", body, timeout_s=self._deadlines.request_s)
        except (asyncio.CancelledError, EngineUnavailable):
            await self.abort(rollout_id)
            raise

    async def _get(self, path: str) -> Any:
        return await self._http.get(self._peer, path, timeout_s=CONTROL_TIMEOUT_S)

    async def _publish(self, path: str, body: object) -> Any:
        return await self._http.post(self._peer, path, body, timeout_s=self._deadlines.publish_s)


def connector(http: Http, decode: wire.Decode, deadlines: Deadlines) -> Callable[[Record], SglangEngine]:
    """Record -> engine."""
    return lambda record: SglangEngine(http, record, decode, deadlines)


def _accepted(reply: Any, name: str) -> None:
    if not isinstance(reply, Mapping) or reply.get("success") is not True:
        raise EngineReplyError(f"{name}: {str(reply)[:300]}")
