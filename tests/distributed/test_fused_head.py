"""Every head equals autograd on full logits, on any layout: loss, columns and both gradients."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_distil import algo
from megatron_distil.trainer.head import passes
from megatron_distil.trainer.head.columns import HeadInputs, VocabShard
from megatron_distil.trainer.head.onepass import onepass_loss
from megatron_distil.trainer.head.stages import credit_plan
from megatron_distil.trainer.head.topk_ce import topk_ce, topk_logprobs
from tests.head_problem import HIDDEN, PACKINGS, TEMPERATURE, by_head, compare, error, problem, reference
from tests.world import run_ranks

TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-6, 2e-6)}
"""Of values and of gradients, relative to their norms."""

OBJECTIVES = [
    {"name": "distil", "future": "sum", "tail": "none"},
    {"name": "distil", "future": "mean", "tail": "bucket"},
    {"name": "distil", "future": "sum", "tail": "renorm", "future_coef": 0.3, "cost": "kl", "discount": 0.9},
    {"name": "distil", "future": "mean", "future_coef": 0.0},
    {"name": "distil", "future": "mean", "future_form": "reweight", "token_clip": 5.0},
    {"name": "ce", "tail": "bucket"},
    {"name": "ce", "tail": "renorm"},
    {"name": "distil", "future": "sum", "baseline": "loo_position"},
    {"name": "sdpo", "divergence": "js", "tail": "bucket"},
    {"name": "sdpo", "divergence": "rkl", "tail": "renorm"},
    {"name": "opsd"},
    {"name": "opd"},
    {"name": "grpo"},
    {"name": "sft"},
]
WITHOUT_SUPPORT = ("grpo", "opd", "sft")
RESULTS = Path(__file__).resolve().parents[1] / "results" / "head_matrix.json"
MASKS = ["all", "random", "a sequence", "one token", "nothing"]
HEADS = ["plain", "composable", "onepass"]


def axes(size: int, layouts: list[str], count: int | None) -> list[tuple]:
    """The full product of what is worth crossing, or a sample of it that differs from world to world."""
    everything = list(
        itertools.product(
            HEADS, layouts, PACKINGS, MASKS, OBJECTIVES, [torch.float64, torch.float32], [7, 1000], [0, 2**20]
        )
    )
    return everything if count is None else random.Random(f"{size} {layouts}").sample(everything, count)


def _groups(rank: int, tp: int, cp: int):
    """tp fastest, as in the trainer."""
    mine = [None, None]
    for start in range(cp):
        group = dist.new_group(list(range(start * tp, (start + 1) * tp)))
        mine[0] = group if rank // tp == start else mine[0]
    for start in range(tp):
        group = dist.new_group(list(range(start, tp * cp, tp)))
        mine[1] = group if rank % tp == start else mine[1]
    return mine


def _matrix(rank, *, tp, cp, layouts, count, record=None):
    passes.BUFFER_BYTES = 64 * 8 * 11  # chunks of eleven rows and less
    tp_group, cp_group = _groups(rank, tp, cp)
    worst = {}
    for head, layout, packing, mask, objective, dtype, stage_rows, keep_bytes in axes(tp * cp, layouts, count):
        k = 0 if objective["name"] in WITHOUT_SUPPORT else 7
        p = problem(packing, mask, dtype=dtype, k=k)
        got = by_head(
            p,
            objective,
            head,
            tp=tp_group,
            cp=cp_group,
            layout=layout,
            stage_rows=stage_rows,
            keep_bytes=keep_bytes,
        )
        value, gradient = TOLERANCE[dtype]
        if dtype == torch.float32:  # what full logits round, and what a difference of two log-probabilities does
            gradient *= {"plain": 5, "composable": 1, "onepass": 1}[head] * (
                10 if objective["name"] in ("sdpo", "opsd") else 1
            )
        try:
            want = reference(p, _objective(objective))
            found = compare(got, want, value=value, gradient=gradient, rank=tp_group.rank())
        except AssertionError as failed:
            failed.add_note(f"{head} {layout} {packing} {mask} {objective} {dtype} {stage_rows} {keep_bytes}")
            raise
        known = worst.setdefault(f"{head} {str(dtype)[6:]}", dict.fromkeys(found, 0.0) | {"cases": 0})
        known |= {name: max(known[name], gap) for name, gap in found.items()} | {"cases": known["cases"] + 1}
    if record is not None and rank == 0:
        record.write_text(json.dumps(worst))


def _objective(table):
    from megatron_distil.algo.objectives import objective_from_table

    return objective_from_table(table)


@pytest.mark.parametrize(
    ("tp", "cp", "layouts"),
    [
        (1, 1, ["zigzag"]),
        (2, 1, ["zigzag"]),
        (4, 1, ["zigzag"]),
        (1, 2, ["zigzag", "contiguous", "zigzag_buffer"]),
        (1, 4, ["zigzag", "contiguous", "zigzag_buffer"]),
        (2, 2, ["zigzag", "contiguous", "zigzag_buffer"]),
    ],
    ids=lambda x: x if isinstance(x, int) else "",
)
def test_every_head_equals_full_logits(tp, cp, layouts):
    run_ranks(_matrix, tp * cp, tp=tp, cp=cp, layouts=layouts, count=60)


@pytest.mark.full
@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2), (4, 2), (2, 4), (4, 4)])
def test_the_whole_matrix(tp, cp, tmp_path):
    """Leaves the largest errors in ``tests/results/head_matrix.json``."""
    count = None if tp * cp <= 4 else 300
    layouts = ["zigzag", "contiguous", "zigzag_buffer"] if cp > 1 else ["zigzag"]
    record = tmp_path / "worst.json"
    run_ranks(_matrix, tp * cp, tp=tp, cp=cp, layouts=layouts, count=count, record=record, timeout_s=3600)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[f"tp {tp}, cp {cp}"] = json.loads(record.read_text())
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


class Products(TorchDispatchMode):
    """Counts matrix products that see the vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.count, self._width = 0, width

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        shapes = [a.shape for a in args if isinstance(a, torch.Tensor)]
        self.count += name in ("mm", "addmm", "addmm_") and any(self._width in shape for shape in shapes)
        return func(*args, **(kwargs or {}))


