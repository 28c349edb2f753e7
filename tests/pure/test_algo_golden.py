"""Golden vectors: one sequence of three tokens and a padded row; values from an independent float64 computation."""

import pytest
import torch

from megatron_distil import algo

Z = torch.tensor(
    [[1.0, 0.0, -1.0, 0.5], [0.2, 0.4, 0.6, -0.8], [-0.5, 1.5, 0.0, 0.3], [9.0, -9.0, 3.0, 1.0]], dtype=torch.float64
)
TEACHER = torch.tensor(
    [[2.0, 0.1, -0.2, -1.0], [0.0, 0.3, 2.0, -0.4], [0.5, 0.7, -0.5, 1.0], [0.0, 5.0, 1.0, -2.0]], dtype=torch.float64
)
SAMPLED = torch.tensor([0, 2, 1, 3])
MASK = torch.tensor([True, True, True, False])
SEGMENTS = torch.zeros(4, dtype=torch.int32)

# name: (tail, support, ce, loss with sum, loss with mean, gradient with sum, row 0 of the gradient with mean)
GOLDEN = {
    "full": (
        "none",
        "full",
        [1.048873, 1.160887, 1.575579],
        0.15677,
        1.178248,
        [
            [1.150131, -0.416951, -0.195963, -0.537217],
            [-0.237104, -0.30194, 0.655324, -0.116281],
            [-0.154416, 0.314331, 0.047638, -0.207553],
        ],
        [0.430428, -0.17837, -0.108194, -0.143864],
    ),
    "raw_teacher": (
        "none",
        "teacher",
        [0.769219, 0.870817, 0.809935],
        0.380084,
        1.007481,
        [
            [0.536717, -0.254238, -0.051531, -0.230948],
            [0.007253, -0.12082, 0.110899, 0.002668],
            [0.055224, 0.119854, 0.09105, -0.266128],
        ],
        [0.094671, -0.1077, 0.002377, 0.010652],
    ),
    "tail_teacher": (
        "bucket",
        "teacher",
        [0.897327, 1.046223, 1.304584],
        0.180206,
        1.057724,
        [
            [0.94727, -0.349703, -0.109012, -0.488556],
            [-0.191942, -0.220835, 0.483389, -0.070612],
            [-0.040313, 0.314331, -0.066465, -0.207553],
        ],
        [0.328997, -0.144746, -0.033612, -0.150639],
    ),
    "tail_student": (
        "bucket",
        "student",
        [0.902045, 1.046223, 1.304584],
        0.184925,
        1.062442,
        [
            [0.94727, -0.380828, -0.140099, -0.426344],
            [-0.191942, -0.220835, 0.483389, -0.070612],
            [-0.040313, 0.314331, -0.066465, -0.207553],
        ],
        [0.328997, -0.175871, -0.064699, -0.088427],
    ),
    "renorm_teacher": (
        "renorm",
        "teacher",
        [0.44337, 0.629032, 0.952613],
        -0.114469,
        0.475933,
        [
            [0.693127, -0.136961, -0.101459, -0.454707],
            [-0.23342, 0.0106, 0.30869, -0.085871],
            [0.0, 0.342967, 0.0, -0.342967],
        ],
        [0.277147, 0.000936, -0.050729, -0.227354],
    ),
}


