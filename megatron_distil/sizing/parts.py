"""What takes room, and what takes time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Phase = Literal["always", "scoring", "update", "publication"]

BYTES_BY_DTYPE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One thing that takes room."""

    name: str
    bytes: float
    why: str
    phase: Phase = "always"
    """When it exists; the phases of a step follow each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One thing that takes time."""

    name: str
    seconds: float
    why: str


def peak(parts: Iterable[Part]) -> float:
    """Bytes at the fullest moment: what always exists, and the largest phase."""
    sums: dict[Phase, float] = {"always": 0.0, "scoring": 0.0, "update": 0.0, "publication": 0.0}
    for part in parts:
        sums[part.phase] += part.bytes
    return sums.pop("always") + max(sums.values())


def human(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
