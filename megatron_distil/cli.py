"""The command line. Each command is a few lines over a function of the package; what needs torch is imported late."""

from __future__ import annotations

import importlib
import json
import logging
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

import megatron_distil
from megatron_distil import sizing
from megatron_distil.config.check import is_supervised
from megatron_distil.config.load import flat, load_config, toml_value
from megatron_distil.config.options import RunOptions
from megatron_distil.config.schema import Config, ParallelConfig
from megatron_distil.errors import ConfigError, DataError, DistilError, EngineReplyError, NonFiniteLossError, Problem
from megatron_distil.registry import Registry

EXIT_STOPPED = 130
"""The run was asked to end before its last step; the same command goes on."""
EXIT_UNAVAILABLE = 75
"""Asks the launcher to start the run again."""
_FATAL = (ConfigError, DataError, EngineReplyError, NonFiniteLossError)
"""Another start would end in the same way."""
_LOST_RANK = "the connection to another rank broke; torchrun says which one ended first"

logger = logging.getLogger(__name__)
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="DistIL: reinforcement learning from rich feedback.",
)

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or a name in launchers/recipes.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings that replace the recipe's, e.g. train.num_steps=100; objective.name=grpo for another method (of the "
        "recipe's objective it keeps what it has too); preset=release-coding for all settings of a published one.",
    ),
]
RunDir = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="The run directory; resumes what is in it.  [runs/RECIPE]")
]
Export = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write the model in Hugging Face's format there at the end.")
]
Replay = Annotated[
    Path | None, typer.Option(metavar="RUN", help="Train on the logged rollouts of another run instead of sampling.")
]


@app.command()
def train(
    recipe: Recipe, overrides: Overrides = None, run: RunDir = None, export: Export = None, replay: Replay = None
) -> None:
    """Train, or go on with a run. One process per rank, started by torchrun."""
    with _reported(folder := _run_dir(run, recipe)):
        config = _checked(recipe, overrides, is_sft=False)
        options = RunOptions(run=folder, registry=_registry(), replay=replay, export=export)
        _finish(_application("train", config, options), config)


@app.command()
def sft(recipe: Recipe, overrides: Overrides = None, run: RunDir = None, export: Export = None) -> None:
    """Supervised training on given responses, the warm start of a student."""
    with _reported(folder := _run_dir(run, recipe)):
        config = _checked(recipe, overrides, is_sft=True)
        _finish(_application("sft", config, RunOptions(run=folder, registry=_registry(), export=export)), config)


@app.command("eval")
def evaluate(recipe: Recipe, overrides: Overrides = None, run: RunDir = None) -> None:
    """Evaluate the newest checkpoint of a run, or the recipe's model where there is none."""
    with _reported(folder := _run_dir(run, recipe)):
        config = _checked(recipe, overrides, is_sft=False)
        if not config.eval.sets:
            hint = 'Write eval.sets = [{ data = "held_out.jsonl" }].'
            raise ConfigError([Problem("eval.sets", (), "there is nothing to evaluate", hint)])
        _application("evaluate", config, RunOptions(run=folder, registry=_registry()))


