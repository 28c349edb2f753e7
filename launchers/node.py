"""One node's part of a role: ``python -m launchers.node ROLE PLAN.json``, once on each node. Standard library only.

1 finds out who it is           node index, job and restart count from Slurm, address from the plan or the routing table
2 waits, where there are jobs   for the services that they need; the first node says where all ranks meet
3 becomes the supervisor        of its ``JobPlan``, with these facts filled in

A node that Slurm has given up may go on by itself, beside the life that took over. It ends as soon as it sees that one.

exit code   that of the supervisor · 75 stopped or without its services · 2 it cannot find out who it is
            0 the run was asked to end for good, or another life has begun: the batch shell starts nothing again after a 0
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from launchers.jobplan import ClusterPlan, JobPlan, RolePlan, cluster_from_json, filled
from launchers.process import ProcessError, free_port, routed_address
from launchers.supervisor import (
    EXIT_SETTINGS,
    EXIT_STOPPED,
    EXIT_SUPERSEDED,
    EXIT_UNAVAILABLE,
    Site,
    supervise_part,
)
from megatron_distil.errors import RegistryError
from megatron_distil.registry import Record, Registry

MEETING = "rdzv"
"""Role of the record that says where the ranks of all nodes meet. It is no service and has no heartbeat."""
MEETING_TIMEOUT_S = 600.0


class NodeError(Exception):
    """The text is all that the user needs; ``exit_code`` is what we end with."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which part of which job this is."""

    role: RolePlan
    index: int
    """Among the nodes of the role."""
    life: str
    """``JOB.RESTART``."""
    host: str
    """Address that other nodes reach it at."""

    @property
    def plan(self) -> JobPlan:
        """What is to be done here, with the place of the ranks' meeting still open."""
        return filled(self.role.node_plans[self.index], {"host": self.host, "life": self.life})


def place_of(plan: ClusterPlan, role: str, environment: Mapping[str, str]) -> Place:
    """Who we are.

    Raises:
        NodeError: Slurm does not say it, or the plan has no such part.
    """
    missing = [name for name in ("SLURM_JOB_ID", "SLURM_PROCID") if not environment.get(name, "").isdigit()]
    if missing:
        given = ", ".join(f"{name}={environment.get(name, '')!r}" for name in missing)
        raise NodeError(f"{given}: no number; this is started by srun, once on each node of a role", EXIT_SETTINGS)
    try:
        part = plan.role(role)
    except KeyError as error:
        raise NodeError(str(error.args[0]), EXIT_SETTINGS) from error
    index = int(environment["SLURM_PROCID"])
    if index >= len(part.node_plans):
        reason = f"SLURM_PROCID={index}: role {role} has {len(part.node_plans)} nodes"
        raise NodeError(f"{reason}; start it with --ntasks={len(part.node_plans)} --ntasks-per-node=1", EXIT_SETTINGS)
    life = f"{environment['SLURM_JOB_ID']}.{environment.get('SLURM_RESTART_COUNT') or '0'}"
    host = plan.host_ip or routed_address() or socket.gethostbyname(socket.gethostname())
    return Place(role=part, index=index, life=life, host=host)


def successor(life: Path) -> str:
    """The life that has begun in place of the one with this folder of the registry; empty: none has.

    A node that has lost the shared folder for a while sees nothing, and goes on.
    """
    with contextlib.suppress(OSError):
        present = _present_job(life.parents[1])
        return next((other.name for other in life.parent.iterdir() if _follows(other, life, present)), "")
    return ""


def _follows(other: Path, life: Path, present: str) -> bool:
    """Whether a life has begun after another one: a later one of its job, or one of the job that the run has now.

    Numbers of jobs start anew with a new Slurm, so between jobs the clock of the shared file system decides.
    """
    job, _, restart = life.name.partition(".")
    other_job, _, other_restart = other.name.partition(".")
    if other_job == job and other_restart.isdigit():
        return int(other_restart) > int(restart) and _began(other) > 0
    return other_job == present and _began(other) > _began(life)


def _began(life: Path) -> int:
    """When the batch shell of a life began, in ns; 0: it has not."""
    try:
        return (life / "began").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _present_job(run: Path) -> str:
    """The job that was launched last; empty: not known."""
    try:
        return str(json.loads((run / "job.json").read_text(encoding="utf-8"))["job_id"])
    except (OSError, ValueError, KeyError):
        return ""


