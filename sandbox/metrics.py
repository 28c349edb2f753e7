"""Counters and histograms, in the text format of Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
COUNTERS = (  # those without a label, which are there from the start
    "jobs",
    "rejected",
    "replayed",
    "joined",
    "cancelled",
    "recycled",
    "faults",
    "start_failures",
    "tests_uploaded",
    "cpu_seconds",
)
HISTOGRAMS = ("worker_start_seconds", "queue_wait_seconds", "run_seconds", "test_seconds")
_PREFIX = "sandbox_"


class Metrics:
    """What happened since the start. Belongs to one thread."""

    def __init__(self) -> None:
        self._counters: Counter[tuple[str, str]] = Counter({(name, ""): 0 for name in COUNTERS})
        self._histograms = {name: _Histogram() for name in HISTOGRAMS}

    def count(self, name: str, amount: float = 1, **label: str) -> None:
        """Add to a counter; at most one label."""
        labels = "".join(f'{{{key}="{value}"}}' for key, value in label.items())
        self._counters[name, labels] += amount  # pyright: ignore[reportArgumentType] - seconds are counted too

    def observe(self, name: str, seconds: float) -> None:
        """Add to a histogram."""
        self._histograms[name].observe(seconds)

    def text(self, gauges: Mapping[str, float]) -> str:
        """Everything, and what is so just now."""
        return "".join(f"{_PREFIX if line[0] != '#' else ''}{line}\n" for line in self._lines(gauges))

    def _lines(self, gauges: Mapping[str, float]) -> Iterator[str]:
        for name, value in gauges.items():
            yield _type(name, "gauge")
            yield f"{name} {value:g}"
        announced = set[str]()
        for (name, labels), value in sorted(self._counters.items()):
            if name not in announced:
                announced.add(name)
                yield _type(f"{name}_total", "counter")
            yield f"{name}_total{labels} {_number(value)}"
        for name, histogram in self._histograms.items():
            yield _type(name, "histogram")
            yield from histogram.lines(name)


class _Histogram:
    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip([*map(str, BOUNDS_S), "+Inf"], self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


def _type(name: str, kind: str) -> str:
    return f"# TYPE {_PREFIX}{name} {kind}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
