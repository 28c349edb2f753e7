"""Whole runs as a user starts them: one short warm start per recipe and session, and supervised training on top of it.

``DISTIL_TEST_WARM_STARTS=DIR`` keeps the warm starts for the next session: what is done is not done again.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from launchers.cluster import load_cluster
from launchers.jobplan import Job, JobPlan, to_json
from launchers.plan import Places, Training, job_plan, services, training_job
from launchers.quickstart import data_overrides, quickstart_plan
from megatron_distil.config.load import load_config
from megatron_distil.registry import Registry
from tests.server import PYTHON as SERVER_PYTHON
from tests.server import skip_without_server
from tests.supervised import eventually, is_alive

ROOT = Path(__file__).resolve().parents[1]
START_S = 240.0
"""A server, on a machine that does something else as well."""
QUICK_STEPS = 8
QUICK_SETTINGS = (f"train.num_steps={QUICK_STEPS}", f"eval.every_steps={QUICK_STEPS}", "checkpoint.every_steps=4")

Edit = Callable[[Job], Job]


@dataclass(frozen=True)
class Base:
    """A warm start: what ``tools/quickstart`` makes before it trains."""

    recipe: str
    folder: Path
    settings: tuple[str, ...]
    """Of the warm start; the same ones skip it in a quickstart of the same folder."""

    def overrides(self) -> list[str]:
        """Trains on its data, from its model."""
        return data_overrides(load_config(self.recipe), self.folder / "data", self.folder / "base")

    @property
    def untrained(self) -> Path:
        """What servers start with."""
        return self.folder / "data" / "model"


class Quickstart(NamedTuple):
    """A finished one."""

    run: Path
    terminal: str
    """What its user saw."""


class Launched:
    """A supervisor in a process of its own, and everything below it."""

    def __init__(self, run: Path, process: subprocess.Popen[bytes], output: Path) -> None:
        self.run, self.process, self._output = run, process, output
        self.registry = Registry(run / "registry")
        self._offset = output.stat().st_size

    def text(self) -> str:
        """What it wrote to the terminal so far."""
        return self._output.read_bytes()[self._offset :].decode(errors="replace")

    def wait(self, timeout_s: float = START_S) -> int:
        """Its exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not done after {timeout_s:.0f} s:\n{self.text()[-3000:]}")

    def until(self, is_true: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
        """Wait for something that it does; it must not end before."""
        deadline = time.monotonic() + timeout_s
        while not is_true():
            if self.process.poll() is not None:
                pytest.fail(f"ended with {self.process.returncode} before {what}:\n{self.text()[-3000:]}")
            if time.monotonic() > deadline:
                pytest.fail(f"after {timeout_s:.0f} s still not: {what}\n{self.text()[-3000:]}")
            time.sleep(0.01)

    def until_step(self, step: int) -> None:
        """Until metrics of this step are written: the next one is being sampled."""
        self.until(lambda: bool(rows_of(self.run, step)), f"step {step} is done")

    def until_mid_step(self, step: int) -> None:
        """Until the rollouts of a step are on disk: it is being trained on."""
        path = self.run / "rollouts" / f"step_{step:06d}.dp0.jsonl"
        self.until(path.exists, f"step {step} is sampled")

    def pids(self) -> set[int]:
        """Every process of the run, but the supervisor."""
        return (_descendants(self.process.pid) | _marked(self.run)) - {self.process.pid}

    def rank_pid(self, rank: int) -> int:
        """The trainer process of a rank."""
        for pid in sorted(self.pids()):
            environment = _proc(pid, "environ").split(b"\0")
            if b"RANK=%d" % rank in environment and b"LOCAL_WORLD_SIZE=2" in environment:
                return pid
        raise AssertionError(f"no rank {rank} among {self.pids()}")

    def ports(self) -> list[int]:
        """Of the services in the registry."""
        records = [r for role in ("rollout", "sandbox") for r in self.registry.live(role, state=None)]
        return [int(record.url.rpartition(":")[2]) for record in records]


@contextmanager
def launched(plan: JobPlan, run: Path) -> Iterator[Launched]:
    """A supervisor of a plan; nothing of it is left afterwards, whatever happens."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / "plan.json"
    path.write_text(to_json(plan))
    with _started([sys.executable, "-m", "launchers.supervisor", "--die-with-parent", str(path)], run) as running:
        yield running


def train_plan(
    base: Base, run: Path, settings: Sequence[str], *, replay: Path | None = None, edit: Edit = lambda job: job
) -> JobPlan:
    """``megatron-distil train`` under the supervisor, with its servers; a replay has none."""
    overrides = (*base.overrides(), *settings)
    config, cluster = load_config(base.recipe, overrides), load_cluster("local")
    places = Places(run=str(run), cwd=str(ROOT), server_python=str(SERVER_PYTHON))
    words = (*(("--replay", str(replay)) if replay is not None else ()), *overrides)
    training = Training(command="train", recipe=base.recipe, run=str(run), export=str(run / "hf"), overrides=words)
    servers = services(config, cluster, places, model=str(base.untrained)) if replay is None else ()
    return job_plan("train", [edit(training_job("train", training, config, cluster, places))], servers, places)


@functools.cache
def warm_start(recipe: str, *settings: str) -> Base:
    """Made when it is first asked for."""
    skip_without_server()
    kept = os.environ.get("DISTIL_TEST_WARM_STARTS")
    if kept is None:
        folder = Path(tempfile.mkdtemp(prefix=f"{recipe}-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    else:
        folder = Path(kept).resolve() / recipe
    places = Places(run=str(folder), cwd=str(ROOT), server_python=str(SERVER_PYTHON))
    plan = quickstart_plan(recipe, places, warm_start=settings)
    with launched(replace(plan, jobs=plan.jobs[:2], services=()), folder) as running:
        assert running.wait(3 * START_S) == 0, running.text()[-3000:]
    return Base(recipe, folder, settings)


def induction() -> Base:
    """Program induction, after half of its warm start."""
    return warm_start("program_induction", "train.num_steps=150")


@functools.cache
def finished_quickstart() -> Quickstart:
    """``tools/quickstart`` of program induction, shortened; run when it is first asked for."""
    base = induction()
    for path in base.folder.iterdir():  # what an earlier session trained there
        if path.is_dir() and path.name not in ("data", "base", "sft", "done"):
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    words = [f"--warm-start={setting}" for setting in base.settings]
    command = [sys.executable, "-m", "launchers.quickstart", base.recipe, *QUICK_SETTINGS]
    with _started([*command, "--out", str(base.folder), *words], base.folder) as running:
        assert running.wait(3 * START_S) == 0, running.text()[-3000:]
        return Quickstart(base.folder, running.text())


def metrics(run: Path) -> list[dict[str, Any]]:
    """Every line of ``metrics.jsonl`` that is whole."""
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines[:-1]]


def rows_of(run: Path, step: int) -> list[dict[str, Any]]:
    """Lines of a training step."""
    return [row for row in metrics(run) if row["step"] == step and "loss/ce_nats" in row]


def values(run: Path, name: str) -> list[float]:
    """A metric of every line that has it."""
    return [row[name] for row in metrics(run) if name in row]


def none_left(pids: set[int], what: str, *, timeout_s: float = 10.0) -> None:
    """All of these are gone within seconds."""
    eventually(lambda: not any(map(is_alive, pids)), f"{what} gone, of {sorted(pids)}", timeout_s=timeout_s)


def is_open(port: int) -> bool:
    """Whether somebody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def _started(command: Sequence[str], run: Path) -> Iterator[Launched]:
    run.mkdir(parents=True, exist_ok=True)
    temporary = run / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DISTIL_SERVER_PYTHON": str(SERVER_PYTHON),
        "TMPDIR": str(temporary),  # also marks every process of the run: the sandbox gets it as well
    }
    output = run / "terminal.log"
    with output.open("ab") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    running = Launched(run, process, output)
    try:
        yield running
    finally:
        left = running.pids() if process.poll() is None else _marked(run)
        process.kill()
        process.wait()
        for pid in left:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


def _proc(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it has ended
        return b""


def _all_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def _descendants(root: int) -> set[int]:
    parent_by_pid = {pid: _proc(pid, "stat").rpartition(b")")[2].split()[1:2] for pid in _all_pids()}
    found, new = set[int](), {root}
    while new:
        found |= new
        new = {pid for pid, parent in parent_by_pid.items() if parent and int(parent[0]) in found} - found
    return found - {root}


def _marked(run: Path) -> set[int]:
    """Whose temporary files are the run's: everything that was started for it, wherever it hangs in the tree."""
    mark = f"TMPDIR={run / 'tmp'}".encode()
    return {pid for pid in _all_pids() if mark in _proc(pid, "environ").split(b"\0")}
