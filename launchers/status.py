"""How a run is doing: ``python -m launchers status RUN``. Asks squeue, then sacct, then scontrol, then the run's own files.

    exit code   0 it goes on, or it is done · 1 it has ended without finishing · 2 there is no such run

A job that squeue lists is alive, whatever the accounting says: a lost node or a time limit is shown as an end while the job
is started again. So only two equal answers in a row are an end for ``follow``.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launchers.jobplan import cluster_from_json
from launchers.process import last_lines
from megatron_distil.errors import ConfigError, DistilError, Problem
from megatron_distil.registry import Registry

POLL_S = 20.0
_ASK_TIMEOUT_S = 30.0
_NOT_OVER = frozenset({"PENDING", "RUNNING", "REQUEUED", "REQUEUE_HOLD", "RESIZING", "SUSPENDED", "COMPLETING"})
"""States of sacct and scontrol that are followed by others."""


class Answers(NamedTuple):
    """What Slurm's programs print for a job; None: the program is not there, or nobody answers it."""

    squeue: str | None
    """``%T|%r|%N|%e``; empty: not listed."""
    sacct: str | None = None
    """``State|ExitCode|NodeList``; empty: it knows nothing, as in the first second."""
    scontrol: str | None = None


class Life(NamedTuple):
    """One start of a job."""

    folder: Path
    """Its records."""
    reason: str
    """Why it ended; empty: nobody has said."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Of a job."""

    word: str
    detail: str = ""
    exit_code: int | None = None
    """None: it goes on."""


class Job(NamedTuple):
    """A job as Slurm numbers it."""

    job_id: str
    cluster: str
    folder: str
    """Its batch script."""


class Run:
    """A run directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def at(cls, folder: str) -> Run:
        """The run in a folder.

        Raises:
            ConfigError: there is none.
        """
        path = Path(folder).expanduser().resolve()
        if not (path / "plan.json").is_file():
            reason = "no run directory: it holds no plan.json"
            raise ConfigError([Problem("RUN", folder, reason, "launch prints it; it is SHARED/runs/NAME.")])
        return cls(path)

    def job(self) -> Job | None:
        """The newest job; None for a run without Slurm."""
        try:
            table = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
            return Job(str(table["job_id"]), str(table["cluster"]), str(table["folder"]))
        except (OSError, ValueError, KeyError):
            return None

    def lives(self, job: Job | None) -> list[Life]:
        """Of a job, the oldest first; without Slurm there is one."""
        registry = self.folder / "registry"
        if job is None:
            return [Life(registry, Registry(registry).reason())]
        found = [path for path in registry.glob(f"{job.job_id}.*") if path.suffix[1:].isdigit()]
        return [Life(path, Registry(path).reason()) for path in sorted(found, key=restart_of)]

    def step(self) -> int:
        """Of the newest checkpoint; 0: there is none."""
        found = (self.folder / "checkpoints").glob("step_*/COMPLETE")
        return max((int(path.parent.name.removeprefix("step_")) for path in found), default=0)

    def num_steps(self) -> int:
        """How many the recipe wants; 0: not known."""
        try:
            table = tomllib.loads((self.folder / "recipe.toml").read_text(encoding="utf-8"))
            return int(table["train"]["num_steps"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def wanted_services(self) -> Mapping[str, int]:
        """By role; empty: not known."""
        try:
            plan = cluster_from_json((self.folder / "plan.json").read_text(encoding="utf-8"))
            return plan.role("trainer").needs
        except (OSError, ValueError, KeyError):
            return {}

    def is_supervised_here(self) -> bool:
        """Whether a supervisor of this machine holds the registry's lock."""
        try:
            inode = (self.folder / "registry" / "lock").stat().st_ino
            return re.search(rf"FLOCK .*:{inode} ", Path("/proc/locks").read_text()) is not None
        except OSError:
            return False


def restart_of(folder: Path) -> int:
    """The restart count of a life."""
    return int(folder.suffix[1:])


