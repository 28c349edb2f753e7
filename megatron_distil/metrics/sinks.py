"""Where the numbers of a step go: JSON lines always; TensorBoard, Weights & Biases and the terminal beside them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_distil.config.schema import Config
from megatron_distil.errors import ConfigError, Problem

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the numbers of a step, of training or of an evaluation."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """``values`` by name; an evaluation's names begin with ``eval/``."""
        ...

    def close(self) -> None:
        """Everything was written."""
        ...


class JsonLines:
    """One JSON object per line, on disk when ``append`` returns.

    The first line that is written says where this attempt begins: lines of that step and later ones come from an
    attempt that went on from there before, and move to ``<name>.<attempt>.jsonl``. A line that a crash tore goes with them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begun = False

    def append(self, step: int, record: Mapping[str, Any]) -> None:
        """Write ``{"step": step, **record}``."""
        if not self._begun:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _cut(self._path, step)
            self._begun = True
        line = json.dumps({"step": step, **record}, allow_nan=False) + "\n"
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _cut(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = next((index for index, line in enumerate(lines) if not _is_before(line, step)), len(lines))
    if kept == len(lines):
        return
    attempt = 1
    while (tail := path.with_suffix(f".{attempt}{path.suffix}")).exists():
        attempt += 1
    # The tail is complete before the file is shortened: a crash in between loses nothing.
    tail.write_bytes(b"".join(lines[kept:]))
    shortened = path.with_suffix(".new")
    with shortened.open("wb") as file:
        file.write(b"".join(lines[:kept]))
        file.flush()
        os.fsync(file.fileno())
    shortened.replace(path)


def _is_before(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] < step
    except (ValueError, KeyError, TypeError):
        return False


class JsonLinesSink:
    """``metrics.jsonl``. What is not a number in JSON is written as a string: "nan", "inf", "-inf"."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line."""
        self._lines.append(
            step, {name: value if abs(value) < float("inf") else str(value) for name, value in values.items()}
        )

    def close(self) -> None:
        """Every line is on disk already."""


class TensorBoardSink:
    """Event files; an earlier attempt's later steps are hidden."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar per name."""
        if self._writer is None:
            from torch.utils.tensorboard.writer import (
                SummaryWriter,
            )  # takes seconds; the first step is not waiting for it

            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class WandbSink:
    """A run of Weights & Biases, continued under the same id on resume."""

    def __init__(self, project: str, run: Path, config: Config) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]  # an extra
        except ImportError as error:
            reason = "Weights & Biases is not installed"
            hint = 'Run pip install "megatron_distil[wandb]", or leave the setting out.'
            raise ConfigError([Problem("log.wandb_project", project, reason, hint)]) from error
        self._run: Any = wandb.init(
            project=project, id=run.name, resume="allow", dir=str(run), config=config.model_dump(mode="json")
        )
        # Steps and evaluations of one step arrive as two lines; W&B's own step can only grow.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Mark the run as finished."""
        self._run.finish()


class TerminalSink:
    """A line per step, through logging; on a terminal a bar beside it, with the phase and the time that is left."""

    def __init__(self, num_steps: int, console: Console) -> None:
        self._num_steps = num_steps
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.fields[phase]:<8}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._bar = self._progress.add_task("", total=num_steps, phase="start", speed="")
            self._progress.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show what is going on."""
        if self._progress is not None:
            self._progress.update(self._bar, phase=name)
        yield

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line, and the bar a step further."""
        if any(name.startswith("eval/") for name in values):
            shown = "  ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in values.items())
            logger.info("after step %d: %s", step, shown)
            return
        logger.info("%s", step_line(step, self._num_steps, values))
        if self._progress is not None:
            speed = f"{values['time/tokens_per_s']:.0f} tokens/s" if "time/tokens_per_s" in values else ""
            self._progress.update(self._bar, completed=step + 1, speed=speed)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()


_IN_A_LINE = (
    ("loss/ce_nats", "ce {:.4f}"),
    ("loss/credit_nats", "credit {:.3f}"),
    ("feedback/passed_frac", "passed {:.1%}"),
    ("rollout/response_tokens", "length {:.1f}"),
    ("train/grad_norm", "grad {:.3f}"),
    ("sync/logprob_gap_nats", "gap {:.1e}"),
    ("time/tokens_per_s", "{:.0f} tokens/s"),
    ("time/step_s", "{:.1f} s"),
)


def step_line(step: int, num_steps: int, values: Mapping[str, float]) -> str:
    """A step as one line: the few numbers that say whether it goes well. Counts finished steps."""
    shown = [text.format(values[name]) for name, text in _IN_A_LINE if name in values]
    return "  ".join([f"step {step + 1}/{num_steps}", *shown])