def _products(rank, *, keep_bytes, cp, layout, stage_rows, least, most):
    passes.BUFFER_BYTES = 128 * 8 * 12
    _, group = _groups(rank, 1, cp)
    p = problem("one", vocab=100, padded=100)
    with Products(100) as counted:
        by_head(p, OBJECTIVES[0], "onepass", cp=group, layout=layout, stage_rows=stage_rows, keep_bytes=keep_bytes)
    chunks = 48 // cp // 12
    assert least <= counted.count / chunks <= most, (counted.count, chunks)


@pytest.mark.parametrize(
    ("cp", "layout", "stage_rows", "keep_bytes", "least", "most"),
    [
        (1, "zigzag", 12, 0, 3, 3),
        (1, "zigzag", 30, 2**20, 15 / 4, 15 / 4),  # stages of three chunks and of two
        (2, "zigzag", 12, 0, 3, 3),
        (2, "contiguous", 12, 2**20, 3, 3),
        (2, "contiguous", 12, 0, 3.1, 4),
    ],
)
def test_three_products_for_each_chunk(cp, layout, stage_rows, keep_bytes, least, most):
    run_ranks(_products, cp, cp=cp, layout=layout, stage_rows=stage_rows, keep_bytes=keep_bytes, least=least, most=most)


def _alone(**options):
    p = problem(**options)
    rows = p.is_row.nonzero()[:, 0]
    shard = VocabShard.of(None, vocab_size=p.vocab, rows=len(p.weight))
    return p, rows, shard


