"""The sampler against servers that are slow, wrong, or die; and against good ones."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_distil.errors import EngineReplyError, EngineUnavailable, StaleWeightsError, SyncError
from megatron_distil.http import Http
from megatron_distil.protocols import SamplingSpec
from megatron_distil.registry import Record, Registry
from megatron_distil.rollout.pool import Admit, EnginePool
from megatron_distil.rollout.sampler import GroupSampler
from megatron_distil.rollout.sglang.client import Deadlines, connector
from megatron_distil.types import Prompt, Rollout, RolloutId
from tests.fakes import FakeServer

STEP = 4
SPEC = SamplingSpec(temperature=1.0, max_new_tokens=8, stop_token_ids=(3,))


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(prompt_id=f"p{k}", text="", token_ids=np.asarray([k, k + 1], dtype=np.int32), task={})
        for k in range(count)
    ]


def drawn(
    folder: Path,
    servers: int,
    work: Callable[[GroupSampler, list[FakeServer]], Awaitable[Any]],
    *,
    admit: Callable[[list[FakeServer]], Admit] | None = None,
    concurrency: int = 64,
    budget_s: float = 10.0,
    request_s: float = 5.0,
) -> Any:
    """The result of ``work`` with that many servers, all of which serve version ``STEP``."""

    async def main() -> Any:
        registry = Registry(folder)
        async with AsyncExitStack() as stack:
            fakes = [
                await stack.enter_async_context(FakeServer(f"engine{k}", registry, version=str(STEP)))
                for k in range(servers)
            ]
            http = await stack.enter_async_context(Http())
            pool = EnginePool(
                registry,
                connector(http, lambda ids: " ".join(map(str, ids)), Deadlines(request_s, 5.0)),
                admit=admit(fakes) if admit is not None else None,
                concurrency=concurrency,
                patience_s=budget_s,
            )
            return await work(GroupSampler(pool, SPEC, samples_per_prompt=4, budget_s=budget_s), fakes)

    return asyncio.run(asyncio.wait_for(main(), 60))


def sample(count: int) -> Callable[[GroupSampler, list[FakeServer]], Awaitable[list[Rollout]]]:
    return lambda sampler, _: sampler.sample(prompts(count), STEP)


def expected_ids(count: int) -> list[RolloutId]:
    return [RolloutId(STEP, f"p{k}", sample) for k in range(count) for sample in range(4)]


def test_every_prompt_gets_its_group_in_order(tmp_path: Path) -> None:
    rollouts = drawn(tmp_path, 2, sample(9))
    assert [rollout.rollout_id for rollout in rollouts] == expected_ids(9)
    # The fake's tokens are a function of the prompt: (k + k + 1 + index) % 97.
    assert [rollout.token_ids.tolist() for rollout in rollouts[20:24]] == [[11, 12, 13, 14]] * 4
    assert rollouts[20].text == "11 12 13"


def test_no_server_gets_more_than_its_seats_and_all_are_used(tmp_path: Path) -> None:
    async def work(sampler: GroupSampler, fakes: list[FakeServer]) -> list[int]:
        for fake in fakes:
            fake.delay_s = 0.02
        await sampler.sample(prompts(24), STEP)
        return [fake.most_in_flight for fake in fakes]

    assert drawn(tmp_path, 2, work, concurrency=5) == [5, 5]


def test_the_rollouts_of_a_prompt_share_a_server(tmp_path: Path) -> None:
    async def work(sampler: GroupSampler, fakes: list[FakeServer]) -> list[FakeServer]:
        for fake in fakes:
            fake.delay_s = 0.2  # all are in flight together, so that the loads count
        await sampler.sample(prompts(12), STEP)
        return fakes

    fakes = drawn(tmp_path, 3, work)
    homes = [{rid.split("/")[1] for rid in fake.requests} for fake in fakes]
    assert sorted(map(len, homes)) == [4, 4, 4]
    assert len(set().union(*homes)) == 12


def test_a_burst_of_503_costs_attempts_and_nothing_else(tmp_path: Path) -> None:
    async def work(sampler: GroupSampler, fakes: list[FakeServer]) -> list[Rollout]:
        fakes[0].faults = ["503"] * 6
        fakes[1].faults = ["503", "close", "503"]
        rollouts = await sampler.sample(prompts(4), STEP)
        counts = Counter(rid for fake in fakes for rid in fake.requests)
        assert sum(counts.values()) == 16 + 9
        assert set(counts) == {f"{rollout_id}." for rollout_id in expected_ids(4)}  # under the same ids
        return rollouts

    assert [rollout.rollout_id for rollout in drawn(tmp_path, 2, work)] == expected_ids(4)


def test_the_only_server_may_fail_now_and_then(tmp_path: Path) -> None:
    async def work(sampler: GroupSampler, fakes: list[FakeServer]) -> list[Rollout]:
        fakes[0].faults = ["503", "close", "abort"]
        return await sampler.sample(prompts(2), STEP)

    assert len(drawn(tmp_path, 1, work)) == 8


def test_a_dead_server_is_replaced_by_the_others(tmp_path: Path) -> None:
    async def work(sampler: GroupSampler, fakes: list[FakeServer]) -> list[Rollout]:
        fakes[0].delay_s = 0.3
        task = asyncio.ensure_future(sampler.sample(prompts(6), STEP))
        while not fakes[0].requests:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await fakes[0].die()
        rollouts = await task
        assert set(fakes[0].requests) <= set(fakes[1].requests)
        return rollouts

    assert [rollout.rollout_id for rollout in drawn(tmp_path, 2, work)] == expected_ids(6)


def test_a_server_that_hangs_is_left_after_the_deadline_and_told_to_stop(tmp_path: Path) -> None:
    async def work(sampler: GroupSampler, fakes: list[FakeServer]) -> list[str]:
        fakes[0].faults = ["hang"]
        await sampler.sample(prompts(1), STEP)
        assert Counter(fakes[0].requests).most_common(1)[0][1] == 2
        return fakes[0].aborted

    assert drawn(tmp_path, 1, work, request_s=0.3) == ["4/p0/0."]


@pytest.mark.parametrize(
    ("edit", "fragment"),
    [
        (lambda reply: reply["output_ids"].pop(), "3 tokens, 4 log-probabilities"),
        (lambda reply: reply["meta_info"]["output_token_logprobs"][1].__setitem__(0, float("nan")), "is nan"),
        (lambda reply: reply.clear(), "meta_info"),
    ],
)
def test_nonsense_stops_the_step_and_is_not_asked_again(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], fragment: str
) -> None:
    async def work(sampler: GroupSampler, fakes: list[FakeServer]) -> None:
        fakes[0].faults = [edit]
        with pytest.raises(EngineReplyError, match=f"4/p0/0: .*{fragment}"):
            await sampler.sample(prompts(1), STEP)
        assert fakes[0].requests.count("4/p0/0.") == 1

    drawn(tmp_path, 1, work)


def test_a_refusal_stops_the_step_and_frees_the_server(tmp_path: Path) -> None:
    async def work(sampler: GroupSampler, fakes: list[FakeServer]) -> None:
        fakes[0].faults = ["400", *["hang"] * 7]
        with pytest.raises(EngineReplyError, match=r"engine0 .*400: .*injected"):
            await sampler.sample(prompts(2), STEP)
        assert set(fakes[0].aborted) == set(fakes[0].requests) - {"4/p0/0."}

    drawn(tmp_path, 1, work)


def test_cancelling_a_step_aborts_what_is_in_flight(tmp_path: Path) -> None:
    async def work(sampler: GroupSampler, fakes: list[FakeServer]) -> None:
        fakes[0].faults = ["hang"] * 8
        task = asyncio.ensure_future(sampler.sample(prompts(2), STEP))
        while len(fakes[0].requests) < 8:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(fakes[0].aborted) == sorted(fakes[0].requests)

    drawn(tmp_path, 1, work)


def test_tokens_of_other_weights_are_refused_by_name(tmp_path: Path) -> None:
    def other(reply: dict[str, Any]) -> None:
        reply["meta_info"]["weight_versions"] = [
            {"version": "3", "start": 0, "end": 1},
            {"version": "4", "start": 1, "end": 4},
        ]

    async def work(sampler: GroupSampler, fakes: list[FakeServer]) -> None:
        fakes[0].faults = [other]
        with pytest.raises(StaleWeightsError, match=r"4/p0/0: engine0 .*versions 3 to 4, the student is at 4"):
            await sampler.sample(prompts(1), STEP)

    drawn(tmp_path, 1, work)


def test_a_server_on_other_weights_is_asked_nothing(tmp_path: Path) -> None:
    async def work(sampler: GroupSampler, fakes: list[FakeServer]) -> list[int]:
        fakes[0].version = "3"
        fakes[1].is_paused = True
        await sampler.sample(prompts(4), STEP)
        return [len(fake.requests) for fake in fakes]

    assert drawn(tmp_path, 3, work) == [0, 0, 16]


def test_a_restarted_server_gets_the_weights_and_the_step_goes_on(tmp_path: Path) -> None:
    admitted: list[tuple[str, int, int]] = []

    def admit(fakes: list[FakeServer]) -> Admit:
        async def bring_up(record: Record, version: int) -> None:
            admitted.append((record.name, record.gen, version))
            fakes[0].version = str(version)

        return bring_up

    async def work(sampler: GroupSampler, fakes: list[FakeServer]) -> list[Rollout]:
        fakes[0].delay_s = 0.2
        task = asyncio.ensure_future(sampler.sample(prompts(3), STEP))
        while len(fakes[0].requests) < 12:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await fakes[0].restart()
        return await task

    rollouts = drawn(tmp_path, 1, work, admit=admit)
    assert [rollout.rollout_id for rollout in rollouts] == expected_ids(3)
    assert admitted[-1] == ("engine0", 1, STEP)


def test_the_end_of_a_step_waits_for_a_server_that_loads(tmp_path: Path) -> None:
    """Otherwise the next publication would meet the load."""
    done: list[int] = []

    def admit(_: list[FakeServer]) -> Admit:
        async def bring_up(record: Record, version: int) -> None:
            done.append(0)
            await asyncio.sleep(0.5)
            done[-1] = version

        return bring_up

    async def work(sampler: GroupSampler, fakes: list[FakeServer]) -> None:
        fakes[0].version = "default"
        fakes[1].delay_s = 0.1
        await sampler.sample(prompts(2), STEP)
        assert done == [STEP]

    drawn(tmp_path, 2, work, admit=admit)


def test_two_instances_of_a_server_are_not_brought_up_at_a_time(tmp_path: Path) -> None:
    """A restarted server answers before its new record is there."""
    at_a_time = 0

    def admit(fakes: list[FakeServer]) -> Admit:
        async def bring_up(record: Record, version: int) -> None:
            nonlocal at_a_time
            at_a_time += 1
            assert at_a_time == 1
            await asyncio.sleep(0.5)
            at_a_time -= 1
            fakes[0].version = str(version)

        return bring_up

    async def work(sampler: GroupSampler, fakes: list[FakeServer]) -> list[Rollout]:
        fakes[0].version = "default"
        task = asyncio.ensure_future(sampler.sample(prompts(1), STEP))
        await asyncio.sleep(0.2)
        fakes[0].gen = 1
        fakes[0].register()
        return await task

    assert len(drawn(tmp_path, 1, work, admit=admit)) == 4


def test_a_server_that_cannot_be_admitted_is_left_out(tmp_path: Path) -> None:
    def admit(_: list[FakeServer]) -> Admit:
        async def bring_up(record: Record, version: int) -> None:
            raise SyncError(f"{record.name}: version {version} differs at lm_head.weight")

        return bring_up

    async def work(sampler: GroupSampler, fakes: list[FakeServer]) -> list[int]:
        fakes[0].version = "default"
        await sampler.sample(prompts(2), STEP)
        return [len(fake.requests) for fake in fakes]

    assert drawn(tmp_path, 2, work, admit=admit) == [0, 8]


def test_without_servers_the_error_names_those_that_there_were(tmp_path: Path) -> None:
    async def work(sampler: GroupSampler, fakes: list[FakeServer]) -> None:
        fakes[0].version = "3"
        await fakes[1].die()
        with pytest.raises(EngineUnavailable) as caught:
            await sampler.sample(prompts(1), STEP)
        assert "no server for 1 s" in str(caught.value)
        assert "engine0 (http://127.0.0.1:" in str(caught.value)
        assert "waits for the next publication" in str(caught.value)
        assert "engine1 (http://127.0.0.1:" in str(caught.value)

    drawn(tmp_path, 2, work, budget_s=1.0)


def test_a_spent_budget_names_the_rollout_and_the_last_failure(tmp_path: Path) -> None:
    async def work(sampler: GroupSampler, fakes: list[FakeServer]) -> None:
        fakes[0].faults = ["503"] * 1000
        with pytest.raises(EngineUnavailable, match=r"4/p0/\d: gave up after 1 s; last: engine0 .*503: .*injected"):
            await sampler.sample(prompts(1), STEP)

    drawn(tmp_path, 1, work, budget_s=1.0)
