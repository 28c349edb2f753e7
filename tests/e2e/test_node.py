"""Nodes of a job as processes of one machine: Slurm gives each only a few numbers in its environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launchers.jobplan import ClusterPlan, Job, JobPlan, RolePlan, ServicePlan, to_json
from launchers.life import setup_text
from launchers.node import MEETING, commit, place_of, successor
from launchers.plan import OWN_STORE
from megatron_distil.registry import Registry
from tests.supervised import ROOT, eventually, is_alive, none_alive

ADDRESS = "127.0.0.2"
"""Not the one that everything on one machine listens on."""
RANK = """
import os, sys, torch, torch.distributed as dist
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.exit(3)
dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
print(f"the ranks sum to {total.item():.0f}", flush=True)
dist.destroy_process_group()
"""


def shell(run: Path, text: str, **changes: object) -> Job:
    return Job(name="train", command=("sh", "-c", text), cwd=str(run), registry=f"{run}/registry/{{life}}", **changes)  # type: ignore[arg-type]


def service(run: Path) -> ServicePlan:
    """It listens where it is told to, and nowhere else."""
    return ServicePlan(
        role="rollout",
        name="rollout-0",
        command=(sys.executable, "-m", "http.server", "--bind", "{host}", "{port}"),
        cwd=str(run),
        log=f"{run}/logs/{{life}}/rollout-0.log",
        health_path="/",
        start_timeout_s=60.0,
    )


class Allocation:
    """A run directory and the processes that Slurm would start in it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.started: list[subprocess.Popen[str]] = []

    def node_plan(self, name: str, *, jobs: tuple[Job, ...] = (), services: tuple[ServicePlan, ...] = ()) -> JobPlan:
        registry, log = f"{self.run}/registry/{{life}}", f"{self.run}/logs/{{life}}/{name}.log"
        return JobPlan(name=name, registry=registry, log=log, services=services, jobs=jobs)

    def plan(self, *jobs: Job, needs: dict[str, int] | None = None, timeout_s: float = 120.0) -> ClusterPlan:
        """One trainer's node for each job, and one rollout node."""
        trainers = tuple(self.node_plan(f"trainer-node{index}", jobs=(job,)) for index, job in enumerate(jobs))
        servers = (self.node_plan("rollout-node0", services=(service(self.run),)),)
        roles = (
            self.role("trainer", trainers, needs=needs or {}, needs_timeout_s=timeout_s),
            self.role("rollout", servers),
        )
        plan = ClusterPlan(
            name="test",
            run=str(self.run),
            account="a",
            partition="p",
            time="1:00:00",
            nodes=len(jobs) + 1,
            gpus_per_node=0,
            signal="B:USR1@60",
            retries=3,
            monitor_s=5,
            setup="",
            host_ip=ADDRESS,
            roles=roles,
        )
        (self.run / "plan.json").write_text(to_json(plan))
        return plan

    def role(self, name: str, plans: tuple[JobPlan, ...], **changes: object) -> RolePlan:
        fields: dict[str, object] = {"nodes": len(plans), "first_node": 0, "script": "", "srun_args": ()}
        return RolePlan(name=name, node_plans=plans, **{**fields, **changes})  # type: ignore[arg-type]

    def start(self, role: str, index: int = 0, *, below: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        of_slurm = {"SLURM_JOB_ID": "7", "SLURM_PROCID": str(index), "SLURMD_NODENAME": f"n{index}"}
        environment = {**os.environ, **of_slurm, "PYTHONPATH": str(ROOT)}
        command = [*below, sys.executable, "-m", "launchers.node", role, f"{self.run}/plan.json"]
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.started.append(process)
        return process

    @property
    def registry(self) -> Registry:
        return Registry(self.run / "registry" / "7.0")

    def begin(self, life: str, *, ago_s: float = 0.0) -> Path:
        """What the batch shell of another life does first."""
        folder = self.run / "registry" / life
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "began").touch()
        os.utime(folder / "began", (time.time() - ago_s,) * 2)
        return folder

    def launched(self, job: str) -> None:
        (self.run / "job.json").write_text(json.dumps({"job_id": job}))

    def setup_of_the_next_life(self) -> int:
        """The exit code of the batch shell's first lines; 9: it goes on."""
        text = setup_text(str(self.run), ["trainer", "rollout"], max_lives_without_progress=3) + "\nexit 9\n"
        environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
        return subprocess.run(["bash", "-c", text], env=environment, check=False, stdout=subprocess.DEVNULL).returncode


@pytest.fixture
def allocation(tmp_path: Path) -> Iterator[Allocation]:
    allocation = Allocation(tmp_path)
    yield allocation
    for process in allocation.started:
        process.kill()
        process.communicate()


def code_of(process: subprocess.Popen[str], timeout_s: float = 60.0) -> int:
    process.communicate(timeout=timeout_s)
    return process.returncode


