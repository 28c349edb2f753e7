"""What is served over HTTP. ``openapi.json`` beside this file says the same to clients."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from sandbox import batch, judge, limits
from sandbox.refusal import BadRequest, NoSuchRoute, Refusal, TestsUnknown, TooLarge, TooSlow, Unauthorized, WrongMethod
from sandbox.request import PROTOCOL, Request, Rules, TestSet, decode, parse, parse_tests
from sandbox.service import Answer, Service
from sandbox.store import TestSets

LARGE_BODY = 256 << 10
"""Above it a body is decoded beside the event loop."""
HANG_UP_POLL_S = 0.25
LINES_PER_WORKER = 2
"""Of a batch: enough that no worker waits, and room in the queue for others."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may ask, and how much at a time."""

    token: bytes
    """Empty: none is asked for."""
    max_body_bytes: int
    read_s: float
    """For a request to arrive."""


class Routes:
    """The handlers of a service."""

    def __init__(
        self, service: Service, rules: Rules, tests: TestSets, access: Access, facts: Mapping[str, object]
    ) -> None:
        self._service, self._rules, self._tests, self._access = service, rules, tests, access
        self._facts = facts
        """Of the machine and this start, repeated in the capabilities."""

    def application(self, *outer: Any) -> web.Application:
        """For aiohttp. ``outer`` are middlewares around ours."""
        app = web.Application(
            client_max_size=self._access.max_body_bytes + 1, middlewares=[*outer, self._errors, self._authorized]
        )
        app.add_routes(
            [
                web.post("/v1/run", self._run),
                web.post("/v1/batch", self._batch),
                web.put("/v1/tests/{sha256}", self._put_tests),
                web.head("/v1/tests/{sha256}", self._head_tests),
                web.get("/v1/capabilities", self._capabilities, allow_head=False),
                web.get("/healthz", self._healthz, allow_head=False),
                web.get("/readyz", self._readyz, allow_head=False),
                web.get("/metrics", self._metrics, allow_head=False),
            ]
        )
        return app

    # ---------------------------------------------------------------------------------------- running
    async def _run(self, http: web.Request) -> web.Response:
        request = await self._parsed(await self._body(http))
        return web.json_response(await self._unless_gone(http, request, self._service.submit(request)))

    async def _batch(self, http: web.Request) -> web.StreamResponse:
        async def answer(line: bytes) -> Answer:
            request = await self._parsed(line)
            return await self._unless_gone(http, request, self._service.submit_patiently(request))

        at_once = LINES_PER_WORKER * self._service.num_workers
        return await batch.serve(http, answer, batch.Bounds(at_once, self._access.max_body_bytes, self._access.read_s))

    async def _parsed(self, data: bytes) -> Request:
        return await _beside(len(data), lambda: parse(decode(data), self._rules, self._tests.get))

    async def _unless_gone(self, http: web.Request, request: Request, work: Coroutine[None, None, Answer]) -> Answer:
        """The answer; without a client that still wants it, the work is cancelled."""
        if not request.cancel_on_disconnect:
            return await work
        task = asyncio.create_task(work)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=HANG_UP_POLL_S)
                if http.transport is None or http.transport.is_closing():
                    break
            else:
                return task.result()
            raise asyncio.CancelledError  # it hung up: there is nobody to answer
        finally:
            task.cancel()

    # ----------------------------------------------------------------------------------- sets of tests
    async def _put_tests(self, http: web.Request) -> web.Response:
        sha256 = _sha256(http)
        data = await self._body(http)
        found = await _beside(len(data), lambda: self._checked(sha256, data))
        if found.size > self._tests.max_bytes:
            raise TooLarge(f"body: {found.size} characters are more than the {self._tests.max_bytes} that are stored")
        self._tests.put(sha256, found)
        self._service.metrics.count("tests_uploaded")
        return web.json_response({"protocol": PROTOCOL, "sha256": sha256, "tests": len(found.rows)})

    def _checked(self, sha256: str, data: bytes) -> TestSet:
        actual = hashlib.sha256(data).hexdigest()
        if actual != sha256:
            raise BadRequest(f"sha256: {sha256} is not the hash of the body, which is {actual}")
        return parse_tests(decode(data), self._rules.max_tests)

    async def _head_tests(self, http: web.Request) -> web.Response:
        sha256 = _sha256(http)
        if self._tests.get(sha256) is None:
            raise TestsUnknown(f"sha256: {sha256} is not stored here")
        return web.Response()

    # ------------------------------------------------------------------------------ what it says of itself
    async def _capabilities(self, _: web.Request) -> web.Response:
        service, rules = self._service, self._rules
        return web.json_response(
            {
                "protocol": PROTOCOL,
                "isolation": self._isolation(),
                "languages": sorted(name for name, why_not in rules.languages.items() if not why_not),
                "unavailable_languages": {name: why_not for name, why_not in rules.languages.items() if why_not},
                "profiles": list(judge.PROFILES),
                "limits": {
                    "defaults": limits.complete({}, rules.ceilings),
                    "floors": dict(limits.FLOORS),
                    "ceilings": dict(rules.ceilings),
                },
                "max_tests": rules.max_tests,
                "max_body_bytes": self._access.max_body_bytes,
                "max_stored_bytes": self._tests.max_bytes,
                "workers": service.num_workers,
                "queue": service.max_waiting,
                **self._facts,
            }
        )

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        is_ready = await self._service.is_ready()
        body = {"protocol": PROTOCOL, "ready": is_ready, "isolation": self._isolation()}
        return web.json_response(body, status=200 if is_ready else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=self._service.metrics_text())

    def _isolation(self) -> dict[str, object]:
        level = self._service.isolation
        return {"level": level.level, "name": level.name, "missing": dict(level.missing)}

    # ------------------------------------------------------------------------------------ every request
    async def _body(self, http: web.Request) -> bytes:
        most, read_s = self._access.max_body_bytes, self._access.read_s
        try:
            if (http.content_length or 0) > most:
                raise TooLarge(f"body: {http.content_length} bytes are more than the {most} of --max-body-bytes")
            async with asyncio.timeout(read_s):
                return await http.read()
        except TimeoutError as error:
            raise TooSlow(f"body: not there within {read_s:g} s (--read-s)") from error
        except web.HTTPRequestEntityTooLarge as error:
            raise TooLarge(f"body: it is more than the {most} bytes of --max-body-bytes") from error
        except web.RequestPayloadError as error:
            raise BadRequest(f"body: {error}") from error

    @web.middleware
    async def _errors(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Refusals, and the errors of the framework, in one form."""
        try:
            try:
                return await handler(request)
            except web.HTTPNotFound as error:
                raise NoSuchRoute(f"path: {request.path!r} is not served; sandbox/openapi.json has what is") from error
            except web.HTTPMethodNotAllowed as error:
                raise WrongMethod(request.method, error.allowed_methods) from error
        except Refusal as refusal:
            body = {"protocol": PROTOCOL, "error": refusal.body()}
            return web.json_response(body, status=refusal.status, headers=refusal.headers)

    @web.middleware
    async def _authorized(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        token = self._access.token
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if token and request.path.startswith("/v1/") and not hmac.compare_digest(given, b"Bearer " + token):
            raise Unauthorized("Authorization: 'Bearer TOKEN' is required, with the token of --token-file")
        return await handler(request)


def _sha256(http: web.Request) -> str:
    given = http.match_info["sha256"]
    if not _SHA256.fullmatch(given):
        raise BadRequest(f"sha256: {given[:80]!r} is not 64 hexadecimal digits in lower case")
    return given


async def _beside(size: int, work: Callable[[], Any]) -> Any:
    """Beside the event loop if there is much to do."""
    return await asyncio.to_thread(work) if size > LARGE_BODY else work()
