"""A task is one module that says how a data row becomes a prompt, how a response is judged, and what the teacher reads.

Adding one touches no loop: write ``megatron_distil/tasks/<name>.py`` with ``TASK = YourTask()``, and say ``task.name = "<name>"``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import megatron_distil.tasks
from megatron_distil.config.schema import TaskConfig
from megatron_distil.errors import ConfigError, DataError, Problem
from megatron_distil.types import Outcome, Program, Prompt, RunResult

Row = Mapping[str, object]
"""One row of a data set."""

_OTHER_MODULES = ("task", "tiny_model", "prepare", "livecodebench_data")


class Response(NamedTuple):
    """What a task sees of a rollout."""

    text: str
    """Without its stop token."""
    is_complete: bool
    """It ended with a stop token. A response that was cut earns no reward, whatever its text is worth."""


@dataclass(frozen=True, slots=True)
class Ruling:
    """What a task says of a response."""

    outcome: Outcome
    reward: float
    """[0, 1]"""
    text: str
    """What the teacher may read; empty if there is nothing to say."""
    pass_fraction: float | None = None
    """[0, 1] tests that passed, of all; None: a response is not judged by tests."""
    vote: str = ""
    """What maj@k counts: equal for responses that say the same. Empty: it has no vote."""


class RowProblem(NamedTuple):
    """One thing that is wrong with a row."""

    field: str
    reason: str


class Task(Protocol):
    """What the stages ask of a task. All methods are pure."""

    @property
    def name(self) -> str:
        """The name of its module."""
        ...

    @property
    def style(self) -> Literal["raw", "chat"]:
        """Whether its texts are what the model reads, or a user's message for the chat template of the model."""
        ...

    @property
    def stop(self) -> tuple[str, ...]:
        """Tokens that end a response; empty: those that the model's own files name."""
        ...

    @property
    def example(self) -> Row:
        """A row that works, for error messages."""
        ...

    def problems(self, row: Row) -> Iterable[RowProblem]:
        """What is wrong with a row."""
        ...

    def prompt_id(self, row: Row) -> str:
        """Unique in the data set."""
        ...

    def prompt_text(self, row: Row) -> str:
        """What the student reads."""
        ...

    def program(self, prompt: Prompt, response: Response) -> Program | Ruling:
        """What is to be run before ``rule`` can speak, or the ruling where nothing is."""
        ...

    def rule(self, prompt: Prompt, response: Response, result: RunResult) -> Ruling:
        """The ruling on a response whose program was run."""
        ...

    def teacher_text(self, prompt: Prompt, *, solution: str | None, feedback: str | None) -> str:
        """What the teacher reads in place of the prompt."""
        ...

    def measures(self, prompt: Prompt, response_text: str) -> Mapping[str, float]:
        """Further measures of an evaluation, averaged as ``eval/<name>``; empty for most tasks."""
        ...


@runtime_checkable
class GeneratedTask(Task, Protocol):
    """A task that makes its own data and can be learned by a tiny character-level model."""

    @property
    def alphabet(self) -> str:
        """One character per token, in the order of their ids; the last two end a response and pad."""
        ...

    def data(self, seed: int) -> Mapping[str, Iterable[Row]]:
        """Rows by data set: ``train`` and evaluation sets with rows of this task, ``sft`` with documents."""
        ...


@runtime_checkable
class ReferenceTask(Task, Protocol):
    """A task whose rows hold solutions that a teacher may be shown (``teacher.demonstration = "reference"``)."""

    def reference(self, prompt: Prompt) -> str | None:
        """The solution, as a response without its stop token; None: this row has none."""
        ...


@runtime_checkable
class ConfigurableTask(Task, Protocol):
    """A task that has settings beside its name."""

    def configured(self, settings: TaskConfig) -> Task:
        """The task under ``[task]`` of a recipe."""
        ...


def task_of(settings: TaskConfig) -> Task:
    """The task that a recipe asks for.

    Raises:
        ConfigError: there is none of that name; the error lists those there are.
    """
    task = task_by_name(settings.name)
    return task.configured(settings) if isinstance(task, ConfigurableTask) else task


def task_names() -> list[str]:
    """Every task there is."""
    modules = (module.name for module in pkgutil.iter_modules(megatron_distil.tasks.__path__))
    return sorted(name for name in modules if name not in _OTHER_MODULES)


def task_by_name(name: str) -> Task:
    """The task of module ``name``.

    Raises:
        ConfigError: there is none; the error lists those there are.
    """
    names = task_names()
    if name not in names:
        raise ConfigError([Problem("task.name", name, "no such task", f"Use one of: {', '.join(names)}.")])
    task: Task = importlib.import_module(f"megatron_distil.tasks.{name}").TASK
    return task


def text_problems(row: Row, fields: Sequence[str], alphabet: str = "") -> Iterable[RowProblem]:
    """Fields that must be non-empty strings and are not, or hold a character outside the alphabet (if one is given)."""
    for field in fields:
        value = row.get(field)
        if value is None:
            yield RowProblem(field, "is missing")
        elif not isinstance(value, str) or not value:
            yield RowProblem(field, f"is {value!r}, not a text")
        elif alphabet and (strange := sorted(set(value) - set(alphabet))):
            yield RowProblem(field, f"has {''.join(strange)!r}, which no token stands for")


def text_of(row: Row, field: str) -> str:
    """A text field of a row that was checked.

    Raises:
        DataError: it is no text.
    """
    value = row.get(field)
    if not isinstance(value, str):
        raise DataError(f"a row has {field} = {value!r}, not a text")
    return value
