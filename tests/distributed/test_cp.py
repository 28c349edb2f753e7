"""Vectors over tokens survive the two-chunk layout, and the credit does not see it."""

import pytest
import torch
import torch.distributed as dist

from megatron_distil import algo
from megatron_distil.trainer.cp import own_part, sequence_cut, whole_sequence, zigzag_order
from tests.world import run_ranks

LENGTHS = (8, 24, 16, 8)
CU = torch.tensor([0, 8, 32, 48, 56], dtype=torch.int32)


def test_the_order_is_that_of_megatron():
    assert zigzag_order(torch.tensor([0, 8, 12]), 2).tolist() == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]
    assert zigzag_order(torch.tensor([0, 3, 5]), 1).tolist() == [[0, 1, 2, 3, 4]]


def test_a_length_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match=r"\[8, 6\] are not all multiples of 2 \* cp = 4"):
        zigzag_order(torch.tensor([0, 8, 14]), 2)


def _credit_case(rank):
    cut = sequence_cut(CU, dist.group.WORLD)
    draw = torch.Generator().manual_seed(0)
    cost = torch.randn(56, generator=draw, dtype=torch.float64)
    mask = torch.rand(56, generator=draw) < 0.6
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    part = own_part(cost, cut)
    assert len(part) == 56 // dist.get_world_size()
    assert torch.equal(whole_sequence(part, cut), cost)
    for mean in (False, True):
        credit = own_part(algo.future_credit(whole_sequence(part, cut), mask, segments, mean=mean), cut)
        want = torch.zeros(56, dtype=torch.float64)
        for t in range(56):
            later = [cost[i].item() for i in range(t + 1, 56) if segments[i] == segments[t] and mask[i]]
            want[t] = sum(later) / (max(1, len(later)) if mean else 1)
        torch.testing.assert_close(credit, want[cut.own], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_the_credit_is_that_of_whole_sequences(cp):
    run_ranks(_credit_case, cp)
