"""Starts a recipe on a cluster: ``python -m launchers.launch RECIPE CLUSTER [KEY=VALUE]...``. Needs no torch.

    exit code   0 submitted · 1 Slurm refused the job · 2 something is wrong, everything is listed, nothing was submitted
                with --follow: 0 the run is done · 1 it has ended without finishing

The run directory is SHARED/runs/NAME. The same command again goes on with the run where it ended.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from launchers import admission, local, slurm, status
from launchers.claim import only_launch
from launchers.cluster import Cluster, cluster_names, load_cluster
from launchers.jobplan import ClusterPlan, JobPlan, RolePlan, to_json
from launchers.plan import Places, Run, Training, cluster_plan, job_plan, services, training_job
from megatron_distil.config.check import is_supervised
from megatron_distil.config.load import load_config, recipe_names, to_toml, toml_value
from megatron_distil.config.schema import Config
from megatron_distil.errors import ConfigError, DistilError, Problem
from megatron_distil.registry import write_atomic

REPO = Path(__file__).resolve().parents[1]
_OF_CLUSTER = "cluster."
"""What overrides of the cluster file begin with."""


class Prepared(NamedTuple):
    """A launch that could be."""

    config: Config
    cluster: Cluster
    run: Run
    plan: ClusterPlan


def prepare(recipe: str, cluster: str, overrides: Sequence[str] = (), *, name: str = "") -> Prepared:
    """Recipe and cluster as a plan; nothing is written.

    Raises:
        ConfigError: with everything that is wrong with the recipe, the cluster file and their overrides.
    """
    config, where = load(recipe, cluster, overrides)
    run_name = name or Path(recipe).stem
    if not re.fullmatch(r"[\w.-]+", run_name):
        reason = "names a folder and a job: letters, digits and _ . - only"
        raise ConfigError([Problem("--name", run_name, reason, f"Try {re.sub(r'[^A-Za-z0-9_.-]+', '-', run_name)}.")])
    folder = f"{where.shared}/runs/{run_name}"
    run = Run(name=run_name, folder=folder, recipe=f"{folder}/recipe.toml", code=where.code or str(REPO))
    if config.feedback.num_sandboxes and not config.feedback.token_file:
        # a sandbox that other nodes reach asks for a token
        token = f"feedback.token_file={toml_value(f'{folder}/sandbox.token')}"
        config = load_config(recipe, [*_of_recipe(overrides), token])
    return Prepared(config, where, run, cluster_plan(config, where, run))


def load(recipe: str, cluster: str, overrides: Sequence[str]) -> tuple[Config, Cluster]:
    """Both, each with its overrides: those of the cluster begin with ``cluster.``.

    Raises:
        ConfigError: with everything that is wrong with either.
    """
    found: list[Problem] = []
    config = where = None
    try:
        config = load_config(recipe, _of_recipe(overrides))
    except ConfigError as error:
        found += error.problems
    try:
        mine = [one.removeprefix(_OF_CLUSTER) for one in overrides if one.startswith(_OF_CLUSTER)]
        where = load_cluster(cluster, mine)
    except ConfigError as error:
        found += [one._replace(path=_of_cluster(one.path)) for one in error.problems]
    if config is None or where is None:
        raise ConfigError(found)
    return config, where


def _of_recipe(overrides: Sequence[str]) -> list[str]:
    return [one for one in overrides if not one.startswith(_OF_CLUSTER)]


def _of_cluster(path: str) -> str:
    return path if path == "cluster" else _OF_CLUSTER + path


def write_run(prepared: Prepared) -> None:
    """Plan, recipe as resolved, and the token of the sandboxes, into the run directory."""
    folder = Path(prepared.run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    Path(prepared.run.recipe).write_text(to_toml(prepared.config), encoding="utf-8")
    Path(prepared.run.plan).write_text(to_json(prepared.plan), encoding="utf-8")
    token = folder / "sandbox.token"
    if prepared.config.feedback.token_file == str(token) and not token.exists():
        with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")


def submit(prepared: Prepared) -> slurm.Submitted:
    """Hand a launch to Slurm.

    Raises:
        ConfigError: this machine lacks something, the nodes would, or the run is launched already; nothing was written.
        SubmitError: Slurm refused it.
    """
    if found := machine_problems(prepared):
        raise ConfigError(found)
    folder = Path(prepared.run.folder)
    with only_launch(folder):
        if found := status.already_running(status.Run(folder)):  # by a launch that was at it as we began
            raise ConfigError(found)
        write_run(prepared)
        submitted = slurm.submit(prepared.plan, home_of(prepared.cluster))
        record = {"cluster": prepared.cluster.name, **submitted._asdict()}
        write_atomic(folder / "job.json", json.dumps(record, indent=2) + "\n")
    return submitted


def machine_problems(prepared: Prepared) -> list[Problem]:
    """What is missing here, or would be on the nodes."""
    where = prepared.config, prepared.cluster, prepared.run
    running = status.already_running(status.Run(Path(prepared.run.folder)))
    return [*running, *slurm.problems(), *admission.problems(*where, os.environ)]


def home_of(cluster: Cluster) -> Path:
    """nemo-run's folder: the nodes read their scripts from it. It replaces ``/nemo_run`` wherever that stands in a script."""
    return Path(cluster.shared) / "slurm"


