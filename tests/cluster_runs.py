"""Runs on the small Slurm, launched as a user launches them, watched from outside, and hurt."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launchers import status
from megatron_distil.registry import Record, Registry
from tests.mini_slurm import MiniSlurm, output
from tests.quickstart import metrics
from tests.server import PYTHON as SERVER_PYTHON
from tests.server import ROOT
from tests.supervised import is_alive

START_S = 300.0
"""From submission to the first step, on a machine that does something else as well."""
STEPS = 6
GONE_S = 30.0
LAUNCH_PYTHON = os.environ.get("DISTIL_LAUNCH_PYTHON", "")

Finding = Callable[..., None]
"""What the fixture ``finding`` gives: called with the run at the end of a drill, and with what was measured."""

CLUSTER = """\
name = "mini"
account = "test"
partition = "batch"
gpus_per_node = 0
processes_per_node = 1           # so that the ranks are on two nodes
host_ip = "127.0.0.1"            # all nodes are this machine
time = "00:10:00"
warn_s = 60
monitor_s = 2
shared = {shared}
code = {code}

[python]
all = {python}
rollout = {server_python}

[env.all]
GLOO_SOCKET_IFNAME = "lo"
OMP_NUM_THREADS = "1"
PYTHONWARNINGS = "ignore"

