"""Whether the worst case of all workers fits into the memory that there is: an out-of-memory kill takes the whole job step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from sandbox import limits

WEIGHTS = {"memory_bytes": 1, "tmp_bytes": 1, "output_bytes": 3}  # three outputs: stdout, stderr, result
_UNLIMITED = 1 << 60
_GIB, _MIB = 1 << 30, 1 << 20


class DoesNotFit(Exception):
    """The text holds the arithmetic."""


class Memory(NamedTuple):
    """What there is."""

    bytes: int
    source: str
    """Who says so."""


def available(root: Path = Path("/")) -> Memory:
    """The least of the memory limits of our cgroup (v1 or v2), those above it, and the machine's memory.

    What is free just now does not count: a service that is restarted on a busy machine must offer what it offered before.
    """
    total = next(line for line in (root / "proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    found = [Memory(int(total.split()[1]) << 10, "MemTotal of /proc/meminfo")]
    for path in _limit_files(root):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < _UNLIMITED:
            found.append(Memory(int(text), str(path)))
    return min(found)


def _limit_files(root: Path) -> Iterator[Path]:
    """``memory.max`` and ``memory.limit_in_bytes`` from our group up to the top of what can be seen."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            tops, name = ("sys/fs/cgroup", "sys/fs/cgroup/unified"), "memory.max"
        elif "memory" in controllers.split(","):
            tops, name = ("sys/fs/cgroup/memory",), "memory.limit_in_bytes"
        else:
            continue
        for relative in (Path(group.lstrip("/")), *Path(group.lstrip("/")).parents):
            yield from (root / top / relative / name for top in tops)


def ceilings(given: Mapping[str, float], *, workers: int, stored_bytes: int, memory: Memory) -> dict[str, float]:
    """The highest limits that a request may ask for. Those of memory that are not given are lowered until all fits.

    workers x (memory + tmp + 3 x output) + stored tests <= memory

    Args:
        given: ceilings that are asked for.
        workers: programs that run at a time.
        stored_bytes: of uploaded tests.
        memory: what there is.

    Raises:
        DoesNotFit: not even the default limits do.
    """
    highest = limits.following(limits.CEILINGS, given)
    least = {name: given.get(name, min(limits.DEFAULTS[name], highest[name])) for name in WEIGHTS}
    room = (memory.bytes - stored_bytes) / workers
    if need(least) > room:
        raise DoesNotFit(_arithmetic(least, workers, stored_bytes, memory))
    spare, wish = room - need(least), need(highest) - need(least)
    share = min(1.0, spare / wish) if wish > 0 else 1.0
    lowered = {name: int(least[name] + share * (highest[name] - least[name])) for name in WEIGHTS}
    return {**highest, **lowered}


def need(asked: Mapping[str, float]) -> float:
    """Bytes that one program may take in all."""
    return sum(weight * asked[name] for name, weight in WEIGHTS.items())


def _arithmetic(least: Mapping[str, float], workers: int, stored_bytes: int, memory: Memory) -> str:
    terms = " + ".join(
        f"{'3 x ' if weight == 3 else ''}{_size(least[name])} {name.removesuffix('_bytes')}"
        for name, weight in WEIGHTS.items()
    )
    wanted = workers * need(least) + stored_bytes
    fitting = int((memory.bytes - stored_bytes) // need(least))
    advice = f"--workers {fitting} fits" if fitting > 0 else "Lower --max-memory-bytes or --max-stored-bytes"
    return (
        f"{workers} workers x ({terms}) + {_size(stored_bytes)} of stored tests = {_size(wanted)}, and there are "
        f"{_size(memory.bytes)} ({memory.source}). {advice}; --memory-bytes N states what there really is."
    )


def _size(value: float) -> str:
    return f"{value / _GIB:.2f} GiB" if value >= _GIB else f"{value / _MIB:.0f} MiB"
