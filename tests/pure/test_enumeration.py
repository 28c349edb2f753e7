"""The gradient of a tabular policy by enumeration of all its sequences: no sampling, no tolerance games."""

import itertools
from functools import cache

import pytest
import torch

from megatron_distil import algo
from megatron_distil.algo.objectives import objective_from_table
from tests.tabular import (
    V,
    cosine,
    exact_gradient,
    expected_gradient,
    local_cost,
    process,
    relative_error,
    scan_of,
    taught_by_itself,
    tokens_at,
)

DISTIL = {"name": "distil", "future": "sum"}


@cache
def horizon(eos):
    return process(eos=eos)


PROCESSES = pytest.mark.parametrize("one", [horizon(None), horizon(2)], ids=["fixed", "eos"])


def per_token(one):
    """Weights whose sum over a sequence is its probability: the mean over its tokens."""
    return (one.probabilities(one.logits) / one.lengths)[:, None].expand(one.mask.shape)


def inclusive(cost, mask, segments, *, mean, discount):
    return algo.future_credit(cost, mask, segments, mean=mean, discount=discount) + cost.detach()


def praising(cost, mask, segments, *, mean, discount):
    return -algo.future_credit(cost, mask, segments, mean=mean, discount=discount)


def backwards(cost, mask, segments, *, mean, discount):
    flipped = (part.flip(0) for part in (cost, mask, segments))
    return algo.future_credit(*flipped, mean=mean, discount=discount).flip(0)


def unmasked(cost, mask, segments, *, mean, discount):
    return algo.future_credit(cost, torch.ones_like(mask), segments, mean=mean, discount=discount)


def unsegmented(cost, mask, segments, *, mean, discount):
    return algo.future_credit(cost, mask, torch.zeros_like(segments), mean=mean, discount=discount)


@PROCESSES
def test_the_process_is_the_one_of_the_figures(one):
    is_fixed = bool(one.mask.all())
    assert (len(one.logits), len(one.mask)) == ((40, 81) if is_fixed else (15, 31))
    probabilities = one.probabilities(one.logits)
    assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-12)
    cost = torch.where(one.mask, local_cost(one.logits, one.teacher, "none", V)[one.states], 0.0)
    value = (probabilities * cost.sum(-1)).sum().item()
    assert value == pytest.approx(5.836916 if is_fixed else 3.224521, abs=1e-6)


@pytest.mark.parametrize(("tail", "k"), [("none", V), ("bucket", V), ("none", 2), ("bucket", 2), ("renorm", 2)])
@PROCESSES
def test_distil_has_the_gradient_of_its_objective(one, tail, k):
    got = expected_gradient(one, DISTIL | {"tail": tail}, k=k)
    assert relative_error(got, exact_gradient(one, tail="none" if k == V else tail, k=k)) <= 1e-12


@PROCESSES
def test_including_the_token_itself_adds_noise_but_no_bias(one):
    got = expected_gradient(one, DISTIL, scan=inclusive)
    assert relative_error(got, exact_gradient(one)) <= 1e-12


@PROCESSES
def test_a_baseline_of_the_state_adds_no_bias(one):
    credit = later_costs(one)
    value = torch.zeros(len(one.logits), dtype=torch.float64)
    weight = torch.where(one.mask, one.probabilities(one.logits)[:, None], 0.0)
    visits = value.index_add(0, one.states.flatten(), weight.flatten())
    value = value.index_add(0, one.states.flatten(), (weight * credit).flatten()) / visits
    for baseline in (value[one.states], torch.full_like(credit, 1.7)):
        got = expected_gradient(one, DISTIL, baseline=baseline)
        assert relative_error(got, exact_gradient(one)) <= 1e-12


def later_costs(one):
    """[N, L] sum of the costs of later tokens, token by token."""
    cost = torch.where(one.mask, local_cost(one.logits, one.teacher, "none", V)[one.states], 0.0)
    return torch.stack([cost[:, t + 1 :].sum(-1) for t in range(cost.shape[1])], -1)


# (cosine with the exact gradient, norm over that of the exact gradient) at the fixed horizon and with an end token
WRONG = {
    "no credit": ({"name": "ce", "tail": "none"}, {}, (0.9082, 0.911), (0.9405, 0.446)),
    "mean": (DISTIL | {"future": "mean"}, {}, (0.9734, 0.938), (0.9926, 0.681)),
    "mean over tokens": (DISTIL, {"weights": per_token}, (1.0, 0.250), (0.9925, 0.382)),
    "mean, over tokens": (DISTIL | {"future": "mean"}, {"weights": per_token}, (0.9734, 0.235), (0.9819, 0.299)),
    "reweight": (DISTIL | {"future": "mean", "future_form": "reweight"}, {}, (0.9040, 2.044), (0.9391, 0.818)),
    "sign": (DISTIL, {"scan": praising}, (0.6512, 1.005), (-0.4673, 0.343)),
}


