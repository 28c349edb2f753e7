"""Rows of a data set, and their order: a file or a data set on the hub behind one face."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_distil.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, object]

CHECKED_AT_START = 1000  # rows; the others are checked when they are taken
MAX_REPORTED = 10


class Rows:
    """A data set of ``datasets``, and the name of each row for error messages."""

    def __init__(self, dataset: Dataset, source: str, lines: Sequence[int] | None) -> None:
        self._dataset = dataset
        self._source = source
        self._lines = lines

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Row:
        return self._dataset[index]

    @property
    def source(self) -> str:
        """The file, or the id and split."""
        return self._source

    def where(self, index: int) -> str:
        """``file:line``, or ``id[split] row``."""
        return f"{self._source}:{self._lines[index]}" if self._lines is not None else f"{self._source} row {index}"


def load_rows(source: str, split: str) -> Rows:
    """Read a JSON-lines file, or a split of a data set on the hub.

    Raises:
        DataError: there is no such file, a line is no JSON object, or there are no rows; every bad line is named.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json") or path.is_file():
        rows = _load_file(path)
    else:
        rows = _load_hub(source, split)
    if not len(rows):
        raise DataError(f"{rows.source}: no rows")
    return rows


def _load_file(path: Path) -> Rows:
    from datasets import Dataset  # a second to import, and some commands never read data

    if not path.is_file():
        raise DataError(f"{path}: no such file; a file with one JSON object per line works")
    values, lines, problems = [], [], []
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            parsed = _parse(text)
            if isinstance(parsed, str):
                problems.append(f"{path}:{line}: {parsed}")
            else:
                values.append(parsed)
                lines.append(line)
    raise_if_any(problems, path.name)
    try:
        return Rows(Dataset.from_list(values), str(path), lines)
    except (TypeError, ValueError, OverflowError) as error:  # pyarrow's errors are ValueErrors and TypeErrors
        raise DataError(f"{path}: a field does not have the same type in all rows: {error}") from error


def _parse(text: str) -> dict[str, Any] | str:
    """The object of a line, or what is wrong with it."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"not JSON: {error}"
    return value if isinstance(value, dict) else f"is a {type(value).__name__}, not an object"


def _load_hub(source: str, split: str) -> Rows:
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        dataset = load_dataset(source, split=split)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError) as error:
        hint = "a path that ends in .jsonl, or the id of a data set on the hub with one of its splits, works"
        raise DataError(f"{source} [{split}]: cannot be loaded: {error}; {hint}") from error
    if not isinstance(dataset, Dataset):
        raise DataError(f"{source} [{split}]: is a {type(dataset).__name__}; name one split of one configuration")
    return Rows(dataset, f"{source} [{split}]", None)


def check_rows(rows: Rows, problems: Callable[[Row], Iterable[tuple[str, str]]], example: Row) -> None:
    """Check the first rows, so that a wrong file shows before any GPU work.

    Raises:
        DataError: names every bad row with field and reason, and shows a row that works.
    """
    found = []
    for index in range(min(len(rows), CHECKED_AT_START)):
        found += [f"{rows.where(index)}: {field}: {reason}" for field, reason in problems(rows[index])]
    raise_if_any(found, f"the first {CHECKED_AT_START} rows of {rows.source}", example)


def raise_if_any(problems: Sequence[str], what: str, example: Row | None = None) -> None:
    """One error for all of them."""
    if not problems:
        return
    shown = [f"  - {problem}" for problem in problems[:MAX_REPORTED]]
    more = [f"  ... and {len(problems) - MAX_REPORTED} more"] if len(problems) > MAX_REPORTED else []
    works = [f"A row that works: {json.dumps(example)}"] if example is not None else []
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''} in {what}:"
    raise DataError("\n".join([count, *shown, *more, *works]))


class Share(NamedTuple):
    """Which replica this is."""

    replica_index: int
    num_replicas: int


class Order:
    """Indices of a step: a pure function of (seed, step), the same on every replica.

    Every epoch has an order of its own. A step never crosses epochs, so no row is in a step twice; the rows that are left over
    at the end of an epoch wait for another one.
    """

    def __init__(self, num_rows: int, *, per_step: int, seed: int, source: str) -> None:
        if num_rows < per_step:
            raise DataError(
                f"{source}: {num_rows} rows, and a step takes {per_step} different ones; take fewer per step"
            )
        self._num_rows = num_rows
        self._per_step = per_step
        self._seed = seed
        self._epoch = -1
        self._indices: list[int] = []

    def indices(self, step: int, share: Share) -> list[int]:
        """A replica's rows of a step: contiguous shares of the step's rows.

        Raises:
            DataError: the rows of a step cannot be shared equally.
        """
        if self._per_step % share.num_replicas:
            raise DataError(f"{self._per_step} rows per step cannot be shared equally by {share.num_replicas} replicas")
        epoch, place = divmod(step, self._num_rows // self._per_step)
        if epoch != self._epoch:
            self._indices = list(range(self._num_rows))
            random.Random(f"order of the rows/{self._seed}/{epoch}").shuffle(self._indices)
            self._epoch = epoch
        own = self._per_step // share.num_replicas
        start = place * self._per_step + share.replica_index * own
        return self._indices[start : start + own]
