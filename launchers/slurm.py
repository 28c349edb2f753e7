"""A plan as one nemo-run experiment: one allocation, one step for each role. The only module that imports nemo-run.

What nemo-run 0.11.1 does with these objects, and why each value is what it is: the launcher's specification, sections 5 and 15.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from launchers.jobplan import ClusterPlan
from megatron_distil.errors import DistilError, Problem

GROUP = "rl"
"""Name of the job group, and so of its files."""
INSTALL = "Use tools/launch, or pip install 'megatron_distil[launch]'."


class SubmitError(DistilError):
    """Slurm did not take the job; the text is its own."""


class Submitted(NamedTuple):
    """A job that Slurm knows."""

    job_id: str
    folder: str
    """What nemo-run has written: the batch script, the scripts of the roles, later their logs."""


class Script(NamedTuple):
    """A file of an experiment."""

    path: str
    """Below the folder of the experiment."""
    text: str


def problems() -> Iterator[Problem]:
    """What this machine lacks to submit a job."""
    if importlib.util.find_spec("nemo_run") is None:
        yield Problem("nemo-run", "missing", "it submits the job, and is not in this Python", INSTALL)
    if shutil.which("sbatch") is None:
        reason = "not on the path; only a login node of the cluster can submit"
        yield Problem("sbatch", "missing", reason, "Launch from there, or add --dry-run or --local.")


def has_nemo_run() -> bool:
    """Whether scripts can be written here."""
    return importlib.util.find_spec("nemo_run") is not None


def submit(plan: ClusterPlan, home: Path) -> Submitted:
    """Hand a plan to Slurm and return at once.

    Args:
        plan: what to run.
        home: folder of nemo-run, seen by all nodes.

    Raises:
        SubmitError: sbatch refused it.
    """
    with _experiment(plan, home) as experiment:
        failed = importlib.import_module("invoke.exceptions").UnexpectedExit  # what nemo-run calls sbatch with
        try:
            experiment.run(detach=True)
        except failed as error:
            raise SubmitError(error.result.stderr.strip() or str(error)) from error
        folder = str(experiment._exp_dir)
        # its status would ask sacct, which not every cluster has
        (group,) = experiment.jobs
        job_id = str(group.handles[0] if group.handles else "").rpartition("/")[2]
    if not job_id.isdigit():
        raise SubmitError(f"sbatch took no job (it said {job_id!r}); its script: {folder}/{GROUP}_sbatch.sh")
    return Submitted(job_id, folder)


def scripts(plan: ClusterPlan, home: Path) -> list[Script]:
    """What ``submit`` would hand to Slurm: the batch script first, then those of the roles."""
    with _experiment(plan, home) as experiment:
        folder = Path(experiment._exp_dir)
        experiment.dryrun(log=False, delete_exp_dir=False)
        found = [folder / f"{GROUP}_sbatch.sh", *sorted((folder / GROUP / "scripts").glob("*.sh"))]
        texts = [Script(str(path.relative_to(folder)), path.read_text().replace(str(folder), "EXP")) for path in found]
    shutil.rmtree(folder)
    return texts


@contextmanager
def _experiment(plan: ClusterPlan, home: Path) -> Iterator[Any]:
    """One group of one task for each role. The import of nemo-run takes seconds and some 120 MB."""
    os.environ["NEMORUN_HOME"] = str(home)  # some of its modules read it when they are imported
    nemo_run = importlib.import_module("nemo_run")  # only here: a plan is made and checked without it
    nemo_run.config.set_nemorun_home(str(home))
    with nemo_run.Experiment(
        plan.name,
        log_level="WARNING",
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
        serialize_metadata_for_scripts=False,
    ) as experiment:
        tasks = [nemo_run.Script(inline=role.script) for role in plan.roles]
        experiment.add(tasks, executor=_executors(nemo_run, plan), name=GROUP)
        yield experiment


def quoted(value: str) -> str:
    """A value for bash without a dollar sign of its own: nemo-run fills templates in values, and would take them for names."""
    if "$" not in value:
        return shlex.quote(value)
    escaped = value.replace("\\", r"\\").replace("'", r"\'").replace("$", r"\x24")
    return f"$'{escaped}'"


def _executors(run: Any, plan: ClusterPlan) -> list[Any]:
    """Each says the size of the whole allocation; where a role runs is said by its ``srun_args`` alone."""
    return [
        run.SlurmExecutor(
            account=plan.account,
            partition=plan.partition,
            nodes=plan.nodes,
            ntasks_per_node=1,
            gpus_per_node=plan.gpus_per_node or None,
            time=plan.time,
            exclusive=True,  # without it a step of one task gets one core
            mem="0",
            container_image=role.image or None,
            container_mounts=list(role.mounts) if role.image else [],
            container_env=list(role.container_env) if role.image else None,
            srun_args=list(role.srun_args),
            signal=plan.signal,
            retries=plan.retries,
            additional_parameters={**plan.sbatch, "export": ",".join(plan.export)},
            job_name_prefix=f"{plan.name}.",
            env_vars={name: quoted(value) for name, value in role.env.items()},  # it writes them as they are
            packager=run.Packager(),
            tunnel=run.LocalTunnel(job_dir=""),
            wait_time_for_group_job=0,
            monitor_group_job_wait_time=plan.monitor_s,
            poll_estimated_start_time=False,
            setup_lines=plan.setup,
        )
        for role in plan.roles
    ]
