"""Natural policy gradient on tables: what the theory promises, and what a plain step does instead."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from megatron_distil import algo
from tests.tabular import exact_gradient, expected_gradient, process, relative_error

REWARD = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
STUDENT = torch.tensor([1 / 20, 9 / 20, 1 / 2], dtype=torch.float64)
TEACHER = torch.tensor([3 / 10, 1 / 20, 13 / 20], dtype=torch.float64)
LOCAL = {
    "reverse KL": algo.reverse_kl,
    "JS": algo.jensen_shannon,
    "forward CE": algo.topk_cross_entropy,
}


def logit_gradient(name, probs, teacher=TEACHER):
    """[V] of one state whose support is the whole vocabulary."""
    logits = probs.log()[None].requires_grad_()
    student = algo.columns(logits, torch.arange(len(probs))[None], torch.zeros(1, dtype=torch.int64))
    LOCAL[name](teacher.log()[None], student, tail="none").sum().backward()
    return logits.grad[0]


def fisher(probs):
    return torch.diag_embed(probs) - probs[..., :, None] * probs[..., None, :]


def change(name, step, probs):
    """d pi / d eta of a step on the logits: against the gradient, or against it over the Fisher matrix.

    d pi / d z is the Fisher matrix itself, so the natural step moves the probabilities by the logit gradient.
    """
    gradient = logit_gradient(name, probs)
    logit_step = -torch.linalg.pinv(fisher(probs)) @ gradient if step == "natural" else -gradient
    return fisher(probs) @ logit_step


def test_the_counterexample_is_the_one_of_the_paper():
    assert [(REWARD * p).sum().item() for p in (STUDENT, TEACHER, TEACHER - STUDENT)] == pytest.approx(
        [11 / 40, 13 / 40, 1 / 20], abs=1e-15
    )
    assert (STUDENT / TEACHER).log().tolist() == pytest.approx([-1.791759, 2.197225, -0.262364], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "step", "moves", "gain"),
    [
        ("reverse KL", "natural", [0.127987, -0.643160, 0.515173], -0.193593),
        ("reverse KL", "plain", [0.007671, -0.277976, 0.270304], -0.131317),
        ("JS", "natural", [0.034619, -0.102555, 0.067937], -0.016659),
        ("JS", "plain", [0.002253, -0.041447, 0.039194], -0.018470),
        ("forward CE", "natural", [0.25, -0.40, 0.15], 0.05),
        ("forward CE", "plain", [0.017125, -0.138375, 0.121250], -0.052062),
    ],
)
def test_a_step_moves_the_policy_as_in_the_table(name, step, moves, gain):
    got = change(name, step, STUDENT)
    assert got.tolist() == pytest.approx(moves, abs=1e-6)
    assert (got * REWARD).sum().item() == pytest.approx(gain, abs=1e-6)
    if (name, step) == ("forward CE", "natural"):
        torch.testing.assert_close(got, TEACHER - STUDENT, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "first", "values", "is_monotone"),
    [
        (
            "reverse KL",
            [0.062799, 0.385684, 0.551517],
            [0.25564, 0.24138, 0.22451, 0.24090, 0.28859, 0.32441],
            False,
        ),
        ("forward CE", [0.075, 0.41, 0.515], [0.28000, 0.28450, 0.29548, 0.30757, 0.31892, 0.32491], True),
    ],
)
def test_natural_steps_of_cross_entropy_are_monotone(name, first, values, is_monotone):
    probs, path = STUDENT, []
    for _ in range(60):
        probs = probs + 0.1 * change(name, "natural", probs)
        path.append(probs)
    gains = [(REWARD * p).sum().item() for p in (STUDENT, *path)]
    assert path[0].tolist() == pytest.approx(first, abs=1e-6)
    assert [gains[n] for n in (1, 2, 5, 10, 20, 60)] == pytest.approx(values, abs=6e-6)
    assert all(later >= earlier for earlier, later in pairwise(gains)) == is_monotone


# ---- whole sequences


def credit_of_actions(one):
    """Visits [S] of each state, and Q [S, V]: expected later cost after an action, by summing over all sequences."""
    cost = torch.where(one.mask, -(one.teacher * one.logits.log_softmax(-1)).sum(-1)[one.states], 0.0)
    later = torch.stack([cost[:, t + 1 :].sum(-1) for t in range(cost.shape[1])], -1)
    weight = torch.where(one.mask, one.probabilities(one.logits)[:, None], 0.0).flatten()
    size = one.logits.numel()
    pair = one.states.flatten() * one.logits.shape[1] + one.actions.flatten()
    visits = torch.zeros(size, dtype=torch.float64).index_add(0, pair, weight)
    total = torch.zeros(size, dtype=torch.float64).index_add(0, pair, weight * later.flatten())
    return visits.view(one.logits.shape).sum(-1), (total / visits).view(one.logits.shape)


def natural_step(one, eta):
    """NPG-DistIL: pi'(a|s) in proportion to pi(a|s) exp(eta (p(a|s) / pi(a|s) - Q(s, a)))."""
    probs = one.logits.softmax(-1)
    return (one.logits + eta * (one.teacher / probs - credit_of_actions(one)[1])).log_softmax(-1)


@pytest.mark.parametrize("eos", [None, 2])
def test_at_each_state_the_gradient_is_the_local_pull_and_the_credit_of_actions(eos):
    one = process(eos=eos)
    visits, credit = credit_of_actions(one)
    probs = one.logits.softmax(-1)
    written_out = (probs - one.teacher) + probs * (credit - (probs * credit).sum(-1, keepdim=True))
    assert relative_error(visits[:, None] * written_out, exact_gradient(one)) <= 1e-12
    assert relative_error(expected_gradient(one, {"name": "distil", "future": "sum"}), exact_gradient(one)) <= 1e-12


@pytest.mark.parametrize("eos", [None, 2])
def test_the_natural_update_goes_against_the_gradient_over_the_fisher_matrix(eos):
    one = process(eos=eos)
    probs, (visits, _) = one.logits.softmax(-1), credit_of_actions(one)
    gradient = expected_gradient(one, {"name": "distil", "future": "sum"})
    logit_step = -torch.einsum("sij,sj->si", torch.linalg.pinv(visits[:, None, None] * fisher(probs)), gradient)
    want = torch.einsum("sij,sj->si", fisher(probs), logit_step)
    eta = 1e-6
    got = (natural_step(one, eta).exp() - probs) / eta
    assert relative_error(got, want) < 1e-4


@pytest.mark.parametrize("eos", [None, 2])
def test_natural_updates_lower_the_cost_of_the_sequences(eos):
    one = process(eos=eos)

    def value(logits):
        cost = torch.where(one.mask, -(one.teacher * logits.log_softmax(-1)).sum(-1)[one.states], 0.0)
        return (one.probabilities(logits) * cost.sum(-1)).sum().item()

    values = [value(one.logits)]
    for _ in range(30):
        one = replace(one, logits=natural_step(one, 0.05))
        values.append(value(one.logits))
    assert all(later < earlier for earlier, later in pairwise(values))
    assert values[-1] < 0.75 * values[0]
