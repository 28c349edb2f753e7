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
