"""Framing between service, zygote and keeper: one JSON object per SEQPACKET datagram, descriptors beside it.

Code, inputs and outputs travel as memory files, never in the datagram: no size limit, no reader thread, no deadlock.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import socket
from collections.abc import Mapping, Sequence

F_ADD_SEALS, ALL_SEALS = 1033, 0xF  # no more seals, no shrink, no grow, no write
MAX_DATAGRAM = 65536
MAX_FDS = 4


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One datagram and its descriptors; empty bytes mean that the peer is gone."""
    space = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
    message, ancillary, _, _ = sock.recvmsg(MAX_DATAGRAM, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return message, list(fds)


def send(sock: socket.socket, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
    """Send one datagram; the receiver gets duplicates of the descriptors."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([json.dumps(message).encode()], ancillary)


def read_from_start(fd: int, limit: int) -> bytes:
    """At most ``limit`` bytes of a memory file. Moves no file offset: the descriptor may be shared."""
    chunks: list[bytes] = []
    done = 0
    while done < limit:
        chunk = os.pread(fd, min(limit - done, 1 << 20), done)
        if not chunk:
            break
        chunks.append(chunk)
        done += len(chunk)
    return b"".join(chunks)


def sealed_file(data: bytes) -> int:
    """A memory file that holds ``data`` and that nobody can write, opened read-only."""
    fd = os.memfd_create("in", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, F_ADD_SEALS, ALL_SEALS)
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)
