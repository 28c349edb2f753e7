"""The sandbox as a service over HTTP.

    python -m sandbox.server [--port 8080]

Probes what this machine can do, sees that the walls stand, checks that the memory suffices, then listens. ``openapi.json``
describes the routes. SIGTERM drains.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import math
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from aiohttp import web

from sandbox import interpreter, languages, limits, linux, memory, probe, self_check
from sandbox.executor import WorkerFault
from sandbox.interpreter import Interpreter
from sandbox.registration import Registration
from sandbox.request import MAX_TESTS, Rules
from sandbox.routes import Access, Routes
from sandbox.service import Isolation, Service
from sandbox.silence import Silence
from sandbox.store import TestSets

LOOPBACK = ("127.0.0.1", "::1", "localhost")
ANY_ADDRESS = ("0.0.0.0", "::")
BACKLOG = 2048
KEEP_ALIVE_S = 75.0
READY_PAUSE_S = 0.2
CLEANUP_S = 5.0
"""For the last answers to reach their clients."""
EXIT_REFUSED = 2


class _Refused(Exception):
    """The service must not start like this."""


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What was found and decided before the service listens."""

    isolation: Isolation
    python: Interpreter
    rules: Rules
    access: Access
    facts: dict[str, object]


def main() -> None:
    """Probe, check, listen. Exit status 2 with one message if this machine does not give what is asked for."""
    options = _options()
    if options.die_with_parent:
        _die_with_parent()
    try:
        asyncio.run(_serve(options, _prepare(options)))
    except (_Refused, memory.DoesNotFit, interpreter.NoInterpreter, WorkerFault) as error:
        print(f"sandbox: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_REFUSED)
    except OSError as error:
        print(f"sandbox: cannot listen on {options.host}:{options.port}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


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
        choices=range(probe.HIGHEST + 1),
        help="isolation level below which the service refuses to start",
    )
    add(
        "--level",
        type=int,
        choices=range(probe.HIGHEST + 1),
        help="isolation level to use; if not given the best, but 4 only for --min-level 4: ten to twenty times slower",
    )
    add("--python", metavar="PATH", help="Python that runs programs; found by itself if not given")
    add("--token-file", type=Path, help="file (mode 0600) with the bearer token that requests must carry")
    add("--registry", type=Path, metavar="DIR", help="folder to keep a record of this service in, for clients")
    add("--name", help="of the record; host and port if not given")
    add("--image", default="", help="digest of the container image, repeated in the capabilities")
    add("--drain-s", type=float, default=30.0, help="how long accepted work may take after SIGTERM")
    add("--read-s", type=float, default=60.0, help="how long a request may take to arrive")
    add("--die-with-parent", action="store_true", help="end when the process that started this one ends")
    add("--max-body-bytes", type=int, default=64 << 20, help="of a request, a line of a batch, a set of tests")
    add(
        "--max-stored-bytes", type=int, default=512 << 20, help="of uploaded tests; the least recently used are dropped"
    )
    add("--max-tests", type=int, default=MAX_TESTS, help="in one request")
    add("--memory-bytes", type=int, help="what all workers may use; the cgroup's or the machine's if not given")
    for name, ceiling in limits.CEILINGS.items():
        kind = int if limits.is_whole(name) else float
        text = f"ceiling of limits.{name}; {ceiling:g} if not given, less if the memory does not suffice"
        add(_option(name), type=kind, help=text)
    options = parser.parse_args()
    least = {"workers": 1, "queue": 1, "port": 0, "drain_s": 0, "read_s": 0.1, "max_body_bytes": 1, "max_tests": 1}
    least |= {"max_stored_bytes": 1, "memory_bytes": 1, **{f"max_{name}": low for name, low in limits.FLOORS.items()}}
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and not low <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')}: {value} is not a number from {low:.12g} on")
    return options


def _option(limit: str) -> str:
    return f"--max-{limit.replace('_', '-')}"


def _die_with_parent() -> None:
    parent = os.getppid()
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew
        sys.exit(EXIT_REFUSED)


def _prepare(options: argparse.Namespace) -> _Start:
    token = _token(options)
    found = memory.available()
    if options.memory_bytes:
        found = memory.Memory(options.memory_bytes, "--memory-bytes")
    given = {name: getattr(options, f"max_{name}") for name in limits.CEILINGS}
    ceilings = memory.ceilings(
        {name: value for name, value in given.items() if value is not None},
        workers=options.workers,
        stored_bytes=options.max_stored_bytes,
        memory=found,
    )
    probed = probe.probe()
    if probe.HIGHEST in (options.level, options.min_level):
        probed = probe.with_gvisor(probed)
    isolation, python = _choose(options, probed)
    versions = {"python": python.version, "code": _code_digest(), **({"image": options.image} if options.image else {})}
    return _Start(
        isolation=isolation,
        python=python,
        rules=Rules(ceilings=ceilings, max_tests=options.max_tests, languages=_languages(isolation.level, ceilings)),
        access=Access(token=token, max_body_bytes=options.max_body_bytes, read_s=options.read_s),
        facts={"versions": versions, "memory": found._asdict(), "probe": {**asdict(probed), "facts": _facts(probed)}},
    )


def _languages(level: int, ceilings: Mapping[str, float]) -> dict[str, str]:
    """Name -> why not; a compiler needs room too."""
    found = languages.available(level)
    if memory.need(languages.COMPILE_LIMITS) > memory.need(ceilings):
        for name, language in languages.LANGUAGES.items():
            if language.compile:
                found[name] = found[name] or "its compiler needs more memory than a worker has"
    return found


def _facts(probed: probe.Probe) -> dict[str, object]:
    return {name: {"works": fact.works, "detail": fact.detail} for name, fact in probed.facts.items()}


def _code_digest() -> str:
    """Of all our modules: two services that differ in it may judge differently."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _choose(options: argparse.Namespace, found: probe.Probe) -> tuple[Isolation, Interpreter]:
    """The level that is used: reachable, enough, and seen to hold."""
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


async def _serve(options: argparse.Namespace, start: _Start) -> None:
    service = Service(start.isolation, start.python, workers=options.workers, queue=options.queue)
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    await service.start()
    silence = Silence(options.read_s)
    routes = Routes(service, start.rules, TestSets(options.max_stored_bytes), start.access, start.facts)
    runner = web.AppRunner(routes.application(silence.note), access_log=None, keepalive_timeout=KEEP_ALIVE_S)
    try:
        await runner.setup()
        await web.TCPSite(runner, options.host, options.port, backlog=BACKLOG).start()
        port = runner.addresses[0][1]
        level = start.isolation
        print(
            f"sandbox: level {level.level} ({level.name}), {options.workers} workers, Python {start.python.version}, "
            f"http://{options.host}:{port}",
            flush=True,
        )
        assert runner.server
        async with _background(silence.watch(runner.server)), _registered(options, start, service, port):
            await stop.wait()
    finally:
        await service.drain(options.drain_s if stop.is_set() else 0.0)
        with suppress(TimeoutError):
            async with asyncio.timeout(CLEANUP_S):
                await runner.cleanup()


@asynccontextmanager
async def _background(*works: Coroutine[None, None, None]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _registered(options: argparse.Namespace, start: _Start, service: Service, port: int) -> AsyncIterator[None]:
    """A record in the registry, if there is one: ready as soon as a program passed through, gone before the drain."""
    if options.registry is None:
        yield
        return
    host = socket.gethostname() if options.host in ANY_ADDRESS else options.host
    info = {"level": start.isolation.level, "workers": options.workers, "python": start.python.version}
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    registration = Registration(options.registry, options.name or f"{host}-{port}", url, info)
    registration.write("starting")
    try:
        async with _background(_announce(registration, service)):
            yield
    finally:
        registration.remove()


async def _announce(registration: Registration, service: Service) -> None:
    while not await service.is_ready():  # noqa: ASYNC110 - asking is what finds it out
        await asyncio.sleep(READY_PAUSE_S)
    await registration.beat()


if __name__ == "__main__":
    main()