@app.command()
def check(
    recipe: Recipe,
    overrides: Overrides = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say what each setting means.")] = False,
) -> None:
    """Say everything that is wrong with a recipe, or print it with all settings; each line is an override."""
    with _reported():
        config = load_config(recipe, overrides or ())
        sentences = _sentences(config) if explain else {}
        lines = [
            f"{path} = {toml_value(value)}" + (f"    # {sentences[path]}" if sentences.get(path) else "")
            for path, value in flat(config).items()
        ]
        typer.echo("\n".join(lines))


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help=f"One of {', '.join(sizing.GPUS)}; cpu: nothing has to fit.")
    ] = "h200",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Within which links are fast.")] = 8,
    ep: Annotated[int, typer.Option(min=1, help="Ranks that share the experts of a layer.")] = 1,
) -> None:
    """What a recipe needs: processes by role, memory of each, time of a step, and whether it fits. The model must be a folder.

    Ends with 2 where it does not fit, and names the nearest layout that does.
    """
    with _reported():
        config = load_config(recipe, overrides or ())
        shape = sizing.ModelShape.from_folder(config.model)
        if found := list(sizing.problems(config, shape, ep=ep)):
            raise ConfigError(found)
        machine = sizing.machine(gpu, gpus_per_node=gpus_per_node)
        is_local = config.has_expert and Path(config.teacher.model).is_dir()
        expert = sizing.ModelShape.from_folder(config.teacher.model) if is_local else None
        found_sizes = sizing.sizes(config, shape, machine or sizing.H200_NODES, ep=ep, expert=expert)
        sizing.print_plan(config, shape, found_sizes, machine)
        if machine and (found := list(sizing.shortfalls(config, shape, machine, ep=ep))):
            raise ConfigError(found)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories; several are compared.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="[RUN/report.html of the first run]")] = None,
) -> None:
    """One self-contained HTML page: before and after, curves, rollouts with their feedback."""
    with _reported():
        from megatron_distil.report import (
            write_report,
        )  # the page is read from files; other commands do not wait for it

        target = out or runs[0] / "report.html"
        write_report(runs, target)
        typer.echo(f"written: {target}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the script ``megatron-distil``; ends the process with the exit code of the command."""
    app(args=None if arguments is None else list(arguments), prog_name="megatron-distil")


def _run_dir(run: Path | None, recipe: str) -> Path:
    return run or Path("runs") / Path(recipe).stem


def _registry() -> Path | None:
    folder = os.environ.get("MEGATRON_DISTIL_REGISTRY")  # noqa: TID251 - the command line hands it on as an option
    return Path(folder) if folder else None


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))  # noqa: TID251 - torchrun says it here only


def _checked(recipe: str, overrides: Sequence[str] | None, *, is_sft: bool) -> Config:
    config = load_config(recipe, overrides or ())
    if is_supervised(config) != is_sft:
        command, hint = ("sft", 'write name = "sft"') if is_sft else ("train and eval", "use megatron-distil sft")
        reason = f"not an objective of megatron-distil {command}"
        raise ConfigError([Problem("objective.name", config.objective.name, reason, f"For this recipe {hint}.")])
    return config


def _application(command: str, config: Config, options: RunOptions) -> Any:
    """``megatron_distil.app`` needs torch and Megatron; it is imported when everything that can be checked was checked."""
    if options.registry is not None and (reason := Registry(options.registry).reason()):
        _say(f"this life of the run has ended: {reason}")  # torchrun starts ranks again that meant to end
        raise typer.Exit(EXIT_UNAVAILABLE)
    options.run.mkdir(parents=True, exist_ok=True)
    if _rank() == 0:
        (options.run / "versions.json").write_text(json.dumps(_versions(), indent=2) + "\n", encoding="utf-8")
    configure_logging(options.run, _rank(), config.parallel)
    work: Callable[[Config, RunOptions], Any] = getattr(importlib.import_module("megatron_distil.app"), command)
    return work(config, options)


