"""A logged run can be trained on again without servers, and every way to its end gives the same bits."""

import os
import signal
from pathlib import Path

import pytest

from launchers.jobplan import JobPlan
from tests.quickstart import (
    QUICK_SETTINGS,
    QUICK_STEPS,
    finished_quickstart,
    induction,
    launched,
    metrics,
    none_left,
    rows_of,
    train_plan,
)


def plan_in(run: Path) -> JobPlan:
    return train_plan(induction(), run, QUICK_SETTINGS, replay=finished_quickstart().run)


@pytest.fixture(scope="module")
def replayed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("replayed")
    with launched(plan_in(run), run) as running:
        assert running.wait() == 0, running.text()[-3000:]
    return run


def exported(run: Path) -> bytes:
    return (run / "hf" / "model.safetensors").read_bytes()


def test_a_replay_without_servers_ends_with_the_weights_of_the_run(replayed):
    logged = finished_quickstart().run
    assert exported(replayed) == exported(logged)
    assert exported(replayed) != (logged / "base" / "model.safetensors").read_bytes()
    assert [row["rollout/replayed_frac"] for row in metrics(replayed)] == [1.0] * QUICK_STEPS
    assert not (replayed / "registry" / "rollout").exists()


def test_a_replay_that_was_killed_in_mid_step_ends_with_the_same_weights(replayed, tmp_path):
    plan = plan_in(tmp_path)
    with launched(plan, tmp_path) as running:
        running.until((tmp_path / "config.json").exists, "the ranks run")
        victim, pids = running.rank_pid(1), running.pids()
        running.until((tmp_path / "checkpoints" / "step_00000004" / "COMPLETE").exists, "a checkpoint is complete")
        os.kill(victim, signal.SIGKILL)
        assert running.wait(60.0) == 128 + signal.SIGKILL, running.text()
        none_left(pids, "trainers")
    assert not rows_of(tmp_path, QUICK_STEPS - 1), "it was killed too late"

    with launched(plan, tmp_path) as running:
        assert running.wait() == 0, running.text()[-3000:]
    assert exported(tmp_path) == exported(replayed)
    assert [row["step"] for row in metrics(tmp_path)] == list(range(QUICK_STEPS))
    first = {row["step"]: row["loss/ce_nats"] for row in metrics(replayed)}
    assert {row["step"]: row["loss/ce_nats"] for row in metrics(tmp_path)} == first
