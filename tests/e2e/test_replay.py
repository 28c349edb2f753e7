"""A logged run can be trained on again without servers, and every way to its end gives the same bits."""

import os
import signal
from pathlib import Path

import pytest

from tests.quickstart import Base, induction, launched, metrics, none_left, rows_of, train_plan

STEPS = 8
SETTINGS = (
    f"train.num_steps={STEPS}",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "eval.every_steps=0",
    "checkpoint.every_steps=2",
    "teacher.rate=0.1",  # the teacher's weights must come back too
)


@pytest.fixture(scope="module")
def base() -> Base:
    return induction()


@pytest.fixture(scope="module")
def logged(base, tmp_path_factory) -> Path:
    """A finished run with servers."""
    run = tmp_path_factory.mktemp("logged")
    with launched(train_plan(base, run, SETTINGS), run) as running:
        assert running.wait() == 0, running.text()[-3000:]
    return run


@pytest.fixture(scope="module")
def replayed(base, logged, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("replayed")
    with launched(train_plan(base, run, SETTINGS, replay=logged), run) as running:
        assert running.wait() == 0, running.text()[-3000:]
    return run


def exported(run: Path) -> bytes:
    return (run / "hf" / "model.safetensors").read_bytes()


def test_a_replay_without_servers_ends_with_the_weights_of_the_run(base, logged, replayed):
    assert exported(replayed) == exported(logged)
    assert exported(replayed) != (base.folder / "base" / "model.safetensors").read_bytes()
    assert [row["rollout/replayed_frac"] for row in metrics(replayed)] == [1.0] * STEPS
    assert not (replayed / "registry" / "rollout").exists()


def test_a_replay_that_was_killed_in_mid_step_ends_with_the_same_weights(base, logged, replayed, tmp_path):
    plan = train_plan(base, tmp_path, SETTINGS, replay=logged)
    with launched(plan, tmp_path) as running:
        running.until((tmp_path / "config.json").exists, "the ranks run")
        victim, pids = running.rank_pid(1), running.pids()
        running.until((tmp_path / "checkpoints" / "step_00000002" / "COMPLETE").exists, "a checkpoint is complete")
        os.kill(victim, signal.SIGKILL)
        assert running.wait(60.0) == 128 + signal.SIGKILL, running.text()
        none_left(pids, "trainers")
    assert not rows_of(tmp_path, STEPS - 1), "it was killed too late"

    with launched(plan, tmp_path) as running:
        assert running.wait() == 0, running.text()[-3000:]
    assert exported(tmp_path) == exported(replayed)
    assert [row["step"] for row in metrics(tmp_path)] == list(range(STEPS))
    first = {row["step"]: row["loss/ce_nats"] for row in metrics(replayed)}
    assert {row["step"]: row["loss/ce_nats"] for row in metrics(tmp_path)} == first
