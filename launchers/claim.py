"""One launch of a run at a time: a file that only one process can make. No lock, which not every shared file system has.

RUN/launching         who launches the run, and since when; there from the last look at Slurm to the record of the job
RUN/launching.over    somebody takes away what a launch has left that died
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from megatron_distil.errors import ConfigError, Problem

STALE_S = 600.0
"""A launch of another host is given up after this time; one of this host as soon as its process is gone."""
_TAKING_OVER_S = 2.0
_POLL_S = 0.02


class Holder(NamedTuple):
    """Who launches a run."""

    host: str
    pid: int
    since: float
    """Seconds since the epoch."""

    @property
    def is_gone(self) -> bool:
        """Whether nothing will come of that launch."""
        if time.time() - self.since > STALE_S:
            return True
        return self.host == socket.gethostname() and not _is_alive(self.pid)


@contextmanager
def only_launch(run: Path) -> Iterator[None]:
    """Be the only launch of a run directory meanwhile.

    Raises:
        ConfigError: another launch is at it, or the folder cannot be written to.
    """
    path = run / "launching"
    mine = Holder(socket.gethostname(), os.getpid(), time.time())
    try:
        run.mkdir(parents=True, exist_ok=True)
        _take(path, mine)
    except OSError as error:
        reason = f"cannot be written to: {error.strerror}"
        hint = "Make room there, or set cluster.shared to another folder."
        raise ConfigError([Problem("cluster.shared", str(run), reason, hint)]) from error
    try:
        yield
    finally:
        if _holder(path) == mine:
            path.unlink(missing_ok=True)


def _take(path: Path, mine: Holder) -> None:
    deadline = time.monotonic() + _TAKING_OVER_S
    while not _made(path, json.dumps(mine._asdict()) + "\n"):
        holder = _holder(path)
        if holder is not None:
            if not holder.is_gone or time.monotonic() > deadline:
                raise ConfigError([_refusal(path, holder)])
            _remove_left(path)
        time.sleep(_POLL_S)


def _remove_left(path: Path) -> None:
    """Take the file of a dead launch away. One process at a time, or the second would take the file of the first."""
    turn = path.with_suffix(".over")
    if not _made(turn, ""):
        return
    try:
        holder = _holder(path)
        if holder is not None and holder.is_gone:
            path.unlink(missing_ok=True)
    finally:
        turn.unlink()


def _made(path: Path, text: str) -> bool:
    """Whether the file is ours now; otherwise it was there."""
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(text)
    except OSError:
        path.unlink()
        raise
    return True


def _holder(path: Path) -> Holder | None:
    """Who has made the file; None: it is no more."""
    try:
        with path.open(encoding="utf-8") as file:
            since = os.fstat(file.fileno()).st_mtime
            text = file.read()
    except FileNotFoundError:
        return None
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):  # not written yet
        return Holder("an unknown host", 0, since)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _refusal(path: Path, holder: Holder) -> Problem:
    since = time.strftime("%F %T", time.localtime(holder.since))
    reason = f"process {holder.pid} of {holder.host} launches it since {since}, as {path} says"
    hint = f"Wait until it has; if there is no such launch any more, remove {path} and {path.name}.over."
    return Problem("--name", path.parent.name, reason, hint)
