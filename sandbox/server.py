"""The sandbox as a service over HTTP.

    python -m sandbox.server [--port 8080]

POST /v1/run runs one program on its tests and judges it. GET /healthz: the event loop turns. GET /readyz: a program
passed through a worker just now; reports the isolation level. GET /metrics: Prometheus text. SIGTERM drains.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import os
import signal
import stat
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from sandbox import interpreter, linux, probe, self_check
from sandbox.executor import WorkerFault
from sandbox.request import PROTOCOL, BadRequest, parse
from sandbox.service import Busy, Draining, IdReused, Isolation, Service

LOOPBACK = ("127.0.0.1", "::1", "localhost")
RETRY_AFTER_S = 0.2
BACKLOG = 2048
EXIT_REFUSED = 2


def main() -> None:
    """Probe, check, listen. Exit status 2 with one message if this machine does not give what is asked for."""
    options = _options()
    if options.die_with_parent:
        _die_with_parent()
    try:
        isolation, python = _choose(options)
        token = _token(options)
        asyncio.run(_serve(options, isolation, python, token))
    except (_Refused, interpreter.NoInterpreter, WorkerFault) as error:
        print(f"sandbox: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_REFUSED)
    except OSError as error:
        print(f"sandbox: cannot listen on {options.host}:{options.port}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


class _Refused(Exception):
    """The service must not start like this."""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sandbox.server", description=(__doc__ or "").splitlines()[0])
    cores = len(os.sched_getaffinity(0))
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; other than loopback needs --token-file")
    add("--port", type=int, default=8080, help="0: any free one")
    add("--workers", type=int, default=cores, help="programs that run at a time")
    add("--queue", type=int, default=256, help="programs that wait; beyond it 429")
    add(
        "--min-level",
        type=int,
        default=2,
        choices=range(5),
        help="isolation level below which the service refuses to start",
    )
    add("--level", type=int, choices=range(probe.HIGHEST + 1), help="isolation level to use; the best if not given")
    add("--python", metavar="PATH", help="Python that runs programs; found by itself if not given")
    add("--token-file", type=Path, help="file (mode 0600) with the bearer token that requests must carry")
    add("--max-body-bytes", type=int, default=64 << 20)
    add("--drain-s", type=float, default=30.0, help="how long accepted work may take after SIGTERM")
    add("--die-with-parent", action="store_true", help="end when the process that started this one ends")
    options = parser.parse_args()
    for name, least in (("workers", 1), ("queue", 1), ("port", 0), ("max_body_bytes", 1), ("drain_s", 0)):
        value = getattr(options, name)
        if value < least:
            parser.error(f"--{name.replace('_', '-')}: {value} is below {least}")
    return options


def _die_with_parent() -> None:
    parent = os.getppid()
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew
        sys.exit(EXIT_REFUSED)


def _choose(options: argparse.Namespace) -> tuple[Isolation, interpreter.Interpreter]:
    """The level that is used: reachable, enough, and seen to hold."""
    found = probe.probe()
    wanted = found.level if options.level is None else options.level
    if wanted > found.level:
        raise _Refused(found.shortfall(wanted))
    if wanted < options.min_level:
        if wanted < found.level:
            raise _Refused(f"--level {wanted} is below --min-level {options.min_level}")
        raise _Refused(found.shortfall(options.min_level))
    python = interpreter.find(options.python)
    problems = asyncio.run(self_check.failures(wanted, python))
    if problems:
        raise _Refused("\n  - ".join([f"level {wanted} does not hold on this machine:", *problems]))
    missing = found.missing if wanted == found.level else {"--level": f"{wanted} was asked for"}
    return Isolation(level=wanted, name=probe.LEVEL_NAMES[wanted], missing=missing), python


def _token(options: argparse.Namespace) -> bytes:
    """The token that requests must carry; empty: none."""
    path = options.token_file
    if path is None:
        if options.host not in LOOPBACK:
            raise _Refused(f"--host {options.host}: whoever reaches it could run programs. Add --token-file FILE.")
        return b""
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise _Refused(f"--token-file {path}: others may read it. Run chmod 600 {path}.")
        token = path.read_bytes().strip()
    except OSError as error:
        raise _Refused(f"--token-file {path}: {error.strerror}") from error
    if not token:
        raise _Refused(f"--token-file {path}: it is empty")
    return token


async def _serve(
    options: argparse.Namespace, isolation: Isolation, python: interpreter.Interpreter, token: bytes
) -> None:
    service = Service(isolation, python, workers=options.workers, queue=options.queue)
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    await service.start()
    runner = web.AppRunner(_application(service, token, options.max_body_bytes), access_log=None)
    try:
        await runner.setup()
        await web.TCPSite(runner, options.host, options.port, backlog=BACKLOG).start()
        port = runner.addresses[0][1]
        print(
            f"sandbox: level {isolation.level} ({isolation.name}), {options.workers} workers, Python {python.version}, "
            f"http://{options.host}:{port}",
            flush=True,
        )
        await stop.wait()
    finally:
        await service.drain(options.drain_s if stop.is_set() else 0.0)
        await runner.cleanup()


def _application(service: Service, token: bytes, max_body_bytes: int) -> web.Application:
    async def run(http: web.Request) -> web.Response:
        try:
            body = json.loads(await http.read())
        except (ValueError, RecursionError):
            return _problem(400, "bad_request", "body: not JSON")
        try:
            return web.json_response(await service.submit(parse(body)))
        except BadRequest as error:
            return _problem(400, "bad_request", str(error))
        except IdReused as error:
            return _problem(409, "id_reused", str(error))
        except Busy as error:
            return _problem(429, "busy", str(error), retry_after_s=RETRY_AFTER_S)
        except Draining as error:
            return _problem(503, "draining", str(error))

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        is_ready = await service.is_ready()
        level = service.isolation
        isolation = {"level": level.level, "name": level.name, "missing": dict(level.missing)}
        body = {"protocol": PROTOCOL, "ready": is_ready, "isolation": isolation}
        return web.json_response(body, status=200 if is_ready else 503)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text=service.metrics())

    app = web.Application(client_max_size=max_body_bytes, middlewares=[_errors, _authorized(token)])
    app.add_routes(
        [
            web.post("/v1/run", run),
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
            web.get("/metrics", metrics),
        ]
    )
    return app


_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def _errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """The errors of the framework, in our form."""
    try:
        return await handler(request)
    except web.HTTPRequestEntityTooLarge as error:
        return _problem(413, "too_large", error.text or "body: too large")
    except web.HTTPException as error:
        code = {404: "no_such_route", 405: "no_such_route"}.get(error.status, "bad_request")
        return _problem(error.status, code, f"{request.method} {request.path}: {error.reason}")


def _authorized(token: bytes) -> Any:
    @web.middleware
    async def check(http: web.Request, handler: _Handler) -> web.StreamResponse:
        given = http.headers.get("Authorization", "").encode()
        if token and http.path.startswith("/v1/") and not hmac.compare_digest(given, b"Bearer " + token):
            return _problem(401, "unauthorized", "Authorization: Bearer TOKEN is required")
        return await handler(http)

    return check


def _problem(status: int, code: str, message: str, **more: object) -> web.Response:
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    body = {"protocol": PROTOCOL, "error": {"code": code, "message": message, **more}}
    return web.json_response(body, status=status, headers=headers)


if __name__ == "__main__":
    main()
