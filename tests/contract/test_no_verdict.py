"""A verdict that is missing has no number, on whatever way it went missing."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_distil.errors import DistilError, SandboxRefused, SandboxUnavailable
from megatron_distil.feedback import wire
from megatron_distil.feedback.judge import TaskJudge
from megatron_distil.tasks.livecodebench import TASK
from megatron_distil.teacher.context import is_success
from megatron_distil.types import Case, Feedback, Outcome, Program, RolloutId, RunResult, Verdict
from tests.task_records import prompt_from, rollout

FOLDER = Path(__file__).parent / "sandbox"
REPLY = json.loads((FOLDER / "reply.json").read_text())
PROGRAM = Program(code="print(int(input()) + 1)", tests=(Case("1\n", "2"), Case("5\n", None)))
SEEN = [Verdict.PASSED, Verdict.RAN]
JUNK: list[Any] = [None, True, False, 0, 1, -1, 2.5, "", "ok", "passed", "sandbox_error", [], {}, [1], {"a": 1}, 10**30]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value in a reply."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [path, *(found for key in keys for found in places(value[key], (*path, key)))]


def spoiled(reply: Any, path: tuple[Any, ...], junk: Any, is_gone: bool) -> Any:
    if not path:
        return junk
    reply = copy.deepcopy(reply)
    target = reply
    for key in path[:-1]:
        target = target[key]
    if is_gone:
        del target[path[-1]]
    else:
        target[path[-1]] = junk
    return reply


def read(reply: Any) -> RunResult | DistilError:
    try:
        return wire.result_of(reply, PROGRAM, request_id="7/p3/0", service="s")
    except DistilError as error:
        return error


def test_no_damage_to_a_reply_makes_another_verdict() -> None:
    """Each value replaced by each kind of junk, or gone: what is read is the verdicts that were sent, or an error."""
    count = 0
    for path in places(REPLY):
        for junk in [*JUNK, object]:
            result = read(spoiled(REPLY, path, junk, is_gone=junk is object and bool(path)))
            count += 1
            if isinstance(result, RunResult) and path[-1:] != ("verdict",):
                assert [test.verdict for test in result.tests] == SEEN, (path, junk)
            elif isinstance(result, RunResult):
                assert junk == "passed", (path, junk)  # the value itself
    assert count > 500


def test_many_damages_at_once_make_no_verdict_either() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        reply: Any = REPLY
        for _ in range(rng.randint(1, 4)):
            path = rng.choice([path for path in places(reply) if path] or [()])
            if not path:
                break
            reply = spoiled(reply, path, rng.choice(JUNK), is_gone=rng.random() < 0.5)
        result = read(reply)
        if isinstance(result, RunResult):
            assert {test.verdict for test in result.tests} <= set(SEEN)


def test_a_fault_with_results_beside_it_is_a_fault() -> None:
    assert isinstance(read({**REPLY, "status": "sandbox_error"}), SandboxUnavailable)


class Failing:
    """A sandbox that raises."""

    def __init__(self, error: DistilError) -> None:
        self.error = error

    async def run(self, program: Program) -> RunResult:
        raise self.error


def test_what_nobody_could_run_has_neither_reward_nor_share_nor_vote_nor_text() -> None:
    prompt = prompt_from(TASK, TASK.example)
    asked = [rollout(f"```\nprint({sample})\n```", prompt=prompt.prompt_id, sample=sample) for sample in range(3)]
    judge = TaskJudge(TASK, Failing(SandboxUnavailable("down")), concurrency=2, max_unavailable=1.0)
    for said in asyncio.run(judge.judge([prompt], asked)):
        assert (said.outcome, said.reward, said.pass_fraction) == (Outcome.UNAVAILABLE, None, None)
        assert (said.vote, said.text) == ("", "")
        assert not is_success(said)


def test_a_refusal_ends_the_run_and_is_no_verdict() -> None:
    prompt = prompt_from(TASK, TASK.example)
    judge = TaskJudge(TASK, Failing(SandboxRefused("no")), concurrency=2, max_unavailable=1.0)
    with pytest.raises(SandboxRefused):
        asyncio.run(judge.judge([prompt], [rollout("```\nx\n```", prompt=prompt.prompt_id)]))


@pytest.mark.parametrize("numbers", [{"reward": 0.0}, {"pass_fraction": 0.0}, {"vote": "x"}, {"reward": 1.0}])
def test_the_record_itself_refuses_a_number_without_a_verdict(numbers: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"reward": None, "text": "", "duration_s": 0.0, **numbers}
    with pytest.raises(ValueError, match="3/p/1: no verdict, and yet"):
        Feedback(rollout_id=RolloutId(3, "p", 1), outcome=Outcome.UNAVAILABLE, **fields)