def state_of(answers: Answers, lives: Sequence[Life]) -> State:
    """What the answers mean for a job with these lives."""
    rows = [row for row in (answers.squeue or "").splitlines() if row.strip()]
    if rows:  # several while it is started again: the last one counts
        return _alive(rows[-1], lives)
    if answers.squeue is None:
        return State(word="unknown", detail="Slurm does not answer")
    reason = lives[-1].reason if lives else ""
    state = _ended_state(answers)
    if not state:
        return _from_files(reason, has_begun=bool(lives), knows_nobody=answers.sacct is None)
    if state in _NOT_OVER:
        return State(word="between two lives", detail=_because(reason))
    if state == "FAILED" and (name := _killed_by(answers)):
        # what the roles have said is only that they were ended then
        detail = f"the batch script was killed by {name}; launch goes on with the run"
        return State(word="failed", detail=detail, exit_code=1)
    return _over(state, reason)


def _alive(row: str, lives: Sequence[Life]) -> State:
    state, why, nodes, end = [*row.split("|"), "", "", ""][:4]
    life = restart_of(lives[-1].folder) if lives else 0
    if state == "PENDING" and why == "DependencyNeverSatisfied":
        return State(word="dead", detail="it waits for a job that has failed, and will never run", exit_code=1)
    if state == "PENDING" and lives:
        return State(word="requeued", detail=f"waits for its life {life + 1}{_because(lives[-1].reason, ', ')}")
    if state == "PENDING":
        return State(word="pending", detail=why)
    if state == "RUNNING":
        return State(word="running", detail=f"life {life} on {nodes} until {end}")
    return State(word=state.lower(), detail=why)


def _ended_state(answers: Answers) -> str:
    """First word of the state that sacct, or else scontrol, tells; empty: neither knows."""
    rows = [row for row in (answers.sacct or "").splitlines() if row.strip()]
    if rows:
        return rows[-1].split("|")[0].split(" ")[0]  # CANCELLED by 1000
    found = re.search(r"JobState=(\w+)", answers.scontrol or "")
    return found[1] if found else ""


def _killed_by(answers: Answers) -> str:
    """The signal that ended the batch script; empty: it ended by itself, or nobody knows."""
    rows = [row for row in (answers.sacct or "").splitlines() if row.strip()]
    found = re.search(r"\|\d+:(\d+)", rows[-1]) if rows else re.search(r"ExitCode=\d+:(\d+)", answers.scontrol or "")
    # Slurm has numbers of its own as well, which are no signals: 53, its output cannot be opened
    return next((one.name for one in signal.Signals if found and one == int(found[1])), "")


def _from_files(reason: str, *, has_begun: bool, knows_nobody: bool) -> State:
    """Slurm has forgotten the job, or does not know it yet."""
    if reason:
        return _over("COMPLETED", reason)
    if has_begun and knows_nobody:
        return State(word="lost", detail="Slurm has forgotten the job, and nobody has said why it ended", exit_code=1)
    return State(word="unknown", detail="Slurm does not list the job (yet)")


def _over(state: str, reason: str) -> State:
    if state == "COMPLETED" and reason.startswith("done"):
        return State(word="done", exit_code=0)
    if state == "COMPLETED" and reason.startswith("stopped"):
        return State(word="stopped", detail=reason, exit_code=0)
    if state == "COMPLETED":
        return State(word="ended without finishing", detail=_because(reason), exit_code=1)
    return State(word=state.lower().replace("_", " "), detail=_because(reason), exit_code=1)


def _because(reason: str, before: str = "") -> str:
    return f"{before}{reason}" if reason else ""


def ask(job_id: str) -> Answers:
    """Ask Slurm's programs; the later ones only where the first does not list the job."""
    squeue = _output(["squeue", "-h", "-j", job_id, "-o", "%T|%r|%N|%e"])
    if squeue is None or squeue.strip():
        return Answers(squeue)
    return Answers(
        squeue,
        _output(["sacct", "-n", "-P", "-X", "-j", job_id, "-o", "State,ExitCode,NodeList"]),
        _output(["scontrol", "show", "job", job_id]),
    )


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return "" if "Invalid job id" in done.stderr else None
    return done.stdout


