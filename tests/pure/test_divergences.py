"""Divergences against formulas written out in numpy for one row at a time: values, logit gradients, edges."""

import math

import numpy as np
import pytest
import torch

from megatron_distil import algo

T, VOCAB, K = 24, 13, 5
DIVERGENCES = {
    "fkl": algo.forward_kl,
    "rkl": algo.reverse_kl,
    "js": algo.jensen_shannon,
    "js .3": lambda *columns, **settings: algo.jensen_shannon(*columns, mix=0.3, **settings),
}
SUPPORTS = ["teacher, bucket", "student, bucket", "teacher, renorm", "student, renorm", "full, none", "full, bucket"]


def draw(seed=0):
    source = np.random.default_rng(seed)
    logits, teacher = source.normal(0.0, 1.5, (T, VOCAB)), source.normal(0.0, 1.5, (T, VOCAB))
    return logits, np.exp(teacher) / np.exp(teacher).sum(-1, keepdims=True), source.integers(0, VOCAB, T)


def ids_of(support, logits, probs):
    """[T, K] with a different number of unused slots at the end of every third row."""
    if support.startswith("full"):
        return np.tile(np.arange(VOCAB), (T, 1))
    ids = np.argsort(-(probs if support.startswith("teacher") else logits), axis=-1)[:, :K]
    for row in range(0, T, 3):
        ids[row, K - row // 3 % 3 :] = -1
    return ids


def taken(logits, probs, ids, sampled):
    """Leaf logits, the student's columns and the teacher at the support."""
    leaf = torch.tensor(logits, requires_grad=True)
    used = torch.from_numpy(ids) >= 0
    teacher = torch.from_numpy(np.log(np.take_along_axis(probs, ids.clip(min=0), -1))).masked_fill(~used, -torch.inf)
    return leaf, algo.columns(leaf, torch.from_numpy(ids), torch.from_numpy(sampled)), teacher


def written_out(kind, tail, z, p, ids, clip):
    """Value and logit gradient of one row: g is the derivative by the logarithm of each class of the student."""
    pi, inside = np.exp(z) / np.exp(z).sum(), ids[ids >= 0]
    if tail == "renorm":
        s, t = pi[inside] / pi[inside].sum(), p[inside] / p[inside].sum()
    else:
        s, t = pi[inside], p[inside]
        if len(inside) < VOCAB:
            s, t = np.append(s, 1 - s.sum()), np.append(t, 1 - t.sum())
    if kind == "fkl":
        entries, g = t * np.log(t / s), -t
    elif kind == "rkl":
        entries, g = s * np.log(s / t), s * (np.log(s / t) + 1)
    else:
        mix = 0.3 if kind == "js .3" else 0.5
        m = (1 - mix) * s + mix * t
        entries, g = mix * t * np.log(t / m) + (1 - mix) * s * np.log(s / m), (1 - mix) * s * np.log(s / m)
    g = np.where(entries <= clip, g, 0.0)
    dz = np.zeros(VOCAB)
    if tail == "renorm":
        dz[inside] = g - s * g.sum()
    else:
        outside = np.setdiff1d(np.arange(VOCAB), inside)
        dz = -g.sum() * pi
        dz[inside] += g[: len(inside)]
        dz[outside] += g[-1] * pi[outside] / pi[outside].sum() if len(outside) else 0.0
    return np.minimum(entries, clip).sum(), dz


@pytest.mark.parametrize("clip", [math.inf, 0.05], ids=["whole", "clipped"])
@pytest.mark.parametrize("with_credit", [False, True], ids=["local", "credit"])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_value_and_gradient_are_those_written_out(kind, support, with_credit, clip):
    logits, probs, sampled = draw()
    ids, tail = ids_of(support, logits, probs), support.split(", ")[1]
    leaf, student, teacher = taken(logits, probs, ids, sampled)
    value = DIVERGENCES[kind](teacher, student, tail=tail, entry_clip=clip)
    cost = np.linspace(0.0, 3.0, T) * with_credit
    (value + torch.from_numpy(cost) * student.sampled).sum().backward()
    for row in range(T):
        want, dz = written_out(kind, tail, logits[row], probs[row], ids[row], clip)
        pi = np.exp(logits[row]) / np.exp(logits[row]).sum()
        dz += cost[row] * (np.eye(VOCAB)[sampled[row]] - pi)
        assert value[row].item() == pytest.approx(want, abs=1e-12)
        np.testing.assert_allclose(leaf.grad[row].numpy(), dz, rtol=0, atol=1e-12)
        assert leaf.grad[row].sum().abs() < 1e-12


# tail: (alpha, alpha_S, sparse entry) for one row, from pi and p at the support, the tails q and tau, m and D
TABLE = {
    "cross-entropy, none": lambda u, p, q, tau, m, D: (m, m, -p),
    "cross-entropy, bucket": lambda u, p, q, tau, m, D: (m + tau - tau / q, m + tau, -p),
    "cross-entropy, renorm": lambda u, p, q, tau, m, D: (0.0, 1 / u.sum(), -p / m),
    "reverse KL, bucket": lambda u, p, q, tau, m, D: (np.log(q / tau) - D, -D, u * np.log(u / p)),
}


@pytest.mark.parametrize("name", TABLE)
def test_one_scalar_per_row_and_the_support_make_up_the_gradient(name):
    logits, probs, sampled = draw(1)
    ids, tail = ids_of("teacher", logits, probs), name.split(", ")[1]
    leaf, student, teacher = taken(logits, probs, ids, sampled)
    loss = algo.reverse_kl if name.startswith("reverse") else algo.topk_cross_entropy
    loss(teacher, student, tail=tail).sum().backward()
    for row in range(T):
        pi, inside = np.exp(logits[row]) / np.exp(logits[row]).sum(), ids[row][ids[row] >= 0]
        u, p = pi[inside], probs[row, inside]
        q, tau, m = 1 - u.sum(), 1 - p.sum(), p.sum()
        divergence = (u * np.log(u / p)).sum() + q * np.log(q / tau)
        alpha, alpha_inside, sparse = TABLE[name](u, p, q, tau, m, divergence)
        dz = alpha * pi
        dz[inside] = alpha_inside * u + sparse
        np.testing.assert_allclose(leaf.grad[row].numpy(), dz, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tail", ["bucket", "renorm"])
def test_forward_kl_is_cross_entropy_less_a_constant(tail):
    logits, probs, sampled = draw(2)
    leaf, student, teacher = taken(logits, probs, ids_of("student", logits, probs), sampled)
    got = algo.forward_kl(teacher, student, tail=tail)
    want = algo.topk_cross_entropy(teacher, student, tail=tail) - algo.support_entropy(teacher, tail=tail)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0] for value in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_on_the_whole_vocabulary_they_are_those_of_torch():
    logits, probs, sampled = draw(3)
    _, student, teacher = taken(logits, probs, ids_of("full", logits, probs), sampled)
    q, p = torch.tensor(logits).log_softmax(-1), torch.from_numpy(probs)
    mixture = (0.3 * p + 0.7 * q.exp()).log()

    def kl(target, log_approximation):
        return torch.nn.functional.kl_div(log_approximation, target, reduction="none").sum(-1)

    for got, want in (
        (algo.forward_kl(teacher, student, tail="none"), kl(p, q)),
        (algo.reverse_kl(teacher, student, tail="none"), kl(q.exp(), p.log())),
        (
            algo.jensen_shannon(teacher, student, tail="none", mix=0.3),
            0.3 * kl(p, mixture) + 0.7 * kl(q.exp(), mixture),
        ),
    ):
        torch.testing.assert_close(got.detach(), want, rtol=1e-12, atol=1e-12)


def test_jensen_shannon_lies_between_both_kl_divergences():
    logits, probs, sampled = draw(4)
    _, student, teacher = taken(logits, probs, ids_of("teacher", logits, probs), sampled)
    for mix, scale, limit in ((1e-6, 1e6, algo.forward_kl), (1 - 1e-6, 1e6, algo.reverse_kl)):
        near = algo.jensen_shannon(teacher, student, tail="bucket", mix=mix) * scale
        torch.testing.assert_close(near, limit(teacher, student, tail="bucket"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tail", ["none", "bucket", "renorm"])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_row_without_support_costs_nothing_and_pulls_nowhere(kind, tail):
    logits, _, sampled = draw()
    leaf = torch.tensor(logits, requires_grad=True)
    student = algo.columns(leaf, torch.full((T, 2), -1), torch.from_numpy(sampled))
    value = DIVERGENCES[kind](torch.full((T, 2), -torch.inf, dtype=torch.float64), student, tail=tail)
    value.sum().backward()
    assert value.abs().max() < 1e-14
    assert leaf.grad.abs().max() < 1e-14


@pytest.mark.parametrize("tail", ["bucket", "renorm"])
@pytest.mark.parametrize("loss", [*DIVERGENCES.values(), algo.topk_cross_entropy], ids=[*DIVERGENCES, "ce"])
def test_slots_that_the_teacher_does_not_use_weigh_nothing_whatever_they_hold(loss, tail):
    logits, probs, sampled = draw()
    _, student, teacher = taken(logits, probs, ids_of("teacher", logits, probs), sampled)
    unused = teacher == -torch.inf
    support = student.support.detach().masked_fill(unused, -7.0).requires_grad_()
    value = loss(teacher, student._replace(support=support), tail=tail)
    torch.testing.assert_close(value, loss(teacher, student, tail=tail), rtol=0, atol=0)
    (pull,) = torch.autograd.grad(value.sum(), support)
    assert unused.any()
    assert (pull[unused] == 0).all()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_support_of_the_whole_vocabulary_has_no_bucket(kind):
    logits, probs, sampled = draw()
    values = []
    for tail in ("none", "bucket", "renorm"):
        leaf, student, teacher = taken(logits, probs, ids_of("full", logits, probs), sampled)
        value = DIVERGENCES[kind](teacher, student, tail=tail)
        value.sum().backward()
        values.append(torch.cat([value.detach()[:, None], leaf.grad], -1))
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(values[2], values[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_teacher_that_is_sure_leaves_everything_finite_in_float32(kind):
    leaf = torch.tensor([[0.0, 0.0, 0.0, 0.0], [60.0, 0.0, -1.0, -2.0]], requires_grad=True)
    ids = torch.tensor([[0, 1], [0, 1]])
    student = algo.columns(leaf, ids, torch.tensor([0, 0]))
    teacher = torch.tensor([[0.0, -30.0], [-1e-7, -40.0]])
    value = DIVERGENCES[kind](teacher, student, tail="bucket")
    value.sum().backward()
    assert value.isfinite().all()
    assert leaf.grad.isfinite().all()
    assert leaf.grad[0, 0] < 0 < leaf.grad[0, 2]


def test_a_clip_keeps_what_is_negative():
    _, student, teacher = taken(*(part[:1] for part in draw(5)[:2]), np.array([[0, 1, 2]]), np.array([0]))
    whole = algo.forward_kl(teacher, student, tail="renorm")
    clipped = algo.forward_kl(teacher, student, tail="renorm", entry_clip=1e-3)
    assert whole.item() > 0 > clipped.item()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_teacher_that_is_not_a_number_is_seen(kind):
    _, student, teacher = taken(*draw()[:2], np.tile(np.arange(K), (T, 1)), draw()[2])
    teacher[3, 1] = torch.nan
    for tail in ("bucket", "renorm"):
        value = DIVERGENCES[kind](teacher, student, tail=tail)
        assert value.isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_divergence_that_is_cut_off_is_refused(kind):
    logits, probs, sampled = draw()
    _, student, teacher = taken(logits, probs, ids_of("teacher", logits, probs), sampled)
    with pytest.raises(ValueError, match=r"ids outside the support.*use bucket or renorm"):
        DIVERGENCES[kind](teacher, student, tail="none")


@pytest.mark.parametrize("mix", [0.0, 1.0, -0.5, math.nan])
def test_a_mixture_of_one_side_only_is_refused(mix):
    logits, probs, sampled = draw()
    _, student, teacher = taken(logits, probs, ids_of("full", logits, probs), sampled)
    with pytest.raises(ValueError, match=r"mix = .*give 0\.5"):
        algo.jensen_shannon(teacher, student, tail="none", mix=mix)


def test_label_cross_entropy_is_that_of_torch():
    logits, _, labels = draw()
    student = algo.columns(torch.tensor(logits), torch.zeros(T, 0, dtype=torch.int64), torch.from_numpy(labels))
    want = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.from_numpy(labels), reduction="none")
    torch.testing.assert_close(algo.label_cross_entropy(student), want, rtol=1e-12, atol=1e-12)