[env.trainer]
CUDA_DEVICE_MAX_CONNECTIONS = "1"
"""


def write_cluster(folder: Path, shared: Path, code: Path) -> Path:
    """The cluster file."""
    words = {"shared": shared, "code": code, "python": sys.executable, "server_python": SERVER_PYTHON}
    path = folder / "mini.toml"
    path.write_text(CLUSTER.format(**{name: json.dumps(str(word)) for name, word in words.items()}))
    return path


def prepare_data(shared: Path) -> None:
    """Data and untrained model of the recipe ``drill``."""
    command = [sys.executable, "-m", "megatron_distil.tasks.prepare", "program_induction", str(shared / "data")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True)


@dataclass
class Site:
    """A cluster, and its shared folder with what the recipe needs."""

    slurm: MiniSlurm
    cluster: Path
    shared: Path

    def launch_command(self, name: str, *overrides: str) -> list[str]:
        words = ["drill", str(self.cluster), f"train.num_steps={STEPS}", *overrides, "--name", name]
        return [LAUNCH_PYTHON, "-m", "launchers.launch", *words]

    def launch(self, name: str, *overrides: str) -> Run:
        """Start the recipe ``drill``; fails where it is refused."""
        done = self.try_launch(name, *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
        return Run(self.slurm, self.shared / "runs" / name)

    def try_launch(self, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.launch_command(name, *overrides), **self.as_user(), capture_output=True, timeout=120, check=False
        )

    def as_user(self) -> dict[str, object]:
        """How commands of the launcher are run."""
        return {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}


@dataclass
class Run:
    """A launched run."""

    slurm: MiniSlurm
    folder: Path
    states: list[str] = field(default_factory=list)
    """Every state that a user who looks all the time has seen, once in a row."""

    @property
    def job(self) -> str:
        """Its number; it keeps it over all lives."""
        return str(json.loads((self.folder / "job.json").read_text())["job_id"])

    def look(self) -> status.State:
        """What a user sees."""
        state = status.look(status.Run(self.folder))
        if [state.word] != self.states[-1:]:
            self.states.append(state.word)
        return state

    def until(self, is_true: Callable[[], bool], what: str, timeout_s: float = START_S) -> float:
        """Wait for something that the run does; returns how long, in s. Fails when the run is over before."""
        began, looked = time.monotonic(), 0.0
        while not is_true():
            now = time.monotonic()
            if now - looked > 1.0:
                looked = now
                state = self.look()
                if state.exit_code is not None and not is_true():
                    pytest.fail(f"{state} before: {what}\n{self.told()}")
            if now - began > timeout_s:
                pytest.fail(f"after {timeout_s:.0f} s still not: {what}\n{self.told()}")
            time.sleep(0.05)
        return time.monotonic() - began

    def until_over(self, timeout_s: float = START_S) -> status.State:
        """Wait for its end."""
        deadline = time.monotonic() + timeout_s
        while (state := self.look()).exit_code is None:
            if time.monotonic() > deadline:
                pytest.fail(f"not over after {timeout_s:.0f} s: {state}\n{self.told()}")
            time.sleep(0.5)
        return state

    def until_step(self, step: int, timeout_s: float = START_S) -> float:
        """Until the metrics of a step are there."""
        return self.until(lambda: step in self.steps(), f"step {step} is done", timeout_s)

    def until_progress(self, life: int, timeout_s: float = START_S) -> None:
        """Until a life has done a step that none before it had done."""
        began = self.folder / "registry" / f"{self.job}.{life}" / "began"
        self.until(began.exists, f"life {life} begins", timeout_s)
        done = max(self.steps(), default=-1)
        self.until(lambda: max(self.steps(), default=-1) > done, f"life {life} does step {done + 1}", timeout_s)

    def steps(self) -> list[int]:
        """That the curve shows, in its order."""
        return [row["step"] for row in metrics(self.folder) if "loss/ce_nats" in row]

    def checkpoint(self) -> int:
        """Step of the newest."""
        return status.Run(self.folder).step()

    def life(self, restart: int) -> Registry:
        """What its services have said of themselves."""
        return Registry(self.folder / "registry" / f"{self.job}.{restart}")

    def restarts(self) -> int:
        """Slurm's own count."""
        found = re.search(r"Restarts=(\d+)", output("scontrol", "show", "job", self.job))
        return int(found[1]) if found else -1

    def reason(self, restart: int) -> str:
        return self.life(restart).reason()

    def record(self, role: str, restart: int = 0, *, gen: int = 0, timeout_s: float = START_S) -> Record:
        """Of the first service of a role, when it is ready after start ``gen``."""

        def found() -> list[Record]:
            return [one for one in self.life(restart).live(role) if one.gen == gen]

        self.until(lambda: bool(found()), f"{role} is ready after start {gen} in life {restart}", timeout_s)
        return found()[0]

    def set_time_limit(self, *, minutes: int) -> None:
        """Of its lives, from the start of the present one."""
        command = ["scontrol", "update", f"JobId={self.job}", f"TimeLimit={minutes}"]
        subprocess.run(command, check=True, timeout=30, capture_output=True)

    def bring_the_time_limit_near(self) -> None:
        """To one or two minutes from now; a warning of two minutes is then due, and comes within half a minute."""
        elapsed = output("squeue", "-h", "-j", self.job, "-o", "%M").strip()
        minutes = elapsed.rpartition(":")[0]
        self.set_time_limit(minutes=int(minutes.rpartition(":")[2]) + 2)

    def nodes(self) -> list[str]:
        """Of the present life; the trainer's first."""
        names = output("squeue", "-h", "-j", self.job, "-o", "%N").strip()
        return output("scontrol", "show", "hostnames", names).split()

    def supervisor(self, role: str, node: int = 0) -> int:
        """Pid of the supervisor of a role on one of its nodes."""
        for pid, words, environment in self._processes():
            if words[1:4] == ["-m", "launchers.node", role] and environment.get("SLURM_PROCID") == str(node):
                return pid
        raise AssertionError(f"no supervisor of {role}, node {node}")

    def slurmstepd(self, role: str) -> int:
        """Pid of Slurm's own process above the supervisor of a role."""
        stat = Path(f"/proc/{self.supervisor(role)}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[1])

    def torchrun(self, node: int = 0) -> int:
        """Pid of torchrun on a node of the trainer."""
        for pid, words, environment in self._processes():
            is_it = words[1:3] == ["-m", "launchers.torchrun"]
            if is_it and environment.get("SLURM_PROCID") == str(node) and "RANK" not in environment:
                return pid
        raise AssertionError(f"no torchrun on node {node}")

    def rank(self, rank: int) -> int:
        """Pid of a trainer process."""
        for pid, _, environment in self._processes():
            if environment.get("RANK") == str(rank) and "TORCHELASTIC_RUN_ID" in environment:
                return pid
        raise AssertionError(f"no rank {rank}")

    def batch_shell(self) -> int:
        """Pid of the batch script."""
        for pid, words, _ in self._processes():
            if words[0].endswith("bash") and words[1:2] and words[1].endswith("slurm_script"):
                return pid
        raise AssertionError("no batch shell")

    def _processes(self) -> Iterator[tuple[int, list[str], dict[str, str]]]:
        """Of this job, on any node."""
        for node in self.slurm.nodes:
            for pid in self.slurm.processes(node):
                environment = _environment(pid)
                if environment.get("SLURM_JOB_ID") == self.job:
                    yield pid, _words(pid), environment

    def kill(self, pid: int) -> float:
        """SIGKILL; returns the time."""
        assert is_alive(pid)
        os.kill(pid, signal.SIGKILL)
        return time.monotonic()

    def page(self) -> str:
        """What ``launchers status`` prints."""
        at = status.Run(self.folder)
        return status.page(at, status.look(at))

    def told(self) -> str:
        """All that a user could read: state, logs, the batch script's output."""
        lines = [self.page()]
        written = sorted((self.folder / "logs").rglob("*.log")) + sorted(self.batch_folder().rglob("*.out"))
        for path in written:
            text = path.read_text(errors="replace").splitlines()[-15:]
            lines += ["", f"==> {path.name}", *text]
        return "\n".join(lines)

    def batch_folder(self) -> Path:
        """nemo-run's."""
        return Path(json.loads((self.folder / "job.json").read_text())["folder"])

    def diaries(self, restart: int = 0) -> str:
        """What the supervisors of a life have written."""
        folder = self.folder / "logs" / f"{self.job}.{restart}"
        return "\n".join(path.read_text() for path in sorted(folder.glob("*-node*.log")))

    def start_s(self, service: str, *, gen: int, restart: int = 0) -> float:
        """How long a service took from its start to being ready, as its supervisor has said it."""
        found = re.findall(rf"{service} is ready after (\d+) s", self.diaries(restart))
        return float(found[gen])

    def trainer_output(self, restart: int = 0) -> str:
        """What the ranks have written."""
        folder = self.folder / "logs" / f"{self.job}.{restart}"
        return "\n".join(path.read_text() for path in sorted(folder.glob("train-node*/**/std*.log")))

    def batch_output(self) -> str:
        """What the batch script has written, in all lives."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.batch_folder().rglob("sbatch*.out")))

    def none_left(self, timeout_s: float = GONE_S) -> None:
        """No process on any node that is up, whatever its environment and its parent are."""
        deadline = time.monotonic() + timeout_s
        while left := {node: pids for node in self.slurm.nodes if (pids := self.slurm.processes(node))}:
            if time.monotonic() > deadline:
                pytest.fail(f"left: { {node: [_words(pid) for pid in pids] for node, pids in left.items()} }")
            time.sleep(0.1)

    def cancel(self) -> None:
        """End it, whatever it does."""
        subprocess.run(["scancel", self.job], timeout=30, check=False, capture_output=True)


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return [""]


def _environment(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
