"""The processes of a run, as data, for one machine and for many. Standard library only: it is read where there is only Python.

    ClusterPlan   one allocation                              PLAN.json on the shared file system
    └ RolePlan    trainer, rollout, teacher, sandbox          one step of the allocation
      └ JobPlan   what the supervisor of one node does        services and jobs

A plan is made before anybody knows where it will run. What is known on the node only stands in it as a word in braces:

    {host}   address of the node                              {life}   JOB ID.RESTART COUNT
    {rdzv}   HOST:PORT where the ranks of all nodes meet      {port}   port of a service, filled in at each of its starts
"""

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
    """None: it serves until it is ended."""


@dataclass(frozen=True, kw_only=True)
class RolePlan:
    """One step of the allocation: ``python -m launchers.node NAME PLAN.json``, once on each of its nodes."""

    name: str
    nodes: int
    first_node: int
    """Index into the allocation."""
    node_plans: tuple[JobPlan, ...]
    """One for each node, in the order of the nodes."""
    needs: Mapping[str, int] = field(default_factory=dict[str, int])
    """Services of other roles that have to be ready before its jobs start, by role."""
    needs_timeout_s: float = 1800.0
    script: str
    """What the step runs: shell text, quoted."""
    srun_args: tuple[str, ...]
    """Placement and containment."""
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    """Exported before the step; the same names in every role, since an export stays for the next."""
    image: str = ""
    """Of pyxis; empty: none."""
    mounts: tuple[str, ...] = ()
    """``OUTSIDE:INSIDE``."""
    container_env: tuple[str, ...] = ()
    """Names whose values in the job win over those of the image."""


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """One allocation and everything that is decided about it."""

    name: str
    run: str
    """The run directory, seen by all nodes."""
    account: str
    partition: str
    time: str
    """``[D-]HH:MM:SS``."""
    nodes: int
    """Of the whole allocation."""
    gpus_per_node: int
    signal: str
    """What the batch shell gets, and how long before the end."""
    retries: int
    """Restarts of any kind: preemption, a lost node and the time limit count as well."""
    monitor_s: int
    """How often the batch shell looks whether a role has ended."""
    setup: str
    """Shell text before the first step."""
    host_ip: str = ""
    """Address that every node publishes, for several nodes on one machine; empty: it is asked of the routing table."""
    roles: tuple[RolePlan, ...]
    """The trainer first: its node runs the batch shell."""
    export: tuple[str, ...] = ()
    """Names that the job takes over from the environment of whoever submits it."""
    sbatch: Mapping[str, str | int | bool] = field(default_factory=dict[str, str | int | bool])
    """Further flags, passed through."""

    def role(self, name: str) -> RolePlan:
        """The role of that name.

        Raises:
            KeyError: the plan has none.
        """
        for role in self.roles:
            if role.name == name:
                return role
        raise KeyError(f"no role {name!r}; the plan has {', '.join(role.name for role in self.roles)}")


def filled(plan: JobPlan, values: Mapping[str, str]) -> JobPlan:
    """The plan with each ``{name}`` of ``values`` replaced in every text; other braces stay as they are."""
    table = _filled(asdict(plan), {"{" + name + "}": value for name, value in values.items()})
    return _job_plan(table)


def _filled(value: Any, words: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for word, text in words.items():
            value = value.replace(word, text)
        return value
    if isinstance(value, Mapping):
        return {key: _filled(item, words) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(item, words) for item in value]
    return value


def to_json(plan: JobPlan | ClusterPlan) -> str:
    """Text that ``from_json`` or ``cluster_from_json`` turns into an equal plan."""
    return json.dumps(asdict(plan), indent=2) + "\n"


def from_json(text: str) -> JobPlan:
    """The plan that ``to_json`` wrote.

    Raises:
        ValueError: the text is no JSON, or no plan.
    """
    try:
        return _job_plan(json.loads(text))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a job plan: {error}") from error


def cluster_from_json(text: str) -> ClusterPlan:
    """The plan that ``to_json`` wrote.

    Raises:
        ValueError: the text is no JSON, or no plan.
    """
    try:
        table: dict[str, Any] = json.loads(text)
        roles = tuple(_role(row) for row in table["roles"])
        return ClusterPlan(**{**table, "roles": roles, "export": tuple(table["export"])})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a cluster plan: {error}") from error


def _role(row: dict[str, Any]) -> RolePlan:
    tuples = {key: tuple(row[key]) for key in ("srun_args", "mounts", "container_env")}
    return RolePlan(**{**row, **tuples, "node_plans": tuple(_job_plan(plan) for plan in row["node_plans"])})


def _job_plan(table: dict[str, Any]) -> JobPlan:
    services = tuple(_service(row) for row in table["services"])
    jobs = tuple(Job(**{**row, "command": tuple(row["command"])}) for row in table["jobs"])
    return JobPlan(**{**table, "services": services, "jobs": jobs})


def _service(row: dict[str, Any]) -> ServicePlan:
    tuples = {key: tuple(row[key]) for key in ("command", "allowed_env", "ready_facts")}
    return ServicePlan(**{**row, **tuples})