def test_two_nodes_meet_and_go_on_in_place_after_the_loss_of_a_rank(allocation: Allocation):
    (allocation.run / "rank.py").write_text(RANK)
    jobs = [
        Job(
            name="train",
            command=(
                *(sys.executable, "-m", "launchers.torchrun", "--nnodes", "2", "--nproc-per-node", "1"),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", "{rdzv}", "--rdzv-id", "{life}"),
                *("--local-addr", "{host}", "--max-restarts", "1", "rank.py"),
            ),
            env=OWN_STORE,
            cwd=str(allocation.run),
            log=f"{allocation.run}/logs/{{life}}/train-node{index}.log",
        )
        for index in range(2)
    ]
    allocation.plan(*jobs, needs={"rollout": 1})
    nodes = [allocation.start("trainer", index) for index in range(2)]
    allocation.start("rollout")
    assert [code_of(node, 150.0) for node in nodes] == [0, 0]
    for index in range(2):
        assert "the ranks sum to 3" in (allocation.run / f"logs/7.0/train-node{index}.log").read_text()
    assert allocation.registry.reason() == "done"
    assert allocation.registry.live(MEETING, stale_s=float("inf"))[0].url.startswith(f"{ADDRESS}:")
    about = json.loads((allocation.run / "logs/7.0/about-trainer.json").read_text())
    assert (about["life"], about["address"]) == ("7.0", ADDRESS)
    assert any(one.startswith("torch==") for one in about["packages"])


def test_a_killed_service_comes_back_and_its_node_serves_until_it_is_ended(allocation: Allocation):
    allocation.plan(shell(allocation.run, "true"))
    node, registry = allocation.start("rollout"), allocation.registry
    eventually(lambda: bool(registry.live("rollout")), "it serves")
    (first,) = registry.live("rollout")
    assert first.url.startswith(f"http://{ADDRESS}:")
    os.kill(first.pid, signal.SIGKILL)
    eventually(lambda: [one.gen for one in registry.live("rollout")] == [1], "it serves again")
    node.send_signal(signal.SIGUSR1)  # Slurm's warning is for the batch shell
    assert node.poll() is None
    (second,) = registry.live("rollout")
    node.terminate()
    assert code_of(node) == 143
    assert not is_alive(second.pid)
    assert registry.live("rollout", state=None) == []


@pytest.mark.parametrize(("wish", "code", "next_life"), [("request_stop", 75, 9), ("request_end", 0, 0)])
def test_a_trainer_that_waits_for_services_leaves_when_it_is_asked_to(
    allocation: Allocation, wish: str, code: int, next_life: int
):
    allocation.plan(shell(allocation.run, "touch began"), needs={"rollout": 1})
    node, registry = allocation.start("trainer"), allocation.registry
    eventually(lambda: (allocation.run / "logs/7.0/about-trainer.json").exists(), "it has begun")
    getattr(registry, wish)()
    assert code_of(node) == code
    assert registry.reason().startswith("stopped asked to stop while waiting for role 'rollout'")
    assert not (allocation.run / "began").exists()
    assert allocation.setup_of_the_next_life() == next_life


def test_services_that_do_not_come_end_the_life_and_not_the_job(allocation: Allocation):
    allocation.plan(shell(allocation.run, "true"), needs={"rollout": 1}, timeout_s=0.5)
    assert code_of(allocation.start("trainer")) == 75
    assert allocation.registry.reason().startswith("unavailable waited 0 s for role 'rollout': need 1 services")
    assert allocation.setup_of_the_next_life() == 9


@pytest.mark.parametrize(
    ("script", "code", "reason", "next_life"),
    [
        ("exit 2", 2, "fatal train ended with exit code 2, on n0", 1),
        ("exit 3", 3, "failed train ended with exit code 3, on n0", 9),
        ("touch registry/7.0/STOP; exit 130", 130, "stopped train was asked to", 9),
        ("echo end >registry/7.0/STOP; exit 130", 0, "stopped train was asked to", 0),
        ("echo fatal no number >registry/7.0/REASON; exit 1", 1, "fatal no number", 1),
    ],
)
def test_how_a_job_ends_says_whether_there_is_another_life(
    allocation: Allocation, script: str, code: int, reason: str, next_life: int
):
    allocation.plan(shell(allocation.run, script))
    assert code_of(allocation.start("trainer")) == code
    assert allocation.registry.reason() == reason
    assert allocation.setup_of_the_next_life() == next_life


def test_only_the_first_node_says_that_all_is_done(allocation: Allocation):
    allocation.plan(shell(allocation.run, "sleep 1; exit 3"), shell(allocation.run, "true"))
    nodes = [allocation.start("trainer", index) for index in range(2)]
    assert [code_of(node) for node in nodes] == [3, 0]
    assert allocation.registry.reason() == "failed train ended with exit code 3, on n0"


SAVER = "trap 'touch saved' TERM INT; sleep 600 & echo $! >>pids; echo $$ >>pids; while :; do wait; done"
"""A job with a child, that saves when it is asked to end, and then goes on."""


