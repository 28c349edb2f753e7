"""What the supervisor of a node does, as data. Standard library only: it is read where there is nothing but Python."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ServicePlan:
    """A process that is kept alive and published in the registry."""

    role: str
    name: str
    command: tuple[str, ...]
    """``{port}`` is filled in."""
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    """Added to the environment."""
    allowed_env: tuple[str, ...] = ()
    """Names that are taken over from the supervisor's environment; empty: all of them."""
    cwd: str
    log: str
    port: int = 0
    """0: a free one, another one after each restart."""
    health_path: str
    """Answers 200 when, and only when, the service is ready."""
    ready_facts: tuple[str, ...] = ()
    """Keys of the JSON in that answer that are told when it is ready."""
    start_timeout_s: float
    probe_every_s: float = 10.0
    """How often a ready service is asked again, and how long it may take to answer."""
    probe_misses: int = 6
    """So many in a row, and it is killed and started again."""
    max_restarts: int = 5
    """Within ten minutes; one more ends the run."""
    stop_grace_s: float = 0.0
    """Between SIGTERM and SIGKILL; 0: SIGKILL at once."""
    start_after: str = ""
    """Name of a job; empty: at once."""
    info: Mapping[str, str | int] = field(default_factory=dict[str, str | int])
    """Goes into the record."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A process that runs to its end. Jobs run one after another; the first that fails ends all."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    cwd: str
    log: str = ""
    """Where its output goes; empty: to the terminal."""
    rank_logs: str = ""
    """Folder of the logs that a failed job leaves; their last lines are repeated."""
    registry: str = ""
    """Folder whose STOP file the job watches; empty: it is ended by a signal."""
    stop_grace_s: float = 10.0
    """From the wish that it ends to SIGKILL."""
    done_marker: str = ""
    """File that is written when the job has succeeded; while it holds the same command the job is skipped."""


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """The processes of one node."""

    name: str
    registry: str
    log: str
    """What the supervisor did."""
    services: tuple[ServicePlan, ...] = ()
    jobs: tuple[Job, ...]


def to_json(plan: JobPlan) -> str:
    """Text that ``from_json`` turns into an equal plan."""
    return json.dumps(asdict(plan), indent=2) + "\n"


def from_json(text: str) -> JobPlan:
    """The plan that ``to_json`` wrote.

    Raises:
        ValueError: the text is no JSON, or no plan.
    """
    try:
        table: dict[str, Any] = json.loads(text)
        services = tuple(_service(row) for row in table.pop("services"))
        jobs = tuple(Job(**{**row, "command": tuple(row["command"])}) for row in table.pop("jobs"))
        return JobPlan(**table, services=services, jobs=jobs)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a job plan: {error}") from error


def _service(row: dict[str, Any]) -> ServicePlan:
    tuples = {key: tuple(row[key]) for key in ("command", "allowed_env", "ready_facts")}
    return ServicePlan(**{**row, **tuples})