def support(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and the teacher's log-probabilities, with one unused slot behind a truncated support."""
    logprobs = TEACHER.log_softmax(-1)
    if kind == "full":
        return torch.arange(4).expand(4, 4), logprobs
    ids = algo.top_k(TEACHER if kind == "teacher" else Z, 2).ids
    unused = torch.full((4, 1), -1)
    return torch.cat([ids, unused], -1), torch.cat([logprobs.gather(-1, ids), unused * torch.inf], -1)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
def test_loss_and_gradient_equal_the_golden_vector(name, mean):
    tail, kind, ce_rows, loss_sum, loss_mean, grad_sum, grad_mean_row0 = GOLDEN[name]
    ids, teacher_logprobs = support(kind)
    z = Z.clone().requires_grad_()
    student = algo.columns(z, ids, SAMPLED)
    ce = algo.topk_cross_entropy(teacher_logprobs, student, tail=tail)
    cost = algo.future_credit(ce, MASK, SEGMENTS, mean=mean)
    terms = algo.distil_terms(ce, student.sampled, cost, MASK.double())
    loss = terms.imitation + terms.credit
    loss.backward()

    later = [ce_rows[1] + ce_rows[2], ce_rows[2], 0.0]
    want_cost = [later[0] / 2, later[1], 0.0] if mean else later
    want_grad = [grad_mean_row0, *grad_sum[1:]] if mean else grad_sum
    near = {"rtol": 0.0, "atol": 2e-6}
    torch.testing.assert_close(ce[:3].detach(), torch.tensor(ce_rows, dtype=torch.float64), **near)
    torch.testing.assert_close(cost[:3], torch.tensor(want_cost, dtype=torch.float64), **near)
    assert loss.item() == pytest.approx(loss_mean if mean else loss_sum, abs=2e-6)
    torch.testing.assert_close(z.grad[:3], torch.tensor(want_grad, dtype=torch.float64), **near)
    assert (z.grad[3] == 0).all()


# (tail, support): for each divergence its rows, the loss with credit from the sum and with credit from the mean
LOCAL = {"ce": algo.topk_cross_entropy, "rkl": algo.reverse_kl, "js": algo.jensen_shannon}
GOLDEN_LOSSES = {
    ("none", "full"): {
        "ce": ([1.048873, 1.160887, 1.575579], 0.156770, 1.178248),
        "rkl": ([0.412070, 0.267441, 0.278148], 0.270421, 0.474080),
        "js": ([0.075087, 0.063184, 0.069834], 0.038519, 0.088173),
    },
    ("none", "teacher"): {"ce": ([0.769219, 0.870817, 0.809935], 0.380084, 1.007481)},
    ("none", "student"): {"ce": ([0.617200, 0.870817, 0.809935], 0.228065, 0.855462)},
    ("bucket", "teacher"): {
        "ce": ([0.897327, 1.046223, 1.304584], 0.180206, 1.057724),
        "rkl": ([0.218631, 0.254574, 0.219211], 0.118097, 0.294953),
        "js": ([0.049083, 0.061014, 0.052980], 0.024655, 0.067207),
    },
    ("bucket", "student"): {
        "ce": ([0.902045, 1.046223, 1.304584], 0.184925, 1.062442),
        "rkl": ([0.399468, 0.254574, 0.219211], 0.298934, 0.475790),
        "js": ([0.072126, 0.061014, 0.052980], 0.047698, 0.090250),
    },
    ("renorm", "teacher"): {
        "ce": ([0.443370, 0.629032, 0.952613], -0.114469, 0.475933),
        "rkl": ([0.068172, 0.244896, 0.243860], -0.053374, 0.129071),
        "js": ([0.015345, 0.053539, 0.062656], -0.018262, 0.025112),
    },
    ("renorm", "student"): {
        "ce": ([0.497790, 0.629032, 0.952613], -0.060049, 0.530353),
        "rkl": ([0.518362, 0.244896, 0.243860], 0.396816, 0.579261),
        "js": ([0.090372, 0.053539, 0.062656], 0.056765, 0.100139),
    },
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("tail", "kind", "name"), [(*key, name) for key, table in GOLDEN_LOSSES.items() for name in table]
)
def test_every_loss_equals_its_golden_vector(tail, kind, name, dtype):
    rows, loss_sum, loss_mean = GOLDEN_LOSSES[tail, kind][name]
    ids, teacher_logprobs = support(kind)
    student = algo.columns(Z.to(dtype), ids, SAMPLED)
    local = LOCAL[name](teacher_logprobs.to(dtype), student, tail=tail)
    near = 2e-6 if dtype == torch.float64 else 1e-5
    assert local[:3].tolist() == pytest.approx(rows, abs=near)
    for mean, want in ((False, loss_sum), (True, loss_mean)):
        credit = algo.future_credit(local, MASK, SEGMENTS, mean=mean)
        terms = algo.distil_terms(local, student.sampled, credit, MASK.to(dtype))
        assert (terms.imitation + terms.credit).item() == pytest.approx(want, abs=2 * near)
        weights = algo.token_weights(MASK, SEGMENTS, reduction="token-mean", denominator=3)
        terms = algo.distil_terms(local, student.sampled, credit, weights)
        assert (terms.imitation + terms.credit).item() == pytest.approx(want / 3, abs=near)


def test_the_inputs_of_the_golden_vector_are_as_written():
    log_pi = algo.columns(Z, torch.zeros(4, 0, dtype=torch.int64), SAMPLED).sampled
    assert log_pi.tolist() == pytest.approx([-0.746567, -1.006368, -0.506613, -8.00281], abs=1e-6)
    assert algo.top_k(TEACHER, 2).ids.tolist() == [[0, 1], [2, 1], [3, 1], [1, 2]]
    assert algo.top_k(Z, 2).ids.tolist() == [[0, 3], [2, 1], [1, 3], [0, 2]]
    mass = {"full": [1.0] * 3, "teacher": [0.877427, 0.839535, 0.677235], "student": [0.801267, 0.839535, 0.677235]}
    for kind, want in mass.items():
        assert support(kind)[1].exp().sum(-1)[:3].tolist() == pytest.approx(want, abs=1e-6)


def test_clipped_policy_terms_equal_the_golden_vector():
    old, advantages = torch.tensor([-1.0, -1.0, -2.0]), torch.tensor([1.0, -1.0, -1.0])
    log_pi = Z.log_softmax(-1).gather(-1, SAMPLED[:, None])[:3, 0]
    bounds = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
    losses = [
        algo.clipped_policy_terms(log_pi[i], old[i], advantages[i], torch.tensor(1.0), **bounds).credit.item()
        for i in range(3)
    ]
    assert (log_pi - old).exp().tolist() == pytest.approx([1.288441, 0.993652, 4.452151], abs=1e-6)
    assert losses == pytest.approx([-1.28, 0.993652, 3.0], abs=1e-6)
    whole = algo.clipped_policy_terms(log_pi, old, advantages, torch.ones(3), **bounds)
    assert whole.credit.item() == pytest.approx(-1.28 + 0.993652 + 3.0, abs=1e-6)
    assert whole.counts["train/ratio_clipped_frac"] == 2
    assert whole.counts["loss/policy_gain"].item() == pytest.approx(1.28 - 0.993652 - 3.0, abs=1e-6)
    part = algo.clipped_policy_terms(log_pi, old, advantages, torch.tensor([0.5, 0.0, 0.5]), **bounds)
    assert part.counts["loss/policy_gain"].item() == pytest.approx(1.28 - 3.0, abs=1e-6)


def test_a_ratio_at_its_bound_still_counts():
    log_pi = torch.tensor([-1.0], requires_grad=True)
    bounds = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.0}
    terms = algo.clipped_policy_terms(log_pi, log_pi.detach(), torch.tensor([-2.0]), torch.ones(1), **bounds)
    terms.credit.backward()
    assert log_pi.grad.item() == 2.0
    assert terms.counts["train/ratio_clipped_frac"] == 0


