"""Stages are closed under what comes later, and the credit does not see how sequences are cut."""

from __future__ import annotations

import itertools
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_distil import algo
from megatron_distil.trainer.cp import contiguous_order, zigzag_order
from megatron_distil.trainer.head import scan, stages
from megatron_distil.trainer.head.scan import CreditScan, future_credit
from megatron_distil.trainer.head.stages import credit_plan
from tests.credit_cases import CALLS, LAYOUTS, MASKS, PACKINGS, Case, make_case, own_rows, scanned, whole_credit
from tests.ranks_in_threads import collectives, run_threads

STAGE_ROWS = (None, 7, 32, 10_000)
SIZES = [("contiguous", 1), ("contiguous", 3), ("zigzag", 2), ("zigzag", 4), ("zigzag over the buffer", 4)]
SHARDS = [(layout, 4) for layout in LAYOUTS if layout.startswith("row shards")]
GRID = [(*layout, mask) for layout, mask in itertools.product(SIZES + SHARDS, MASKS)]
CUTS = list(itertools.product(PACKINGS, STAGE_ROWS))
SUM = {"mean": False, "discount": 1.0}


@pytest.fixture(autouse=True)
def _threads_for_ranks(monkeypatch):
    monkeypatch.setattr(scan, "dist", collectives)


def plans_of(case: Case, stage_rows=None):
    ranks = range(len(case.order))
    return [credit_plan(case.order, case.segment_ids, case.is_row, rank, stage_rows=stage_rows) for rank in ranks]


def credit_of(case: Case, stage_rows=None):
    """[calls, T] from all ranks."""
    plans = plans_of(case, stage_rows)
    found = torch.zeros_like(case.costs)
    parts = run_threads(lambda rank, group: scanned(case, plans[rank], group, rank), len(plans))
    for rank, part in enumerate(parts):
        found[:, own_rows(case, rank)] = part
    return found


def of_lengths(lengths, order=None, seed=0):
    total, draw = sum(lengths), torch.Generator().manual_seed(seed)
    return Case(
        order=torch.arange(total)[None] if order is None else order,
        segment_ids=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        is_row=torch.ones(total, dtype=torch.bool),
        costs=torch.randn(len(CALLS), total, generator=draw, dtype=torch.float64),
    )


def assert_stages_are_closed(case: Case, plans) -> None:
    """Every row in one stage, and every later row of its sequence, on any rank, in the same or an earlier one."""
    stage = torch.full((len(case.segment_ids),), -1)
    for rank, plan in enumerate(plans):
        rows = own_rows(case, rank)
        assert plan.num_rows == len(rows)
        assert len(plan.stages) == len(plans[0].stages)
        for index, part in enumerate(plan.stages):
            assert (part.rows.diff() > 0).all()
            assert (stage[rows[part.rows]] == -1).all()
            stage[rows[part.rows]] = index
    assert (stage[case.is_row] >= 0).all()
    for segment in case.segment_ids.unique():
        inside = stage[case.is_row & (case.segment_ids == segment)]
        assert (inside.diff() <= 0).all()