def local_plan(config: Config, cluster: Cluster, folder: Path) -> JobPlan:
    """The same run in one supervisor on this machine."""
    python = os.environ.get("DISTIL_SERVER_PYTHON") or cluster.python_of("rollout")
    places = Places(run=str(folder), cwd=os.getcwd(), server_python=python)
    command = "sft" if is_supervised(config) else "train"
    training = Training(command=command, recipe=str(folder / "recipe.toml"), run=str(folder))
    servers = [] if is_supervised(config) else services(config, cluster, places, model=config.model)
    return job_plan(folder.name, [training_job("train", training, config, cluster, places)], servers, places)


def summary(prepared: Prepared) -> str:
    """Who runs where, for people."""
    plan, slots = prepared.plan, prepared.cluster.slots
    per_node = f"{plan.gpus_per_node} GPUs" if plan.gpus_per_node else f"{slots} processes"
    nodes = "1 node" if plan.nodes == 1 else f"{plan.nodes} nodes"
    lines = [f"{plan.name} on {prepared.cluster.name}: {nodes} of {per_node}, lives of {plan.time}"]
    lines += [f"  {role.name:8} {_nodes(role):12} {_processes(role, prepared)}" for role in plan.roles]
    return "\n".join([*lines, f"  in {plan.run}"])


def _nodes(role: RolePlan) -> str:
    last = role.first_node + role.nodes - 1
    return f"node {last}" if role.nodes == 1 else f"nodes {role.first_node}-{last}"


def _processes(role: RolePlan, prepared: Prepared) -> str:
    if role.name == "trainer":
        parallel = prepared.config.parallel
        return f"{parallel.world_size} ranks: tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {parallel.dp}"
    count = sum(len(plan.services) for plan in role.node_plans)
    tp = {"rollout": prepared.config.rollout.engine_tp, "teacher": prepared.config.teacher.engine_tp}.get(role.name)
    what = "server" if tp else "service"
    gpus = f", {tp} GPU{'s' if tp > 1 else ''} each" if tp and prepared.plan.gpus_per_node else ""
    return f"{count} {what}{'s' if count > 1 else ''}{gpus}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options = _parser().parse_intermixed_args(arguments)
    words = [word for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    try:
        recipe, cluster = _recipe_and_cluster(words, is_local=options.local)
        config, where = load(recipe, cluster, overrides)
        if where.scheduler == "none":
            folder = Path("runs", options.name or Path(recipe).stem).resolve()
            plan = local_plan(config, where, folder)
            if not options.dry_run:
                _run_here(config, plan, folder)
            print(to_json(plan), end="")
            return 0
        prepared = prepare(recipe, cluster, overrides, name=options.name)
        if options.dry_run:
            return _show(prepared)
        submitted = submit(prepared)
    except DistilError as error:
        print(f"launch: {error}\nNothing was submitted.", file=sys.stderr)
        return error.exit_code
    print(f"{summary(prepared)}\njob {submitted.job_id}; its scripts and logs: {submitted.folder}")
    if options.follow:
        return status.follow(status.Run(Path(prepared.run.folder)))
    return 0


def _recipe_and_cluster(words: Sequence[str], *, is_local: bool) -> tuple[str, str]:
    known = f"Recipes: {', '.join(recipe_names())}; clusters: {', '.join(cluster_names())}."
    if is_local and len(words) in (1, 2):
        return words[0], "local"
    if len(words) != 2:
        reason = "needs one RECIPE and one CLUSTER; everything else is KEY=VALUE"
        raise ConfigError([Problem("arguments", " ".join(words), reason, known)])
    return words[0], words[1]


def _run_here(config: Config, plan: JobPlan, folder: Path) -> NoReturn:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(to_toml(config), encoding="utf-8")
    local.become(plan, folder)


def _show(prepared: Prepared) -> int:
    """What would be submitted, and what would keep it from that on this machine."""
    print(summary(prepared))
    if slurm.has_nemo_run():
        with tempfile.TemporaryDirectory() as home:
            for script in slurm.scripts(prepared.plan, Path(home)):
                print(f"\n===== {script.path}\n{script.text}", end="")
    else:
        print("\n".join(f"\n===== {role.name}\n{role.script}" for role in prepared.plan.roles), end="")
        print(f"\nThe batch script is nemo-run's, which is not here. {slurm.INSTALL}", file=sys.stderr)
    if found := machine_problems(prepared):
        print("\nHere it would be refused:", *(f"  - {one}" for one in found), sep="\n", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launchers.launch",
        description="Starts a recipe on a cluster, or goes on with it where it ended.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE CLUSTER | KEY=VALUE",
        help="files, or names in launchers/recipes and launchers/clusters; then settings that replace theirs, "
        "those of the cluster as cluster.KEY=VALUE",
    )
    parser.add_argument("--name", default="", help="of the run and of its folder  [RECIPE]")
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted")
    parser.add_argument(
        "--follow", action="store_true", help="say how it is doing until it is over; Ctrl-C ends nothing"
    )
    parser.add_argument("--local", action="store_true", help="on this machine, in the foreground, without Slurm")
    return parser


if __name__ == "__main__":
    sys.exit(main())
