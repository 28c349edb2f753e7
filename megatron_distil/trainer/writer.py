"""Writes what Megatron has planned for a checkpoint, in a forked process.

Megatron's own writer starts a multiprocessing.Manager, which imports the entry script again and outlives us, and waits for
ever for a worker that was killed. This one is one fork per rank: it dies with its parent, and its result is a file.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import queue
import signal
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_distil.errors import CheckpointError

_RESULTS = "results_of_rank_"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Checksum(NamedTuple):
    """What a file must be when it is read."""

    num_bytes: int
    crc32: int


def checksum(path: Path) -> Checksum:
    """Reads the file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return Checksum(size, crc)


class BackgroundWrite:
    """This rank's share of a checkpoint on its way to the disk."""

    def __init__(self, results: _ResultsFile, pid: int | None, finalize_fns: list[Callable[[], None]]) -> None:
        self._results = results
        self._pid = pid
        self._status = 0
        self.finalize_fns = finalize_fns
        """Collective; to be called when all ranks have written."""

    def is_running(self) -> bool:
        """Does not wait."""
        return self._reap(os.WNOHANG)

    def join(self) -> None:
        """Waits for the process."""
        self._reap(0)

    def checksums(self) -> dict[str, Checksum]:
        """Of the files of this rank.

        Raises:
            CheckpointError: they could not be written.
        """
        if self._status:
            code = os.waitstatus_to_exitcode(self._status)
            raise CheckpointError(f"the process that wrote it ended with {code}")
        return self._results.checksums()

    @staticmethod
    def clean(folder: Path) -> None:
        """Removes what was written for us alone."""
        for path in folder.glob(f"{_RESULTS}*"):
            path.unlink()

    def _reap(self, options: int) -> bool:
        if self._pid is not None:
            ended, status = os.waitpid(self._pid, options)
            if ended:
                self._pid, self._status = None, status
        return self._pid is not None


def start_write(planned: Callable[[], Any], folder: Path, *, rank: int, in_background: bool) -> BackgroundWrite:
    """Collective over the world: plans the checkpoint and writes this rank's share.

    Args:
        planned: makes Megatron's request; the state is copied by the fork, so it may change when this returns.
        folder: exists.
        rank: in the world.
        in_background: False: returns when it is written.
    """
    results = _ResultsFile(folder / f"{_RESULTS}{rank}")
    place: Any = filesystem_async
    place._results_queue = results  # in the place of the Manager's queue
    request = planned()
    pid = None
    if request.async_fn is not None:  # this rank has something to write
        buckets = request.preload_fn() if request.preload_fn else request.async_fn_args[1]
        transforms = request.async_fn.args[0]
        if in_background:
            pid = _forked(lambda: _write(transforms, buckets, results))
        else:
            _write(transforms, buckets, results)
    return BackgroundWrite(results, pid, list(request.finalize_fns))


def _forked(work: Callable[[], None]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _die_with(parent)
        work()
        code = 0
    finally:
        os._exit(code)  # nothing of the parent may be ended or flushed by this process


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)
    for number in (signal.SIGTERM, signal.SIGINT):  # who ends a run politely waits for its last checkpoint
        signal.signal(number, signal.SIG_IGN)


def _write(transforms: Any, buckets: list[Any], results: _ResultsFile) -> None:
    written: dict[int, Any] = {}
    checksums: dict[str, Checksum] = {}
    for index, bucket in enumerate(buckets):
        box: Any = _Box()
        FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, box, box, use_fsync=True)
        _, written[index] = box.content
        path = Path(bucket[0])
        if isinstance(written[index], Exception):
            path.unlink(missing_ok=True)  # the device may be full, and the result needs a few bytes
            results.put(written[index])
            return
        checksums[path.name] = checksum(path)
    results.put_checksums(checksums)
    results.put(written)


class _Box:
    """Both queues that Megatron's function fills: the result, and the count of workers, which nobody reads."""

    content: Any = None

    def put(self, item: Any) -> None:
        self.content = item

    def get(self) -> None:
        pass

    def task_done(self) -> None:
        pass


class _ResultsFile:
    """A queue of one item that survives the process which puts it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sums: dict[str, Checksum] = {}

    def put_checksums(self, sums: dict[str, Checksum]) -> None:
        self._sums = sums

    def put(self, item: Any) -> None:
        failure = _said(item) if isinstance(item, Exception) else None
        self._path.write_bytes(pickle.dumps((None if failure else item, self._sums, failure)))

    def get_nowait(self) -> Any:
        item, _, failure = self._read()
        return RuntimeError(failure) if failure else item

    def checksums(self) -> dict[str, Checksum]:
        try:
            _, sums, failure = self._read()
        except queue.Empty:
            return {}  # this rank had nothing to write
        if failure:
            raise CheckpointError(failure)
        return sums

    def _read(self) -> tuple[Any, dict[str, Checksum], str | None]:
        try:
            return pickle.loads(self._path.read_bytes())
        except FileNotFoundError as error:
            raise queue.Empty from error


def _said(error: Exception) -> str:
    """Torch's zip writer hides a full device behind a RuntimeError on positions; the OSError is in its context."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    shown = found or error
    return f"{type(shown).__name__}: {shown}"
