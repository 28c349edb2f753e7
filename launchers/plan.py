"""Configuration, cluster and folders -> the processes of a run. Pure: no clock, no environment, no file is read.

one machine     services, training_job and job_plan -> JobPlan
many            cluster_plan -> ClusterPlan: the same processes, seated by ``layout`` on the nodes of an allocation
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from launchers.cluster import ROLES, Cluster
from launchers.jobplan import ClusterPlan, Job, JobPlan, RolePlan, ServicePlan
from launchers.layout import Layout, Seat, layout
from launchers.life import setup_text
from launchers.preflight import step_command
from launchers.prelude import modules_text, preflight_text
from megatron_distil.config.check import is_supervised

if TYPE_CHECKING:
    from megatron_distil.config.schema import Config

STEP_GRACE_S = 600.0
"""A job that is asked to stop finishes its step and saves."""
QUIET_HEALTH = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
"""A server's default would generate a token for each probe, and hang while it is paused."""
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Otherwise ranks that torchrun starts again on several nodes meet the addresses of those before (pytorch issue 135712)."""
SANDBOX_START_S = 120.0
INHERITED = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "SLURM_CONF")
"""All that a job takes over from the environment of whoever submits it, beside the secrets that its cluster names."""
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
    sandbox_python: str = ""
    """Empty: the trainer's."""
    host: str = "127.0.0.1"
    """What services listen on."""
    life: str = ""
    """Folder between ``logs`` or ``registry`` and what is in it, one for each start; empty: none."""

    @property
    def registry(self) -> str:
        """Records of the services."""
        return "/".join([self.run, "registry", *filter(None, [self.life])])

    @property
    def logs(self) -> str:
        """Folder of the logs."""
        return "/".join([self.run, "logs", *filter(None, [self.life])])

    def log(self, name: str) -> str:
        """Log file of a process."""
        return f"{self.logs}/{name}.log"


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
                *(places.sandbox_python or places.trainer_python, "-m", "sandbox.server"),
                *("--host", places.host, "--port", "{port}"),
                *("--workers", str(feedback.sandbox_workers), "--min-level", str(feedback.min_isolation)),
                *("--drain-s", "2"),
                *(("--token-file", feedback.token_file) if feedback.token_file else ()),
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
        *("--model-path", model, "--host", places.host, "--port", "{port}"),
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
    return Job(
        name=name,
        command=(*torchrun, *_distil_command(training)),
        env=cluster.env_of("trainer"),
        cwd=places.cwd,
        rank_logs=rank_logs if redirects else "",
        registry=f"{training.run}/registry",
        stop_grace_s=STEP_GRACE_S,
    )


