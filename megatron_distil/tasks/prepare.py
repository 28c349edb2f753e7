"""Data and a random model of a task that makes its own: ``python -m megatron_distil.tasks.prepare TASK DIR [--seed N]``.

Writes ``DIR/<data set>.jsonl`` and ``DIR/model/``; the same bytes for the same arguments. Does nothing where that was done.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from megatron_distil.errors import ConfigError, DistilError, Problem
from megatron_distil.tasks.task import GeneratedTask, Row, task_by_name, task_names
from megatron_distil.tasks.tiny_model import write_tiny_model

MARKER = "prepared.json"
FORMAT = 1  # raise it when a generator or the model changes, so that old folders are written anew


def prepare(task_name: str, folder: Path, *, seed: int) -> list[Path]:
    """Write what is missing; the marker comes last, so an interrupted run is done again.

    Returns:
        The files and folders that are there now.

    Raises:
        ConfigError: no such task, or it makes no data.
    """
    task = task_by_name(task_name)
    if not isinstance(task, GeneratedTask):
        raise ConfigError(
            [Problem("task.name", task_name, "makes no data of its own", "Name a data set in data.train.")]
        )
    data = task.data(seed)
    written = [*(folder / f"{name}.jsonl" for name in data), folder / "model"]
    settings = {"task": task_name, "seed": seed, "format": FORMAT}
    if _read_marker(folder / MARKER) == settings and all(path.exists() for path in written):
        return written

    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).unlink(missing_ok=True)
    for name, rows in data.items():
        _write_rows(folder / f"{name}.jsonl", rows)
    write_tiny_model(folder / "model", task.alphabet, seed=seed)
    (folder / MARKER).write_text(json.dumps(settings) + "\n", encoding="utf-8")
    return written


def _read_marker(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="megatron_distil.tasks.prepare", description="Write the data and a random model of a task."
    )
    parser.add_argument("task", help=f"one of: {', '.join(task_names())}")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        written = prepare(options.task, options.folder, seed=options.seed)
    except DistilError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.writelines(f"{path}\n" for path in written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
