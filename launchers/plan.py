"""Configuration, cluster and folders -> the processes of a run. Pure: no clock, no environment, no file is read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launchers.cluster import Cluster
from launchers.jobplan import Job, JobPlan, ServicePlan

if TYPE_CHECKING:
    from megatron_distil.config.schema import Config

STEP_GRACE_S = 600.0
"""A job that is asked to stop finishes its step and saves."""
QUIET_HEALTH = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
"""A server's default would generate a token for each probe, and hang while it is paused."""
SANDBOX_START_S = 120.0
SANDBOX_ENV = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV")
"""All that the sandbox gets of the user's environment: it runs programs that nobody has read."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where everything is on the node."""

    run: str
    """The run directory, absolute."""
    cwd: str
    """What relative paths of a recipe are relative to."""
    trainer_python: str = sys.executable
    server_python: str

    @property
    def registry(self) -> str:
        """Records of the services."""
        return f"{self.run}/registry"

    def log(self, name: str) -> str:
        """Log file of a process."""
        return f"{self.run}/logs/{name}.log"


@dataclass(frozen=True, kw_only=True)
class Training:
    """One ``megatron-distil train`` or ``sft``."""

    command: str
    recipe: str
    run: str
    export: str = ""
    """Folder of the trained model; empty: none is written."""
    overrides: tuple[str, ...] = ()


def services(
    config: Config, cluster: Cluster, places: Places, *, model: str, start_servers_after: str = ""
) -> list[ServicePlan]:
    """The servers that a training run asks. Engines start with ``model``, which is replaced by the first publication; ...

    those of an expert keep theirs.
    """
    rollout, feedback = config.rollout, config.feedback
    servers = [
        ServicePlan(
            role="rollout",
            name=f"rollout-{index}",
            command=_server_command(config, places, model, tp=rollout.engine_tp, seed=config.train.seed + index),
            env={**cluster.env_of("rollout"), **QUIET_HEALTH},
            cwd=places.cwd,
            log=places.log(f"rollout-{index}"),
            health_path="/health",
            start_timeout_s=rollout.start_timeout_s,
            start_after=start_servers_after,
        )
        for index in range(rollout.num_engines)
    ]
    experts = [
        ServicePlan(
            role="teacher",
            name=f"teacher-{index}",
            command=_server_command(config, places, config.teacher.model, tp=config.teacher.engine_tp, seed=index),
            env={**cluster.env_of("teacher"), **QUIET_HEALTH},
            cwd=places.cwd,
            log=places.log(f"teacher-{index}"),
            health_path="/health",
            start_timeout_s=rollout.start_timeout_s,
        )
        for index in range(config.teacher.num_engines if config.has_expert else 0)
    ]
    sandboxes = [
        ServicePlan(
            role="sandbox",
            name=f"sandbox-{index}",
            command=(
                *(places.trainer_python, "-m", "sandbox.server", "--host", "127.0.0.1", "--port", "{port}"),
                *("--workers", str(feedback.sandbox_workers), "--min-level", str(feedback.min_isolation)),
                *("--drain-s", "2"),
            ),
            env=cluster.env_of("sandbox"),
            allowed_env=SANDBOX_ENV,
            cwd=places.cwd,
            log=places.log(f"sandbox-{index}"),
            health_path="/readyz",
            ready_facts=("isolation",),
            start_timeout_s=SANDBOX_START_S,
            stop_grace_s=5.0,
        )
        for index in range(feedback.num_sandboxes)
    ]
    return servers + experts + sandboxes


def _server_command(config: Config, places: Places, model: str, *, tp: int, seed: int) -> tuple[str, ...]:
    return (
        *(places.server_python, "-m", "megatron_distil.rollout.sglang.serve"),
        *("--model-path", model, "--host", "127.0.0.1", "--port", "{port}"),
        *("--dtype", config.rollout.engine_dtype, "--tp-size", str(tp)),
        *("--random-seed", str(seed)),
    )


def training_job(name: str, training: Training, config: Config, cluster: Cluster, places: Places) -> Job:
    """One process per rank, started by torchrun on this machine."""
    world = config.parallel.world_size
    rank_logs = f"{places.run}/logs/{name}"
    # the first rank speaks to the terminal, the others to files
    redirects = [f"{rank}:3" for rank in range(1, world)]
    torchrun = (
        *(places.trainer_python, "-m", "launchers.torchrun", "--nnodes", "1", "--nproc-per-node", str(world)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        *("--max-restarts", "0"),
        *(("--log-dir", rank_logs, "--redirects", ",".join(redirects)) if redirects else ()),
    )
    distil = (
        # without the "--" torchrun takes our --run for an abbreviation of its own --run-path
        *("-m", "--", "megatron_distil", training.command, training.recipe, "--run", training.run),
        *(("--export", training.export) if training.export else ()),
    )
    return Job(
        name=name,
        command=(*torchrun, *distil, *training.overrides),
        env=cluster.env_of("trainer"),
        cwd=places.cwd,
        rank_logs=rank_logs if redirects else "",
        registry=f"{training.run}/registry",
        stop_grace_s=STEP_GRACE_S,
    )


def job_plan(name: str, jobs: Sequence[Job], services: Sequence[ServicePlan], places: Places) -> JobPlan:
    """Jobs and services in one supervisor."""
    return JobPlan(
        name=name,
        registry=places.registry,
        log=places.log("supervisor"),
        services=tuple(services),
        jobs=tuple(jobs),
    )