def _distil_command(training: Training) -> tuple[str, ...]:
    return (
        # without the "--" torchrun takes our --run for an abbreviation of its own --run-path
        *("-m", "--", "megatron_distil", training.command, training.recipe, "--run", training.run),
        *(("--export", training.export) if training.export else ()),
        *training.overrides,
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


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is to run on a cluster, as its nodes see it."""

    name: str
    folder: str
    """The run directory."""
    recipe: str
    """The recipe as resolved."""
    code: str
    """The folder of this package."""

    @property
    def plan(self) -> str:
        """The plan, read by every node."""
        return f"{self.folder}/plan.json"


def cluster_plan(config: Config, cluster: Cluster, run: Run) -> ClusterPlan:
    """One allocation with a step for each role, the trainer first.

    Raises:
        ConfigError: the recipe cannot be laid out on the nodes of the cluster.
    """
    seats = layout(config, cluster)
    return ClusterPlan(
        name=run.name,
        run=run.folder,
        account=cluster.account,
        partition=cluster.partition,
        time=cluster.time,
        nodes=seats.nodes,
        gpus_per_node=cluster.gpus_per_node,
        signal=f"B:USR1@{cluster.warn_s}",
        retries=cluster.retries,
        monitor_s=cluster.monitor_s,
        setup=_setup(config, cluster, run, seats),
        host_ip=cluster.host_ip,
        roles=tuple(_roles(config, cluster, run, seats)),
        export=(*INHERITED, *_secrets(cluster)),
        sbatch=cluster.sbatch,
    )


def _setup(config: Config, cluster: Cluster, run: Run, seats: Layout) -> str:
    """What the batch shell does before the first step."""
    min_level = config.feedback.min_isolation if "sandbox" in seats.spans else 0
    preflight = step_command(cluster, seats.nodes, run.code, f"{run.folder}/preflight", min_level)
    return (
        setup_text(run.folder, list(seats.spans), max_lives_without_progress=cluster.max_lives_without_progress)
        + modules_text(cluster.modules)
        + preflight_text(preflight, cluster.preflight)
    )


def _roles(config: Config, cluster: Cluster, run: Run, seats: Layout) -> Iterator[RolePlan]:
    places = Places(
        run=run.folder,
        cwd=cluster.shared,
        trainer_python=cluster.python_of("trainer"),
        server_python=cluster.python_of("rollout"),
        sandbox_python=cluster.python_of("sandbox"),
        host="{host}",
        life="{life}",
    )
    found = [] if is_supervised(config) else services(config, cluster, places, model=config.model)
    seated: dict[str, list[list[ServicePlan]]] = {
        role: [[] for _ in range(seats.spans[role].nodes)] for role in ROLES if role in seats.spans
    }
    for service in found:
        seat = seats.seats[service.name]
        seated[service.role][seat.node].append(_seated(service, seat))
    for role, span in seats.spans.items():
        is_trainer = role == "trainer"
        plans = tuple(
            JobPlan(
                name=f"{run.name}-{role}-{node}",
                registry=places.registry,
                log=places.log(f"{role}-node{node}"),
                services=tuple(seated[role][node]),
                jobs=(_node_job(node, config, cluster, run, places, seats),) if is_trainer else (),
            )
            for node in range(span.nodes)
        )
        yield RolePlan(
            name=role,
            nodes=span.nodes,
            first_node=span.first,
            node_plans=plans,
            needs=_counts(found) if is_trainer else {},
            needs_timeout_s=config.rollout.start_timeout_s,
            script=_script(role, cluster, run),
            srun_args=_srun_args(role, span.nodes, span.first, cluster),
            env=cluster.env_of("all"),
            image=cluster.image_of(role) if cluster.runtime == "pyxis" else "",
            mounts=tuple(f"{outside}:{inside}" for outside, inside in cluster.mounts.items()),
            container_env=(*sorted(cluster.env.get("all", {})), *cluster.secrets.get(role, ())),
        )


def _counts(services: Sequence[ServicePlan]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for service in services:
        counts[service.role] = counts.get(service.role, 0) + 1
    return counts


def _seated(service: ServicePlan, seat: Seat) -> ServicePlan:
    if not seat.gpus:
        return service
    return replace(service, env={**service.env, "CUDA_VISIBLE_DEVICES": ",".join(map(str, seat.gpus))})


def _node_job(node: int, config: Config, cluster: Cluster, run: Run, places: Places, seats: Layout) -> Job:
    """The ranks of one node. The first of them speaks to the terminal as well, all write to files."""
    ranks = seats.ranks_per_node
    rank_logs = f"{places.logs}/train-node{node}"
    torchrun = (
        *(places.trainer_python, "-m", "launchers.torchrun"),
        *("--nnodes", str(seats.spans["trainer"].nodes), "--nproc-per-node", str(ranks)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "{rdzv}", "--rdzv-id", "{life}", "--local-addr", "{host}"),
        *("--max-restarts", str(cluster.restarts_in_place), "--log-dir", rank_logs),
        *("--redirects", ",".join(f"{rank}:3" for rank in range(ranks)), "--tee", "0:3"),
    )
    command = "sft" if is_supervised(config) else "train"
    training = Training(command=command, recipe=run.recipe, run=run.folder)
    gpus = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(ranks)))} if cluster.gpus_per_node else {}
    return Job(
        name="train",
        command=(*torchrun, *_distil_command(training)),
        env={**cluster.env_of("trainer"), **gpus, **OWN_STORE, "MEGATRON_DISTIL_REGISTRY": places.registry},
        cwd=places.cwd,
        rank_logs=rank_logs,
        registry=places.registry,
        stop_grace_s=STEP_GRACE_S,
    )


def _script(role: str, cluster: Cluster, run: Run) -> str:
    """Shell text of a step: what the role may know, then the supervisor of its node."""
    own = cluster.secrets.get(role, ())
    foreign = [name for name in _secrets(cluster) if name not in own]
    command = [cluster.python_of(role), "-m", "launchers.node", role, run.plan]
    image = cluster.image_of(role)
    if cluster.runtime == "apptainer" and image:
        mounts = [f"--bind={outside}:{inside}" for outside, inside in cluster.mounts.items()]
        nv = [] if role == "sandbox" or not cluster.gpus_per_node else ["--nv"]
        command = ["apptainer", "exec", *nv, *mounts, image, *command]
    return (
        (f"unset {' '.join(foreign)}\n" if foreign else "")
        + f"export PYTHONPATH={shlex.quote(run.code)}\n"
        + f"cd {shlex.quote(run.code)} || exit 2\n"
        + f"exec {shlex.join(command)}\n"
    )


def _srun_args(role: str, nodes: int, first: int, cluster: Cluster) -> tuple[str, ...]:
    """Placement. nemo-run's own flags come before, ``--kill-on-bad-exit=1`` among them: a step ends with the first of its
    supervisors, and the life with the step, since what that supervisor served is not served again.
    """
    without_gpus = ("--gpus-per-node=0",) if role == "sandbox" and cluster.gpus_per_node else ()
    return (
        *("--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--relative={first}"),
        # what the job was told to take over is not all that a step needs: the batch script exports more
        *("--cpu-bind=none", "--unbuffered", "--export=ALL"),
        *without_gpus,
    )


def _secrets(cluster: Cluster) -> tuple[str, ...]:
    return tuple(sorted({name for names in cluster.secrets.values() for name in names}))