@pytest.mark.parametrize("head", ["composable", "onepass"])
def test_gradients_of_several_microbatches_add_up_in_main_grad(head):
    total, expected = torch.zeros(64, HIDDEN, dtype=torch.float64), torch.zeros(64, HIDDEN, dtype=torch.float64)
    weight = problem().weight
    for seed in range(3):
        p = problem(seed=seed)
        p.weight.copy_(weight)
        want = reference(p, _objective(OBJECTIVES[1]))
        got = by_head(p, OBJECTIVES[1], head, main_grad=total)
        expected += want.weight_grad
        assert error(got.hidden_grad, want.hidden_grad) < 1e-12
    assert error(total, expected) < 1e-12


def _one_pass(p, rows, shard, weight, hidden, **options):
    objective = _objective(OBJECTIVES[1])

    def program(columns, at, future):
        terms = objective.terms(p.tokens(columns, rows[at]), future)
        return terms.imitation + terms.credit

    order = torch.arange(len(p.is_row))[None]
    plan = credit_plan(order, p.segment_ids, p.is_row, 0, stage_rows=16)
    inputs = HeadInputs(hidden[rows], weight, p.support_ids[rows], p.sampled_ids[rows], shard, TEMPERATURE)
    return onepass_loss(inputs, program, plan, None, **options)


def test_a_loss_scale_is_given_before_the_backward():
    p, rows, shard = _alone()
    hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
    weight.main_grad, wrong = torch.zeros_like(p.weight), torch.zeros(())
    loss = _one_pass(p, rows, shard, weight, hidden, grad_scale=64.0, wrong_scale=wrong)
    (loss * 64.0).backward()
    want = reference(p, _objective(OBJECTIVES[1]))
    assert error(hidden.grad, want.hidden_grad * 64) < 1e-12
    assert error(weight.main_grad, want.weight_grad * 64) < 1e-12
    assert wrong == 0
    assert weight.grad_added_to_main_grad


def test_another_scale_in_the_backward_is_counted():
    p, rows, shard = _alone()
    hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
    wrong = torch.zeros(())
    (_one_pass(p, rows, shard, weight, hidden, wrong_scale=wrong) * 2.0).backward()
    assert wrong == 1
    want = reference(p, _objective(OBJECTIVES[1]))
    assert error(weight.grad, want.weight_grad * 2) < 1e-12, "without main_grad any factor is right"


def test_a_backward_that_is_no_number_is_not_one_of_another_scale():
    p, rows, shard = _alone()
    hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
    wrong = torch.zeros(())
    (_one_pass(p, rows, shard, weight, hidden, wrong_scale=wrong) * torch.nan).backward()
    assert wrong == 0
    assert hidden.grad[rows].isnan().all()


def test_another_scale_leaves_no_number_where_the_weight_has_its_gradient_already():
    p, rows, shard = _alone()
    hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
    weight.main_grad, wrong = torch.zeros_like(p.weight), torch.zeros(())
    (_one_pass(p, rows, shard, weight, hidden, wrong_scale=wrong) * 2.0).backward()
    assert wrong == 1
    assert hidden.grad[rows].isnan().all()


def test_a_second_backward_is_refused():
    p, rows, shard = _alone()
    hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
    loss = _one_pass(p, rows, shard, weight, hidden)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward through the one-pass head"):
        loss.backward()


def test_without_gradients_nothing_is_touched():
    p, rows, shard = _alone()
    weight = p.weight.clone().requires_grad_()
    weight.main_grad = torch.zeros_like(p.weight)
    with torch.no_grad():
        loss = _one_pass(p, rows, shard, weight, p.hidden)
    assert error(loss, reference(p, _objective(OBJECTIVES[1])).loss) < 1e-12
    assert (weight.main_grad == 0).all()
    assert not loss.requires_grad


def test_a_tied_weight_gets_zeros_for_what_is_added_already():
    p, rows, shard = _alone()
    hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
    weight.main_grad, weight.zero_out_wgrad = torch.zeros_like(p.weight), True
    _one_pass(p, rows, shard, weight, hidden).backward()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("head", ["composable", "onepass"])
