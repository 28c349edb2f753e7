"""Between nodes, before a run: ports, clocks and the shared file system, each tried for real. Standard library only.

Every node answers on a port and in the shared folder while it asks the others, so no node is special and one node alone
talks to itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import socketserver
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.process import PORTS
from megatron_distil.registry import write_atomic

ROUNDS = 5
"""Of which the quickest counts: the others waited for something else."""
_POLL_S = 0.005
_CONNECT_S = 5.0


class LinkError(Exception):
    """Another node, or the folder, did not do its part; the text says which."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """What one node found."""

    unreachable: Mapping[str, str]
    """Node -> why no connection came about."""
    skew_s: float
    """Largest difference to the clock of another node, less what the connection leaves open."""
    visible_s: float
    """From a file's renaming here to its being listed on the next node."""
    write_bytes_per_s: float
    read_bytes_per_s: float
    """Of what the next node wrote."""


class _Clock(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while self.request.recv(1):
            self.request.sendall(f"{time.time():.6f}\n".encode())


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


@contextmanager
def listening() -> Iterator[int]:
    """A server that tells the time, on a free port of those that a run takes.

    Yields:
        The port.

    Raises:
        LinkError: all that were tried are taken.
    """
    server = _bound()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def _bound() -> _Server:
    tried = random.sample(PORTS, 50)
    for port in tried:
        try:
            return _Server(("", port), _Clock)
        except OSError:
            continue
    raise LinkError(f"none of 50 ports in {PORTS.start}..{PORTS.stop - 1} can be listened on")


def clock_difference(address: str, port: int) -> tuple[float, float]:
    """Their clock minus ours, and how uncertain that is: half the round trip. As NTP does it.

    Raises:
        OSError: there is no connection, or it broke.
    """
    best = (0.0, float("inf"))
    with socket.create_connection((address, port), timeout=_CONNECT_S) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = peer.makefile("rb")
        for _ in range(ROUNDS):
            before = time.time()
            peer.sendall(b"?")
            line = reader.readline()
            after = time.time()
            if not line:
                raise ConnectionError("the connection was closed")
            if (after - before) / 2 < best[1]:
                best = (float(line) - (before + after) / 2, (after - before) / 2)
    return best


def measure(
    folder: Path, node: int, peers: Mapping[int, tuple[str, int]], *, file_bytes: int, timeout_s: float
) -> Links:
    """Try every other node, and the folder with the next one. All nodes at the same time.

    Args:
        folder: of this preflight, shared.
        node: index of this node.
        peers: address and port of every node.
        file_bytes: how much is written and read.
        timeout_s: for everything that another node has to do.

    Raises:
        LinkError: what another node writes does not arrive, or not as it was written.
        OSError: the folder cannot be written to.
    """
    unreachable: dict[str, str] = {}
    skew = 0.0
    for index, (address, port) in peers.items():
        if index == node:
            continue
        try:
            difference, uncertain = clock_difference(address, port)
        except (OSError, ValueError) as error:
            unreachable[str(index)] = f"{address}:{port}: {error}"
            continue
        skew = max(skew, abs(difference) - uncertain)
    written = _write_file(folder, node, file_bytes)
    following = (node + 1) % len(peers)
    with _answering(folder, (node - 1) % len(peers), node, timeout_s):
        visible = _visible_s(folder, node, timeout_s)
    return Links(
        unreachable=unreachable,
        skew_s=max(0.0, skew),
        visible_s=visible,
        write_bytes_per_s=file_bytes / written,
        read_bytes_per_s=file_bytes / _read_file(folder, following, timeout_s),
    )


def publish(path: Path, table: Mapping[str, Any]) -> None:
    """Readers see all of it, or nothing."""
    write_atomic(path, json.dumps(table))


def collect(folder: Path, kind: str, count: int, timeout_s: float) -> list[dict[str, Any]]:
    """What every node has published as ``kind``, by node.

    Raises:
        LinkError: some have not, in time.
    """
    missing = set(range(count))
    deadline = time.monotonic() + timeout_s
    while missing and time.monotonic() < deadline:
        names = set(os.listdir(folder))  # the registry lists as well: what a cache hides from it is hidden here
        missing = {node for node in range(count) if f"{kind}-{node}.json" not in names}
        if missing:
            time.sleep(10 * _POLL_S)
    if missing:
        nodes = ", ".join(str(node) for node in sorted(missing))
        raise LinkError(
            f"node {nodes} wrote no {kind} within {timeout_s:.0f} s: it has not started, has failed, or does not see {folder}"
        )
    return [json.loads((folder / f"{kind}-{node}.json").read_text()) for node in range(count)]


def _write_file(folder: Path, node: int, file_bytes: int) -> float:
    block = os.urandom(2**20)
    digest = hashlib.sha256()
    start = time.monotonic()
    with (folder / f"file-{node}.bin").open("wb") as file:
        for number in range(0, file_bytes, len(block)):
            piece = (number.to_bytes(8, "big") + block[8:])[: file_bytes - number]
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.monotonic() - start
    publish(folder / f"file-{node}.json", {"sha256": digest.hexdigest()})
    return seconds


def _read_file(folder: Path, node: int, timeout_s: float) -> float:
    wanted = _wait_for(folder, f"file-{node}.json", timeout_s)
    digest = hashlib.sha256()
    start = time.monotonic()
    with (folder / f"file-{node}.bin").open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    seconds = time.monotonic() - start
    if digest.hexdigest() != json.loads(wanted)["sha256"]:
        raise LinkError(f"{folder}/file-{node}.bin does not read as node {node} wrote it")
    return seconds


@contextmanager
def _answering(folder: Path, previous: int, node: int, timeout_s: float) -> Iterator[None]:
    """Answer the pings of the node before this one, meanwhile and until it has all of them."""
    thread = threading.Thread(target=_answer, args=(folder, previous, node, timeout_s), daemon=True)
    thread.start()
    yield
    thread.join(timeout_s)


def _answer(folder: Path, previous: int, node: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for number in range(ROUNDS):
        while f"ping-{previous}-{number}" not in os.listdir(folder):
            if time.monotonic() > deadline:
                return
            time.sleep(_POLL_S)
        (folder / f"pong-{previous}-{number}").touch()


def _visible_s(folder: Path, node: int, timeout_s: float) -> float:
    """Half of the quickest way there and back."""
    best = float("inf")
    for number in range(ROUNDS):
        start = time.monotonic()
        (folder / f"ping-{node}-{number}").touch()
        _wait_for(folder, f"pong-{node}-{number}", timeout_s)
        best = min(best, time.monotonic() - start)
    return best / 2


def _wait_for(folder: Path, name: str, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while name not in os.listdir(folder):
        if time.monotonic() > deadline:
            raise LinkError(f"{folder}/{name} did not appear within {timeout_s:.0f} s")
        time.sleep(_POLL_S)
    return (folder / name).read_text()
