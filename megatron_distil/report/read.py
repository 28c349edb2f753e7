"""A run directory, as far as the report needs it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_distil.errors import DataError

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run has written."""

    name: str
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    steps: Sequence[Line]
    """Lines of training, in order."""
    evals: Sequence[Line]
    """Lines of evaluations, in order; ``step`` counts finished steps."""
    samples: Sequence[Line]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, under names that tell them apart.

    Raises:
        DataError: a folder holds no run, or a file is damaged in its middle.
    """
    return [_read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, and as many parts before it as it takes."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{one[-1]} ({index})" for index, one in enumerate(parts, start=1)]  # one folder given twice


def _read_run(folder: Path, name: str) -> Run:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{folder}: no metrics.jsonl, so this is no run directory, or its first step is not done")
    lines = [_numbers(line) for line in _lines(path)]
    samples = folder / "samples.jsonl"
    return Run(
        name=name,
        config=_table(folder / "config.json"),
        versions=_table(folder / "versions.json"),
        steps=[line for line in lines if not _is_eval(line)],
        evals=[line for line in lines if _is_eval(line)],
        samples=_lines(samples) if samples.is_file() else [],
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. A last line without an end is being written, or was torn: it is left out."""
    found: list[dict[str, Any]] = []
    raw = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(raw, start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(raw) and not line.endswith(b"\n"):
                break
            raise DataError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise DataError(f"{path}: line {number} has no step")
        found.append(entry)
    return found


def _numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    """``metrics.jsonl`` spells what is no number in JSON: "nan", "inf", "-inf"."""
    return {name: float(value) if isinstance(value, str) else value for name, value in line.items()}


def _is_eval(line: Line) -> bool:
    return any(name.startswith("eval/") for name in line)


def _table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
