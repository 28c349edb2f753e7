"""Ends a run: ``python -m launchers stop RUN``. It finishes its step, saves, and is not started again.

A job that does not run at the moment, as it waits for nodes, has nothing to save and is cancelled. ``launch`` goes on with the run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launchers.status import Job, Run, State, look
from megatron_distil.errors import DistilError
from megatron_distil.registry import Registry


class StopError(DistilError):
    """The run cannot be ended from here."""


def stop(run: Run, state: State) -> str:
    """Ask a run to save and to end. Returns what was done.

    Raises:
        StopError: Slurm does not answer.
    """
    job = run.job()
    if state.exit_code is not None or state.word == "not running":
        return f"it does not run: {state.word}"
    if job is None:
        Registry(run.folder / "registry").request_end()
        return "it finishes its step, saves and ends"
    if state.word == "unknown":
        raise StopError(f"job {job.job_id}: {state.detail}")
    if state.word in ("pending", "requeued"):
        return cancel(job)
    Registry(_life(run, job)).request_end()
    return f"job {job.job_id} finishes its step, saves and ends"


def cancel(job: Job) -> str:
    """End a job at once. Returns what was done.

    Raises:
        StopError: Slurm refused it.
    """
    try:
        done = subprocess.run(["scancel", job.job_id], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StopError(f"scancel {job.job_id}: {error}") from error
    if done.returncode:
        raise StopError(f"scancel {job.job_id}: {done.stderr.strip()}")
    return f"job {job.job_id} is cancelled"


def _life(run: Run, job: Job) -> Path:
    """Where the present life looks: Slurm's own count, since a life that has just begun has no folder yet."""
    newest = [life.folder for life in run.lives(job)][-1:]
    try:
        told = subprocess.run(
            ["scontrol", "show", "job", job.job_id], capture_output=True, text=True, check=False, timeout=60
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        told = ""
    found = re.search(r"Restarts=(\d+)", told)
    if found or not newest:
        return run.folder / "registry" / f"{job.job_id}.{found[1] if found else 0}"
    return newest[0]


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m launchers stop", description="Ends a run, which saves first.")
    parser.add_argument("run", metavar="RUN", help="the run directory, SHARED/runs/NAME")
    parser.add_argument(
        "--now", action="store_true", help="cancel the job: what came after the last checkpoint is lost"
    )
    options = parser.parse_args(argv)
    try:
        run = Run.at(options.run)
        job = run.job()
        print(cancel(job) if options.now and job else stop(run, look(run)))
    except DistilError as error:
        print(f"stop: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