def run(place: Place) -> int:
    """Do this node's part. Returns the exit code."""
    plan = place.plan
    registry = Registry(plan.registry)
    registry.folder.mkdir(parents=True, exist_ok=True)
    if place.index == 0:
        write_about(place)
    next_life = partial(successor, registry.folder)
    site = Site(
        host=place.host,
        node=os.environ.get("SLURMD_NODENAME", ""),
        is_alone=False,
        is_first=place.index == 0,
        successor=next_life,
        parent=os.getppid(),
    )
    try:
        if plan.jobs:
            plan = filled(plan, {"rdzv": meeting_place(place, registry)})
        code = supervise_part(plan, site)
    except NodeError as error:
        print(f"distil: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    is_over = code in (EXIT_STOPPED, EXIT_UNAVAILABLE) and registry.end_requested()
    # after any other code the batch shell of this life would have the job requeued, and so end the life that took over
    return 0 if is_over or code == EXIT_SUPERSEDED else code


def meeting_place(place: Place, registry: Registry) -> str:
    """``HOST:PORT`` of the ranks' rendezvous, when the services that the jobs need are there.

    The first node chooses it; the others read it, however old the record is: nobody writes it again.

    Raises:
        NodeError: asked to stop meanwhile, another life has begun, or the time was over; REASON says which.
    """

    def stopped() -> bool:
        return registry.stop_requested() or bool(successor(registry.folder))

    try:
        for role, count in place.role.needs.items():
            found = registry.wait_for(role, count, timeout_s=place.role.needs_timeout_s, stopped=stopped)
            print(f"distil: {role}: {', '.join(one.url for one in found)}", file=sys.stderr, flush=True)
        if place.index == 0:
            _say_meeting(registry, f"{place.host}:{free_port(place.host)}")
        (meeting,) = registry.wait_for(MEETING, 1, timeout_s=MEETING_TIMEOUT_S, stale_s=float("inf"), stopped=stopped)
    except (RegistryError, ProcessError) as error:
        if life := successor(registry.folder):
            text = f"life {life} has begun; this one ends"
            registry.say_reason(f"failed {text}")
            raise NodeError(text, EXIT_SUPERSEDED) from error
        kind = "stopped" if registry.stop_requested() else "unavailable"
        registry.say_reason(f"{kind} {error}")
        raise NodeError(str(error), EXIT_UNAVAILABLE) from error
    return meeting.url


def _say_meeting(registry: Registry, url: str) -> None:
    pid = os.getpid()
    registry.write(
        Record(role=MEETING, name="0", url=url, pid=pid, pgid=pid, state="ready", gen=0, ts=time.time()),
    )


def write_about(place: Place) -> None:
    """What this life of a role runs on, beside its logs: a run directory says by itself how it came about."""
    table = {
        "role": place.role.name,
        "life": place.life,
        "host": socket.gethostname(),
        "address": place.host,
        "kernel": platform.release(),
        "python": f"{platform.python_version()} {sys.executable}",
        "code": os.getcwd(),
        "commit": commit(Path.cwd()),
        "packages": sorted({f"{one.name}=={one.version}" for one in metadata.distributions()}),
    }
    path = Path(place.plan.log).parent / f"about-{place.role.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def commit(root: Path) -> str:
    """The commit of a checkout, read without git, which images do not have; empty where there is none."""
    folder = root / ".git"
    try:
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (folder / name).exists():
            return (folder / name).read_text().strip()
        packed = (folder / "packed-refs").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split()[0] for line in packed if line.endswith(f" {name}")), "")


def main(argv: list[str]) -> int:
    """``argv``: a role, and the path of the plan."""
    if len(argv) != 2 or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 0 if argv in (["-h"], ["--help"]) else EXIT_SETTINGS
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm's warning is for the batch shell; children inherit this
    role, path = argv
    try:
        place = place_of(cluster_from_json(Path(path).read_text(encoding="utf-8")), role, os.environ)
    except (OSError, ValueError) as error:
        print(f"distil: {path}: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    except NodeError as error:
        print(f"distil: {error}", file=sys.stderr)
        return error.exit_code
    return run(place)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
