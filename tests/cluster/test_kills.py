"""What becomes of a run when a process or a node of it is killed."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.cluster_runs import STEPS, Run, Site

Finding = Callable[..., None]
GOES_ON = {"pending", "running", "requeued", "completing", "between two lives", "done"}
"""All that a user may read of a run that is not lost."""


def until_recovered(run: Run, killed: float) -> float:
    """Until the next life has done a step that the one before had not; returns how long that took, in s."""
    run.until_progress(life=1)
    return round(time.monotonic() - killed, 1)


def assert_nothing_is_lost(run: Run, *, lives: int) -> None:
    """It has finished all steps in so many lives, nobody was told otherwise, and nothing is left of it."""
    assert run.until_over().word == "done"
    run.none_left()
    assert run.steps() == list(range(STEPS))
    assert run.checkpoint() == STEPS
    assert run.restarts() == lives - 1, run.told()
    assert run.reason(lives - 1) == "done"
    assert set(run.states) <= GOES_ON


@pytest.mark.full
def test_killed_rank(site: Site, finding: Finding) -> None:
    run = site.launch("killed-rank")
    run.until_step(1)
    killed = run.kill(run.rank(1))
    recovered_s = until_recovered(run, killed)
    assert_nothing_is_lost(run, lives=2)
    assert run.reason(0) == "failed train was killed by SIGKILL"
    assert "rank 1 was killed by SIGKILL, before all others" in run.told()
    finding(run, recovered_s=recovered_s)


@pytest.mark.full
def test_killed_torchrun(site: Site, finding: Finding) -> None:
    run = site.launch("killed-torchrun")
    run.until_step(1)
    killed = run.kill(run.torchrun(1))
    recovered_s = until_recovered(run, killed)
    assert_nothing_is_lost(run, lives=2)
    assert run.reason(0) == "failed train was killed by SIGKILL"
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
    finding(run, recovered_s=recovered_s)