def assert_credit_is_that_of_whole_sequences(layout, size, mask, cuts):
    for packing, stage_rows in cuts:
        case = make_case(packing, layout, mask, size)
        assert_stages_are_closed(case, plans_of(case, stage_rows))
        torch.testing.assert_close(credit_of(case, stage_rows), whole_credit(case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("number", "layout", "size", "mask"), [(i, *grid) for i, grid in enumerate(GRID)])
def test_credit_is_that_of_whole_sequences(number, layout, size, mask):
    assert_credit_is_that_of_whole_sequences(layout, size, mask, CUTS[number % 5 :: 5])


@pytest.mark.full
@pytest.mark.parametrize(("layout", "size", "mask"), GRID)
def test_credit_is_that_of_whole_sequences_however_they_are_cut(layout, size, mask):
    assert_credit_is_that_of_whole_sequences(layout, size, mask, CUTS)


@st.composite
def any_case(draw):
    """Sequences of any length, the tokens of any rank in any order."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    size, seed = draw(st.integers(1, 4)), draw(st.integers(0, 2**16))
    random = torch.Generator().manual_seed(seed)
    total = -(-sum(lengths) // size) * size
    segments = torch.full((total,), -1)
    segments[: sum(lengths)] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    is_row = (torch.rand(total, generator=random) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))) & (segments >= 0)
    grain = draw(st.sampled_from([1, 3, 16]))  # short pieces, or long ones
    shuffled = torch.randperm(-(-total // grain), generator=random).repeat_interleave(grain)[:total]
    order = shuffled.argsort(stable=True).view(size, total // size)
    return Case(order, segments, is_row, torch.randn(len(CALLS), total, generator=random, dtype=torch.float64))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=any_case(), stage_rows=st.sampled_from([None, 1, 7, 32]))
def test_credit_is_that_of_whole_sequences_in_any_order(case, stage_rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "dist", collectives)
        assert_stages_are_closed(case, plans_of(case, stage_rows))
        torch.testing.assert_close(credit_of(case, stage_rows), whole_credit(case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [15, 16, 17, 256, 257, 4096, 4097, 70_000])
def test_blocks_of_blocks_add_up(length):
    case = of_lengths([3, length, 2])
    want = whole_credit(case)
    scale = want.abs().amax(1, keepdim=True)
    torch.testing.assert_close(credit_of(case) / scale, want / scale, rtol=0, atol=1e-12)


def test_one_rank_is_cut_from_the_end():
    case = of_lengths([5, 30, 10])
    (plan,) = plans_of(case, 7)
    assert [part.rows.tolist() for part in plan.stages][:2] == [list(range(38, 45)), list(range(31, 38))]
    assert [len(part.rows) for part in plan.stages] == [7] * 6 + [3]


def test_the_halves_of_the_two_chunk_layout_are_two_stages_of_equal_ranks():
    order = zigzag_order(torch.tensor([0, 64]), 4)
    plans = plans_of(of_lengths([64], order), 4)
    assert [[len(part.rows) for part in plan.stages] for plan in plans] == [[8, 8]] * 4


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "zigzag over the buffer"])
def test_many_sequences_make_stages_of_the_asked_size_that_keep_every_rank_busy(layout):
    lengths = (torch.randint(1, 20, (200,), generator=torch.Generator().manual_seed(0)) * 8).tolist()
    cu = torch.tensor([0, *lengths]).cumsum(0)
    plans = plans_of(of_lengths(lengths, LAYOUTS[layout](cu, 4)), 128)
    rows = torch.tensor([[len(part.rows) for part in plan.stages] for plan in plans])
    assert rows.amax() < 3 * 128
    assert rows.amax(0).sum() < 1.2 * rows.sum(1).amax()
    assert rows.shape[1] <= -(-int(rows.sum(1).amax()) // 128)


@pytest.mark.parametrize("size", [2, 4])
def test_sequences_in_halves_are_cut_once_and_evenly_and_never_where_no_rank_comes_again(size):
    case = of_lengths([96, 96], zigzag_order(torch.tensor([0, 96, 192]), size))
    plans = plans_of(case, 4)
    assert [[len(part.rows) for part in plan.stages] for plan in plans] == [[48 // size] * 4] * size
    # what is left of a first half lies on one rank, which comes next as well
    case.is_row.view(2, 96)[:, : 52 - 48 // size] = False
    assert [len(plan.stages) for plan in plans_of(case, 4)] == [2] * size


def test_entries_are_counted_by_keys_of_any_size():
    keys = np.array([65537, 1, 65537, 65535, 1, 65537])
    assert stages._counts_before(keys).tolist() == [0, 0, 1, 0, 1, 2]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "row shards, zigzag"])
@pytest.mark.parametrize("stage_rows", [None, 16])
def test_a_call_gathers_once_and_as_many_numbers_as_the_busiest_rank_has_pieces(layout, stage_rows):
    case = make_case("uneven", layout, "random", 4)
    plans = plans_of(case, stage_rows)
    holder, stage = torch.empty(2, len(case.segment_ids), dtype=torch.int64)
    for rank, plan in enumerate(plans):
        holder[case.order[rank]] = rank
        for index, part in enumerate(plan.stages):
            stage[own_rows(case, rank)[part.rows]] = index
    counts = torch.zeros(len(plans[0].stages), 4, dtype=torch.int64)
    before = None
    for token in case.is_row.nonzero()[:, 0].tolist():
        now = (int(case.segment_ids[token]), int(stage[token]), int(holder[token]))
        if now != before:
            counts[now[1], now[2]] += 1
        before = now

    def sent(rank, group):
        scanned(case, plans[rank], group, rank)
        return group.gathered

    want = counts.amax(1).repeat_interleave(len(CALLS)).tolist()
    assert run_threads(sent, 4) == [want] * 4


def test_one_rank_and_a_batch_without_rows_gather_nothing():
    for case in (of_lengths([5, 6]), make_case("uneven", "zigzag", "none", 2)):
        plans = plans_of(case)

        def sent(rank, group, case=case, plans=plans):
            assert scanned(case, plans[rank], group, rank).shape == (len(CALLS), plans[rank].num_rows)
            return group.gathered

        assert run_threads(sent, len(plans)) == [[]] * len(plans)


def test_a_large_neighbour_takes_no_digits():
    case = of_lengths([20, 20, 20])
    costs = case.costs.clone()
    costs[:, 20:40] *= 1e30
    want = whole_credit(case._replace(costs=costs))
    found = credit_of(case._replace(costs=costs), 7)
    for segment in range(3):
        own = case.segment_ids == segment
        torch.testing.assert_close(found[:, own], want[:, own], rtol=1e-11, atol=0)


def test_a_cost_that_is_not_finite_stays_in_its_sequence():
    case = of_lengths([20, 20, 20], contiguous_order(60, 4))
    want = whole_credit(case)
    case.costs[:, 35] = torch.nan
    found = credit_of(case, 7)
    assert found[0, 20:35].isnan().all()
    assert torch.equal(found[:, :20].isfinite(), torch.ones_like(found[:, :20], dtype=torch.bool))
    others = case.segment_ids != 1
    torch.testing.assert_close(found[:, others], want[:, others], rtol=1e-12, atol=1e-12)


def test_the_stand_alone_scan_keeps_the_dtype_and_has_no_gradient():
    case = make_case("uneven", "zigzag", "random", 2)
    plans, want = plans_of(case), whole_credit(case)

    def scan(rank, group):
        cost = case.costs[3, own_rows(case, rank)].float().requires_grad_()
        return future_credit(cost, plans[rank], group, **CALLS[3])

    for rank, part in enumerate(run_threads(scan, 2)):
        assert part.dtype == torch.float32
        assert not part.requires_grad
        torch.testing.assert_close(part, want[3, own_rows(case, rank)].float(), rtol=1e-5, atol=1e-6)


def test_a_plan_moves_with_all_its_tensors():
    def devices(record):
        if isinstance(record, torch.Tensor):
            return {record.device.type}
        if is_dataclass(record):
            record = tuple(getattr(record, field.name) for field in fields(record))
        return set().union(*map(devices, record)) if isinstance(record, tuple) else set()

    (plan,) = plans_of(of_lengths([300]), 20)
    assert devices(plan) == {"cpu"}
    assert devices(plan.to("meta")) == {"meta"}


def test_a_discount_counts_masked_positions():
    draw = torch.Generator().manual_seed(0)
    cost = torch.randn(40, generator=draw, dtype=torch.float64)
    mask = torch.rand(40, generator=draw) < 0.6
    segments = (torch.rand(40, generator=draw) < 0.1).cumsum(0)
    for discount in (1.0, 0.9, 0.0):
        want = torch.zeros(40, dtype=torch.float64)
        for t in range(40):
            later = [i for i in range(t + 1, 40) if mask[i] and segments[i] == segments[t]]
            want[t] = sum(discount**between * cost[i].item() for between, i in enumerate(later))
        got = algo.future_credit(cost, mask, segments, discount=discount)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_planned_is_refused():
    order, segments = contiguous_order(8, 2), torch.tensor([0, 0, 0, 1, 1, 1, -1, -1])
    is_row = segments >= 0
    with pytest.raises(ValueError, match=r"their shapes are \(8,\), \(8,\), \(8,\)"):
        credit_plan(order[0].repeat(2), segments, is_row, 0)
    with pytest.raises(ValueError, match="rank 2 of 2 ranks; give 0 to 1"):
        credit_plan(order, segments, is_row, 2)
    with pytest.raises(ValueError, match="stage_rows = 0; give 1 or more"):
        credit_plan(order, segments, is_row, 0, stage_rows=0)
    with pytest.raises(ValueError, match="each response token once"):
        credit_plan(order[:1].repeat(2, 1), segments, is_row, 0)
    with pytest.raises(ValueError, match="token 7 is a row in padding"):
        credit_plan(order, segments, (torch.arange(8) == 7) | (torch.arange(8) == 1), 0)  # token 1 is of sequence 0


def test_calls_that_do_not_fit_the_plan_are_refused():
    (plan,) = plans_of(of_lengths([9]), 3)
    with pytest.raises(ValueError, match="made for 1 ranks, the group has 2"):
        run_threads(lambda rank, group: CreditScan(plan, group, "cpu"), 2)
    with pytest.raises(ValueError, match="has 3 stages; make it with stage_rows=None"):
        future_credit(torch.zeros(9), plan, None, **SUM)
    scan = CreditScan(plan, None, "cpu")
    with pytest.raises(ValueError, match=r"stage 0 has 3 rows on this rank, its cost has shape \(9,\)"):
        scan.credit(0, torch.zeros(9), **SUM)
    with pytest.raises(ValueError, match="stages come in order"):
        scan.credit(1, torch.zeros(3), **SUM)
    scan.credit(0, torch.zeros(3), **SUM)
    scan.credit(0, torch.zeros(3), **SUM)
    scan.credit(1, torch.zeros(3), **SUM)
    with pytest.raises(ValueError, match="stage 2 after 1 of 2 calls for stage 1"):
        scan.credit(2, torch.zeros(3), **SUM)
    scan.credit(1, torch.zeros(3), **SUM)
    with pytest.raises(ValueError, match="stage 1 was asked 3 times, stage 0 only 2"):
        scan.credit(1, torch.zeros(3), **SUM)
