"""Connections that bring no whole request in time are closed: not every version of aiohttp does so by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from aiohttp import web


class Silence:
    """Knows which connections never spoke."""

    def __init__(self, read_s: float) -> None:
        self._read_s = read_s
        self._spoke = set[object]()
        self._since: dict[web.RequestHandler, float] = {}

    @web.middleware
    async def note(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """This connection spoke; from now on the time it may be idle is aiohttp's affair."""
        self._spoke.add(request.protocol)
        return await handler(request)

    async def watch(self, server: web.Server) -> None:
        """Close those that did not, until cancelled."""
        while True:
            await asyncio.sleep(self._read_s / 4)
            self._close(server.connections, time.monotonic())

    def _close(self, connections: list[web.RequestHandler], now: float) -> None:
        self._spoke.intersection_update(connections)
        self._since = {one: self._since.get(one, now) for one in connections if one not in self._spoke}
        for one, since in self._since.items():
            if now - since >= self._read_s:
                one.force_close()
