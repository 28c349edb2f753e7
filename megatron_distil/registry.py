"""Who serves what, and where: records with heartbeats in a folder. Standard library only.

    FOLDER/<role>/<name>.json      one service; written by its supervisor, every two seconds and at every change
    FOLDER/<role>/<name>.paused    whoever stops the service (SIGSTOP) says so here first
    FOLDER/STOP                    the run shall save and end; with the word "end" in it: and not start again
    FOLDER/REASON                  why it ended, one line of whoever knew it first; its first word:
                                   done · stopped · unavailable · failed (start it again) · fatal (do not)

A folder that every node sees is all that is needed: no name service, no daemon. Readers compare the writer's clock with
their own, so the clocks of the nodes must agree to well under ``STALE_S``.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_distil.errors import RegistryError

HEARTBEAT_S = 2.0
STALE_S = 10.0
_POLL_S = 0.2
_FOR_GOOD = "end"

State = Literal["starting", "ready"]


@dataclass(frozen=True)
class Record:
    """One service."""

    role: str
    """``rollout``, ``teacher`` (of an expert) or ``sandbox``."""
    name: str
    """Unique within the role; also its file name."""
    url: str
    pid: int
    pgid: int
    """Process group: what to signal so that the children of the service get it too."""
    state: State
    """``ready``: its own health answer was seen."""
    gen: int
    """Start of this instance: 0, 1, ... A changed number is a restarted server, which lost what it had been sent."""
    ts: float
    """Heartbeat, seconds since the epoch."""
    info: Mapping[str, str | int] = field(default_factory=dict[str, str | int])


class Registry:
    """A folder of records."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def write(self, record: Record) -> None:
        """Replace the record of (role, name); readers see the old one or the new one."""
        write_atomic(self._path(record.role, record.name, "json"), json.dumps(asdict(record)))

    def remove(self, role: str, name: str) -> None:
        """Take a service off, for good."""
        self._path(role, name, "json").unlink(missing_ok=True)
        self.clear_paused_name(role, name)

    def live(self, role: str, *, state: State | None = "ready", stale_s: float = STALE_S) -> list[Record]:
        """Records with a fresh heartbeat, sorted by name; ``state=None``: in any state."""
        now = time.time()
        records = [record for path in self._files(role) if (record := _read(path)) is not None]
        return [r for r in records if state in (None, r.state) and now - r.ts < stale_s]

    def roles(self) -> list[str]:
        """Roles of which a service has ever registered, sorted."""
        try:
            return sorted(entry.name for entry in os.scandir(self.folder) if entry.is_dir())
        except FileNotFoundError:
            return []

    def wait_for(
        self,
        role: str,
        count: int,
        *,
        timeout_s: float,
        stale_s: float = STALE_S,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[Record]:
        """All live records of a role, as soon as there are ``count`` of them.

        Raises:
            RegistryError: the time is over, or ``stopped()``.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            have = self.live(role, stale_s=stale_s)
            if len(have) >= count:
                return have
            if stopped():
                raise RegistryError(f"asked to stop while waiting for {self._shortage(role, count)}")
            if time.monotonic() >= deadline:
                raise RegistryError(f"waited {timeout_s:.0f} s for {self._shortage(role, count)}")
            time.sleep(_POLL_S)

    def _shortage(self, role: str, count: int) -> str:
        now = time.time()
        ready = len(self.live(role))
        others = [
            f"{r.name} is {r.state}, start {r.gen}, last heartbeat {now - r.ts:.0f} s ago"
            for r in self.live(role, state=None, stale_s=float("inf"))
            if r.state != "ready" or now - r.ts >= STALE_S
        ]
        known = "; ".join(others) or "no other service of this role has ever registered"
        return f"role '{role}': need {count} services, have {ready} ready ({known}; registry: {self.folder})"

    def mark_paused(self, record: Record) -> None:
        """Say that the service is about to be stopped by SIGSTOP: silence is not death until ``clear_paused``."""
        write_atomic(self._path(record.role, record.name, "paused"), str(os.getpid()))

    def clear_paused(self, record: Record) -> None:
        """The service runs again."""
        self.clear_paused_name(record.role, record.name)

    def clear_paused_name(self, role: str, name: str) -> None:
        """As ``clear_paused``, for those who have no record yet."""
        self._path(role, name, "paused").unlink(missing_ok=True)

    def is_paused(self, role: str, name: str) -> bool:
        """Whether somebody has stopped the service on purpose."""
        return self._path(role, name, "paused").exists()

    def say_reason(self, text: str) -> None:
        """Leave a line that says why the run ended: exit codes do not survive torchrun and srun. The first one stays.

        In a folder that is full or read-only none is left: whoever ends a run has other work than to fail of that.
        """
        path = self.folder / "REASON"
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("x") as file:
                try:
                    file.write(" ".join(text.split()) + "\n")
                    file.flush()
                except OSError:
                    path.unlink()  # an empty one would keep the reason of whoever can write it
                    raise

    def reason(self) -> str:
        """Empty while nobody has said one."""
        try:
            return (self.folder / "REASON").read_text().strip()
        except FileNotFoundError:
            return ""

    def request_stop(self) -> None:
        """Ask the run to save and to end after its current step."""
        if not self.stop_requested():
            write_atomic(self.folder / "STOP", "")

    def request_end(self) -> None:
        """As ``request_stop``, and the job is not to be started again."""
        write_atomic(self.folder / "STOP", _FOR_GOOD + "\n")

    def stop_requested(self) -> bool:
        """Whether ``request_stop`` was called."""
        return (self.folder / "STOP").exists()

    def end_requested(self) -> bool:
        """Whether ``request_end`` was called."""
        try:
            return (self.folder / "STOP").read_text().strip() == _FOR_GOOD
        except FileNotFoundError:
            return False

    def forget_end(self) -> None:
        """Take STOP and REASON of an earlier attempt away."""
        for name in ("STOP", "REASON"):
            (self.folder / name).unlink(missing_ok=True)

    def _path(self, role: str, name: str, suffix: str) -> Path:
        return self.folder / role / f"{name}.{suffix}"

    def _files(self, role: str) -> list[str]:
        folder = str(self.folder / role)
        try:
            return [f"{folder}/{name}" for name in sorted(os.listdir(folder)) if name.endswith(".json")]
        except FileNotFoundError:
            return []


def _read(path: str) -> Record | None:
    """None for what does not parse: a reader may race a file system's cache, or the end of the service."""
    try:
        with open(path, "rb") as file:
            fields: dict[str, Any] = json.loads(file.read())
        return Record(**fields)
    except (OSError, ValueError, TypeError):
        return None


def write_atomic(path: Path, text: str) -> None:
    """Replace a file: readers, on other nodes too, see the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
