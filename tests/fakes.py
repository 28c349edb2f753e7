"""A server that answers as SGLang does, and misbehaves on demand: what the real one cannot be asked to do.

It speaks the paths that the client uses. Its log-probabilities are a function of the token, its tokens of the prompt and
of the request's number, so that a test can tell which server said what.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from aiohttp import web

from megatron_distil.registry import Record, Registry

Fault = Literal["503", "400", "hang", "close", "abort"] | Callable[[dict[str, Any]], object]
"""What happens to one ``/generate``: a status, no answer, a cut connection, or an edit of the reply."""


@dataclass
class FakeServer:
    """One engine. ``faults`` are used up one per request; without any it is well behaved."""

    name: str
    registry: Registry
    version: str = "default"
    delay_s: float = 0.0
    load_s: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    refuses: dict[str, str] = field(default_factory=dict)
    """Path -> text of the 400 that it gets."""
    corrupts: str = ""
    """A weight that is changed after loading."""

    device: str = "cpu"
    pgid: int = 1
    gen: int = 0
    calls: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    most_in_flight: int = 0
    is_paused: bool = False
    has_session: bool = False
    _in_flight: int = 0
    _is_loading: bool = False
    _folder: str = ""
    _port: int = 0
    _runner: web.AppRunner | None = None

    async def __aenter__(self) -> FakeServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def start(self) -> None:
        """Listen, on the port of the last time if there was one, and register."""
        app = web.Application()
        app.router.add_route("*", "/{path}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.0, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self.register()

    def register(self) -> None:
        """A fresh heartbeat."""
        self.registry.write(self.record)

    @property
    def record(self) -> Record:
        url = f"http://127.0.0.1:{self._port}"
        return Record("rollout", self.name, url, pid=1, pgid=self.pgid, state="ready", gen=self.gen, ts=time.time())

    async def die(self) -> None:
        """Cut every connection."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        assert runner.server is not None
        for site in list(runner.sites):
            await site.stop()
        for connection in list(runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await runner.cleanup()

    async def restart(self) -> None:
        """As a supervisor would: same port, start weights, the next ``gen``."""
        await self.die()
        self.version, self.gen, self.is_paused, self.has_session, self._folder = (
            "default",
            self.gen + 1,
            False,
            False,
            "",
        )
        await self.start()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        self.calls.append(path)
        if path in self.refuses:
            return web.json_response({"success": False, "message": self.refuses[path]}, status=400)
        body = await request.json() if request.can_read_body else {}
        return await getattr(self, f"_{path}")(request, body)

    async def _generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        self.requests.append(body["rid"])
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            while self.is_paused:  # noqa: ASYNC110 - tests set the flag directly
                await asyncio.sleep(0.01)
            await asyncio.sleep(self.delay_s)
            return await self._answer(request, body, self.faults.pop(0) if self.faults else None)
        finally:
            self._in_flight -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any], fault: Fault | None) -> web.StreamResponse:
        reply = self._reply(body)
        match fault:
            case "503" | "400":
                return web.json_response({"error": "injected"}, status=int(fault))
            case "hang":
                await asyncio.sleep(3600)
            case "close":
                assert request.transport is not None
                request.transport.abort()
            case "abort":
                reply["meta_info"]["finish_reason"] = {"type": "abort", "message": "Aborted"}
            case None:
                pass
            case edit:
                edit(reply)
        return web.Response(text=json.dumps(reply), content_type="application/json")

    def _reply(self, body: dict[str, Any]) -> dict[str, Any]:
        return reply_to(body, self.version)

    async def _abort_request(self, _: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        self.aborted.append(body["rid"])
        return web.Response()

    async def _model_info(self, _: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"weight_version": self.version})

    async def _server_info(self, _: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"version": "0.5.21", "tp_size": 1, "device": self.device, "dtype": "float32"})

    async def _ready(self, _: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=503 if self.is_paused else 200)

    async def _freeze_gc(self, _: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        return web.Response(text="Garbage collection frozen.\n")

    async def _pause_generation(self, _: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert body == {"mode": "retract"}
        self.is_paused = True
        return web.json_response({"status": "ok"})

    async def _flush_cache(self, request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        assert not request.query, "with a timeout the real server waits for the requests that the pause holds back"
        return web.Response(text="Cache flushed.\n", status=200 if self.is_paused else 400)

    async def _begin_weight_update(self, _: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        if self.has_session:
            return web.json_response(
                {"success": False, "message": "a weight-update session is already open"}, status=400
            )
        self.has_session = True
        return web.json_response({"success": True})

    async def _end_weight_update(self, _: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        had, self.has_session = self.has_session, False
        return web.json_response({"success": had}, status=200 if had else 400)

    async def _update_weights_from_disk(self, _: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert body["flush_cache"] is False
        assert self.is_paused
        if self._is_loading:  # two at a time end the real server
            await self.die()
        self._is_loading = True
        await asyncio.sleep(self.load_s)
        self._is_loading = False
        self.version, self._folder = body["weight_version"], body["model_path"]
        return web.json_response({"success": True, "message": "", "num_paused_requests": 0})

    async def _weights_checker(self, _: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert body == {"action": "checksum"}
        table = fused_digests(Path(self._folder) / "model.safetensors") if self._folder else {"none": "0" * 16}
        if self.corrupts:
            table[self.corrupts] = "f" * 16
        return web.json_response({"success": True, "ranks": [{"checksums": table}]})

    async def _continue_generation(self, _: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        self.is_paused = False
        return web.json_response({"status": "ok"})


@dataclass
class FakeExpert(FakeServer):
    """A server of role ``teacher``. What it says of a token is a function of the three ids before it."""

    vocab_size: int = 97
    says: str = "0.5.21"
    """Its version."""
    bodies: list[dict[str, Any]] = field(default_factory=list)

    @property
    def record(self) -> Record:
        return replace(super().record, role="teacher")

    @staticmethod
    def row(ids: list[int], vocab_size: int) -> np.ndarray:
        """[V] log-probabilities of what follows, float32."""
        logits = np.random.default_rng(ids[-3:]).normal(0.0, 2.0, vocab_size)
        return (logits - np.log(np.exp(logits).sum())).astype(np.float32)

    def _reply(self, body: dict[str, Any]) -> dict[str, Any]:
        self.bodies.append(body)
        assert body["sampling_params"] == {"temperature": 1.0, "max_new_tokens": 0}
        ids, start, k = body["input_ids"], body["logprob_start_len"], body.get("top_logprobs_num", 0)
        rows = np.stack([self.row(ids[:end], self.vocab_size) for end in range(start + 1, len(ids))])
        response = ids[start + 1 :]
        own = [[float(row[token]), token, None] for row, token in zip(rows, response, strict=True)]
        meta: dict[str, Any] = {
            "id": body["rid"],
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(ids),
            "completion_tokens": 0,
            "input_token_logprobs": [[None, ids[start], None], *own],
        }
        if k:
            best = np.argsort(-rows, axis=1, kind="stable")[:, :k].astype(np.int32)
            arrays = {"idx": best, "val": np.take_along_axis(rows, best, 1)}
            for part, array in arrays.items():
                name = f"input_top_logprobs_{part}_flat_b64"
                meta |= {name: base64.b64encode(array.tobytes()).decode(), f"{name}_dtype": array.dtype.name}
            meta |= {"input_top_logprobs_shape": list(best.shape), "input_top_logprobs_null_prefix": 1}
        return {"output_ids": [], "meta_info": meta}

    async def _server_info(self, _: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"version": self.says, "tp_size": 1, "device": "cpu", "dtype": "float32"})


def reply_to(body: dict[str, Any], version: str) -> dict[str, Any]:
    """A well-formed reply of as many tokens as the request allows, at most 4."""
    limit = body["sampling_params"]["max_new_tokens"]
    ids = [(sum(body["input_ids"]) + index) % 97 for index in range(min(4, limit))]
    finish = {"type": "length", "length": limit} if limit <= 4 else {"type": "stop", "matched": ids[-1]}
    return {
        "text": "",
        "output_ids": ids,
        "meta_info": {
            "id": body["rid"],
            "finish_reason": finish,
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": len(ids),
            "output_token_logprobs": [[-0.01 * token, token, None] for token in ids],
            "weight_versions": [{"version": version, "start": 0, "end": len(ids)}],
        },
    }


def fused_digests(file: Path) -> dict[str, str]:
    """What a server on a CPU says of the weights in a float32 file whose vocabulary needs no padding."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    content = {
        name: raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        for name, entry in header.items()
        if name != "__metadata__"
    }
    joined: dict[str, bytes] = {}
    for name, value in content.items():
        if ".q_proj." in name:
            parts = [content[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            joined[name.replace(".q_proj.", ".qkv_proj.")] = b"".join(parts)
        elif ".gate_proj." in name:
            up = content[name.replace(".gate_proj.", ".up_proj.")]
            joined[name.replace(".gate_proj.", ".gate_up_proj.")] = value + up
        elif not any(f".{part}_proj." in name for part in ("k", "v", "up")):
            joined[name] = value
    return {name: hashlib.sha256(value).hexdigest()[:16] for name, value in joined.items()}