@pytest.mark.parametrize("name", WRONG)
@PROCESSES
def test_what_is_not_the_gradient_is_as_far_from_it_as_measured(one, name):
    table, options, *figures = WRONG[name]
    options = {key: value(one) if key == "weights" else value for key, value in options.items()}
    got, want = expected_gradient(one, table, **options), exact_gradient(one)
    expected_cosine, expected_norm = figures[0 if one.mask.all() else 1]
    assert cosine(got, want) == pytest.approx(expected_cosine, abs=6e-5)
    assert (got.norm() / want.norm()).item() == pytest.approx(expected_norm, abs=6e-4)


@pytest.mark.parametrize(
    ("tail", "k", "figures"),
    [
        ("none", 2, [(0.9104, 0.894), (0.9337, 0.501)]),
        ("bucket", 2, [(0.9082, 0.911), (0.9405, 0.446)]),
        ("renorm", 2, [(0.9462, 0.809), (0.9771, 0.560)]),
    ],
)
@PROCESSES
def test_local_cross_entropy_is_as_far_from_its_own_gradient_as_measured(one, tail, k, figures):
    got, want = expected_gradient(one, {"name": "ce", "tail": tail}, k=k), exact_gradient(one, tail=tail, k=k)
    expected_cosine, expected_norm = figures[0 if one.mask.all() else 1]
    assert cosine(got, want) == pytest.approx(expected_cosine, abs=6e-5)
    assert (got.norm() / want.norm()).item() == pytest.approx(expected_norm, abs=6e-4)


