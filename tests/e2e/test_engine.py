"""A real server on this machine: what it samples, what it says of it, and how it is interrupted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_distil.http import Http
from megatron_distil.protocols import SamplingSpec
from megatron_distil.registry import Registry
from megatron_distil.rollout.pool import EnginePool
from megatron_distil.rollout.sampler import GroupSampler
from megatron_distil.rollout.sglang.client import Deadlines, SglangEngine, connector
from megatron_distil.types import FinishReason, Rollout, RolloutId
from tests.server import DIMS, RealServer, load, logprobs, prompts, real_server
from tests.tiny_model import tiny_qwen3

__all__ = ["real_server"]
VERSION = 3


def on_server(
    server: RealServer, folder: Path, work: Callable[[GroupSampler, SglangEngine], Awaitable[Any]], **spec: Any
) -> Any:
    """The result of ``work`` with the server on its start weights, which are called ``VERSION``."""

    async def main() -> Any:
        registry = Registry(folder)
        registry.write(server.record)
        async with Http() as http:
            connect = connector(http, str, Deadlines(60.0, 60.0))
            engine = connect(server.record)
            await engine.settle()
            await load(engine, str(server.model), VERSION)
            pool = EnginePool(registry, connect, admit=None, concurrency=256, patience_s=30.0)
            settings = SamplingSpec(**({"temperature": 1.0, "max_new_tokens": 16, "stop_token_ids": ()} | spec))
            return await work(GroupSampler(pool, settings, samples_per_prompt=4, budget_s=60.0), engine)

    return asyncio.run(asyncio.wait_for(main(), 120))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_servers_logprobs_are_those_of_hugging_face(
    real_server: RealServer, tmp_path: Path, temperature: float
) -> None:
    given = prompts(6)
    rollouts = on_server(real_server, tmp_path, lambda s, _: s.sample(given, VERSION), temperature=temperature)
    model = tiny_qwen3(seed=0, **DIMS)
    wrong = tiny_qwen3(seed=1, **DIMS)
    assert [rollout.rollout_id for rollout in rollouts] == [
        RolloutId(VERSION, f"p{k}", j) for k in range(6) for j in range(4)
    ]
    assert len({tuple(rollout.token_ids.tolist()) for rollout in rollouts}) > 20
    by_id = {prompt.prompt_id: prompt for prompt in given}
    gaps, others = [], []
    for rollout in rollouts:
        said = torch.from_numpy(rollout.logprobs)
        prompt = by_id[rollout.rollout_id.prompt]
        gaps.append((said - logprobs(model, prompt, rollout, temperature)).abs().max().item())
        others.append((said - logprobs(wrong, prompt, rollout, temperature)).abs().max().item())
    assert max(gaps) < 1e-4, gaps
    assert min(others) > 0.1  # other weights do not pass


def test_a_stop_token_ends_a_response_and_is_part_of_it(real_server: RealServer, tmp_path: Path) -> None:
    stops = tuple(range(0, 300, 3))
    rollouts = on_server(
        real_server, tmp_path, lambda s, _: s.sample(prompts(4), VERSION), stop_token_ids=stops, max_new_tokens=64
    )
    assert all(rollout.finish is FinishReason.STOP for rollout in rollouts)
    assert all(rollout.token_ids[-1] in stops for rollout in rollouts)
    assert not any(set(rollout.token_ids[:-1].tolist()) & set(stops) for rollout in rollouts)


def test_a_step_of_many_requests_is_answered_as_a_whole(real_server: RealServer, tmp_path: Path) -> None:
    async def work(sampler: GroupSampler, _: SglangEngine) -> float:
        start = time.perf_counter()
        rollouts = await sampler.sample(prompts(64), VERSION)
        assert len({rollout.rollout_id for rollout in rollouts}) == 256
        return 256 / (time.perf_counter() - start)

    rate = on_server(real_server, tmp_path, work, max_new_tokens=8)
    print(f"{rate:.0f} requests per second")


def test_a_cancelled_step_leaves_the_server_idle(real_server: RealServer, tmp_path: Path) -> None:
    async def work(sampler: GroupSampler, engine: SglangEngine) -> float:
        task = asyncio.ensure_future(sampler.sample(prompts(4), VERSION))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        start = time.perf_counter()
        spec = SamplingSpec(temperature=1.0, max_new_tokens=1, stop_token_ids=())
        await engine.generate(prompts(1)[0], spec, RolloutId(VERSION, "next", 0))
        while (await _running(engine)) and time.perf_counter() - start < 10:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return time.perf_counter() - start

    assert on_server(real_server, tmp_path, work, max_new_tokens=480) < 5


async def _running(engine: SglangEngine) -> int:
    loads = (await engine._get("/v1/loads?include=core"))["loads"]
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


def test_a_response_that_meets_an_update_knows_where(real_server: RealServer, tmp_path: Path) -> None:
    """The update does not wait for it: held requests do not keep the cache from being flushed."""

    async def work(_: GroupSampler, engine: SglangEngine) -> tuple[Rollout, float]:
        spec = SamplingSpec(temperature=1.0, max_new_tokens=400, stop_token_ids=())
        task = asyncio.ensure_future(engine.generate(prompts(1)[0], spec, RolloutId(VERSION, "p0", 0)))
        await asyncio.sleep(0.3)
        start = time.perf_counter()
        await load(engine, str(real_server.model), VERSION + 1)
        seconds = time.perf_counter() - start
        return await task, seconds

    rollout, seconds = on_server(real_server, tmp_path, work)
    assert (rollout.oldest_weights, rollout.newest_weights) == (VERSION, VERSION + 1)
    assert len(rollout.token_ids) == 400
    assert seconds < 10
