"""Work of a head reaches its replica, and its errors reach everybody."""

import asyncio
import itertools
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_distil.errors import ConfigError, EngineUnavailable, ForeignError, Problem
from megatron_distil.trainer.groups import Groups, make_groups
from megatron_distil.trainer.replica import Replica, balanced, portable
from tests.trainer_config import trainer_config
from tests.world import RankFailed, run_ranks


def replica_of(*, collect_timeout_s: float = 60, **parallel: int) -> tuple[Groups, Replica]:
    sizes = trainer_config(parallel=parallel).parallel
    groups = make_groups(sizes, collective_timeout_s=60, collect_timeout_s=collect_timeout_s)
    return groups, Replica(groups)


def share(rank: int) -> None:
    _, replica = replica_of(tp=2, dp=2)
    loops = []

    async def work() -> list[Any]:
        loops.append(asyncio.get_running_loop())
        return [rank, "text"]

    for _ in range(2):
        assert replica.on_head(work) == [rank // 2 * 2, "text"]  # ranks 0 and 2 are the heads
    assert len(set(loops)) == (rank in (0, 2)), "one event loop per run, on heads only"
    assert len(loops) == 2 * (rank in (0, 2))
    replica.close()


def test_a_replica_gets_what_its_head_found_in_one_event_loop() -> None:
    run_ranks(share, 4)


class Unpicklable(Exception):
    def __init__(self, first: str, second: object) -> None:
        super().__init__(f"{first} failed")
        self.second = second


def fail(rank: int, *, kind: str) -> None:
    groups, replica = replica_of(tp=2, dp=2)
    errors: dict[str, Exception] = {
        "ours": EngineUnavailable("http://127.0.0.1:1: refused"),
        "with_problems": ConfigError([Problem("a.b", 1, "is wrong")]),
        "plain": KeyError("rows"),
        "foreign": Unpicklable("a thing", lambda: None),
    }

    async def work() -> list[int]:
        if rank == 2:
            raise errors[kind]
        return [1]

    want = (
        errors[kind]
        if rank == 2 or kind != "foreign"
        else ForeignError(f"{Unpicklable.__module__}.Unpicklable: a thing failed")
    )
    with pytest.raises(type(want)) as caught:
        replica.on_head(work)
    assert type(caught.value) is type(want)
    assert str(caught.value) == str(want)
    assert caught.value.__notes__ == ["raised on rank 2"]
    assert replica.any_rank(rank == 3), "the groups are still in step"
    assert groups.rank == rank


@pytest.mark.parametrize("kind", ["ours", "with_problems", "plain", "foreign"])
def test_the_error_of_one_head_is_raised_on_every_rank(kind: str) -> None:
    run_ranks(fail, 4, kind=kind)


def first_of_two(rank: int) -> None:
    _, replica = replica_of(dp=2)

    async def work() -> list[int]:
        raise EngineUnavailable(f"from rank {rank}")

    with pytest.raises(EngineUnavailable, match="from rank 0"):
        replica.on_head(work)


def test_of_several_errors_every_rank_raises_the_same() -> None:
    run_ranks(first_of_two, 2)


def slow_head(rank: int) -> None:
    _, replica = replica_of(tp=2, collect_timeout_s=1)

    async def work() -> list[int]:
        await asyncio.sleep(30)
        return [1]

    replica.on_head(work)


def test_the_others_wait_for_a_head_no_longer_than_they_were_told() -> None:
    begin = time.monotonic()
    with pytest.raises(RankFailed, match=r"[Tt]imed out"):
        run_ranks(slow_head, 2)
    assert time.monotonic() - begin < 15


def numbers(rank: int) -> None:
    groups, replica = replica_of(tp=2, dp=2)
    index = groups.replica_index
    assert replica.sum_over_replicas([1.5, index + 1.0, 1e-17]) == [3.0, 3.0, 2e-17]
    assert not replica.any_rank(False)
    assert replica.any_rank(rank == 1)


def test_sums_count_each_replica_once() -> None:
    run_ranks(numbers, 4)


def spread(rank: int) -> None:
    """Items are (group, tokens); replica 0 has the long ones."""
    groups, replica = replica_of(tp=2, dp=2)
    had = [[("a", 50), ("a", 40), ("b", 30), ("b", 30)], [("c", 10), ("c", 5), ("d", 8), ("d", 8)]][
        groups.replica_index
    ]
    got = replica.exchange(had, group_of=lambda item: item[0], size_of=lambda item: item[1])
    # by hand: sizes a 90, b 60, c 15, d 16; largest first: a | b, then d to b's side, c to a's
    want = [[("a", 50), ("a", 40), ("c", 10), ("c", 5)], [("b", 30), ("b", 30), ("d", 8), ("d", 8)]]
    assert got == want[groups.replica_index]


def test_whole_groups_are_spread_by_their_tokens() -> None:
    run_ranks(spread, 4)


def alone(rank: int) -> None:
    _, replica = replica_of()
    assert replica.exchange([3, 1, 2], group_of=lambda item: item, size_of=lambda item: item) == [3, 1, 2]


def test_a_single_replica_keeps_its_order() -> None:
    run_ranks(alone, 1)


@given(st.lists(st.integers(0, 100), max_size=12), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_shares_hold_everything_once_with_equal_counts(sizes: list[int], parts: int) -> None:
    shares = balanced(sizes, parts)
    assert sorted(itertools.chain(*shares)) == list(range(len(sizes)))
    assert all(share == sorted(share) for share in shares)
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1


def test_shares_are_nearly_as_even_as_can_be() -> None:
    sizes = [9, 8, 7, 6, 5, 4, 3, 2]
    best = min(max(sum(part), sum(sizes) - sum(part)) for part in itertools.combinations(sizes, 4))  # by enumeration
    assert max(sum(sizes[i] for i in share) for share in balanced(sizes, 2)) <= best + 2


def test_an_error_that_changes_when_pickled_travels_as_text() -> None:
    class Local(Exception):
        pass

    assert isinstance(portable(Local("x")), ForeignError)
    assert isinstance(portable(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")), UnicodeDecodeError)
