"""What the wire does to us, in our words."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from megatron_distil.errors import EngineReplyError, EngineUnavailable
from megatron_distil.http import Http, Peer, attempts


def peer_at(port: int) -> Peer:
    return Peer("engine7", f"http://127.0.0.1:{port}", unavailable=EngineUnavailable, refused=EngineReplyError)


def ask(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    work: Callable[[Http, Peer], Awaitable[Any]],
) -> Any:
    """The result of ``work`` against a server whose every path is ``handler``."""

    async def main() -> Any:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.0, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            async with Http() as http:
                return await work(http, peer_at(runner.addresses[0][1]))
        finally:
            await runner.cleanup()

    return asyncio.run(main())


def post(http: Http, peer: Peer) -> Awaitable[Any]:
    return http.post(peer, "/generate", {"a": 1}, timeout_s=5.0)


@pytest.mark.parametrize("status", [500, 502, 503, 408, 429])
def test_a_server_that_cannot_now_is_unavailable(status: int) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text="overloaded")

    with pytest.raises(EngineUnavailable, match=rf"engine7 \(http.*/generate\): {status}: overloaded"):
        ask(handler, post)


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_server_that_will_not_has_refused(status: int) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text="too long " * 200)

    with pytest.raises(EngineReplyError, match=rf"engine7 .*: {status}: too long .*\(1800 bytes\)"):
        ask(handler, post)


def test_silence_is_unavailable_after_the_deadline() -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    with pytest.raises(EngineUnavailable, match=r"engine7 .*no answer within 0\.1 s"):
        ask(handler, lambda http, peer: http.post(peer, "/generate", {}, timeout_s=0.1))


def test_a_cut_connection_is_unavailable() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    with pytest.raises(EngineUnavailable, match="engine7"):
        ask(handler, post)


def test_half_a_body_is_unavailable() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100", "Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(b'{"output_ids": [1,')
        assert request.transport is not None
        request.transport.close()
        return response

    with pytest.raises(EngineUnavailable, match="engine7"):
        ask(handler, post)


def test_nobody_there_is_unavailable() -> None:
    async def main() -> None:
        async with Http() as http:
            await http.get(peer_at(9), "/health", timeout_s=5.0)

    with pytest.raises(EngineUnavailable, match="engine7"):
        asyncio.run(main())


def test_a_reply_is_what_it_says_that_it_is() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        match request.path:
            case "/json":
                return web.json_response({"got": await request.json()})
            case "/text":
                return web.Response(text="Cache flushed.")
            case "/empty":
                return web.Response()
            case _:
                return web.Response(body=b'{"half', content_type="application/json")

    async def work(http: Http, peer: Peer) -> list[Any]:
        got = [await http.post(peer, path, {"b": [1.5]}, timeout_s=5.0) for path in ("/json", "/text", "/empty")]
        with pytest.raises(EngineReplyError, match=r'not JSON: \{"half'):
            await http.post(peer, "/other", {}, timeout_s=5.0)
        return got

    assert ask(handler, work) == [{"got": {"b": [1.5]}}, "Cache flushed.", None]


def test_a_status_is_no_error_where_it_is_asked_for() -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    assert ask(handler, lambda http, peer: http.status(peer, "/ready", timeout_s=5.0)) == 503


def test_a_large_body_arrives_whole() -> None:
    async def size(request: web.Request) -> web.Response:
        return web.json_response(len(await request.content.read()))

    reply = ask(size, lambda http, peer: http.post(peer, "/", {"a": "x" * 2**21}, timeout_s=20.0))
    assert reply == len('{"a": ""}') + 2**21


def test_three_hundred_requests_are_in_flight_at_once() -> None:
    waiting = 0
    all_there = asyncio.Event()

    async def handler(_: web.Request) -> web.StreamResponse:
        nonlocal waiting
        waiting += 1
        if waiting == 300:
            all_there.set()
        await all_there.wait()
        return web.json_response(waiting)

    async def work(http: Http, peer: Peer) -> Any:
        return await asyncio.gather(*(http.post(peer, "/generate", {}, timeout_s=20.0) for _ in range(300)))

    assert ask(handler, work) == [300] * 300


def test_attempts_end_with_the_last_error_as_it_was() -> None:
    count = 0

    async def main() -> None:
        nonlocal count
        async for attempt in attempts(1.0, on=EngineUnavailable):
            with attempt:
                count += 1
                raise EngineUnavailable(f"attempt {count}")

    with pytest.raises(EngineUnavailable) as caught:
        asyncio.run(main())
    assert str(caught.value) == f"attempt {count}"
    assert count > 1


def test_a_refusal_is_not_tried_again() -> None:
    count = 0

    async def main() -> None:
        nonlocal count
        async for attempt in attempts(5.0, on=EngineUnavailable):
            with attempt:
                count += 1
                raise EngineReplyError("no")

    with pytest.raises(EngineReplyError):
        asyncio.run(main())
    assert count == 1
