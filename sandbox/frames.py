"""Framing on a pipe into gVisor, where descriptors do not pass: one JSON object, then the bytes of its files.

length of the header (4 bytes, big endian) | {"sizes": [...], ...} | file | file | ...
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

MAX_HEADER = 1 << 20
MAX_FILE = 1 << 30


class Broken(Exception):
    """What came is no frame, or ends in the middle of one."""


def write(fd: int, message: Mapping[str, object], files: Sequence[bytes] = ()) -> None:
    """Write all of it; blocks while the pipe is full."""
    header = json.dumps({**message, "sizes": [len(file) for file in files]}).encode()
    for part in (len(header).to_bytes(4, "big") + header, *files):
        view = memoryview(part)
        while view:
            view = view[os.write(fd, view) :]


def read(fd: int) -> tuple[dict[str, Any], list[bytes]] | None:
    """One frame; None at the end of the pipe.

    Raises:
        Broken: it is malformed.
    """
    first = os.read(fd, 1)
    if not first:
        return None
    size = int.from_bytes(first + _exactly(fd, 3), "big")
    if size > MAX_HEADER:
        raise Broken(f"a header of {size} bytes")
    try:
        message = json.loads(_exactly(fd, size))
        sizes = [int(number) for number in message.pop("sizes")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Broken(f"the header: {error!r}") from error
    if len(sizes) > 4 or not all(0 <= number <= MAX_FILE for number in sizes):
        raise Broken(f"files of {sizes} bytes")
    return message, [_exactly(fd, number) for number in sizes]


def _exactly(fd: int, size: int) -> bytes:
    parts: list[bytes] = []
    left = size
    while left:
        part = os.read(fd, min(left, 1 << 20))
        if not part:
            raise Broken("the pipe ended within a frame")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
