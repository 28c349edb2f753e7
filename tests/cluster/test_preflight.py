"""A job that tries its nodes before its first step."""

from __future__ import annotations

import re

import pytest

from tests.cluster_runs import STEPS, Finding, Site


@pytest.mark.full
def test_preflight(site: Site, finding: Finding) -> None:
    """All is well: its table lies beside the logs, and the run goes on."""
    run = site.launch("preflight", "cluster.preflight=first")
    run.until_step(0)
    table = (run.folder / "logs" / f"{run.job}.0" / "preflight.log").read_text()
    assert re.search(r"^ok +all-reduce +all nodes +gloo, 3 ranks", table, re.MULTILINE)
    assert re.search(r"^all \d+ checks passed$", table, re.MULTILINE)
    assert run.until_over().word == "done"
    assert run.steps() == list(range(STEPS))
    run.none_left()
    finding(run)


@pytest.mark.full
def test_failed_preflight(site: Site, finding: Finding) -> None:
    """Better walls than there are: the job ends before any server starts, and says which node lacks what."""
    run = site.launch("failed-preflight", "cluster.preflight=first", "feedback.min_isolation=4")
    assert run.until_over().word == "failed"
    assert re.fullmatch(r"fatal preflight: 3 of \d+ checks failed; .*/preflight.log", run.reason(0))
    assert "feedback.min_isolation = 4; python -m sandbox.probe says what is missing" in run.batch_output()
    assert run.restarts() == 0
    assert not list((run.folder / "logs").rglob("rollout-*.log")), "no server was started"
    run.none_left()
    finding(run)
