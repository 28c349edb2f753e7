"""The last lines of a run's logs: ``python -m launchers logs RUN [ROLE]``. One folder for each life, one file for each process.

RUN/logs/LIFE/ROLE-nodeN.log            what the supervisor of a node did, with the last words of what died
RUN/logs/LIFE/rollout-I.log ...         a service
RUN/logs/LIFE/train-nodeN/.../stdout.log, stderr.log    a rank, one folder for each attempt of torchrun
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launchers.process import last_lines
from launchers.status import Run
from megatron_distil.errors import ConfigError, DistilError, Problem

_POLL_S = 0.5
_RANKS = "train-node"


def files_of(folder: Path, role: str = "") -> list[Path]:
    """Logs of a life, those of one role or all: supervisors and services first, then the ranks."""
    found = sorted(path for path in folder.rglob("*.log") if path.is_file())
    of_role = [path for path in found if not role or role_of(folder, path) == role]
    return sorted(of_role, key=lambda path: len(path.relative_to(folder).parts))


def role_of(folder: Path, path: Path) -> str:
    """Whose log this is: what its name begins with."""
    first = path.relative_to(folder).parts[0]
    return "trainer" if first.startswith(_RANKS) else first.removesuffix(".log").rpartition("-")[0]


def folder_of(run: Run, life: str = "") -> Path:
    """Where the logs of a life are.

    Raises:
        ConfigError: there is no such life.
    """
    job = run.job()
    if job is None:
        return run.folder / "logs"
    known = [one.folder.name for one in run.lives(job)]
    name = f"{job.job_id}.{life}" if life.isdigit() else life or (known[-1] if known else "")
    folder = run.folder / "logs" / name
    if not name or not folder.is_dir():
        reason = f"no logs of such a life in {run.folder / 'logs'}"
        raise ConfigError([Problem("--life", life, reason, f"There is {', '.join(known) or 'none yet'}.")])
    return folder


def show(files: Sequence[Path], folder: Path, count: int) -> None:
    """The last lines of each."""
    for path in files:
        if lines := last_lines(path, count=count):
            print(f"==> {path.relative_to(folder)}", *lines, sep="\n", flush=True)


class Tail:
    """What is written to logs from now on, files that do not exist yet as well."""

    def __init__(self, folder: Path, role: str) -> None:
        self._folder, self._role = folder, role
        self._sizes = {path: path.stat().st_size for path in files_of(folder, role)}

    def new(self) -> list[tuple[str, str]]:
        """Complete lines since the last call, with the name of the log."""
        found: list[tuple[str, str]] = []
        for path in files_of(self._folder, self._role):
            before = self._sizes.get(path, 0)
            with path.open("rb") as file:
                file.seek(min(before, file.seek(0, os.SEEK_END)))
                text = file.read()
            complete = text[: text.rfind(b"\n") + 1]
            self._sizes[path] = before + len(complete)
            name = str(path.relative_to(self._folder))
            found += [(name, line) for line in complete.decode(errors="replace").splitlines()]
        return found


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m launchers logs", description="The last lines of a run's logs.")
    parser.add_argument("run", metavar="RUN", help="the run directory, SHARED/runs/NAME")
    parser.add_argument(
        "role", metavar="ROLE", nargs="?", default="", help="trainer, rollout, teacher or sandbox  [all]"
    )
    parser.add_argument("--life", default="", help="a restart count, or JOB.RESTART  [the newest]")
    parser.add_argument("-n", "--lines", type=int, default=20, help="of each log  [20]")
    parser.add_argument("-f", "--follow", action="store_true", help="and what is written from now on, until Ctrl-C")
    options = parser.parse_args(argv)
    try:
        folder = folder_of(Run.at(options.run), options.life)
        files = files_of(folder, options.role)
        if not files:
            roles = sorted({role_of(folder, path) for path in files_of(folder)})
            reason = f"no log of this role in {folder}"
            raise ConfigError([Problem("ROLE", options.role, reason, f"There is {', '.join(roles) or 'none yet'}.")])
    except DistilError as error:
        print(f"logs: {error}", file=sys.stderr)
        return error.exit_code
    tail = Tail(folder, options.role)
    show(files, folder, options.lines)
    try:
        while options.follow:
            for name, line in tail.new():
                print(f"{name} | {line}", flush=True)
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
