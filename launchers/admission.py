"""What has to be true where a run is launched from: whatever would fail on the nodes later is said before anything is submitted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from launchers.cluster import ROLES, Cluster
from launchers.plan import Run
from megatron_distil import sizing
from megatron_distil.config.check import is_supervised
from megatron_distil.config.schema import Config
from megatron_distil.errors import DataError, Problem


def problems(config: Config, cluster: Cluster, run: Run, environment: Mapping[str, str]) -> Iterator[Problem]:
    """Folders, images, interpreters, models, data and secrets that are not there; layouts that the model does not allow."""
    shared = Path(cluster.shared)
    if not shared.is_dir():
        reason = "not a folder on this machine, and the nodes have to see it under the same path"
        yield Problem("cluster.shared", cluster.shared, reason, "Create it, or set cluster.shared=DIR.")
        return
    if not os.access(shared, os.W_OK):
        yield Problem(
            "cluster.shared", cluster.shared, "cannot be written to", "Set cluster.shared to a folder of yours."
        )
    yield from _installation(cluster, run)
    yield from _models(config, cluster)
    yield from _data(config, shared)
    for role, names in cluster.secrets.items():
        for name in names:
            if not environment.get(name):
                reason = "is named as a secret, and this shell does not have it"
                hint = f"export {name}=..., or set cluster.secrets.{role}=[]."
                yield Problem(f"cluster.secrets.{role}", name, reason, hint)


def _installation(cluster: Cluster, run: Run) -> Iterator[Problem]:
    for outside in cluster.mounts:
        if not Path(outside).is_dir():
            yield Problem("cluster.mounts", outside, "there is no such folder to mount", "Create it, or leave it out.")
    for role in ROLES:
        image = cluster.image.get(role, "")
        if image.startswith("/") and not os.access(image, os.R_OK):
            yield Problem(f"cluster.image.{role}", image, "no image that can be read", "launchers/images builds them.")
    if cluster.image:
        return
    if not Path(run.code, "launchers", "node.py").is_file():
        yield Problem(
            "cluster.code", run.code, "holds no launchers/node.py", "Name the root of a checkout of this package."
        )
    for role, python in cluster.python.items():
        if python.startswith("/") and not os.access(python, os.X_OK):
            reason = "no interpreter that can be run"
            yield Problem(f"cluster.python.{role}", python, reason, "tools/environment.sh makes such environments.")


def _models(config: Config, cluster: Cluster) -> Iterator[Problem]:
    shared = Path(cluster.shared)
    try:
        shape = sizing.ModelShape.from_folder(shared / config.model)
    except DataError as error:
        yield _no_model("model", config.model, str(error))
    else:
        yield from shape_problems(config, cluster, shape)
    if config.has_expert and not (shared / config.teacher.model / "config.json").is_file():
        yield _no_model("teacher.model", config.teacher.model, "holds no config.json")


def shape_problems(config: Config, cluster: Cluster, shape: sizing.ModelShape) -> Iterator[Problem]:
    """Layouts that a model of this shape does not allow, or that do not fit the memory of the cluster's GPUs."""
    found = list(sizing.problems(config, shape))
    yield from found
    if cluster.gpu and not found:
        machine = sizing.Machine(gpu=sizing.GPUS[cluster.gpu], gpus_per_node=cluster.gpus_per_node)
        yield from sizing.shortfalls(config, shape, machine)


def _no_model(setting: str, model: str, reason: str) -> Problem:
    hint = "Name a folder in Hugging Face's format, absolute or below cluster.shared; the nodes download nothing."
    return Problem(setting, model, reason, hint)


def _data(config: Config, shared: Path) -> Iterator[Problem]:
    files = {"data.train": config.data.train}
    if not is_supervised(config):
        files |= {f"eval.sets[{index}].data": one.data for index, one in enumerate(config.eval.sets)}
    for setting, name in files.items():
        # anything else is the id of a data set on the hub
        if name.endswith(".jsonl") and not os.access(shared / name, os.R_OK):
            yield Problem(
                setting, name, f"there is no {shared / name} that can be read", "Prepare it, or name another."
            )
    if config.task.tests and not (shared / config.task.tests).is_dir():
        yield Problem(
            "task.tests", config.task.tests, f"there is no folder {shared / config.task.tests}", "Prepare it."
        )