@pytest.mark.parametrize("form", ["score", "reweight"])
def test_weights_and_cost_are_constants(form):
    ce, log_pi, cost, weights = (torch.rand(3, requires_grad=True) for _ in range(4))
    terms = algo.distil_terms(ce, log_pi, cost, weights, form=form)
    (terms.imitation + terms.credit).backward()
    assert cost.grad is None
    assert weights.grad is None


def test_a_padded_position_of_zeros_costs_nothing():
    # A clamped tail makes such a position cost 1.612e-06, and 8192 of them 0.0132 in the credit of those before.
    zeros = torch.zeros(1, 20)
    clamped = -torch.expm1(zeros.logsumexp(-1).clamp(max=-1e-7))
    assert (-clamped * clamped.log()).item() == pytest.approx(1.612e-6, rel=1e-3)
    student = algo.Columns(support=zeros, tail=torch.zeros(1), sampled=torch.zeros(1))
    unused = torch.full((1, 20), -torch.inf)
    assert algo.topk_cross_entropy(unused, student, tail="bucket").item() == 0.0


def test_a_suffix_sum_that_forgets_the_mask_is_caught_by_the_vector():
    ids, teacher_logprobs = support("full")
    ce = algo.topk_cross_entropy(teacher_logprobs, algo.columns(Z, ids, SAMPLED), tail="none")
    wrong = algo.future_credit(ce, torch.ones(4, dtype=torch.bool), SEGMENTS)
    torch.testing.assert_close(
        wrong[:3], torch.tensor([20.397950, 19.237063, 17.661483], dtype=torch.float64), rtol=0, atol=2e-6
    )


def test_the_credit_restarts_at_the_boundary_of_packed_sequences():
    ce = torch.tensor([0.3, 0.2, 0.1, 5.0, 4.0], dtype=torch.float64)
    segments, mask = torch.tensor([0, 0, 0, 1, 1]), torch.ones(5, dtype=torch.bool)
    right = torch.tensor([0.3, 0.1, 0.0, 4.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(algo.future_credit(ce, mask, segments), right, rtol=1e-12, atol=1e-12)
    one = algo.future_credit(ce, mask, torch.zeros(5, dtype=torch.int64))
    assert one.tolist() == pytest.approx([9.3, 9.1, 9.0, 4.0, 0.0])


def test_columns_hold_0_in_unused_slots():
    ids = torch.tensor([[2, -1], [-1, -1], [-1, 0], [1, 3]])
    want = torch.where(ids >= 0, Z.log_softmax(-1).gather(-1, ids % 4), 0.0)
    torch.testing.assert_close(algo.columns(Z, ids, SAMPLED).support, want, rtol=1e-12, atol=0)


def test_a_tiny_tail_keeps_its_digits_in_float32():
    logits = torch.tensor([[30.0, 0.0, -1.0]], requires_grad=True)
    tail = algo.columns(logits, torch.tensor([[0]]), torch.tensor([0])).tail
    want = torch.log_softmax(logits.detach().double(), -1)[0, 1:].logsumexp(-1).item()
    assert tail.item() == pytest.approx(want, rel=1e-6)


def test_a_bucket_pulls_at_a_tail_however_small_it_is():
    logits = torch.tensor([[30.0, 0.0, -1.0]], requires_grad=True)
    teacher = torch.tensor([[0.75]]).log()
    ce = algo.topk_cross_entropy(teacher, algo.columns(logits, torch.tensor([[0]]), torch.tensor([0])), tail="bucket")
    ce.sum().backward()
    q = logits.detach().double().softmax(-1)[0]
    tail = q[1:].sum()
    want = torch.stack([q[0] - 0.75, q[1] - 0.25 * q[1] / tail, q[2] - 0.25 * q[2] / tail])
    assert ce.item() == pytest.approx(-0.25 * tail.log().item(), rel=1e-6)
    torch.testing.assert_close(logits.grad[0].double(), want, rtol=1e-5, atol=1e-7)


def test_top_k_gives_ties_to_the_smaller_id():
    top = algo.top_k(torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]]), 2)
    assert top.ids.tolist() == [[1, 2]]
    assert top.entropy.item() == pytest.approx(
        torch.distributions.Categorical(logits=torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0])).entropy().item()
    )


