import asyncio
import json

import pytest

from megatron_distil.errors import SandboxRefused, SandboxUnavailable
from megatron_distil.feedback.judge import NoRunner, TaskJudge
from megatron_distil.tasks import program_induction, two_roads
from megatron_distil.types import CaseResult, FinishReason, Outcome, RunResult, Verdict
from tests.task_records import prompt_from, rollout

INDUCTION, ROADS = program_induction.TASK, two_roads.TASK
PROMPT = prompt_from(INDUCTION, INDUCTION.example)
VALUES = {"x*81+2": [81 * x + 2 for x in range(12)], "x*18+2": [18 * x + 2 for x in range(12)], "x": list(range(12))}


class FakeSandbox:
    """Knows a few expressions; is down, refuses or hangs for others."""

    def __init__(self):
        self.ran = []
        self.running = self.most = 0

    async def run(self, program):
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.001)
        self.running -= 1
        expression = program.code.rsplit("outputs('", 1)[1].split("'", 1)[0]
        self.ran.append(expression)
        if expression.startswith("0"):
            raise SandboxUnavailable(f"sandbox-1 is down: {expression}")
        if expression.startswith("1"):
            raise SandboxRefused("limits.cpu_s: too large")
        if expression.startswith("9"):
            return RunResult(tests=(CaseResult(Verdict.TIME_LIMIT, "", 0),), feedback="", duration_s=2.0)
        stdout = json.dumps(VALUES[expression]) + "\n"
        return RunResult(tests=(CaseResult(Verdict.RAN, stdout, len(stdout)),), feedback="", duration_s=0.5)


def judge(texts, sandbox, *, max_unavailable=0.1, concurrency=8, finish=FinishReason.STOP):
    rollouts = [rollout(text, sample=index, finish=finish) for index, text in enumerate(texts)]
    judge = TaskJudge(INDUCTION, sandbox, concurrency=concurrency, max_unavailable=max_unavailable)
    feedback = asyncio.run(judge.judge([PROMPT], rollouts))
    assert [entry.rollout_id for entry in feedback] == [r.rollout_id for r in rollouts]
    return feedback


def test_every_response_gets_its_own_feedback_in_order():
    feedback = judge(["x*18+2", "x*81+2", "", "9**9**9", "x"], FakeSandbox())
    assert [(f.outcome, f.reward, f.text, f.duration_s) for f in feedback] == [
        (Outcome.FAILED, 0.0, "x*18+2:2,20,182", 0.5),
        (Outcome.PASSED, 1.0, "", 0.5),
        (Outcome.INVALID, 0.0, ":-,-,-", 0.0),
        (Outcome.TIMEOUT, 0.0, "9**9**9:-,-,-", 2.0),
        (Outcome.FAILED, 0.0, "x:0,1,10", 0.5),
    ]


@pytest.mark.parametrize("finish", [FinishReason.LENGTH, FinishReason.ABORT])
def test_a_response_that_was_cut_has_not_passed(finish):
    (feedback,) = judge(["x*81+2"], FakeSandbox(), finish=finish)
    assert (feedback.outcome, feedback.reward, feedback.text) == (Outcome.FAILED, 0.0, "x*81+2:2,83,812")


def test_equal_programs_run_once():
    sandbox = FakeSandbox()
    feedback = judge(["x", "x*81+2", "x", "x"], sandbox)
    assert sorted(sandbox.ran) == ["x", "x*81+2"]
    assert [f.reward for f in feedback] == [0.0, 1.0, 0.0, 0.0]


def test_no_more_programs_are_in_flight_than_allowed():
    sandbox = FakeSandbox()
    judge([f"9**9**{i}" for i in range(20)], sandbox, concurrency=3)
    assert sandbox.most == 3


def test_an_outage_is_no_reward_of_zero():
    feedback = judge(["0", *["x"] * 9], FakeSandbox(), max_unavailable=0.1)
    assert (feedback[0].outcome, feedback[0].reward, feedback[0].text) == (Outcome.UNAVAILABLE, None, "")
    assert {f.outcome for f in feedback[1:]} == {Outcome.FAILED}


def test_more_outages_than_allowed_stop_the_run_with_the_counts_and_the_reason():
    with pytest.raises(
        SandboxUnavailable, match=r"2 of 10 responses have no verdict.*0\.1.*sandbox-1 is down"
    ) as raised:
        judge(["00", "0", *["x"] * 8], FakeSandbox(), max_unavailable=0.1)
    assert raised.value.exit_code == 75


def test_a_refusal_is_raised_as_it_is():
    with pytest.raises(SandboxRefused, match="cpu_s"):
        judge(["1", "x"], FakeSandbox())


def test_a_task_that_rules_at_once_needs_no_sandbox():
    prompt = prompt_from(ROADS, ROADS.example)
    rollouts = [rollout(text, sample=index) for index, text in enumerate(["x4721", "(538", "(537"])]
    judge = TaskJudge(ROADS, NoRunner(), concurrency=1, max_unavailable=0.0)
    feedback = asyncio.run(judge.judge([prompt], rollouts))
    assert [(f.reward, f.text) for f in feedback] == [(1.0, "538"), (1.0, "538"), (0.0, "538")]


def test_a_task_that_runs_programs_says_what_it_lacks_without_a_sandbox():
    judge = TaskJudge(INDUCTION, NoRunner(), concurrency=1, max_unavailable=0.5)
    with pytest.raises(SandboxUnavailable, match="num_sandboxes is 0"):
        asyncio.run(judge.judge([PROMPT], [rollout("x")]))