def _versions() -> dict[str, str]:
    """Of what a result depends on; the packages are asked without importing them."""
    found = {"python": platform.python_version(), "megatron_distil": megatron_distil.__version__}
    for package in ("torch", "megatron-core", "transformers", "numpy", "pydantic"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _finish(steps: int, config: Config) -> None:
    if steps < config.train.num_steps:
        if _rank() == 0:
            typer.echo(f"stopped after {steps} of {config.train.num_steps} steps; the same command goes on", err=True)
        _say_reason(f"stopped after {steps} of {config.train.num_steps} steps")
        raise typer.Exit(EXIT_STOPPED)


@contextmanager
def _reported(run: Path | None = None) -> Iterator[None]:
    """Errors of ours end with their text and exit code; a bug's traceback goes to the run's log, its last line here."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):  # typer knows what to do with them
        raise
    except KeyboardInterrupt:
        _say("stopped")
        raise typer.Exit(EXIT_STOPPED) from None
    except DistilError as error:
        _keep_traceback(run)
        if isinstance(error, _FATAL):
            _say_reason(f"fatal {error}")
        elif error.exit_code == EXIT_UNAVAILABLE:
            _say_reason(f"unavailable {error}")
        _say("\n".join([str(error), *getattr(error, "__notes__", ())]))
        raise typer.Exit(error.exit_code) from None
    except Exception as error:  # noqa: BLE001 - a bug, on its way out of the process
        last = _LOST_RANK if _is_lost_rank(error) else "".join(traceback.format_exception_only(error)).strip()
        kept = _keep_traceback(run)
        where = f"traceback: {kept}" if kept else traceback.format_exc()
        typer.echo(f"rank {_rank()}: {last}\n{where}", err=True)
        raise typer.Exit(1) from None


def _is_lost_rank(error: Exception) -> bool:
    """What a rank sees when another one dies in a collective; gloo tells it by a text only."""
    text = str(error)
    return isinstance(error, RuntimeError) and "gloo/transport" in text and "Connection " in text


def _say(text: str) -> None:
    """All ranks have the same error; one of them prints it."""
    if _rank() == 0:
        typer.echo(text, err=True)


def _say_reason(text: str) -> None:
    """Why this life of a job ended; exit codes do not survive torchrun and srun. What torchrun may repair gives no reason."""
    if folder := _registry():
        with suppress(OSError):  # the error itself is more important
            registry = Registry(folder)
            is_wanted = (
                text.startswith("unavailable") and registry.stop_requested()
            )  # who was asked to stop stops waiting
            registry.say_reason(text.replace("unavailable", "stopped", 1) if is_wanted else text)


def _keep_traceback(run: Path | None) -> Path | None:
    if run is None or not run.is_dir():
        return None
    path = run / "logs" / f"error.rank{_rank()}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:  # a full disk or a folder that is read-only may be what we are about to tell
        return None
    return path


class _Label(logging.Filter):
    """Adds the rank's place in the layout to every record."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self._label = label

    def filter(self, record: logging.LogRecord) -> bool:
        record.label = self._label
        return True


class _Terminal(logging.StreamHandler[Any]):
    """Writes to whatever stderr is at the moment: a progress bar puts itself in between to stay below the lines."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


def rank_label(rank: int, parallel: ParallelConfig) -> str:
    """A rank's place in Megatron's order, tp-cp-dp-pp, innermost first: ``dp0.tp1.pp0.cp0``."""
    tp, rest = rank % parallel.tp, rank // parallel.tp
    cp, rest = rest % parallel.cp, rest // parallel.cp
    dp, pp = rest % parallel.dp, rest // parallel.dp
    return f"dp{dp}.tp{tp}.pp{pp}.cp{cp}"


def configure_logging(run: Path, rank: int, parallel: ParallelConfig) -> None:
    """INFO of every head and WARNING of every rank go to the run's ``logs/``, of INFO only the first head's to the terminal."""
    label = rank_label(rank, parallel)
    is_head = label.endswith(".tp0.pp0.cp0")
    folder = run / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / f"rank{rank}.log", encoding="utf-8")
    file.setLevel(logging.INFO if is_head else logging.WARNING)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(label)s %(name)s: %(message)s"))
    terminal = _Terminal()
    terminal.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    text = "%(asctime)s %(message)s" if parallel.world_size == 1 else "%(asctime)s %(label)s %(message)s"
    terminal.setFormatter(logging.Formatter(text, datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    logging.getLogger("megatron_distil").setLevel(logging.INFO)
    # What these libraries deprecate or recommend for GPUs is nothing that a user of ours can act on.
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch\.distributed)\b")
    for handler in (file, terminal):
        handler.addFilter(_Label(label))
        root.addHandler(handler)


def _sentences(section: Any, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if hasattr(type(value), "model_fields"):
            found |= _sentences(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = " ".join((info.description or "").split())
    return found