@pytest.mark.parametrize("k", [1, 4])
def test_what_a_teacher_says_is_constant(k):
    top = algo.top_k(TEACHER.clone().requires_grad_(), k)
    assert top.ids.shape == top.logprobs.shape == (4, k)
    assert not top.logprobs.requires_grad
    assert not top.entropy.requires_grad
    assert not algo.support_entropy(top.logprobs.requires_grad_(), tail="bucket").requires_grad


@pytest.mark.parametrize("k", [0, 4])
def test_top_k_says_how_many_ids_there_are(k):
    with pytest.raises(ValueError, match=f"k = {k} of 3 ids; give 1 to 3"):
        algo.top_k(torch.zeros(1, 3), k)


@pytest.mark.parametrize("tail", ["none", "bucket", "renorm"])
def test_the_support_entropy_is_the_cross_entropy_of_a_student_equal_to_the_teacher(tail):
    ids, logprobs = support("teacher")
    student = algo.columns(TEACHER, ids, SAMPLED)
    ce = algo.topk_cross_entropy(logprobs, student, tail=tail)
    torch.testing.assert_close(algo.support_entropy(logprobs, tail=tail), ce, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tail", ["none", "bucket", "renorm"])
def test_a_row_without_support_costs_nothing_and_pulls_nowhere(tail):
    z = Z.clone().requires_grad_()
    student = algo.columns(z, torch.full((4, 2), -1), SAMPLED)
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        ce = algo.topk_cross_entropy(torch.full((4, 2), -torch.inf, dtype=torch.float64), student, tail=tail)
        ce.sum().backward()
    assert ce.abs().max() < 1e-15
    assert z.grad.abs().max() < 1e-15


def test_a_support_of_the_whole_vocabulary_has_no_bucket():
    ids, logprobs = support("full")
    z = Z.float().requires_grad_()
    ce = algo.topk_cross_entropy(logprobs.float(), algo.columns(z, ids, SAMPLED), tail="bucket")
    ce.sum().backward()
    want = (-logprobs.exp() * Z.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(ce.detach().double(), want, rtol=1e-6, atol=1e-6)
    assert z.grad.isfinite().all()


def test_a_discount_weighs_each_later_position_less():
    cost, mask = torch.tensor([7.0, 1.0, 10.0, 100.0]), torch.tensor([True, True, True, True])
    got = algo.future_credit(cost, mask, torch.tensor([0, 0, 0, 0]), discount=0.5)
    assert got.tolist() == [1.0 + 5.0 + 25.0, 10.0 + 50.0, 100.0, 0.0]


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\), \(2,\), \(3,\)"):
        algo.future_credit(torch.zeros(3), torch.zeros(2, dtype=torch.bool), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="need the same rows"):
        algo.columns(torch.zeros(3, 5), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("length", [1, 2, 3, 17, 64])
def test_the_scan_equals_a_loop(length):
    draw = torch.Generator().manual_seed(length)
    cost = torch.randn(length, generator=draw, dtype=torch.float64)
    mask = torch.rand(length, generator=draw) < 0.7
    segments = (torch.rand(length, generator=draw) < 0.2).cumsum(0)
    for mean in (False, True):
        want = torch.zeros(length, dtype=torch.float64)
        for t in range(length):
            later = [i for i in range(t + 1, length) if segments[i] == segments[t] and mask[i]]
            total = sum(cost[i].item() for i in later)
            want[t] = total / max(1, len(later)) if mean else total
        torch.testing.assert_close(algo.future_credit(cost, mask, segments, mean=mean), want, rtol=1e-12, atol=1e-12)
