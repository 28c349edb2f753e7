"""A real Slurm of several nodes on this machine: a controller and one slurmd for each node, in a folder of its own.

Every daemon runs below a guard, which adopts what loses its parent and kills everything below it when it is ended or when
the process that asked for it dies. So the end of a guard is the end of a node, and what is left on a node can be listed
whatever it did to its environment.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launchers import guard
from launchers.process import is_free
from tests.supervised import eventually, is_alive

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
PACKAGES = "slurm-wlm munge"
SILENT_NODE_S = 6
"""After so long without an answer a node counts as down; Slurm's default is 300."""
REQUEUE_S = 5
"""So long a job waits that is started again; Slurm's default is 120."""
_MUNGE_FILES = {"key-file": "key", "socket": "sock", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
_PATHS = ("/usr/sbin", "/sbin")
_INSTALL_S = 300.0
_START_S = 30.0

_CONF = """\
ClusterName=mini
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge/sock,cred_expire={requeue_s}
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
# no control groups, so that it works in any container: the processes of a step are found by their parents
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout={silent_s}
KillWait=5
MinJobAge=600
InactiveLimit=0
BatchStartTimeout=10
MessageTimeout=10
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1,batch_sched_delay=0,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# nodes claim cores that this machine does not have
SlurmdParameters=config_overrides
JobRequeue=1
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=batch Nodes=ALL MaxTime=INFINITE State=UP Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def skip_without_slurm() -> None:
    """Install Slurm where that is allowed; skip where it is not there then."""
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *_PATHS])
    if not _missing():
        return
    if os.getuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip(f"needs slurm: no {', '.join(_missing())}; on Debian as root: apt-get install {PACKAGES}")
    _install()
    if _missing():
        pytest.skip(f"needs slurm: apt-get install {PACKAGES} failed, there is no {', '.join(_missing())}")


def _missing() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name) is None]


def _install() -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # 1: no daemon of theirs starts
    install = ["install", "-y", "--no-install-recommends", *PACKAGES.split()]
    for words in (install, ["update"], install):
        command = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=200", *words]
        subprocess.run(command, env=environment, capture_output=True, timeout=_INSTALL_S, check=False)
        if not _missing():
            return


@dataclass
class _Daemon:
    """A guard, and the program below it."""

    guard: subprocess.Popen[bytes]
    holder: int
    """Pid of the shell between the two."""
    pid: int
    """Of the program."""

    def end(self) -> None:
        """With everything below it."""
        self.guard.send_signal(guard.KILL_NOW)
        self.guard.wait(20.0)


@dataclass
class MiniSlurm:
    """The cluster. Its nodes are ``n1``, ``n2``, ...; partition ``urgent`` preempts ``batch``."""

    root: Path
    num_nodes: int
    cores: int = 16
    """That a node claims."""
    _daemons: dict[str, list[_Daemon]] = field(default_factory=dict)

    @property
    def conf(self) -> Path:
        """``SLURM_CONF`` of whoever talks to it."""
        return self.root / "etc" / "slurm.conf"

    @property
    def nodes(self) -> list[str]:
        """Names."""
        return [f"n{index + 1}" for index in range(self.num_nodes)]

    def start(self) -> None:
        """Bring everything up; sets ``SLURM_CONF`` of this process."""
        for name in ("etc", "munge", "state", "spool", "run", "log"):
            (self.root / name).mkdir(parents=True)
        (self.root / "munge").chmod(0o711)
        ports = _free_ports(1 + self.num_nodes)
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cores} Boards=1 "
            f"SocketsPerBoard=1 CoresPerSocket={self.cores} ThreadsPerCore=1 RealMemory=8192 State=UNKNOWN"
            for name, port in zip(self.nodes, ports[1:], strict=True)
        )
        text = _CONF.format(
            port=ports[0],
            user=self.user,
            root=self.root,
            nodes=nodes,
            silent_s=SILENT_NODE_S,
            requeue_s=REQUEUE_S,
        )
        self.conf.write_text(text)
        (self.conf.parent / "cgroup.conf").write_text("CgroupAutomount=no\n")
        os.environ["SLURM_CONF"] = str(self.conf)
        self._start_munge()
        self._start_controller()
        for name in self.nodes:
            self._start_slurmd(name)
        eventually(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), "all nodes idle", timeout_s=_START_S)

    def stop(self) -> None:
        """End everything that was started, and everything that that has started."""
        for daemons in self._daemons.values():
            for daemon in daemons:
                daemon.end()
        self._daemons.clear()
        os.environ.pop("SLURM_CONF", None)

    def states(self) -> dict[str, str]:
        """By node, as sinfo says it."""
        rows = output("sinfo", "-h", "-N", "-p", "batch", "-o", "%N %T").splitlines()
        return {row.split()[0]: row.split()[1] for row in rows}

    @property
    def user(self) -> str:
        """Whom it belongs to."""
        return getpass.getuser()

    def is_gone(self, name: str) -> bool:
        """Whether a node has no daemon."""
        daemons = self._daemons.get(name, [])
        return not daemons or not is_alive(daemons[-1].pid)

    def kill_node(self, name: str) -> None:
        """What a power failure leaves: no process of the node."""
        for daemon in self._daemons.pop(name):
            daemon.end()

    def kill_slurmd(self, name: str) -> None:
        """The daemon alone; the processes of its jobs go on."""
        os.kill(self._daemons[name][-1].pid, signal.SIGKILL)

    def start_node(self, name: str) -> None:
        """Bring it back."""
        self._start_slurmd(name)
        eventually(lambda: self.states()[name] in ("idle", "mixed", "allocated"), f"{name} is back", timeout_s=_START_S)

    def restart_controller(self, *, away_s: float = 0.0) -> None:
        """As an administrator does it; jobs go on."""
        for daemon in self._daemons.pop("controller"):
            os.kill(daemon.pid, signal.SIGTERM)
            eventually(lambda pid=daemon.pid: not is_alive(pid), "the controller has ended", timeout_s=_START_S)
            daemon.end()
        time.sleep(away_s)
        self._start_controller()

    def processes(self, node: str) -> list[int]:
        """All that runs on a node beside its daemon."""
        found: list[int] = []
        for daemon in self._daemons.get(node, []):
            found += set(guard.descendants(daemon.guard.pid)) - {daemon.holder, daemon.pid}
        return found

    def _start_munge(self) -> None:
        folder = self.root / "munge"
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        # its folder may lie in one that everybody can write to, which munged dislikes
        own = [f"--{name}={folder / file}" for name, file in _MUNGE_FILES.items()]
        self._start("munge", ["munged", "--foreground", "--force", *own])
        eventually((folder / "sock").is_socket, "munged listens", timeout_s=_START_S)

    def _start_controller(self) -> None:
        self._start("controller", ["slurmctld", "-D", "-f", str(self.conf)])
        eventually(lambda: output("scontrol", "ping").find("UP") > 0, "the controller answers", timeout_s=_START_S)

    def _start_slurmd(self, name: str) -> None:
        (self.root / "spool" / name).mkdir(exist_ok=True)
        self._start(name, ["slurmd", "-D", "-f", str(self.conf), "-N", name])

    def _start(self, name: str, command: Sequence[str]) -> None:
        """Below a shell that outlives the program: else its death would be that of all that it has started."""
        told = self.root / "run" / f"{name}.started"
        told.unlink(missing_ok=True)
        script = '"$@" & echo $! >"$0.new" && mv "$0.new" "$0"; wait; exec sleep infinity'
        words = ["bash", "-c", script, str(told), *command]
        read, write = os.pipe()
        line = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(write), *words]
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            started = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[write])
        os.close(write)
        with os.fdopen(read) as pipe:
            holder = int(pipe.readline())
        eventually(told.exists, f"{command[0]} is started", timeout_s=_START_S)
        self._daemons.setdefault(name, []).append(_Daemon(started, holder, int(told.read_text())))


def output(*command: str, timeout_s: float = 30.0) -> str:
    """Of one of Slurm's programs; empty where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    return done.stdout if done.returncode == 0 else ""


def _free_ports(count: int) -> list[int]:
    """Below the range that the kernel chooses from, so that nobody is given one of them meanwhile."""
    found: list[int] = []
    port = 20000 + os.getpid() % 10000
    while len(found) < count:
        port += 1
        if is_free(port):
            found.append(port)
    return found
