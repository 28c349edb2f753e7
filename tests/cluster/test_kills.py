"""What becomes of a run when a process or a node of it is killed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from launchers.status import State
from tests.cluster_runs import STEPS, Finding, Run, Site
from tests.quickstart import metrics
from tests.supervised import eventually, none_alive

GOES_ON = {"pending", "running", "requeued", "completing", "between two lives", "done"}
"""All that a user may read of a run that is not lost."""


def until_recovered(run: Run, killed: float) -> float:
    """Until the next life has done a step that the one before had not; returns how long that took, in s."""
    run.until_progress(life=1)
    return round(time.monotonic() - killed, 1)


def assert_nothing_is_lost(run: Run, *, lives: int = 0, steps: int = STEPS) -> None:
    """It has finished all steps in so many lives, nobody was told otherwise, and nothing is left of it.

    Every step of the curve was made of all its responses, all of them judged, by servers that had the weights of that step.
    """
    assert run.until_over().word == "done"
    run.none_left()
    rows = [row for row in metrics(run.folder) if "loss/ce_nats" in row]
    assert [row["step"] for row in rows] == list(range(steps))
    assert run.checkpoint() == steps
    assert {row["rollout/count"] for row in rows} == {8.0}
    assert {row["feedback/unavailable_frac"] for row in rows} == {0.0}
    assert max(row["sync/logprob_gap_max_nats"] for row in rows) < 1e-4
    assert not lives or run.restarts() == lives - 1, run.told()
    assert run.reason(run.restarts()) == "done"
    assert set(run.states) <= GOES_ON


@pytest.mark.full
def test_killed_rank(site: Site, finding: Finding) -> None:
    run = site.launch("killed-rank")
    run.until_step(1)
    killed = run.kill(run.rank(1))
    recovered_s = until_recovered(run, killed)
    assert_nothing_is_lost(run, lives=2)
    assert run.reason(0) == "failed train was killed by SIGKILL, on n2"
    assert "rank 1 was killed by SIGKILL, before all others" in run.told()
    finding(run, recovered_s=recovered_s)


@pytest.mark.full
def test_killed_torchrun(site: Site, finding: Finding) -> None:
    run = site.launch("killed-torchrun")
    run.until_step(1)
    killed = run.kill(run.torchrun(1))
    recovered_s = until_recovered(run, killed)
    assert_nothing_is_lost(run, lives=2)
    assert run.reason(0) == "failed train was killed by SIGKILL, on n2"
    finding(run, recovered_s=recovered_s)


@pytest.mark.full
def test_killed_sandbox(site: Site, finding: Finding) -> None:
    """It is started again in the same life, and what it was judging is judged by its successor."""
    run = site.launch("killed-sandbox")
    run.until_step(1)
    killed = run.kill(run.record("sandbox").pid)
    run.record("sandbox", gen=1)
    recovered_s = round(time.monotonic() - killed, 1)
    assert_nothing_is_lost(run, lives=1)
    assert "sandbox-0 was killed by SIGKILL; start 1 in 0.5 s" in run.diaries()
    finding(run, recovered_s=recovered_s)


@pytest.mark.full
@pytest.mark.parametrize("role", ["rollout", "trainer"])
def test_killed_supervisor(site: Site, finding: Finding, role: str) -> None:
    run = site.launch(f"killed-supervisor-of-{role}")
    run.until_step(1)
    killed = run.kill(run.supervisor(role))
    recovered_s = until_recovered(run, killed)
    assert_nothing_is_lost(run, lives=2)
    assert run.reason(0).startswith(f"failed {role} ended with exit code 1")
    finding(run, recovered_s=recovered_s)


@pytest.mark.full
@pytest.mark.parametrize("index", [2, 0], ids=["rollout", "batch-host"])
def test_killed_node(site: Site, finding: Finding, index: int) -> None:
    """The run goes on where a node is to spare, and not on the one that is dead."""
    run = site.launch(f"killed-node-{index}")
    run.until_step(1)
    node = run.nodes()[index]
    site.slurm.kill_node(node)
    recovered_s = until_recovered(run, time.monotonic())
    assert node not in run.nodes()
    assert_nothing_is_lost(run, lives=2)
    finding(run, recovered_s=recovered_s)


UNNOTICED = 60
"""Steps of a run whose node loses nothing but its daemon: it goes on until Slurm notices."""


@pytest.mark.full
@pytest.mark.parametrize("index", [2, 1, 0], ids=["rollout", "trainer", "batch-host"])
def test_killed_slurmd(site: Site, finding: Finding, index: int) -> None:
    """What goes on on a node that Slurm has given up ends when the next life begins, and does not disturb it."""
    run = site.launch(f"killed-slurmd-{index}", f"train.num_steps={UNNOTICED}")
    run.until_step(1)
    node = run.nodes()[index]
    old = site.slurm.processes(node)
    site.slurm.kill_slurmd(node)
    recovered_s = until_recovered(run, time.monotonic())
    assert node not in run.nodes()
    eventually(lambda: none_alive(old), f"{node} is silent")
    if index == 2:  # ranks end by themselves, as the others are gone
        assert f"life {run.job}.1 has begun; this one ends" in run.diaries(0)
    assert_nothing_is_lost(run, lives=2, steps=UNNOTICED)
    finding(run, recovered_s=recovered_s)


@pytest.mark.full
def test_killed_batch_shell(site: Site, finding: Finding) -> None:
    """Slurm calls that a failed job and does not start it again; ``launch`` goes on with the run."""
    run = site.launch("killed-batch-shell")
    run.until_step(1)
    run.kill(run.batch_shell())
    detail = "the batch script was killed by SIGKILL; launch goes on with the run"
    assert run.until_over() == State(word="failed", detail=detail, exit_code=1)
    run.none_left()
    began = time.monotonic()
    run = site.launch("killed-batch-shell")
    run.until_progress(life=0)
    recovered_s = round(time.monotonic() - began, 1)
    assert_nothing_is_lost(run, lives=1)
    finding(run, recovered_s=recovered_s)


@pytest.mark.full
def test_killed_slurmstepd(site: Site, finding: Finding) -> None:
    """Of the rollout step. srun does not notice; but what was below it ends, as nobody else would end it."""
    run = site.launch("killed-slurmstepd", "rollout.budget_s=20", "rollout.request_timeout_s=6")
    run.until_step(1)
    killed = run.kill(run.slurmstepd("rollout"))
    recovered_s = until_recovered(run, killed)
    assert_nothing_is_lost(run, lives=2)
    assert run.reason(0) == "unavailable the slurmstepd of this step is gone, which would end it, on n3"
    finding(run, recovered_s=recovered_s)


KILLS = 20
LONG_S = 600.0
"""A life after another, and a server that is started again, on a machine that does something else as well."""


@pytest.mark.full
def test_twenty_kills(site: Site, finding: Finding) -> None:
    """Of anything, at random, and most of them where nobody has to start the job again, which takes longest."""
    steps = 3 * KILLS
    run = site.launch(
        "twenty-kills",
        f"train.num_steps={steps}",
        "cluster.time=01:00:00",
        "cluster.restarts_in_place=10",
        "cluster.max_lives_without_progress=10",
    )
    generator = random.Random(KILLS)
    victims: dict[str, Callable[[], int]] = {
        "rank": lambda: run.rank(generator.randrange(2)),
        "rollout server": lambda: run.life(run.restarts()).live("rollout")[0].pid,
        "sandbox": lambda: run.life(run.restarts()).live("sandbox")[0].pid,
        "torchrun": lambda: run.torchrun(generator.randrange(2)),
        "supervisor of the trainer": lambda: run.supervisor("trainer", generator.randrange(2)),
        "supervisor of the servers": lambda: run.supervisor("rollout"),
    }
    killed: list[str] = []
    while len(killed) < KILLS:
        done = max(run.steps(), default=-1)
        run.until(lambda done=done: max(run.steps(), default=-1) > done, f"a step after {killed}", LONG_S)
        (name,) = generator.choices(list(victims), weights=(6, 6, 6, 1, 1, 1))
        try:
            run.kill(victims[name]())
        except (AssertionError, IndexError, ProcessLookupError):
            continue  # it is being started again
        killed.append(name)
    run.until_over(LONG_S)
    assert_nothing_is_lost(run, steps=steps)
    finding(run, killed=killed)
