"""LiveCodeBench end to end: data as upstream packs them, our rows, the client, a real service at the machine's highest level."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_distil.config.schema import FeedbackConfig, TaskConfig
from megatron_distil.feedback.code import SandboxPool
from megatron_distil.feedback.judge import TaskJudge
from megatron_distil.http import Http
from megatron_distil.registry import Record, Registry
from megatron_distil.tasks.livecodebench import LiveCodeBench
from megatron_distil.tasks.livecodebench_data import Selection, prepare
from megatron_distil.types import Feedback, Outcome, Prompt, Rollout
from tests.contest import IN_WINDOW, Attempt, write_upstream
from tests.sandbox_service import Service
from tests.task_records import prompt_from, rollout

CONFIG = FeedbackConfig(test_timeout_s=1.0, request_timeout_s=120.0, budget_s=240.0, min_isolation=1)
WORKERS = 2


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service("--min-level", "1", "--workers", str(WORKERS)) as started:
        yield started


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lcb")
    write_upstream(folder / "upstream.jsonl")
    prepare(folder, [str(folder / "upstream.jsonl")], Selection())
    return folder


def prompts(data: Path, task: LiveCodeBench, name: str = "test") -> dict[str, Prompt]:
    rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
    return {row["id"]: prompt_from(task, row) for row in rows}


def task_of(data: Path, **settings: object) -> LiveCodeBench:
    table = {"name": "livecodebench", "tests": str(data / "tests"), **settings}
    return LiveCodeBench(TaskConfig.model_validate(table))


def judged(
    service: Service, folder: Path, task: LiveCodeBench, known: dict[str, Prompt], rollouts: list[Rollout]
) -> list[Feedback]:
    registry = Registry(folder)
    registry.write(Record("sandbox", "s0", service.url, os.getpid(), 0, "ready", 0, time.time() + 600))

    async def main() -> list[Feedback]:
        async with Http() as http:
            pool = SandboxPool(http, registry, CONFIG)
            judge = TaskJudge(task, pool, concurrency=64, max_unavailable=0.0)
            return await judge.judge(list(known.values()), rollouts)

    return asyncio.run(main())


def answer(code: str, prompt: str, sample: int) -> Rollout:
    return rollout(f"I would write:\n```python\n{code}\n```\n", prompt=prompt, sample=sample)


def test_every_program_gets_its_verdict_reward_and_feedback(service: Service, data: Path, tmp_path: Path) -> None:
    task = task_of(data)
    known = prompts(data, task)
    attempts = [
        (contest.name, sample, attempt)
        for contest in IN_WINDOW
        for sample, attempt in enumerate([Attempt(contest.right, Outcome.PASSED, "", 1.0), *contest.others])
    ]
    attempts.sort(key=lambda entry: entry[2].outcome is Outcome.TIMEOUT)
    rollouts = [answer(attempt.code, name, sample) for name, sample, attempt in attempts]
    num_quick = sum(attempt.outcome is not Outcome.TIMEOUT for _, _, attempt in attempts)
    feedback = judged(service, tmp_path, task, known, rollouts[:num_quick])
    feedback += judged(service, tmp_path, task_of(data, stop_after_timeouts=1), known, rollouts[num_quick:])
    assert all(
        "Passed 0 of 1 tests." in said.text for said in feedback[num_quick:]
    )  # and did not burn the time of others
    wrong: list[str] = []
    right_votes = {name: said.vote for (name, sample, _), said in zip(attempts, feedback, strict=True) if sample == 0}
    for (name, sample, wanted), said in zip(attempts, feedback, strict=True):
        is_passed = wanted.outcome is Outcome.PASSED
        fraction = 1.0 if is_passed else wanted.fraction
        is_right = (
            (said.outcome, said.reward) == (wanted.outcome, float(is_passed))
            and fraction in (None, said.pass_fraction)
            and wanted.says in said.text
            and (said.text == "") == is_passed
            and bool(said.vote)
        )
        if not is_right:
            wrong.append(f"{name}/{sample}: {said.outcome} {said.reward} {said.pass_fraction} {said.text!r}")
        if not is_passed:
            assert said.vote != right_votes[name], (name, sample)
    assert wrong == []
    assert len(attempts) == 68
    requests = service.count("sandbox_tests_uploaded_total")
    assert requests == len({prompt.task["tests"] for prompt in known.values()})


def test_what_the_teacher_reads_is_what_was_wrong(service: Service, data: Path, tmp_path: Path) -> None:
    task = task_of(data, max_failing=1)
    known = prompts(data, task)
    (said,) = judged(service, tmp_path, task, known, [answer("print(input())", "two-apples", 0)])
    assert said.text == (
        "Passed 0 of 4 tests.\n\nTest 1: Wrong Answer\nInput:\n```\n0 0\n```\nOutput:\n```\n0 0\n```\nExpected:\n```\n0\n```"
    )
    hidden = task_of(data, max_failing=1, show_expected=False)
    (said,) = judged(service, tmp_path, hidden, known, [answer("print(input()) ", "two-apples", 0)])
    assert "Expected" not in said.text
    assert "Output:" in said.text


def test_training_stops_where_it_is_told_to_and_counts_the_rest_as_failed(
    service: Service, data: Path, tmp_path: Path
) -> None:
    task = task_of(data, stop_after=1, reward="pass_fraction")
    known = prompts(data, task, "train")
    assert {prompt.task["num_tests"] for prompt in known.values()} == {1, 2}
    feedback = judged(
        service,
        tmp_path,
        task,
        known,
        [
            answer("raise SystemExit(1)", "leap", 0),
            answer("print('LEAP' if int(input()) % 4 == 0 else 'COMMON')", "leap", 1),
        ],
    )
    assert (feedback[0].outcome, feedback[0].reward) == (Outcome.FAILED, 0.0)
    assert "Passed 0 of 1 tests." in feedback[0].text
    assert feedback[1].reward == feedback[1].pass_fraction


@pytest.mark.parametrize("profile", ["lcb", "sdpo"])
def test_right_programs_pass_under_other_rules(service: Service, data: Path, tmp_path: Path, profile: str) -> None:
    """SDPO's harness looks into no class and reads arguments between blanks: those programs are left out there."""
    task = task_of(data, profile=profile)
    known = prompts(data, task)
    taken = [
        contest
        for contest in IN_WINDOW
        if profile == "lcb"
        or ("class Solution" not in contest.right and contest.name not in ("pairs", "flood", "average"))
    ]
    assert len(taken) > 10
    feedback = judged(service, tmp_path, task, known, [answer(one.right, one.name, 0) for one in taken])
    missed = [
        f"{one.name}: {said.outcome} {said.text}"
        for one, said in zip(taken, feedback, strict=True)
        if said.outcome is not Outcome.PASSED
    ]
    assert missed == []


def test_responses_without_a_program_ask_nothing_of_the_sandbox(service: Service, data: Path, tmp_path: Path) -> None:
    task = task_of(data)
    before = service.count("sandbox_jobs_total")
    feedback = judged(
        service,
        tmp_path,
        task,
        prompts(data, task),
        [rollout("x" * 20, prompt="leap"), rollout("```", prompt="stairs")],
    )
    assert [(said.outcome, said.reward, said.pass_fraction) for said in feedback] == [(Outcome.INVALID, 0.0, 0.0)] * 2
    assert service.count("sandbox_jobs_total") - before <= 1  # the question whether it is ready
