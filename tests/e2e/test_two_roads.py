"""Future credit through the whole stack, held to a prediction on paper (``tasks/two_roads.py``)."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import pytest

from launchers.jobplan import Job
from megatron_distil.tasks.two_roads import first_road_shares
from tests.quickstart import Edit, launched, metrics, train_plan, values, warm_start
from tests.wrong_credit import HEAD, KINDS

STEPS, SETTLED = 40, 20
LONGEST_S = 900.0
SHARES = first_road_shares()


def trained(folder: Path, *settings: str, edit: Edit = lambda job: job) -> float:
    """The share of the first road, mean of the evaluations when it has settled."""
    plan = train_plan(warm_start("two_roads"), folder, (f"train.num_steps={STEPS}", *settings), edit=edit)
    with launched(plan, folder) as running:
        assert running.wait(LONGEST_S) == 0, running.text()[-3000:]
    name = "eval/first_road_share"
    shares = [row[name] for row in metrics(folder) if name in row and row["step"] >= SETTLED]
    assert len(shares) == 3
    assert max(values(folder, "sync/logprob_gap_nats")) < 1e-4
    return mean(shares)


def with_credit(kind: str, job: Job) -> Job:
    """The same command with a wrong credit."""
    at = job.command.index("megatron_distil")
    return replace(job, command=(*job.command[:at], "tests.wrong_credit", kind, *job.command[at + 1 :], HEAD))


def test_summed_credit_leaves_the_road_that_costs_later(tmp_path):
    assert trained(tmp_path) == pytest.approx(SHARES.sum, abs=0.03)
    before = values(tmp_path, "eval/first_road_share")[0]
    assert 0.4 < before < 0.6
    assert values(tmp_path, "eval/avg_at_8")[-1] > 0.85


@pytest.mark.full
def test_mean_credit_leaves_it_less_often(tmp_path):
    assert trained(tmp_path, "objective.future=mean") == pytest.approx(SHARES.mean, abs=0.04)


@pytest.mark.full
def test_local_cross_entropy_copies_the_choice_of_the_teacher(tmp_path):
    assert trained(tmp_path, "objective.future=none") == pytest.approx(SHARES.none, abs=0.05)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_credit_misses_the_prediction(tmp_path, kind):
    assert trained(tmp_path, edit=partial(with_credit, kind)) < 0.55
