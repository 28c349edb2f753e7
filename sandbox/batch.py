"""Many requests over one connection: a JSON object per line in, an answer per line out, in order of completion.

A client that does not read its answers is not read from: at most ``at_once`` lines are between the two.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

from aiohttp import StreamReader, web

from sandbox.refusal import BadRequest, Refusal, TooLarge, TooSlow
from sandbox.request import PROTOCOL

NDJSON = "application/x-ndjson"


class Bounds(NamedTuple):
    """What a batch may cost."""

    at_once: int
    """Lines that are read and not yet answered."""
    max_line_bytes: int
    read_s: float
    """For the bytes of one line to arrive, and for the next line while nothing runs; also to take an answer."""


class Line(NamedTuple):
    """One line of a batch."""

    number: int
    """From 1."""
    data: bytes | Refusal
    """A refusal if the line did not fit, or did not come."""


async def serve(http: web.Request, answer: Callable[[bytes], Awaitable[Any]], bounds: Bounds) -> web.StreamResponse:
    """Answer every line; ``answer`` raises a Refusal for those that are not taken."""
    response = web.StreamResponse(headers={"Content-Type": NDJSON})
    await response.prepare(http)
    permits, writing = asyncio.Semaphore(bounds.at_once), asyncio.Lock()

    async def one(line: Line) -> None:
        try:
            said = await _answered(line, answer)
            async with writing, asyncio.timeout(bounds.read_s):
                await response.write(json.dumps(said).encode() + b"\n")
        finally:
            permits.release()

    tasks = set[asyncio.Task[None]]()
    is_there = True
    try:
        async with asyncio.TaskGroup() as group:
            async for line in lines(http.content, bounds, is_idle=lambda: not tasks):
                await permits.acquire()
                task = group.create_task(one(line))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
    except* (ConnectionError, TimeoutError):  # it hung up, or takes no answers
        is_there = False
    if is_there:
        await response.write_eof()
    if http.transport and not (is_there and http.content.at_eof()):  # what is left of a stream that was given up
        http.transport.close()
    return response


async def lines(content: StreamReader, bounds: Bounds, *, is_idle: Callable[[], bool]) -> AsyncIterator[Line]:
    """The lines that are not empty, each as soon as it is there. Ends with the stream, or with one that came too slowly."""
    number, held, size = 1, list[bytes](), 0
    loop = asyncio.get_running_loop()
    deadline = loop.time() + bounds.read_s
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await content.readany()
        except TimeoutError:
            if size or is_idle():
                yield Line(number, TooSlow(f"line {number}: not there within {bounds.read_s:g} s"))
                return
            deadline = loop.time() + bounds.read_s
            continue
        except web.RequestPayloadError as error:
            yield Line(number, BadRequest(f"line {number}: {error}"))
            return
        for index, piece in enumerate(chunk.split(b"\n") if chunk else [b"", b""]):
            if index:
                data = _whole(held, size, number, bounds)
                if isinstance(data, Refusal) or data.strip():
                    yield Line(number, data)
                number, held, size = number + 1, [], 0
                deadline = loop.time() + bounds.read_s
            size += len(piece)
            if size <= bounds.max_line_bytes:
                held.append(piece)
        if not chunk:
            return


def _whole(held: list[bytes], size: int, number: int, bounds: Bounds) -> bytes | Refusal:
    if size > bounds.max_line_bytes:
        return TooLarge(f"line {number}: {size} bytes are more than the {bounds.max_line_bytes} of --max-body-bytes")
    return b"".join(held)


async def _answered(line: Line, answer: Callable[[bytes], Awaitable[Any]]) -> Any:
    try:
        if isinstance(line.data, Refusal):
            raise line.data
        return await answer(line.data)
    except Refusal as refusal:
        return {"protocol": PROTOCOL, "id": _id(line.data), "line": line.number, "error": refusal.body()}


def _id(data: bytes | Refusal) -> str | None:
    """Of a line that was refused, if it has one that can be read."""
    try:
        found = json.loads(data)["id"] if isinstance(data, bytes) else None
    except (ValueError, RecursionError, TypeError, KeyError):
        found = None
    return found if isinstance(found, str) else None
