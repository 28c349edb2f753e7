"""Sums travel, the division happens once, at the end. A metric is born as (sum, count) or as a maximum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megatron_distil.metrics import names
from megatron_distil.types import Sums


class Totals:
    """What was counted so far. Adding is associative and commutative up to rounding, so replicas may add in any order."""

    def __init__(self, sums: Iterable[Sums] = ()) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._maxima: dict[str, float] = {}
        for one in sums:
            self.merge(one)

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        """Count ``total`` over ``count`` things.

        Raises:
            ValueError: the name is not in the catalogue.
        """
        names.sentence(name)
        known, counted = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = known + total, counted + count

    def peak(self, name: str, value: float) -> None:
        """Keep the largest value.

        Raises:
            ValueError: the name is not in the catalogue.
        """
        names.sentence(name)
        self._maxima[name] = max(value, self._maxima.get(name, value))

    def merge(self, other: Sums | Totals) -> None:
        """Add everything that ``other`` has counted."""
        counted = other.as_sums() if isinstance(other, Totals) else other
        for name, (total, count) in counted.sums.items():
            self.add(name, total, count)
        for name, value in counted.maxima.items():
            self.peak(name, value)

    def as_sums(self) -> Sums:
        """As a record, to send to another rank."""
        return Sums(sums=dict(self._sums), maxima=dict(self._maxima))

    def has(self, name: str) -> bool:
        """Whether anything was counted under that name."""
        return name in self._sums or name in self._maxima

    def means(self) -> Mapping[str, float]:
        """Sums divided by their counts, totals (``names.is_total``) as they are, and maxima; sorted by name.

        What was never counted has no mean.
        """
        values = dict(self._maxima)
        for name, (total, count) in self._sums.items():
            if names.is_total(name):
                values[name] = total
            elif count:
                values[name] = total / count
        return dict(sorted(values.items()))