def test_float16_is_refused(head):
    p, rows, shard = _alone(dtype=torch.float16)
    inputs = HeadInputs(p.hidden, p.weight, p.support_ids, p.sampled_ids, shard)
    run = {
        "onepass": lambda: _one_pass(p, rows, shard, p.weight, p.hidden),
        "composable": lambda: topk_logprobs(inputs),
    }
    with pytest.raises(ValueError, match="float16"):
        run[head]()


@pytest.mark.parametrize("head", ["composable", "onepass"])
@pytest.mark.parametrize("objective", OBJECTIVES[:3] + OBJECTIVES[5:7], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_improbable_tokens_and_extreme_logits_stay_exact(head, objective, dtype):
    p = problem(dtype=dtype, scale=25.0)
    got, want = by_head(p, objective, head), reference(p, _objective(objective))
    assert want.columns.sampled.min() < -80.0
    exact = dtype == torch.float64
    compare(got, want, value=1e-12 if exact else 1e-6, gradient=1e-11 if exact else 2e-6)


@pytest.mark.parametrize("head", ["composable", "onepass"])
def test_a_softmax_coefficient_of_zero_is_no_pole(head):
    """Summed credit equal to the teacher's mass: outside the support the gradient vanishes."""
    p = problem(k=0)
    weight = p.weight.clone().requires_grad_()
    hidden = p.hidden.clone().requires_grad_()
    shard = VocabShard.of(None, vocab_size=p.vocab, rows=len(p.weight))
    ids = p.sampled_ids[:, None]
    found = topk_logprobs(HeadInputs(hidden, weight, ids, p.sampled_ids, shard))
    (found.support[:, 0] - found.sampled).sum().backward()
    assert hidden.grad.abs().max() < 1e-12
    assert weight.grad.abs().max() < 1e-12


@pytest.mark.parametrize("head", ["plain", "composable", "onepass"])
def test_a_row_without_weight_has_no_gradient_whatever_it_holds(head):
    p = problem(scale=40.0)
    got = by_head(p, OBJECTIVES[6], head)
    idle = p.vectors["weights"] == 0
    assert (got.hidden_grad[idle] == 0).all()


@pytest.mark.parametrize("head", ["composable", "onepass"])
def test_banned_ids_weigh_nothing(head):
    p = replace(problem(vocab=40), vocab=50)
    p.hidden[:, 0] = 1.0
    banned = [41, 44, 45, 49]
    p.weight[banned] = 0.0
    p.weight[banned, 0] = -torch.inf
    got, want = by_head(p, OBJECTIVES[1], head), reference(p, _objective(OBJECTIVES[1]))
    assert error(got.loss, want.loss) < 1e-12
    compare_columns = zip(got.columns, want.columns, strict=True)
    assert all(error(a, b) < 1e-12 for a, b in compare_columns)


def _whole_vocabulary(rank, *, tp, shift):
    group, _ = _groups(rank, tp, 1)
    p = problem(k=61)
    p.hidden[:, 0], p.weight[:, 0] = 1.0, shift
    want = reference(p, _objective(OBJECTIVES[1]))
    assert (want.columns.tail == -torch.inf).any()
    for head in HEADS:
        got = by_head(p, OBJECTIVES[1], head, tp=group)
        assert error(got.loss, want.loss) < 1e-9
        assert error(got.hidden_grad, want.hidden_grad) < 1e-9
        assert error(got.weight_grad, want.weight_grad.split(64 // tp)[rank]) < 1e-9


@pytest.mark.parametrize("shift", [0.0, -1000.0])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_support_of_the_whole_vocabulary_leaves_nothing_outside(tp, shift):
    run_ranks(_whole_vocabulary, tp, tp=tp, shift=shift)


def test_a_gradient_of_an_unused_slot_goes_nowhere():
    p, _, shard = _alone()
    hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
    up = torch.randn(p.support_ids.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = topk_logprobs(HeadInputs(hidden, weight, p.support_ids, p.sampled_ids, shard, TEMPERATURE))
    want = algo.columns(hidden @ weight[: p.vocab].t() / TEMPERATURE, p.support_ids, p.sampled_ids)
    got = torch.autograd.grad((found.support * up).sum(), [hidden, weight])
    wanted = torch.autograd.grad((want.support * up).sum(), [hidden, weight])
    assert all(error(a, b) < 1e-12 for a, b in zip(got, wanted, strict=True))


def test_logits_far_from_0_cost_no_digits_where_the_support_is_everything():
    draw = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.ones(16, 1), torch.randint(-4, 5, (16, 1), generator=draw) / 4], 1)
    weight = torch.cat([torch.full((8, 1), -1000.0), torch.randint(-8, 9, (8, 1), generator=draw) / 4], 1)
    ids, sampled = torch.arange(8).expand(16, 8), torch.zeros(16, dtype=torch.int64)
    found = topk_logprobs(HeadInputs(rows, weight, ids, sampled, VocabShard.of(None, vocab_size=8, rows=8)))
    want = algo.columns(rows.double() @ weight.double().t(), ids, sampled)  # the logits have few bits: both are exact
    torch.testing.assert_close(found.support.double(), want.support, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head", ["composable", "onepass"])
def test_a_row_that_is_no_number_reaches_the_gradient(head):
    p = problem()
    p.hidden[9] = torch.nan
    got = by_head(p, OBJECTIVES[1], head)
    assert got.loss.isnan()
    assert got.weight_grad.isnan().any()


def _across_tp(rank, *, dtype):
    p = problem(dtype=dtype)
    one = by_head(p, OBJECTIVES[1], "onepass")
    group, _ = _groups(rank, 2, 1)
    two = by_head(p, OBJECTIVES[1], "onepass", tp=group)
    again = by_head(p, OBJECTIVES[1], "onepass", tp=group)
    for a, b, c in zip(one.columns, two.columns, again.columns, strict=True):
        assert error(b, a.double()) < 5e-7
        assert torch.equal(b.nan_to_num(), c.nan_to_num())
    assert torch.equal(two.weight_grad, again.weight_grad), "one layout repeats itself bit for bit"
    assert torch.equal(two.hidden_grad, again.hidden_grad)


def test_the_same_layout_repeats_itself_and_others_agree():
    run_ranks(_across_tp, 2, dtype=torch.float32)


def _bfloat16(rank, *, scale):
    draw = torch.Generator().manual_seed(0)
    rows, hidden_size, vocab = 96, 64, 2048
    hidden = torch.randn(rows, hidden_size, generator=draw).bfloat16()
    weight = (torch.randn(vocab, hidden_size, generator=draw) * scale / 8).bfloat16()
    logits = hidden.double() @ weight.double().t()
    assert logits.max() > 4 * scale / 2
    teacher = (logits + torch.randn(rows, vocab, generator=draw)).log_softmax(-1).topk(20, -1)
    sampled = torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0]
    shard = VocabShard.of(None, vocab_size=vocab, rows=vocab)
    ours = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    truth = hidden.double().requires_grad_(), weight.double().requires_grad_()
    up = torch.rand(rows, generator=draw)
    teacher_logprobs = teacher.values.float()
    ce, logprob = topk_ce(HeadInputs(*ours, teacher.indices, sampled, shard), teacher_logprobs, tail="none")
    (up * (ce + logprob)).sum().backward()
    columns = algo.columns(truth[0] @ truth[1].t(), teacher.indices, sampled)
    want = algo.topk_cross_entropy(teacher_logprobs.double(), columns, tail="none")
    (up * (want + columns.sampled)).sum().backward()
    assert (ce.double() - want).abs().max() < 1e-5
    for a, b in zip(ours, truth, strict=True):
        assert error(a.grad, b.grad) < 4e-3


@pytest.mark.parametrize("scale", [6.0, 14.0])
def test_bfloat16_operands_lose_nothing_in_the_statistics(scale):
    run_ranks(_bfloat16, 1, scale=scale)
