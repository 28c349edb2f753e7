"""The gradient of a tabular policy by enumeration of all its sequences: no sampling, no tolerance games."""

import itertools

import pytest
import torch

from megatron_distil import algo
from megatron_distil.algo.objectives import objective_from_table
from tests.tokens import tokens_of

V, H, EOS = 3, 4, 2


def states() -> dict[tuple[int, ...], int]:
    prefixes = [p for n in range(H) for p in itertools.product(range(V), repeat=n) if EOS not in p]
    return {prefix: index for index, prefix in enumerate(prefixes)}


def sequences() -> list[tuple[int, ...]]:
    ended = [(*p, EOS) for n in range(H) for p in itertools.product(range(V), repeat=n) if EOS not in p]
    return ended + [p for p in itertools.product(range(V), repeat=H) if EOS not in p]


INDEX = states()
TEACHER = torch.randn(len(INDEX), V, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2
POLICY = torch.randn(len(INDEX), V, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
LATER = {"mean": False, "discount": 1.0}


def rows(sequence):
    return torch.tensor([INDEX[sequence[:t]] for t in range(len(sequence))]), torch.tensor(sequence)


def token_costs(logits, tail):
    """[states] cross-entropy at every state on the teacher's top 2."""
    top = algo.top_k(TEACHER, 2)
    student = algo.columns(logits, top.ids, torch.zeros(len(INDEX), dtype=torch.int64))
    return algo.topk_cross_entropy(top.logprobs, student, tail=tail)


def exact_gradient(tail):
    """d/dtheta of sum_y pi(y) sum_t ce_t, the probabilities differentiated too."""
    logits = POLICY.clone().requires_grad_()
    logprobs, ce = logits.log_softmax(-1), token_costs(logits, tail)
    total = 0.0
    for sequence in sequences():
        at, actions = rows(sequence)
        total = total + logprobs[at, actions].sum().exp() * ce[at].sum()
    total.backward()
    return logits.grad


def surrogate_gradient(objective, tail, spoil=None):
    """Expectation over the policy of the gradient of the objective's terms."""
    logits = POLICY.clone().requires_grad_()
    top, total = algo.top_k(TEACHER, 2), 0.0
    weights = POLICY.log_softmax(-1)
    for sequence in sequences():
        at, actions = rows(sequence)
        sampled = weights[at, actions]

        def future(cost, *, mean, discount):
            mask, segments = torch.ones(len(cost), dtype=torch.bool), torch.zeros(len(cost), dtype=torch.int64)
            if spoil is not None:
                return spoil(cost)
            return algo.future_credit(cost, mask, segments, mean=mean, discount=discount)

        tokens = tokens_of(algo.columns(logits[at], top.ids[at], actions), top.logprobs[at], sampling_logprobs=sampled)
        terms = objective.terms(tokens, future)
        total = total + sampled.sum().exp() * (terms.imitation + terms.credit)
    total.backward()
    return logits.grad


@pytest.mark.parametrize("tail", ["none", "bucket", "renorm"])
def test_distil_has_the_gradient_of_the_objective(tail):
    objective = objective_from_table({"name": "distil", "future": "sum", "tail": tail})
    torch.testing.assert_close(surrogate_gradient(objective, tail), exact_gradient(tail), rtol=1e-10, atol=1e-12)


def test_including_the_token_itself_adds_noise_but_no_bias():
    objective = objective_from_table({"name": "distil", "future": "sum"})
    inclusive = surrogate_gradient(objective, "bucket", lambda cost: cost.detach().flip(0).cumsum(0).flip(0))
    torch.testing.assert_close(inclusive, exact_gradient("bucket"), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("table", "spoil"),
    [
        ({"future": "none"}, None),
        ({"future": "mean"}, None),
        ({"future": "sum", "future_form": "reweight"}, None),
        ({"future": "sum", "future_coef": 0.5}, None),
        ({"future": "sum", "discount": 0.5}, None),
        ({"future": "sum", "cost": "kl"}, None),
        ({"future": "sum", "future_clip": 0.5}, None),
        ({"future": "sum", "token_clip": 0.8}, None),
        ({"future": "sum"}, lambda cost: -algo.future_credit(cost, cost > -9, (cost > 99).int())),
        ({"future": "sum"}, lambda cost: cost.detach().cumsum(0)),
    ],
    ids=["no credit", "mean", "reweight", "half", "discount", "kl", "clip", "token clip", "sign", "earlier tokens"],
)
def test_the_check_above_can_fail(table, spoil):
    objective = objective_from_table({"name": "distil"} | table)
    assert not torch.allclose(surrogate_gradient(objective, "bucket", spoil), exact_gradient("bucket"), rtol=1e-3)


def test_the_gradient_vanishes_under_the_kl_cost_where_teacher_and_student_agree():
    same = algo.top_k(POLICY, 2)
    logits = POLICY.clone().requires_grad_()
    actions = POLICY.argmin(-1)
    tokens = tokens_of(
        algo.columns(logits, same.ids, actions),
        same.logprobs,
        sampling_logprobs=POLICY.log_softmax(-1).gather(-1, actions[:, None])[:, 0],
    )

    def future(cost, *, mean, discount):
        assert cost.abs().max() < 1e-12
        return cost * 3

    terms = objective_from_table({"name": "distil", "future": "sum", "cost": "kl"}).terms(tokens, future)
    (terms.imitation + terms.credit).backward()
    assert logits.grad.abs().max() < 1e-12
