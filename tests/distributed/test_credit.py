"""The staged credit scan over real ranks equals the scan of whole sequences."""

import pytest
import torch
import torch.distributed as dist

from megatron_distil.trainer.head.scan import future_credit
from megatron_distil.trainer.head.stages import credit_plan
from tests.credit_cases import CALLS, LAYOUTS, MASKS, PACKINGS, make_case, own_rows, scanned, whole_credit
from tests.world import run_ranks


def _counted(monkeypatch):
    """Elements that this rank sends, call by call; no other collective is allowed."""
    sent = []
    gather = dist.all_gather_single

    def counted(out, mine, group):
        sent.append(mine.numel())
        gather(out, mine, group=group)

    monkeypatch.setattr(dist, "all_gather_single", counted)
    for other in ("all_reduce", "all_gather", "broadcast", "barrier", "all_gather_object", "all_to_all_single"):
        monkeypatch.delattr(dist, other)
    return sent


def _whole_sequences(rank, layout, packings, masks, stage_rows):
    group, size = dist.group.WORLD, dist.get_world_size()
    with pytest.MonkeyPatch.context() as patch:
        sent = _counted(patch)
        for packing in packings:
            for mask in masks:
                case = make_case(packing, layout, mask, size)
                want = whole_credit(case)[:, own_rows(case, rank)]
                for rows in stage_rows:
                    plan = credit_plan(case.order, case.segment_ids, case.is_row, rank, stage_rows=rows)
                    sent.clear()
                    torch.testing.assert_close(scanned(case, plan, group, rank), want, rtol=1e-12, atol=1e-12)
                    calls = len(CALLS) * len(plan.stages) if case.is_row.any() else 0
                    assert len(sent) == calls
                    if calls:
                        assert min(sent) >= 1


def _stand_alone(rank):
    case = make_case("uneven", "zigzag", "responses with gaps", dist.get_world_size())
    plan = credit_plan(case.order, case.segment_ids, case.is_row, rank)
    cost, want = case.costs[:, own_rows(case, rank)], whole_credit(case)[:, own_rows(case, rank)]
    for number, call in enumerate(CALLS):
        found = future_credit(cost[number], plan, dist.group.WORLD, **call)
        torch.testing.assert_close(found, want[number], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layout", "size"),
    [("zigzag", 2), ("zigzag", 4), ("contiguous", 3), ("zigzag over the buffer", 4), ("row shards, zigzag", 4)],
)
def test_credit_is_that_of_whole_sequences(layout, size):
    run_ranks(_whole_sequences, size, layout, ("uneven",), ("random", "a rank without rows", "none"), (None, 7))


def test_the_stand_alone_scan_is_that_of_whole_sequences():
    run_ranks(_stand_alone, 2)


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 4, 8, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_credit_is_that_of_whole_sequences_at_scale(layout, size):
    run_ranks(_whole_sequences, size, layout, tuple(PACKINGS), MASKS, (None, 7, 32, 10_000), timeout_s=600)
