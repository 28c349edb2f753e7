"""Runs a plan on this machine, in the foreground."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from launchers.jobplan import JobPlan, to_json


def write_plan(plan: JobPlan, folder: Path) -> Path:
    """``FOLDER/plan.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.json"
    path.write_text(to_json(plan), encoding="utf-8")
    return path


def become(plan: JobPlan, folder: Path) -> NoReturn:
    """Replace this process by the supervisor of a plan: signals and exit code are its own."""
    path = write_plan(plan, folder)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "launchers.supervisor", str(path)])


def run(plan: JobPlan, folder: Path) -> int:
    """Run a plan to its end, and return its exit code. Ctrl-C is the supervisor's business; it dies with us."""
    path = write_plan(plan, folder)
    before = signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN, which the supervisor would inherit
    try:
        command = [sys.executable, "-m", "launchers.supervisor", "--die-with-parent", str(path)]
        return subprocess.run(command, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)
