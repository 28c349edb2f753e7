"""The task's programs in the real sandbox."""

import asyncio
import uuid

import pytest

from megatron_distil.feedback import wire
from megatron_distil.feedback.judge import TaskJudge
from megatron_distil.tasks import program_induction
from megatron_distil.types import Outcome
from tests.sandbox_service import Service
from tests.task_records import prompt_from, rollout

TASK = program_induction.TASK
PROMPT = prompt_from(TASK, TASK.example)


class Runner:
    def __init__(self, service):
        self.service = service

    async def run(self, program):
        request_id = uuid.uuid4().hex
        body = wire.request_of(program, request_id, test_timeout_s=1.0)
        answer = await asyncio.to_thread(self.service.post, body)
        assert answer.status == 200, answer.body
        return wire.result_of(answer.body, program, request_id=request_id, service="here")


@pytest.fixture(scope="module")
def service():
    with Service("--min-level", "0", "--workers", "1") as started:
        yield started


def test_programs_are_judged_by_what_they_return(service):
    expected = [
        ("x*81+2", Outcome.PASSED, ""),
        ("2+x*81#", Outcome.PASSED, ""),
        ("x*18+2", Outcome.FAILED, "x*18+2:2,20,182"),
        ("x>1", Outcome.FAILED, "x>1:-,-,-"),
        ("(((", Outcome.FAILED, "(((:-,-,-"),
        ("(9,)*9**9", Outcome.FAILED, "(9,)*9**9:-,-,-"),
        ("9**9**9**9", Outcome.TIMEOUT, "9**9**9**9:-,-,-"),
    ]
    rollouts = [rollout(text, sample=index) for index, (text, _, _) in enumerate(expected)]
    judge = TaskJudge(TASK, Runner(service), concurrency=2, max_unavailable=0.0)
    feedback = asyncio.run(judge.judge([PROMPT], rollouts))
    assert [(r.text, f.outcome, f.text) for r, f in zip(rollouts, feedback, strict=True)] == expected
    assert [f.reward for f in feedback] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
