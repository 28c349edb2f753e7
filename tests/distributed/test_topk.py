"""The teacher's side of the head equals whole logits that are sorted: ids exactly, ties included, on any cut of the vocabulary."""

import itertools

import pytest
import torch
import torch.distributed as dist

from megatron_distil.trainer.head import topk as head_topk
from megatron_distil.trainer.head.columns import VocabShard
from megatron_distil.trainer.head.topk import Scores, Voice, at_ids, top_k
from tests.world import run_ranks

ROWS, HIDDEN, PADDED = 70, 24, 1024
NEAR = {torch.float32: 5e-6, torch.float64: 1e-13}


def problem(dtype: torch.dtype, grain: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiples of ``grain``: products are exact in any order of summation, so ids may be compared. 1: masses of ties."""
    draw = torch.Generator().manual_seed(3)
    rows, weight = torch.randn(ROWS, HIDDEN, generator=draw), torch.randn(PADDED, HIDDEN, generator=draw)
    return tuple(((x / grain).round() * grain).to(dtype) for x in (rows, weight))


def small_tiles(rows: int, columns: int, block: int) -> None:
    head_topk.TILE_ROWS, head_topk.TILE_COLUMNS, head_topk.LEAST_BLOCK = rows, columns, block


def own_shard(vocab: int, padded: int = PADDED) -> tuple[VocabShard, slice]:
    per_rank = padded // dist.get_world_size()
    shard = VocabShard.of(dist.group.WORLD, vocab_size=vocab, rows=per_rank)
    return shard, slice(shard.first, shard.first + per_rank)


def check(got: Scores, logits: torch.Tensor, ids: torch.Tensor, sampled: torch.Tensor) -> None:
    """All of it, against whole logits in float64."""
    assert torch.equal(got.ids, ids)
    wide = logits.double()
    logprobs, near = wide.log_softmax(-1), {"rtol": 0, "atol": NEAR[logits.dtype]}
    assert got.logprobs.dtype == got.entropy.dtype == logits.dtype
    torch.testing.assert_close(got.logprobs.double(), logprobs.gather(1, ids), **near)
    torch.testing.assert_close(got.sampled.double(), logprobs.gather(1, sampled[:, None])[:, 0], **near)
    torch.testing.assert_close(got.entropy.double(), -(logprobs.exp() * logprobs).sum(-1), **near)
    whole = wide.gather(1, sampled[:, None])[:, 0] - got.sampled.double()
    torch.testing.assert_close(whole, wide.logsumexp(-1), **near)


def sorted_ids(logits: torch.Tensor, k: int) -> torch.Tensor:
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def _sorted_case(rank: int, *, vocab: int) -> None:
    shard, mine = own_shard(vocab)
    for dtype, grain in itertools.product((torch.float32, torch.float64), (1 / 64, 1.0)):
        rows, weight = problem(dtype, grain)
        logits = rows @ weight[:vocab].t()
        sampled = torch.arange(ROWS) * 37 % vocab
        voices = [Voice(rows, weight[mine], 1.0)]
        for k, tile in itertools.product((1, 20, 100, vocab), ((24, 64, 4), (48, 256, 8), (512, 2048, 32))):
            small_tiles(*tile)
            want = sorted_ids(logits, k)
            check(top_k(voices, k, sampled, shard, temperature=1.0), logits, want, sampled)
        for ids in (want[:, :0], want[:, 5:25].flip(1)):
            check(at_ids(voices, ids, sampled, shard, temperature=1.0), logits, ids, sampled)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("vocab", [1000, 260], ids=["padded", "ranks with few ids or none"])
def test_the_largest_are_those_of_sorted_logits(tp: int, vocab: int) -> None:
    run_ranks(_sorted_case, tp, vocab=vocab)


def _order_case(rank: int) -> None:
    small_tiles(8, 64, 4)
    shard, mine = own_shard(1000)
    rows, ids = torch.ones(ROWS, 1), torch.arange(PADDED, dtype=torch.float64)
    sampled = torch.arange(ROWS)
    orders = [(weight / 64).float() for weight in (ids, -ids, ids * 0, -(ids % 7), (ids - 500).abs())]
    orders += [1.0 + ids * 37 % 501 * 1e-12]  # float64 that float32 cannot tell apart
    for weight in orders:
        whole, ones = weight[:, None], rows.to(weight.dtype)
        logits = ones @ whole[:1000].t()
        found = top_k([Voice(ones, whole[mine], 1.0)], 30, sampled, shard, temperature=1.0)
        check(found, logits, sorted_ids(logits, 30), sampled)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_order_of_logits_over_ids_does_not_matter(tp: int) -> None:
    run_ranks(_order_case, tp)


def _mixture_case(rank: int) -> None:
    small_tiles(32, 256, 8)
    shard, mine = own_shard(1000)
    rows, weight = problem(torch.float32, 1 / 32)
    other, other_weight = rows.flip(0) * 1.25, weight.flip(0)
    voices = [Voice(rows, weight[mine], 0.75), Voice(other, other_weight[mine], 0.25)]
    logits = (0.75 * (rows @ weight[:1000].t()) + 0.25 * (other @ other_weight[:1000].t())) / 0.5
    sampled = torch.arange(ROWS)
    check(top_k(voices, 20, sampled, shard, temperature=0.5), logits, sorted_ids(logits, 20), sampled)


@pytest.mark.parametrize("tp", [1, 2])
def test_voices_are_mixed_as_logits_and_divided_by_the_temperature(tp: int) -> None:
    run_ranks(_mixture_case, tp)


def _bfloat16_case(rank: int) -> None:
    shard, mine = own_shard(1000)
    rows, weight = (x.bfloat16() for x in problem(torch.float32, 1 / 16))
    logits, sampled = rows.float() @ weight[:1000].float().t(), torch.arange(ROWS)
    check(
        top_k([Voice(rows, weight[mine], 1.0)], 20, sampled, shard, temperature=1.0),
        logits,
        sorted_ids(logits, 20),
        sampled,
    )


def test_products_of_bfloat16_are_not_rounded_to_it() -> None:
    run_ranks(_bfloat16_case, 2)


def _not_finite_case(rank: int) -> None:
    shard, mine = own_shard(1000)
    rows, weight = problem(torch.float32, 1 / 64)
    rows[3, 0], rows[40] = torch.nan, torch.inf
    weight[990] = 0.0  # on the last rank; inf * 0 is NaN there alone
    sampled = torch.arange(ROWS)
    found = top_k([Voice(rows, weight[mine], 1.0)], 20, sampled, shard, temperature=1.0)
    assert (~found.entropy.isfinite()).nonzero()[:, 0].tolist() == [3, 40]
    assert (~at_ids([Voice(rows, weight[mine], 1.0)], found.ids[:, :0], sampled, shard, temperature=1.0)
            .entropy.isfinite()).nonzero()[:, 0].tolist() == [3, 40]  # fmt: skip
    keep = [i for i in range(ROWS) if i not in (3, 40)]
    logits = rows[keep] @ weight[:1000].t()
    check(Scores(*(column[keep] for column in found)), logits, sorted_ids(logits, 20), sampled[keep])


@pytest.mark.parametrize("tp", [1, 2])
def test_a_row_that_is_not_finite_says_so_on_every_rank_and_spoils_no_other(tp: int) -> None:
    run_ranks(_not_finite_case, tp)


def _no_rows_case(rank: int) -> None:
    shard, mine = own_shard(1000)
    voices, none = [Voice(torch.zeros(0, HIDDEN), torch.ones(PADDED, HIDDEN)[mine], 1.0)], torch.zeros(0).long()
    assert top_k(voices, 7, none, shard, temperature=1.0).ids.shape == (0, 7)
    assert at_ids(voices, none[:, None].expand(0, 5), none, shard, temperature=1.0).logprobs.shape == (0, 5)


@pytest.mark.parametrize("tp", [1, 2])
def test_no_rows_are_no_scores(tp: int) -> None:
    run_ranks(_no_rows_case, tp)


@pytest.mark.parametrize("k", [0, -1, 1001])
def test_as_many_as_there_are_ids_can_be_asked_for(k: int) -> None:
    shard = VocabShard.of(None, vocab_size=1000, rows=PADDED)
    rows, weight = problem(torch.float32, 1.0)
    with pytest.raises(ValueError, match=rf"k = {k} of 1000 ids; give 1 to 1000"):
        top_k([Voice(rows, weight, 1.0)], k, torch.zeros(ROWS).long(), shard, temperature=1.0)


@pytest.mark.parametrize("half", [0, 1], ids=["rows", "weight"])
def test_float16_is_refused(half: int) -> None:
    shard = VocabShard.of(None, vocab_size=1000, rows=PADDED)
    both = [x.half() if i == half else x for i, x in enumerate(problem(torch.float32, 1.0))]
    with pytest.raises(ValueError, match=r"float16.*bfloat16 or float32"):
        top_k([Voice(both[0], both[1], 1.0)], 5, torch.zeros(ROWS).long(), shard, temperature=1.0)