def look(run: Run, asked: Callable[[str], Answers] = ask) -> State:
    """The state of a run now."""
    job = run.job()
    lives = run.lives(job)
    if job is not None:
        return state_of(asked(job.job_id), lives)
    if run.is_supervised_here():
        return State(word="running", detail="on this machine")
    if not lives[0].reason:
        return State(word="not running", detail="on this machine")
    return _over("COMPLETED" if lives[0].reason.startswith(("done", "stopped")) else "FAILED", lives[0].reason)


def already_running(run: Run, asked: Callable[[str], Answers] = ask) -> list[Problem]:
    """A run that is launched again while a job of it lives: two would write into one folder."""
    job = run.job()
    if job is None or not (asked(job.job_id).squeue or "").strip():
        return []
    reason = f"job {job.job_id} works in {run.folder} already"
    hint = f"python -m launchers stop {run.folder} ends it; another --name starts another run."
    return [Problem("--name", run.folder.name, reason, hint)]


def page(run: Run, state: State) -> str:
    """All that there is to say, for people."""
    job = run.job()
    lives = run.lives(job)
    number = f"job {job.job_id} on {job.cluster}" if job else "without Slurm"
    steps = f"{run.step()} of {run.num_steps()}" if run.num_steps() else str(run.step())
    lines = [f"{run.folder.name}: {state.word}{_because(state.detail, ', ')}", f"  {number}, checkpoint {steps}"]
    if state.exit_code is None and lives:
        lines += [f"  {line}" for line in _services(Registry(lives[-1].folder), run.wanted_services())]
    if job is not None:
        is_between = state.exit_code is not None or state.word == "requeued"
        present = None if is_between or not lives else lives[-1]
        lines += [f"  life {restart_of(life.folder)}: {life.reason or _silence(life, present)}" for life in lives]
    if state.exit_code and lives and job is not None:
        log = run.folder / "logs" / lives[-1].folder.name / "trainer-node0.log"
        lines += [f"  {log.name} | {line}" for line in last_lines(log, count=8)]
    return "\n".join(lines)


def _silence(life: Life, present: Life | None) -> str:
    """In place of a reason, which nobody can leave whose node is lost or whose folder cannot be written."""
    return "no reason yet" if life == present else "ended without a word, as on a lost node or a full disk"


def _services(registry: Registry, wanted: Mapping[str, int]) -> list[str]:
    lines: list[str] = []
    for role in wanted or [role for role in registry.roles() if role != "rdzv"]:
        ready = registry.live(role)
        starting = len(registry.live(role, state="starting"))
        restarts = sum(one.gen for one in ready)
        lines.append(
            f"{role}: {len(ready)}{f' of {wanted[role]}' if role in wanted else ''} ready"
            + (f", {starting} starting" if starting else "")
            + (f", {restarts} restarts" if restarts else "")
        )
    return lines


def follow(run: Run, *, poll_s: float = POLL_S, asked: Callable[[str], Answers] = ask) -> int:
    """Print every change until the run is over, and return its exit code; 130 after Ctrl-C, which ends nothing else."""
    try:
        return _follow(run, poll_s, asked)
    except KeyboardInterrupt:
        print(f"the run goes on; python -m launchers status {run.folder}", flush=True)
        return 128 + signal.SIGINT


def _follow(run: Run, poll_s: float, asked: Callable[[str], Answers]) -> int:
    said, before = "", None
    while True:
        state = look(run, asked)
        if (text := page(run, state)) != said:
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
            said = text
        if state.exit_code is not None and state == before:
            return state.exit_code
        before = state
        time.sleep(poll_s if state.exit_code is None else min(poll_s, 2.0))


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m launchers status", description="How a run is doing.")
    parser.add_argument("run", metavar="RUN", help="the run directory, SHARED/runs/NAME")
    parser.add_argument("--follow", action="store_true", help="until it is over; prints what changes")
    options = parser.parse_args(argv)
    try:
        run = Run.at(options.run)
    except DistilError as error:
        print(f"status: {error}", file=sys.stderr)
        return error.exit_code
    if options.follow:
        return follow(run)
    state = look(run)
    print(page(run, state))
    return state.exit_code or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
