from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product

import pytest

from megatron_distil.config.schema import EvalConfig, EvalSet
from megatron_distil.evals import HeldOut, RunEvals, best_at_k, count, maj_at_k, pass_at_k, tried
from megatron_distil.metrics.log import Outlets, RunLog
from megatron_distil.metrics.reduce import Totals
from megatron_distil.types import Feedback, FinishReason, Outcome, Prompt, Rollout
from tests.records import feedback, prompt, rollout

PASSED, FAILED, LOST = Outcome.PASSED, Outcome.FAILED, Outcome.UNAVAILABLE


@pytest.mark.parametrize("num_samples", range(1, 7))
def test_pass_at_k_is_the_share_of_all_draws_with_a_passing_one(num_samples: int):
    for num_passed in range(num_samples + 1):
        outcomes = [True] * num_passed + [False] * (num_samples - num_passed)
        for k in range(1, num_samples + 1):
            draws = list(combinations(outcomes, k))
            assert pass_at_k(num_samples, num_passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_more_than_was_sampled_is_refused():
    with pytest.raises(ValueError, match="pass@4 cannot be told from 3 samples"):
        pass_at_k(3, 1, 4)


def test_the_k_that_are_tried():
    assert [tried(n) for n in (1, 2, 6, 8)] == [[1], [2], [2, 4, 6], [2, 4, 8]]


def best_by_enumeration(rewards: Sequence[float], k: int) -> float:
    draws = list(product(rewards, repeat=k))
    return sum(map(max, draws)) / len(draws)


def majority_by_enumeration(votes: Sequence[str], rewards: Sequence[float], k: int) -> float:
    """Over every draw with replacement; of several most frequent votes, the one that is drawn first."""
    total = 0.0
    draws = list(product(range(len(votes)), repeat=k))
    for drawn in draws:
        cast = [votes[index] for index in drawn]
        most = max(map(cast.count, cast))
        total += rewards[next(index for index in drawn if cast.count(votes[index]) == most)]
    return total / len(draws)


@pytest.mark.parametrize("rewards", [[1.0], [0.0, 1.0], [0.2, 0.9, 0.2], [1.0, 0.0, 0.0, 0.5, 0.0]])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_best_at_k_is_the_mean_over_all_draws_with_replacement(rewards: list[float], k: int):
    assert best_at_k(rewards, k) == pytest.approx(best_by_enumeration(rewards, k))


@pytest.mark.parametrize(
    ("votes", "rewards"),
    [
        ("a", [1.0]),
        ("ab", [1.0, 0.0]),
        ("aab", [1.0, 1.0, 0.0]),
        ("abbc", [1.0, 0.0, 0.0, 0.0]),
        ("aabbc", [1.0, 1.0, 0.0, 0.0, 0.5]),
    ],
)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_maj_at_k_tends_to_the_mean_over_all_draws(votes: str, rewards: list[float], k: int):
    exact = majority_by_enumeration(votes, rewards, k)
    # 1000 draws of a number in [0, 1]: the standard error is .016 at most
    assert maj_at_k(list(votes), rewards, k) == pytest.approx(exact, abs=0.05)
    assert maj_at_k(list(votes), rewards, k) == maj_at_k(list(votes), rewards, k)


def test_a_frequent_wrong_answer_beats_a_rare_right_one():
    votes, rewards = ["right", *["wrong"] * 7], [1.0, *[0.0] * 7]
    assert maj_at_k(votes, rewards, 8) < 0.1
    assert best_at_k(rewards, 8) == pytest.approx(1 - (7 / 8) ** 8)
    assert pass_at_k(8, 1, 8) == 1.0


def test_votes_and_shares_are_counted_where_every_response_has_them():
    def judged(vote: str) -> Mapping[str, float]:
        rollouts, said = [], []
        for sample, outcome in enumerate([PASSED, FAILED]):
            one = rollout("a", sample)
            rollouts.append(one)
            reward = float(outcome is PASSED)
            votes = {"vote": vote if sample else "v"} if vote else {}
            said.append(replace(feedback(one, outcome, reward=reward), pass_fraction=(1 + reward) / 2, **votes))
        totals = Totals()
        count(totals, HeldOut(prefix="", prompts=[]), rollouts, said, num_samples=2)
        return totals.means()

    with_votes = judged("w")
    assert with_votes["eval/pass_fraction"] == 0.75
    assert with_votes["eval/best_at_2"] == 0.75
    assert with_votes["eval/maj_at_2"] == pytest.approx(0.5, abs=0.05)
    assert not {"eval/best_at_2", "eval/maj_at_2"} & set(judged(""))


def test_a_set_is_counted_prompt_by_prompt():
    outcomes = {"a": [PASSED, PASSED, FAILED, FAILED], "b": [FAILED, FAILED, FAILED, LOST], "c": [LOST] * 4}
    rollouts, said = [], []
    for name, each in outcomes.items():
        for sample, outcome in enumerate(each):
            one = rollout(
                name, sample, tokens=sample + 1, finish=FinishReason.LENGTH if sample == 3 else FinishReason.STOP
            )
            rollouts.append(one)
            reward = None if outcome is LOST else float(outcome is PASSED)
            said.append(feedback(one, outcome, reward=reward))
    totals = Totals()
    count(totals, HeldOut(prefix="new_", prompts=[]), rollouts, said, num_samples=4)
    assert totals.means() == pytest.approx(
        {
            "eval/new_avg_at_4": 0.25,  # a: 2 of 4, b: 0 of 3; c has no verdict at all
            "eval/new_pass_at_2": (5 / 6 + 0.0) / 2,
            "eval/new_pass_at_4": 1.0,  # b has three verdicts only: nothing can be said of four
            "eval/new_reward": 2 / 7,
            "eval/new_response_tokens": 2.5,
            "eval/new_truncated_frac": 0.25,
            "eval/new_unavailable_frac": 5 / 12,
        }
    )


class Students:
    """Passes each prompt as often as its name says."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    async def sample(self, prompts: Sequence[Prompt], step: int) -> list[Rollout]:
        self.steps.append(step)
        return [rollout(one.prompt_id, sample, step=step) for one in prompts for sample in range(2)]


class Judges:
    """The first ``int(name)`` samples pass."""

    async def judge(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Feedback]:
        return [
            feedback(one, PASSED if one.rollout_id.sample < int(one.rollout_id.prompt) else FAILED, reward=0.5)
            for one in rollouts
        ]


class Kept:
    def __init__(self) -> None:
        self.lines: list[tuple[int, Mapping[str, float]]] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.lines.append((step, values))

    def close(self) -> None: ...


def evals_of(*, every_steps: int, num_steps: int = 7, is_first_replica: bool = True) -> tuple[RunEvals, Kept, Students]:
    kept, students = Kept(), Students()
    evals = RunEvals(
        config=EvalConfig(every_steps=every_steps, samples_per_prompt=2, sets=(EvalSet(data="a"),)),
        num_steps=num_steps,
        sets=[HeldOut(prefix="", prompts=[prompt("0"), prompt("2")]), HeldOut(prefix="new_", prompts=[prompt("1")])],
        sampler=students,
        judge=Judges(),
        measures=lambda prompt, text: {"first_road_share": float(text == "response 0")},
        on_head=lambda work: asyncio.run(work()),  # pyright: ignore[reportArgumentType]  # a coroutine is what work returns
        is_first_replica=is_first_replica,
        log=RunLog(outlets=Outlets(sinks=[kept])),
    )
    return evals, kept, students


def test_evaluations_are_due_before_between_and_after():
    evals, _, _ = evals_of(every_steps=3)
    assert [step for step in range(8) if evals.is_due(step)] == [0, 3, 6, 7]
    evals, _, _ = evals_of(every_steps=0)
    assert not any(evals.is_due(step) for step in range(8))


def test_an_evaluation_writes_one_line_for_all_sets():
    evals, kept, students = evals_of(every_steps=3)
    for step in range(4):
        evals.run_if_due(step)
    assert students.steps == [0, 0, 3, 3]
    assert [step for step, _ in kept.lines] == [0, 3]
    values = kept.lines[0][1]
    assert {
        name: values[name] for name in ("eval/avg_at_2", "eval/pass_at_2", "eval/new_avg_at_2", "eval/new_pass_at_2")
    } == {
        "eval/avg_at_2": 0.5,
        "eval/pass_at_2": 0.5,
        "eval/new_avg_at_2": 0.5,
        "eval/new_pass_at_2": 1.0,
    }
    assert values["eval/first_road_share"] == values["eval/new_first_road_share"] == 0.5


def test_other_replicas_wait_and_sample_nothing():
    evals, _, students = evals_of(every_steps=3, is_first_replica=False)
    assert evals.run(0) == {}
    assert students.steps == []


def test_the_table_is_returned():
    evals, kept, _ = evals_of(every_steps=0)
    assert evals.run(5) == kept.lines[0][1]
