"""A supervisor in a process of its own, and small services and jobs for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launchers.jobplan import Job, JobPlan, ServicePlan, to_json
from megatron_distil.registry import Record, Registry

ROOT = Path(__file__).resolve().parents[1]

SERVICE = """
import http.server, os, signal, subprocess, sys, threading, time
from pathlib import Path

port, folder = int(sys.argv[1]), Path(sys.argv[2])
# a descendant that no signal to our process group reaches
below = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"],
                         start_new_session=True)
with open(folder / "pids", "a") as file:
    file.write(f"{os.getpid()}\\n{below.pid}\\n")

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        while (folder / "hang").exists():
            time.sleep(0.05)
        self.send_response(200 if (self.path == "/health") else 404)
        self.end_headers()
        self.wfile.write(b'{"level": 3}')

    def log_message(self, *_):
        pass

def ended(*_):
    (folder / "ended").touch()
    os._exit(0)

signal.signal(signal.SIGTERM, ended)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""

JOB = """
import os, subprocess, sys, time
from pathlib import Path

folder = Path(sys.argv[1])
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
with open(folder / "pids", "a") as file:
    file.write(f"{os.getpid()}\\n{below.pid}\\n")
(folder / "job.pid").write_text(str(os.getpid()))
while not (folder / "registry" / "STOP").exists() or len(sys.argv) > 2:
    time.sleep(0.05)
below.kill()
below.wait()
(folder / "saved").touch()
sys.exit(130)
"""


def service(folder: Path, name: str = "rollout-0", **changes: object) -> ServicePlan:
    """A server with a descendant in a session of its own."""
    fields: dict[str, object] = {
        "role": "rollout",
        "name": name,
        "command": (sys.executable, "-c", SERVICE, "{port}", str(folder)),
        "cwd": str(folder),
        "log": str(folder / f"{name}.log"),
        "health_path": "/health",
        "start_timeout_s": 30.0,
    }
    return ServicePlan(**{**fields, **changes})  # type: ignore[arg-type]


def job(folder: Path, *words: str, **changes: object) -> Job:
    """Runs until STOP, with a descendant in a session of its own; any word: runs for ever."""
    fields: dict[str, object] = {
        "name": "train",
        "command": (sys.executable, "-c", JOB, str(folder), *words),
        "cwd": str(folder),
        "registry": str(folder / "registry"),
        "stop_grace_s": 30.0,
    }
    return Job(**{**fields, **changes})  # type: ignore[arg-type]


def shell(folder: Path, text: str, name: str = "shell", **changes: object) -> Job:
    """A shell script."""
    return Job(name=name, command=("sh", "-c", text), cwd=str(folder), **changes)  # type: ignore[arg-type]


class Supervised:
    """A running supervisor."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder, self.process = folder, process
        self.registry = Registry(folder / "registry")

    def pids(self) -> list[int]:
        """Everything that services and jobs have started so far."""
        try:
            return [int(line) for line in (self.folder / "pids").read_text().split()]
        except FileNotFoundError:
            return []

    def record(self, name: str = "rollout-0", *, gen: int = 0) -> Record:
        """The ready record of a start, as soon as it is there."""

        def found() -> list[Record]:
            return [r for r in self.registry.live("rollout") if r.name == name and r.gen == gen]

        eventually(lambda: bool(found()), f"{name} is ready for the {gen}. time")
        return found()[0]

    def finished(self, timeout_s: float = 30.0) -> tuple[int, str]:
        """Exit code and what was written to the terminal."""
        _, text = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, text


def eventually(is_true: Callable[[], bool], what: str, *, timeout_s: float = 30.0) -> None:
    """Wait, but not for ever."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"after {timeout_s} s still not: {what}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """False for a zombie as well."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def none_alive(pids: list[int]) -> bool:
    return not any(is_alive(pid) for pid in pids)


@contextmanager
def supervised(folder: Path, *jobs: Job, services: tuple[ServicePlan, ...] = ()) -> Iterator[Supervised]:
    """A supervisor of these; whatever is left at the end is killed."""
    plan = JobPlan(
        name="test", registry=str(folder / "registry"), log=str(folder / "supervisor.log"), services=services, jobs=jobs
    )
    path = folder / "plan.json"
    path.write_text(to_json(plan))
    command = [sys.executable, "-m", "launchers.supervisor", "--die-with-parent", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        running = Supervised(folder, process)
        try:
            yield running
        finally:
            process.kill()
            for pid in running.pids():
                if is_alive(pid):
                    os.kill(pid, signal.SIGKILL)
