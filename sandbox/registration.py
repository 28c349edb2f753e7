"""The record of a running service in a registry folder. The trainer's side is ``megatron_distil/registry.py``; bytes are shared."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

HEARTBEAT_S = 2.0
ROLE = "sandbox"


class Registration:
    """``FOLDER/sandbox/NAME.json``, rewritten with every heartbeat."""

    def __init__(self, folder: Path, name: str, url: str, info: Mapping[str, str | int]) -> None:
        self._path = folder / ROLE / f"{name}.json"
        self._lock = threading.Lock()
        self._is_removed = False
        self._record: dict[str, object] = {
            "role": ROLE,
            "name": name,
            "url": url,
            "pid": os.getpid(),
            "pgid": os.getpgid(0),
            "state": "starting",
            "gen": self._last_gen() + 1,
            "ts": 0.0,
            "info": dict(info),
        }

    def write(self, state: str) -> None:
        """Replace the record; readers see the old one or the new one.

        Raises:
            OSError: the folder cannot be written.
        """
        with self._lock:
            if not self._is_removed:  # a heartbeat on its way must not bring the record back
                self._replace(state)

    def _replace(self, state: str) -> None:
        self._record.update(state=state, ts=time.time())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        with temporary.open("w") as file:
            file.write(json.dumps(self._record))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)

    async def beat(self) -> None:
        """Say that we are ready, again and again, until cancelled. A folder that fails for a while is not our end."""
        is_well = True
        while True:
            try:
                await asyncio.to_thread(self.write, "ready")
                is_well = True
            except OSError as error:
                if is_well:
                    print(f"sandbox: {self._path}: {error.strerror}", file=sys.stderr, flush=True)
                is_well = False
            await asyncio.sleep(HEARTBEAT_S)

    def remove(self) -> None:
        """Take the service off."""
        with self._lock, suppress(OSError):
            self._is_removed = True
            self._path.unlink(missing_ok=True)

    def _last_gen(self) -> int:
        try:
            gen = json.loads(self._path.read_text())["gen"]
        except (OSError, ValueError, TypeError, KeyError):
            return -1
        return gen if isinstance(gen, int) else -1
