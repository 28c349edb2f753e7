"""What the service keeps between requests: uploaded tests, and recent answers."""

from __future__ import annotations

import json
from collections import OrderedDict
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

from sandbox.refusal import IdReused
from sandbox.request import TestSet

Answer = dict[str, Any]
CACHE_ENTRIES, CACHE_BYTES = 4096, 64 << 20


class _Sized(Protocol):
    @property
    def size(self) -> int: ...


V = TypeVar("V", bound=_Sized)


class _Recent(Generic[V]):
    """The last used, bounded by number and bytes."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._max_entries = max_entries
        self._entries: OrderedDict[str, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> V | None:
        found = self._entries.get(key)
        with suppress(KeyError):  # large requests look beside the event loop, which may drop it just now
            self._entries.move_to_end(key)
        return found

    def put(self, key: str, value: V) -> None:
        known = self._entries.pop(key, None)
        self.held_bytes += value.size - (known.size if known else 0)
        self._entries[key] = value
        while len(self._entries) > self._max_entries or self.held_bytes > self.max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self.held_bytes -= dropped.size


class TestSets(_Recent[TestSet]):
    """Uploaded tests, by the SHA-256 of the bytes they came as."""

    __test__ = False  # not a test of pytest

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, max_bytes)


class _Remembered:
    def __init__(self, answer: Answer) -> None:
        self.answer, self.size = answer, len(json.dumps(answer))


class Answers:
    """Recent answers by the digest of what was asked, and the ids that were used for it."""

    def __init__(self, max_entries: int = CACHE_ENTRIES, max_bytes: int = CACHE_BYTES) -> None:
        self._answers: _Recent[_Remembered] = _Recent(max_entries, max_bytes)
        self._max_ids = 2 * max_entries
        self._ids: OrderedDict[str, str] = OrderedDict()

    def claim(self, request_id: str, digest: str) -> None:
        """Bind an id to a content.

        Raises:
            IdReused: it is bound to another one.
        """
        if self._ids.setdefault(request_id, digest) != digest:
            raise IdReused(f"id: {request_id!r} was used for another request; every content needs its own id, or none")
        self._ids.move_to_end(request_id)
        while len(self._ids) > self._max_ids:
            self._ids.popitem(last=False)

    def get(self, digest: str) -> Answer | None:
        """What was answered."""
        known = self._answers.get(digest)
        return known.answer if known else None

    def put(self, digest: str, answer: Answer) -> None:
        """A fault is never remembered: a retry runs again."""
        if answer["status"] == "ok":
            self._answers.put(digest, _Remembered(answer))
