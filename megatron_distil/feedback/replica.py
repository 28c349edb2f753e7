"""One sandbox service as the trainer knows it: what it can, which tests it holds, how it has behaved of late."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from pathlib import Path

from megatron_distil.config.schema import FeedbackConfig
from megatron_distil.errors import DataError, SandboxRefused, SandboxUnavailable
from megatron_distil.feedback import wire
from megatron_distil.http import Http, Peer, Reply, judged
from megatron_distil.registry import Record
from megatron_distil.types import CaseFile, Program, RunResult

FAULTS_TO_OPEN = 3
"""Faults in a row after which a service is left alone until it says that it is ready."""
PROBE_PAUSE_S = 1.0
PROBE_TIMEOUT_S = 10.0


class SandboxReplica:
    """Belongs to one event loop. ``busy`` is the pool's: programs that it has here now."""

    def __init__(self, http: Http, peer: Peer, config: FeedbackConfig, said: wire.Capabilities) -> None:
        self.name, self.url = peer.name, peer.url
        self.said = said
        self.busy = 0
        self._http, self._config, self._peer = http, config, peer
        self._faults, self._last_fault, self._probe_at = 0, "", 0.0
        self._holds = set[str]()
        self._uploads: dict[str, asyncio.Lock] = {}

    @classmethod
    async def known(cls, http: Http, record: Record, config: FeedbackConfig, token: str) -> SandboxReplica:
        """Ask a service whether it is ready and what it can.

        Raises:
            SandboxUnavailable: it does not answer, or is not ready.
            SandboxRefused: it answers something else than the protocol says.
        """
        peer = Peer(record.name, record.url, SandboxUnavailable, SandboxRefused, token)
        timeout_s = min(PROBE_TIMEOUT_S, config.request_timeout_s)
        await http.get(peer, wire.READY_PATH, timeout_s=timeout_s)
        said = await http.get(peer, wire.CAPABILITIES_PATH, timeout_s=timeout_s)
        return cls(http, peer, config, wire.capabilities_of(said, service=f"{record.name} ({record.url})"))

    def __str__(self) -> str:
        return f"{self.name} ({self.url})"

    # ---- the breaker

    @property
    def is_trusted(self) -> bool:
        """It did not fail several times in a row, or it has said since that it is ready."""
        return self._faults < FAULTS_TO_OPEN

    def failed(self, error: SandboxUnavailable) -> None:
        """Count a fault; one that says when to come back is busy, not broken."""
        if not error.retry_after_s:
            self._faults, self._last_fault = self._faults + 1, str(error)

    async def probe(self) -> None:
        """Ask a service that is not trusted whether it is ready, once in a while: then it is trusted again."""
        now = time.monotonic()
        if self.is_trusted or now < self._probe_at:
            return
        self._probe_at = now + PROBE_PAUSE_S
        try:
            timeout_s = min(PROBE_TIMEOUT_S, self._config.request_timeout_s)
            status = await self._http.status(self._peer, wire.READY_PATH, timeout_s=timeout_s)
        except SandboxUnavailable as error:
            self._last_fault = str(error)
            return
        if status == 200:
            self._faults = 0

    def describe(self) -> str:
        """For errors."""
        return str(self) if self.is_trusted else f"{self} is left alone after: {self._last_fault}"

    # ---- requests

    async def run(self, program: Program, request_id: str, *, timeout_s: float) -> RunResult:
        """What the program did.

        Raises:
            SandboxUnavailable: no answer in time, no connection, it is busy, or the sandbox itself failed.
            SandboxRefused: it refused the program, or answered something else than the protocol says.
            DataError: the file of the tests is not what the data says.
        """
        until = time.monotonic() + timeout_s
        body = wire.request_of(
            program, request_id, test_timeout_s=self._config.test_timeout_s, deadline_s=max(round(timeout_s, 3), 0.001)
        )
        data = json.dumps(body).encode()
        await self._bring(program.case_file, until)
        reply = await self._ask("POST", wire.RUN_PATH, data, until)
        if program.case_file is not None and wire.refusal_of(reply.payload).code == wire.TESTS_UNKNOWN:
            self._holds.discard(program.case_file.sha256)  # it has dropped them, or started anew
            await self._bring(program.case_file, until)
            reply = await self._ask("POST", wire.RUN_PATH, data, until)
        result = wire.result_of(self._judged(wire.RUN_PATH, reply), program, request_id=request_id, service=self.name)
        self._faults = 0
        return result

    async def _bring(self, cases: CaseFile | None, until: float) -> None:
        """See that it holds the tests; however many programs wait for them, they are sent once."""
        if cases is None or cases.sha256 in self._holds:
            return
        async with self._uploads.setdefault(cases.sha256, asyncio.Lock()):
            if cases.sha256 in self._holds:
                return
            path = f"{wire.TESTS_PATH}/{cases.sha256}"
            if (await self._ask("HEAD", path, None, until)).status != 200:
                payload = await asyncio.to_thread(read_cases, cases)
                self._judged(path, await self._ask("PUT", path, payload, until))
            self._holds.add(cases.sha256)

    async def _ask(self, method: str, path: str, data: bytes | None, until: float) -> Reply:
        timeout_s = max(until - time.monotonic(), 0.001)
        return await self._http.ask(self._peer, method, path, data, timeout_s=timeout_s)

    def _judged(self, path: str, reply: Reply) -> object:
        try:
            return judged(self._peer, path, reply)
        except SandboxUnavailable as error:
            error.retry_after_s = wire.refusal_of(reply.payload).retry_after_s
            raise


def read_cases(cases: CaseFile) -> bytes:
    """The bytes of a file of tests.

    Raises:
        DataError: there is no such file, or it holds something else.
    """
    hint = "prepare the data again (megatron_distil/docs/tasks.md), or name another folder in task.tests"
    try:
        payload = Path(cases.path).read_bytes()
    except OSError as error:
        raise DataError(f"{cases.path}: {error.strerror}; {hint}") from error
    if hashlib.sha256(payload).hexdigest() != cases.sha256:
        raise DataError(f"{cases.path}: its content is not what its name says; {hint}")
    return payload
