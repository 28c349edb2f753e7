"""A run of all roles on a real Slurm, and what becomes of it when something breaks."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.cluster_runs import STEPS, Site

Finding = Callable[..., None]


def test_finish(site: Site, finding: Finding) -> None:
    began = time.monotonic()
    run = site.launch("finish")
    run.until_step(0)
    first_step_s = time.monotonic() - began
    assert run.until_over().word == "done"
    assert run.steps() == list(range(STEPS))
    assert run.reason(0) == "done"
    run.none_left()
    finding(run, first_step_s=round(first_step_s, 1))


def test_killed_server(site: Site, finding: Finding) -> None:
    """It is started again in the same life, gets the weights of the present step, and no step is lost."""
    run = site.launch("killed-server")
    run.until_step(1)
    start_s = run.start_s("rollout-0", gen=0)
    killed = run.kill(run.record("rollout").pid)
    run.record("rollout", gen=1)
    recovered_s = time.monotonic() - killed
    assert run.until_over().word == "done"
    assert run.steps() == list(range(STEPS))
    assert run.restarts() == 0
    assert "rollout-0 was killed by SIGKILL; start 1 in 0.5 s" in run.diaries()
    assert "rollout-0, start 1: gets version" in run.trainer_output()
    run.none_left()
    finding(run, recovered_s=round(recovered_s, 1), server_start_s=start_s)
