"""Every error that we raise on purpose.

    DistilError                    .exit_code: what the command line ends with
    ├── ConfigError(ValueError)    .problems; before any GPU work                                   exit 2
    ├── DataError(ValueError)      a row of a data set or a file of a model is malformed            exit 2
    ├── RolloutError
    │   ├── EngineUnavailable      cannot be reached or refuses work; another server may do it      exit 75
    │   ├── EngineReplyError       answered something that we cannot trust; never retried           exit 1
    │   └── StaleWeightsError      a rollout spans more versions than rollout.max_lag               exit 1
    ├── SandboxUnavailable         our outage; says nothing about the program                       exit 75
    ├── SandboxRefused             it understood the request and said no                            exit 1
    ├── SyncError                  trainer and engine disagree on a weight                          exit 1
    ├── NonFiniteLossError         raised on every rank before the optimizer step                   exit 1
    ├── CheckpointError            missing, truncated, of another run, or not writable              exit 1
    ├── RegistryError              the services that a run needs did not appear in time             exit 75
    └── ForeignError               an error of a library, raised on another rank                    exit 1

Exit 75 asks the launcher to start the run again; it resumes by itself. All of them pickle: they cross ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any, ClassVar, Final, NamedTuple


class Missing(Enum):
    """Stands for a value that nobody gave; an enum, so that it stays itself when an error crosses ranks."""

    MISSING = "MISSING"


MISSING: Final = Missing.MISSING


class Problem(NamedTuple):
    """One thing that is wrong with a configuration, and a way out."""

    path: str
    value: object
    reason: str
    suggestion: str = ""

    def __str__(self) -> str:
        given = "" if self.value is MISSING else f" = {self.value!r}"
        return f"{self.path}{given}: {self.reason}. {self.suggestion}".rstrip()


class DistilError(Exception):
    """Root of all errors of this package."""

    exit_code: ClassVar[int] = 1


class ConfigError(DistilError, ValueError):
    """Everything that is wrong with a configuration, in one error."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} in the configuration:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


class DataError(DistilError, ValueError):
    """A row of a data set, or a file of a model, is malformed. The text names file and line."""

    exit_code = 2


class RolloutError(DistilError):
    """Sampling failed."""


class EngineUnavailable(RolloutError):
    """An engine cannot be reached or refuses work. Another one may do it."""

    exit_code = 75


class EngineReplyError(RolloutError):
    """An engine answered something that cannot be trusted. The same question gets the same answer."""


class StaleWeightsError(RolloutError):
    """A rollout spans more weight versions than allowed."""


class SandboxUnavailable(DistilError):
    """The sandbox gave no verdict. This says nothing about the program."""

    exit_code = 75
    retry_after_s: float = 0.0
    """The pause that a busy service asked for; 0: it did not say that it was busy."""


class SandboxRefused(DistilError):
    """The sandbox understood the request and refused it."""


class SyncError(DistilError):
    """An engine does not hold the weights that were sent."""


class NonFiniteLossError(DistilError):
    """A loss or gradient is not finite; raised on every rank before the optimizer step."""


class CheckpointError(DistilError):
    """A checkpoint cannot be read or written."""


class RegistryError(DistilError):
    """The services that a run needs did not appear, or fell below the quorum."""

    exit_code = 75


class ForeignError(DistilError):
    """An error of a library on another rank, as text: its class may not pickle."""
