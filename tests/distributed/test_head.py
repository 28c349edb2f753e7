"""The head on a cut vocabulary equals the specification on the whole one, values and gradients."""

import pytest
import torch
import torch.distributed as dist

from megatron_distil import algo
from megatron_distil.algo.vocabulary import Columns
from megatron_distil.trainer.head import columns as head_columns
from megatron_distil.trainer.head.columns import HeadInputs, VocabShard, columns
from tests.world import run_ranks

ROWS, HIDDEN, VOCAB, PADDED, K = 37, 12, 61, 64, 7


def problem(vocab=VOCAB, k=K, dtype=torch.float64):
    draw = torch.Generator().manual_seed(3)
    rows = torch.randn(ROWS, HIDDEN, generator=draw, dtype=torch.float64).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=draw, dtype=torch.float64).to(dtype)
    support = torch.stack([torch.randperm(vocab, generator=draw)[:k] for _ in range(ROWS)])
    support[::3, k // 2 :] = -1
    support[1] = -1
    sampled = torch.randint(0, vocab, (ROWS,), generator=draw)
    sampled[::2] = support[::2, 0].clamp(min=0)
    up = torch.randn(ROWS, k + 2, generator=draw, dtype=torch.float64).to(dtype)
    return rows, weight, support, sampled, up


def total(c: Columns, up: torch.Tensor) -> torch.Tensor:
    return (torch.cat([c.support, c.tail[:, None], c.sampled[:, None]], dim=-1) * up).sum()


def _columns_case(rank, *, vocab, chunk_bytes, temperature):
    head_columns.CHUNK_BYTES = chunk_bytes
    size = dist.get_world_size()
    rows, weight, support, sampled, up = problem(vocab)
    group, per_rank = dist.group.WORLD, PADDED // size
    mine = rows.clone().requires_grad_()
    part = weight[rank * per_rank : (rank + 1) * per_rank].clone().requires_grad_()
    shard = VocabShard.of(group, vocab_size=vocab, rows=per_rank)
    got = columns(HeadInputs(mine, part, support, sampled, shard, temperature))
    total(got, up).backward()

    whole_rows, whole = rows.clone().requires_grad_(), weight.clone().requires_grad_()
    want = algo.columns(whole_rows @ whole[:vocab].t() / temperature, support, sampled)
    total(want, up).backward()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12)
    dist.all_reduce(mine.grad)
    torch.testing.assert_close(mine.grad, whole_rows.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(part.grad, whole.grad.chunk(size)[rank], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("vocab", "chunk_bytes", "temperature"),
    [(VOCAB, 2**30, 1.0), (VOCAB, 640, 0.7), (20, 2**30, 1.0)],
    ids=["whole", "chunks at another temperature", "a rank without ids"],
)
def test_columns_equal_the_specification_with_gradients(tp, vocab, chunk_bytes, temperature):
    run_ranks(_columns_case, tp, vocab=vocab, chunk_bytes=chunk_bytes, temperature=temperature)


def _full_support_case(rank):
    size = dist.get_world_size()
    draw = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(5, HIDDEN, generator=draw), torch.randn(16, HIDDEN, generator=draw)
    rows.requires_grad_()
    shard = VocabShard.of(dist.group.WORLD, vocab_size=16, rows=16 // size)
    part = weight.chunk(size)[rank]
    got = columns(HeadInputs(rows, part, torch.arange(16).expand(5, 16), torch.zeros(5, dtype=torch.int64), shard))
    assert (got.tail == -torch.inf).all()
    teacher = torch.randn(5, 16, generator=draw).log_softmax(-1)
    ce = algo.topk_cross_entropy(teacher, got, tail="bucket")
    ce.sum().backward()
    want = -(teacher.exp() * (rows @ weight.t()).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(ce, want, rtol=1e-5, atol=1e-5)
    assert rows.grad.isfinite().all()


@pytest.mark.parametrize("tp", [1, 2])
def test_a_support_of_the_whole_vocabulary_has_no_tail(tp):
    run_ranks(_full_support_case, tp)


def _no_rows_case(rank):
    size = dist.get_world_size()
    rows = torch.zeros(0, HIDDEN, requires_grad=True)
    part = torch.ones(PADDED // size, HIDDEN, requires_grad=True)
    shard = VocabShard.of(dist.group.WORLD, vocab_size=VOCAB, rows=PADDED // size)
    none = torch.zeros(0, dtype=torch.int64)
    got = columns(HeadInputs(rows, part, torch.zeros(0, K, dtype=torch.int64), none, shard))
    (got.sampled.sum() + got.tail.sum() + got.support.sum()).backward()
    assert (part.grad == 0).all()


@pytest.mark.parametrize("tp", [1, 2])
def test_no_rows_are_a_loss_of_zero_with_a_backward(tp):
    run_ranks(_no_rows_case, tp)
