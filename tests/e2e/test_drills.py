"""What dies in the middle of a step, and what is left of it: one run that loses everything once, and finishes."""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launchers.jobplan import JobPlan
from megatron_distil.registry import Record
from tests.quickstart import Launched, induction, is_open, launched, metrics, none_left, rows_of, train_plan, values
from tests.supervised import eventually, is_alive

STEPS = 12
SETTINGS = (
    f"train.num_steps={STEPS}",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "feedback.max_unavailable=0.0",
    "eval.every_steps=0",
    "checkpoint.every_steps=2",
)
GONE_S = 10.0


@dataclass
class Story:
    """What was seen on the way."""

    run: Path
    texts: list[str] = field(default_factory=list)
    """What each start wrote to the terminal."""
    codes: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """Done when each start ended."""
    server_pids: dict[int, int] = field(default_factory=dict)
    """By number of start, in the first start of the run."""
    server_lost_in: int = -1


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Story:
    run = tmp_path_factory.mktemp("drills")
    plan = train_plan(induction(), run, SETTINGS)
    told = Story(run)
    _lose_services_and_a_rank(plan, told)
    _press_ctrl_c(plan, told)
    _lose_the_supervisor(plan, told)
    with launched(plan, run) as running:
        told.codes.append(running.wait())
        told.texts.append(running.text())
    return told


def _lose_services_and_a_rank(plan: JobPlan, told: Story) -> None:
    with launched(plan, told.run) as running:
        running.until_step(0)
        os.kill(_record(running, "sandbox", gen=0).pid, signal.SIGKILL)
        running.until_step(1)
        _record(running, "sandbox", gen=1)
        running.until_step(2)

        first = _record(running, "rollout", gen=0)
        os.kill(first.pid, signal.SIGKILL)
        told.server_lost_in = len(values(told.run, "loss/ce_nats"))
        running.until_step(told.server_lost_in)
        second = _record(running, "rollout", gen=1)
        told.server_pids = {0: first.pid, 1: second.pid}

        running.until_mid_step(told.server_lost_in + 2)
        pids, ports = running.pids(), running.ports()
        os.kill(running.rank_pid(1), signal.SIGKILL)
        _see_the_end(running, told, pids, ports)


def _press_ctrl_c(plan: JobPlan, told: Story) -> None:
    with launched(plan, told.run) as running:
        running.until_step(told.steps[-1])
        pids, ports = running.pids(), running.ports()
        running.process.send_signal(signal.SIGINT)
        _see_the_end(running, told, pids, ports)


def _lose_the_supervisor(plan: JobPlan, told: Story) -> None:
    with launched(plan, told.run) as running:
        running.until_mid_step(told.steps[-1])
        pids, ports = running.pids(), running.ports()
        running.process.kill()
        _see_the_end(running, told, pids, ports)


def _see_the_end(running: Launched, told: Story, pids: set[int], ports: list[int]) -> None:
    """Exit code, and that nothing is left: no process, no port."""
    told.codes.append(running.wait(120.0))
    none_left(pids, "all processes", timeout_s=GONE_S)
    assert len(pids) >= 8, "two guards, torchrun, two ranks, servers and their workers"
    assert len(ports) == 2
    eventually(lambda: not any(map(is_open, ports)), f"ports closed, of {ports}", timeout_s=GONE_S)
    left = running.pids()
    assert not any(map(is_alive, left)), left
    told.texts.append(running.text())
    told.steps.append(len(values(told.run, "loss/ce_nats")))


def _record(running: Launched, role: str, *, gen: int) -> Record:
    def found() -> list[Record]:
        return [record for record in running.registry.live(role) if record.gen == gen]

    running.until(lambda: bool(found()), f"{role} is ready after start {gen}")
    return found()[0]


def test_every_step_is_done_once_and_the_run_finishes(story):
    assert story.codes[-1] == 0, story.texts[-1]
    assert [row["step"] for row in metrics(story.run)] == list(range(STEPS))
    assert (story.run / "hf" / "model.safetensors").exists()
    assert max(values(story.run, "sync/logprob_gap_nats")) < 1e-4, "somebody sampled with other weights"


def test_a_killed_sandbox_comes_back_and_no_reward_is_lost(story):
    assert "sandbox-0 was killed by SIGKILL; start 1 in 0.5 s" in story.texts[0]
    assert set(values(story.run, "feedback/unavailable_frac")) == {0.0}


def test_a_killed_server_comes_back_and_is_admitted_in_the_same_step(story):
    step = story.server_lost_in
    assert "rollout-0 was killed by SIGKILL; start 1 in 0.5 s" in story.texts[0]
    assert f"rollout-0, start 1: gets version {step}" in story.texts[0]
    assert "starts over" not in story.texts[0], "the publication had to help"
    (row,) = rows_of(story.run, step)
    assert row["rollout/count"] == 16
    assert row["rollout/replayed_frac"] == 0.0
    assert row["rollout/lag_steps_max"] == 0.0


def test_a_killed_rank_ends_the_command_with_one_message(story):
    assert story.codes[0] == 128 + signal.SIGKILL
    end = story.texts[0].partition("rank 1 was killed by SIGKILL")
    assert end[1], story.texts[0][-2000:]
    assert "train was killed by SIGKILL" in end[2]
    # torchrun ends the others at once: what rank 0 has seen of it, it says in one line, if it lives long enough
    told = [line for line in end[0].splitlines() if line.startswith("rank 0")]
    assert told in ([], ["rank 0: the connection to another rank broke; torchrun says which one ended first"])
    assert "Traceback" not in story.texts[0]
    assert "gloo" not in story.texts[0]


def test_ctrl_c_saves_and_ends_with_130(story):
    assert story.codes[1] == 128 + signal.SIGINT
    assert f"stopped after {story.steps[1]} of {STEPS} steps; the same command goes on" in story.texts[1]
    assert "Traceback" not in story.texts[1]
    assert "before all others" not in story.texts[1]
    first = next(row for row in metrics(story.run) if row["step"] == story.steps[1])
    assert first["loss/ce_nats"] > 0.0
    assert f"step {story.steps[1]}/" not in story.texts[2], "a saved step was done again"


def test_a_killed_supervisor_leaves_nothing(story):
    assert story.codes[2] == -signal.SIGKILL  # _see_the_end has looked for processes and ports
