"""The teacher's head on a cut vocabulary equals the specification on the whole one: ids exactly, ties included."""

import pytest
import torch
import torch.distributed as dist

from megatron_distil import algo
from megatron_distil.trainer.head import columns as head_columns
from megatron_distil.trainer.head.columns import VocabShard
from megatron_distil.trainer.head.topk import Voice, at_ids, top_k
from tests.world import run_ranks

ROWS, HIDDEN, VOCAB, PADDED = 37, 12, 61, 64


def problem(dtype=torch.float32):
    draw = torch.Generator().manual_seed(3)
    rows = torch.randn(ROWS, HIDDEN, generator=draw, dtype=torch.float64).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=draw, dtype=torch.float64).to(dtype)
    return rows, weight


def _topk_case(rank, *, k, vocab, has_ties, chunk_bytes):
    head_columns.CHUNK_BYTES = chunk_bytes
    size = dist.get_world_size()
    rows, weight = problem()
    other, other_weight = rows.flip(0) * 1.1, weight.flip(0)
    if has_ties:
        rows, weight, other, other_weight = (x.round() for x in (rows, weight, other, other_weight))
    per_rank = PADDED // size
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    shard = VocabShard.of(dist.group.WORLD, vocab_size=vocab, rows=per_rank)
    voices = [Voice(rows, weight[mine], 0.75), Voice(other, other_weight[mine], 0.25)]
    logits = 0.75 * (rows @ weight[:vocab].t()) + 0.25 * (other @ other_weight[:vocab].t())
    got, want = top_k(voices, k, shard, temperature=1.0), algo.top_k(logits, k)
    assert torch.equal(got.ids, want.ids)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-5, atol=1e-5)
    ids = torch.arange(vocab).roll(5)[:k].expand(ROWS, k)
    here = at_ids(voices, ids, shard, temperature=1.0)
    torch.testing.assert_close(here.logprobs, logits.log_softmax(-1).gather(-1, ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(here.entropy, want.entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("k", "vocab", "has_ties", "chunk_bytes"),
    [(7, VOCAB, False, 2**30), (7, VOCAB, True, 640), (20, 20, True, 2**30)],
    ids=["values", "ties and chunks", "whole vocabulary"],
)
def test_top_k_is_exact_and_gives_ties_to_the_smaller_id(tp, k, vocab, has_ties, chunk_bytes):
    run_ranks(_topk_case, tp, k=k, vocab=vocab, has_ties=has_ties, chunk_bytes=chunk_bytes)


def _no_rows_case(rank):
    per_rank = PADDED // dist.get_world_size()
    shard = VocabShard.of(dist.group.WORLD, vocab_size=VOCAB, rows=per_rank)
    voice = Voice(torch.zeros(0, HIDDEN), torch.ones(per_rank, HIDDEN), 1.0)
    assert top_k([voice], 7, shard, temperature=1.0).ids.shape == (0, 7)


@pytest.mark.parametrize("tp", [1, 2])
def test_no_rows_are_no_targets(tp):
    run_ranks(_no_rows_case, tp)