@pytest.mark.parametrize("successor", ["7.1", "9.0"])
def test_everything_of_a_life_is_killed_when_another_one_has_begun(allocation: Allocation, successor: str):
    allocation.plan(shell(allocation.run, SAVER, stop_grace_s=600.0))
    allocation.begin("7.0", ago_s=60.0)
    nodes, pids = [allocation.start("trainer"), allocation.start("rollout")], allocation.run / "pids"
    eventually(lambda: pids.exists() and len(pids.read_text().split()) == 2, "the job runs")
    eventually(lambda: bool(allocation.registry.live("rollout")), "it serves")
    processes = [*map(int, pids.read_text().split()), allocation.registry.live("rollout")[0].pid]
    allocation.launched(successor.partition(".")[0])
    allocation.begin(successor)
    start = time.monotonic()
    # not to be told apart from a good end by the batch shell: it would have the job requeued, which now is another life
    assert [code_of(node) for node in nodes] == [0, 0]
    assert time.monotonic() - start < 10.0
    assert none_alive(processes)
    assert not (allocation.run / "saved").exists()
    for name in ("trainer-node0", "rollout-node0"):
        diary = (allocation.run / f"logs/7.0/{name}.log").read_text()
        assert diary.count(f"life {successor} has begun; this one ends") == 1
    assert allocation.registry.reason().startswith(f"failed life {successor} has begun; this one ends")


def test_a_node_ends_with_what_started_it(allocation: Allocation):
    """A slurmstepd that is killed: nobody would end the server when the job is over."""
    allocation.plan()
    script = '"$@" 2> >(read -r) & wait'  # nobody reads what it says in the end
    step = allocation.start("rollout", below=("bash", "-c", script, "bash"))
    eventually(lambda: bool(allocation.registry.live("rollout")), "it serves")
    server = allocation.registry.live("rollout")[0].pid
    step.kill()
    eventually(lambda: not is_alive(server), "it serves no more", timeout_s=10.0)
    reason = "unavailable the slurmstepd of this step is gone, which would end it, on n0"
    eventually(lambda: allocation.registry.reason() == reason, "it has said why")


@pytest.mark.parametrize("needs", [{}, {"rollout": 1}])
def test_a_life_that_is_not_the_newest_starts_nothing(allocation: Allocation, needs: dict[str, int]):
    allocation.plan(shell(allocation.run, "touch began"), needs=needs)
    allocation.begin("7.0")
    allocation.begin("7.1")
    assert code_of(allocation.start("trainer")) == 0
    assert not (allocation.run / "began").exists()
    assert allocation.registry.reason().startswith("failed life 7.1 has begun; this one ends")


@pytest.mark.parametrize(
    ("present", "others", "found"),
    [
        ("7", {"7.1": 60, "7.3": 5, "6.9": 5, "70.4": 5}, "7.3"),
        ("7", {"7.1": 60, "6.9": 5, "70.4": 5}, ""),  # nobody launched these jobs
        ("", {"7.3": 5}, "7.3"),
        ("8", {"8.0": 5}, "8.0"),
        ("3", {"3.0": 5}, "3.0"),  # numbers of jobs have started anew
        ("8", {"8.0": 60}, ""),  # job.json is not written yet, and we are the new job
    ],
)
def test_which_life_goes_before_another(allocation: Allocation, present: str, others: dict[str, int], found: str):
    mine = allocation.begin("7.2", ago_s=30)
    (mine.parent / "progress.7").write_text("none 0")
    (mine.parent / "7.4").mkdir()
    (mine.parent / "7.4" / "STOP").touch()  # `launchers stop` makes it before a life has begun
    for life, ago_s in others.items():
        allocation.begin(life, ago_s=ago_s)
    if present:
        allocation.launched(present)
    assert successor(mine) == found


@pytest.mark.parametrize(
    ("role", "environment", "text"),
    [
        ("trainer", {"SLURM_JOB_ID": "7"}, "SLURM_PROCID=''"),
        ("trainer", {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1"}, "--ntasks=1 --ntasks-per-node=1"),
        ("teacher", {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, "the plan has trainer, rollout"),
    ],
)
def test_a_node_that_cannot_be_placed_says_why(
    allocation: Allocation, role: str, environment: dict[str, str], text: str
):
    plan = allocation.plan(shell(allocation.run, "true"))
    with pytest.raises(Exception, match=text):
        place_of(plan, role, environment)


def test_the_commit_is_read_without_git(tmp_path: Path):
    assert commit(tmp_path) == ""
    run = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", "-C", str(tmp_path)]
    subprocess.run([*run, "init", "-q"], check=True)
    subprocess.run([*run, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    said = subprocess.run([*run, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert commit(tmp_path) == said
    subprocess.run([*run, "pack-refs", "--all"], check=True)
    assert commit(tmp_path) == said
    subprocess.run([*run, "checkout", "-q", "--detach"], check=True)
    assert commit(tmp_path) == said