@PROCESSES
def test_a_credit_that_carries_gradient_is_as_far_as_measured(one):
    logits = one.logits.clone().requires_grad_()
    tokens = tokens_at(one, logits, one.probabilities(one.logits)[:, None].expand(one.mask.shape), V)
    ce = algo.topk_cross_entropy(tokens.teacher_logprobs, tokens.student, tail="none")
    masked = torch.where(one.mask, ce.view(one.mask.shape), 0.0)
    attached = (masked.flip(-1).cumsum(-1).flip(-1) - masked).flatten()
    (tokens.weights * (ce + attached * tokens.student.sampled)).sum().backward()
    want = 0.7759 if one.mask.all() else 0.9550
    assert cosine(logits.grad, exact_gradient(one)) == pytest.approx(want, abs=6e-5)
    # and the terms cannot be given such a credit: they treat it as a constant
    detached = algo.distil_terms(
        ce.detach(), tokens.student.sampled.detach().requires_grad_(), attached, tokens.weights
    )
    (gradient,) = torch.autograd.grad(detached.credit, logits, allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize(
    ("table", "options"),
    [
        (DISTIL | {"future_coef": 0.5}, {}),
        (DISTIL | {"discount": 0.5}, {}),
        (DISTIL | {"cost": "kl"}, {}),
        (DISTIL | {"future_clip": 0.5}, {}),
        (DISTIL | {"token_clip": 0.8}, {}),
        (DISTIL, {"scan": backwards}),
        (DISTIL, {"scan": unmasked}),
        (DISTIL, {"scan": unsegmented}),
    ],
    ids=["half", "discount", "kl", "clip", "token clip", "earlier tokens", "padding", "neighbours"],
)
def test_the_checks_above_can_fail(table, options):
    one = horizon(2)
    assert relative_error(expected_gradient(one, table, **options), exact_gradient(one)) > 0.01


@PROCESSES
def test_parts_from_the_end_of_the_sequences_add_up(one):
    """What a staged head does: later tokens first, credit carried along."""
    objective = objective_from_table(DISTIL)
    weights = one.probabilities(one.logits)[:, None].expand(one.mask.shape)
    credit = later_costs(one)
    logits = one.logits.clone().requires_grad_()
    whole = tokens_at(one, logits, weights, V)
    columns = torch.arange(one.mask.numel()) % one.mask.shape[1]
    loss, count, largest = 0.0, 0, []
    for rows in ((columns >= 2).nonzero()[:, 0], (columns < 2).nonzero()[:, 0], torch.arange(0)):
        part = whole._replace(
            student=whole.student._replace(**{name: x[rows] for name, x in whole.student._asdict().items()}),
            **{name: x[rows] for name, x in whole._asdict().items() if name != "student"},
        )
        terms = objective.terms(part, lambda cost, *, mean, discount, rows=rows: credit.flatten()[rows])
        loss, count = loss + terms.imitation + terms.credit, count + terms.counts["loss/ce_nats"]
        largest.append(terms.maxima["loss/credit_max_nats"].item())
    loss.backward()
    assert relative_error(logits.grad, exact_gradient(one)) <= 1e-12
    cost = local_cost(one.logits, one.teacher, "none", V)[one.states]
    assert count.item() == pytest.approx(cost[one.mask].sum().item(), rel=1e-12)
    assert max(largest) == credit[one.mask].max().item()
    assert largest[-1] == -torch.inf


# ---- off policy: the sequences come from another policy


def other_policy(one):
    return {
        "weights": one.probabilities(one.behaviour)[:, None].expand(one.mask.shape),
        "sampling_logprobs": one.taken(one.behaviour),
    }


@pytest.mark.parametrize(
    ("clips", "sequence_clip", "want_cosine", "want_error"),
    [
        ({"tis_clip": "none"}, None, 0.8517, 0.537),
        ({"tis_clip": 1e9}, None, 0.9898, 0.147),
        ({"tis_clip": 2.0}, None, 0.9892, 0.151),
        ({"tis_clip": "none"}, 1e9, 1.0, 0.0),
        ({"tis_clip": "none"}, 2.0, 0.9981, 0.080),
    ],
    ids=["none", "token", "token, at most 2", "sequence", "sequence, at most 2"],
)
@pytest.mark.parametrize("path", ["engine", "step"])
def test_weights_of_another_policy_are_as_far_as_measured(clips, sequence_clip, want_cosine, want_error, path):
    one = horizon(None)
    options = other_policy(one)
    if path == "step":  # the same gap, between the policy before the step and now
        options["old_logprobs"] = options["sampling_logprobs"]
        clips = {"tis_clip": "none", "ratio_clip": clips["tis_clip"]}
    if sequence_clip is not None:
        ratio = one.probabilities(one.logits) / one.probabilities(one.behaviour)
        options["weights"] = options["weights"] * ratio.clamp(max=sequence_clip)[:, None]
    got, want = expected_gradient(one, DISTIL | clips, **options), exact_gradient(one)
    assert cosine(got, want) == pytest.approx(want_cosine, abs=6e-5)
    assert relative_error(got, want) == pytest.approx(want_error, abs=6e-4)


def test_weights_of_the_prefix_are_exact():
    one = horizon(None)
    logits = one.logits.clone().requires_grad_()
    ratio = (one.taken(one.logits) - one.taken(one.behaviour)).exp().cumprod(-1)
    prefix = torch.cat([torch.ones(len(ratio), 1, dtype=torch.float64), ratio[:, :-1]], -1).flatten()
    tokens = tokens_at(one, logits, other_policy(one)["weights"], V)
    ce = algo.topk_cross_entropy(tokens.teacher_logprobs, tokens.student, tail="none")
    credit = scan_of(one)(prefix * ce, mean=False, discount=1.0)
    terms = algo.distil_terms(prefix * ce, tokens.student.sampled, credit, tokens.weights)
    (terms.imitation + terms.credit).backward()
    assert relative_error(logits.grad, exact_gradient(one)) <= 1e-12


def test_the_other_policy_is_the_one_of_the_figures():
    one = horizon(None)
    gap = one.taken(one.behaviour).sum(-1) - one.taken(one.logits).sum(-1)
    assert (one.probabilities(one.behaviour) * gap).sum().item() == pytest.approx(0.196, abs=5e-4)


# ---- baselines


@pytest.mark.parametrize("baseline", ["loo_position", "loo_batch"])
@pytest.mark.parametrize("future", ["sum", "mean"])
def test_a_leave_one_out_baseline_adds_no_bias(baseline, future):
    """Every pair of rollouts of one prompt, as often as the policy draws it."""
    one = process(eos=2, horizon=3)
    objective = objective_from_table({"name": "distil", "future": future, "tail": "none", "baseline": baseline})
    assert objective.needs_baseline
    flat = objective.credit(tokens_at(one, one.logits, torch.ones_like(one.mask, dtype=torch.float64), V), scan_of(one))
    credits = [row[: int(n)] for row, n in zip(flat.view(one.mask.shape), one.lengths, strict=True)]
    probability = one.probabilities(one.logits)

    def gradient(table, *, own_included):
        total = torch.zeros_like(one.logits)
        for second in range(len(credits)):  # for each partner: all first rollouts at once
            taken_off = torch.zeros_like(flat).view(one.mask.shape)
            for first, credit in enumerate(credits):
                mine = objective.baselines([credit, credits[second]], [7, 7])[0]
                mine = (mine + credit) / 2 if own_included else mine
                taken_off[first, : len(mine)] = mine
            weights = (probability * probability[second])[:, None].expand(one.mask.shape)
            total += expected_gradient(one, table, weights=weights, baseline=taken_off)
        return total

    table = {"name": "distil", "future": future, "baseline": baseline}
    want = expected_gradient(one, {"name": "distil", "future": future})
    assert relative_error(gradient(table, own_included=False), want) <= 1e-12
    assert relative_error(gradient(table, own_included=True), want) > 0.01


def test_a_baseline_of_the_position_halves_the_variance():
    one = horizon(2)
    probability, credit = one.probabilities(one.logits), later_costs(one)
    position = (probability[:, None] * credit * one.mask).sum(0) / (probability[:, None] * one.mask).sum(0)

    def variance(table, baseline):
        gradients = []
        for row in range(len(probability)):
            weights = torch.zeros_like(credit)
            weights[row] = 1.0
            gradients.append(expected_gradient(one, table, weights=weights, baseline=baseline))
        samples = torch.stack(gradients).flatten(1)
        mean = (probability[:, None] * samples).sum(0)
        return (probability[:, None] * (samples - mean).square()).sum().item()

    nothing = torch.zeros_like(credit)
    assert variance(DISTIL, nothing) == pytest.approx(4.70, abs=5e-3)
    assert variance(DISTIL, position.expand_as(credit)) == pytest.approx(2.27, abs=5e-3)
    assert variance({"name": "ce", "tail": "none"}, nothing) == pytest.approx(0.31, abs=5e-3)


def test_leave_one_out_means_equal_loops():
    draw = torch.Generator().manual_seed(0)
    groups = [3, 1, 3, 3, 1, 9, 3]
    credits = [torch.randn(n, generator=draw, dtype=torch.float64) for n in (4, 2, 7, 0, 5, 3, 6)]
    by_position = algo.leave_one_out_position(credits, groups)
    by_batch = algo.leave_one_out_batch(credits)
    for i, credit in enumerate(credits):
        others = [other for j, other in enumerate(credits) if j != i]
        assert by_batch[i].tolist() == pytest.approx([torch.cat(others).mean().item()] * len(credit))
        for t in range(len(credit)):
            at = [c[t].item() for j, c in enumerate(credits) if j != i and groups[j] == groups[i] and len(c) > t]
            assert by_position[i][t].item() == pytest.approx(sum(at) / len(at) if at else 0.0)
    assert [c.dtype for c in algo.leave_one_out_position([torch.ones(2)], [0])] == [torch.float32]
    assert algo.leave_one_out_batch([torch.ones(2)])[0].tolist() == [0.0, 0.0]
    assert algo.leave_one_out_batch([]) == algo.leave_one_out_position([], []) == []
    with pytest.raises(ValueError, match="2 credits, but 1 group ids"):
        algo.leave_one_out_position([torch.ones(2), torch.ones(1)], [0])


def test_leave_one_out_means_are_constants():
    credits = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    for found in (algo.leave_one_out_position(credits, [0, 0]), algo.leave_one_out_batch(credits)):
        assert [part.requires_grad for part in found] == [False, False]


# ---- the teacher is the student


@pytest.mark.parametrize(
    ("table", "norm", "longer", "more_entropy"),
    [
        ({"name": "ce", "tail": "none"}, 0.0, 0.0, 0.0),
        (DISTIL, 0.7776, -0.6280, 0.0529),
        (DISTIL | {"future": "mean"}, 0.3140, -0.2514, 0.0209),
        (DISTIL | {"cost": "kl"}, 0.0, 0.0, 0.0),
        (DISTIL | {"cost": "kl", "future": "mean"}, 0.0, 0.0, 0.0),
        ({"name": "sdpo", "tail": "none"}, 0.0, 0.0, 0.0),
        ({"name": "sdpo", "divergence": "rkl", "tail": "none"}, 0.0, 0.0, 0.0),
        ({"name": "opsd", "tail": "none"}, 0.0, 0.0, 0.0),
    ],
    ids=["ce", "sum", "mean", "kl sum", "kl mean", "sdpo", "sdpo rkl", "opsd"],
)
def test_a_teacher_equal_to_the_student_pulls_as_measured(table, norm, longer, more_entropy):
    one = taught_by_itself(process(eos=2, horizon=5))
    logits = one.logits.clone().requires_grad_()
    probability = one.probabilities(logits)
    length = (probability * one.lengths).sum()
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    mean_entropy = (probability * torch.where(one.mask, entropy[one.states], 0.0).sum(-1)).sum() / length
    assert length.item() == pytest.approx(2.8267, abs=5e-5)
    gradient = expected_gradient(one, table)
    assert gradient.norm().item() == pytest.approx(norm, abs=5e-5)
    for value, want in ((length, longer), (mean_entropy, more_entropy)):
        (slope,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert -(gradient * slope).sum().item() == pytest.approx(want, abs=5e-5)


# ---- policy gradients


def reverse_kl_gradient(one, *, of_sequences):
    """Of KL(pi || p) over whole sequences, or at each state, the visits of the states held fixed."""
    logits = one.logits.clone().requires_grad_()
    if of_sequences:
        gap = one.taken(logits) - one.taken(one.teacher.log())
        (one.probabilities(logits) * gap.sum(-1)).sum().backward()
    else:
        visits = torch.zeros(len(logits), dtype=torch.float64)
        weight = torch.where(one.mask, one.probabilities(one.logits)[:, None], 0.0)
        visits = visits.index_add(0, one.states.flatten(), weight.flatten())
        logprobs = logits.log_softmax(-1)
        (visits * (logprobs.exp() * (logprobs - one.teacher.log())).sum(-1)).sum().backward()
    return logits.grad


@pytest.mark.parametrize(
    ("sampler", "discount"), [("own", 0.0), ("own", 1.0), ("other", 0.0), ("other", 0.5), ("other", 1.0)]
)
@PROCESSES
def test_opd_has_the_gradient_of_the_reverse_kl_divergence(one, discount, sampler):
    teacher = one.taken(one.teacher.log())
    table = {"name": "opd", "discount": discount}
    if sampler == "own":
        got = expected_gradient(one, table, teacher_sampled=teacher)
        assert relative_error(got, reverse_kl_gradient(one, of_sequences=bool(discount))) <= 1e-12
        double = expected_gradient(one, table | {"coef": 2.0}, teacher_sampled=teacher)
        assert relative_error(double, 2 * got) <= 1e-12
        return
    # Another policy sampled. By hand: rho_t times the advantage over that policy, here and later.
    options = other_policy(one)
    gap = teacher - options["sampling_logprobs"]
    steps = torch.arange(gap.shape[1])
    gain = torch.stack([(gap[:, t:] * discount ** (steps[t:] - t)).sum(-1) for t in steps], -1)
    logits = one.logits.clone().requires_grad_()
    ratio = (one.taken(logits) - options["sampling_logprobs"]).exp()
    (-options["weights"] * torch.where(one.mask, ratio * gain, 0.0)).sum().backward()
    got = expected_gradient(one, table, teacher_sampled=teacher, **options)
    assert relative_error(got, logits.grad) <= 1e-12


@PROCESSES
def test_sdpo_at_the_sampled_token_is_reverse_kl_on_average(one):
    sampled = expected_gradient(
        one, {"name": "sdpo", "divergence": "rkl_sampled"}, teacher_sampled=one.taken(one.teacher.log())
    )
    whole = expected_gradient(one, {"name": "sdpo", "divergence": "rkl", "tail": "none"})
    assert relative_error(sampled, whole) <= 1e-12


@PROCESSES
def test_grpo_is_the_gradient_of_the_expected_reward(one):
    """Rollouts in pairs: the mean of the pair leaves half of the reward's gradient, since it holds the own reward."""
    reward = (one.actions == 1).double().mul(one.mask).sum(-1) / 4
    logits = one.logits.clone().requires_grad_()
    (-one.probabilities(logits) * reward).sum().backward()
    probability = one.probabilities(one.logits)
    grpo = objective_from_table({"name": "grpo"})
    first, second = (torch.tensor(part) for part in zip(*itertools.product(range(len(reward)), repeat=2), strict=True))
    pairs = torch.stack([reward[first], reward[second]], 1).flatten()
    advantage = grpo.advantages(pairs, torch.arange(len(first)).repeat_interleave(2))[::2]
    weighted = (probability[first] * probability[second] * advantage).view(len(reward), -1).sum(-1)
    weights = torch.where(one.mask, probability[:, None], 0.0)
    got = expected_gradient(
        one, {"name": "grpo"}, weights=weights, advantages=(weighted / probability)[:, None].expand(one.mask.shape)
    )
    assert relative_error(got, logits.grad / 2) <= 1e-12
