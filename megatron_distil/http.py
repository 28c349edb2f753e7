"""The one HTTP client of a run: deadlines, and errors in our words.

``Http.post`` never retries: one request, one answer, one deadline. Retries are declared by ``attempts`` and used where
there is another server to try.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import aiohttp
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_before_delay,
    wait_exponential,
    wait_random,
)

from megatron_distil.errors import DistilError

CONNECT_TIMEOUT_S = 5.0
KEEP_ALIVE_S = 3.0
"""Below the 5 s of uvicorn, so that a connection is never used again while the server closes it."""
_RETRYABLE = frozenset({408, 429})
_EXCERPT = 500


class Peer(NamedTuple):
    """Who we talk to, and what its failures are called."""

    name: str
    url: str
    unavailable: type[DistilError]
    """It cannot be reached, refuses work or is too slow; worth another attempt."""
    refused: type[DistilError]
    """It understood and said no; the same question gets the same answer."""
    token: str = ""
    """Sent as ``Authorization: Bearer``; empty: none is."""

    def __repr__(self) -> str:
        return f"Peer({self.name}, {self.url})"  # the token belongs in no message


def attempts(
    budget_s: float, on: type[DistilError], least_pause: Callable[[BaseException], float] = lambda _: 0.0
) -> AsyncRetrying:
    """Attempts with growing, jittered pauses until the budget is spent; then the last error, as it was.

    Args:
        budget_s: for all of them, pauses included.
        on: errors after which there is another attempt.
        least_pause: seconds that an error asks us to wait at least.
    """
    growing = wait_exponential(multiplier=0.2, max=10.0)
    jitter = wait_random(0.0, 0.2)

    def pause(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        asked = 0.0 if error is None else least_pause(error)
        return max(growing(state), asked) + jitter(state)

    return AsyncRetrying(retry=retry_if_exception_type(on), wait=pause, stop=stop_before_delay(budget_s), reraise=True)


class Reply(NamedTuple):
    """What a peer answered, whatever it is."""

    status: int
    content_type: str
    payload: bytes


class Http:
    """One session for the whole run. Callers bound what is in flight; the session adds no limit of its own.

    The session is made by the first call, inside the loop that runs it: the object may be made before there is one.
    """

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Http:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. A later call would make a new session."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def post(self, peer: Peer, path: str, body: object, *, timeout_s: float) -> Any:
        """The decoded reply, as ``judged`` reads it.

        Raises:
            peer.unavailable: no answer in time, a broken connection, 5xx, 408 or 429.
            peer.refused: any other status above 299, or a reply that is not the JSON that it claims to be.
        """
        data = json.dumps(body).encode()
        return judged(peer, path, await self.ask(peer, "POST", path, data, timeout_s=timeout_s))

    async def get(self, peer: Peer, path: str, *, timeout_s: float) -> Any:
        """As ``post``."""
        return judged(peer, path, await self.ask(peer, "GET", path, timeout_s=timeout_s))

    async def status(self, peer: Peer, path: str, *, timeout_s: float) -> int:
        """The status of ``GET``, whatever it is.

        Raises:
            peer.unavailable: no answer in time, or a broken connection.
        """
        return (await self.ask(peer, "GET", path, timeout_s=timeout_s)).status

    async def ask(self, peer: Peer, method: str, path: str, data: bytes | None = None, *, timeout_s: float) -> Reply:
        """One request and its answer, whatever its status is; ``judged`` says what it means.

        Raises:
            peer.unavailable: no answer in time, or a broken connection.
        """
        headers = {"Authorization": f"Bearer {peer.token}"} if peer.token else None
        body = None if data is None else io.BytesIO(data)  # read in pieces: whole, a large one holds up all others
        try:
            async with asyncio.timeout(timeout_s):
                async with self._opened().request(method, peer.url + path, data=body, headers=headers) as response:
                    return Reply(response.status, response.content_type, await response.read())
        except TimeoutError as error:
            raise peer.unavailable(f"{_where(peer, path)}: no answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise peer.unavailable(f"{_where(peer, path)}: {type(error).__name__}: {error}") from error

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
                headers={"Content-Type": "application/json"},
            )
        return self._session


def judged(peer: Peer, path: str, answer: Reply) -> Any:
    """The decoded reply: JSON, or text where the peer says that it is; None when it is empty.

    Raises:
        peer.unavailable: 5xx, 408 or 429.
        peer.refused: any other status above 299, or a reply that is not the JSON that it claims to be.
    """
    if answer.status >= 500 or answer.status in _RETRYABLE:
        raise peer.unavailable(f"{_where(peer, path)}: {answer.status}: {_excerpt(answer.payload)}")
    if answer.status > 299:
        raise peer.refused(f"{_where(peer, path)}: {answer.status}: {_excerpt(answer.payload)}")
    if not answer.payload:
        return None
    if answer.content_type != "application/json":
        return answer.payload.decode(errors="replace")
    try:
        return json.loads(answer.payload)
    except ValueError as error:
        raise peer.refused(f"{_where(peer, path)}: the reply is not JSON: {_excerpt(answer.payload)}") from error


def _where(peer: Peer, path: str) -> str:
    return f"{peer.name} ({peer.url}{path})"


def _excerpt(payload: bytes) -> str:
    text = payload[:_EXCERPT].decode(errors="replace")
    return text if len(payload) <= _EXCERPT else f"{text}... ({len(payload)} bytes)"
