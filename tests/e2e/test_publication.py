"""Publication to a real server: what it holds afterwards, bit by bit, and what it serves when something went wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from megatron_distil.config.schema import RolloutConfig, SyncConfig
from megatron_distil.errors import SyncError
from megatron_distil.http import Http
from megatron_distil.protocols import SamplingSpec
from megatron_distil.registry import Registry
from megatron_distil.rollout.pool import EnginePool
from megatron_distil.rollout.sampler import GroupSampler
from megatron_distil.rollout.sglang.client import Deadlines, connector
from megatron_distil.sync.broadcast import BroadcastSink
from megatron_distil.sync.disk import DiskSink, Snapshots
from megatron_distil.sync.plan import Bucket, weight_spec
from megatron_distil.sync.publish import Admission, Publisher
from megatron_distil.types import Prompt, Rollout
from tests.server import DIMS, RealServer, load, logprobs, prompts, real_server
from tests.tiny_model import tiny_qwen3, write_tiny_qwen3

__all__ = ["real_server"]
Sink = Literal["broadcast", "disk"]
SPEC = SamplingSpec(temperature=1.0, max_new_tokens=16, stop_token_ids=())


class Wrong(BroadcastSink):
    """Sends one value that the trainer does not hold."""

    weight = ""

    async def send(self, bucket: Bucket, tensors: Sequence[Tensor], version: int) -> None:
        sent = list(tensors)
        for index, weight in enumerate(bucket.weights):
            if weight.name == self.weight:
                sent[index] = sent[index].clone()
                sent[index].view(-1)[7] += 1e-3
        await super().send(bucket, sent, version)


class Run:
    """One trainer rank and the real server."""

    def __init__(self, server: RealServer, folder: Path) -> None:
        self.server = server
        self.runner = asyncio.Runner()
        self.registry = Registry(folder / "registry")
        self.registry.write(server.record)
        self.snapshots = Snapshots(folder / "weights", server.model)
        self.http = Http()
        self.connect = connector(self.http, str, Deadlines(60.0, 60.0))
        self.models = {seed: tiny_qwen3(seed=seed, **DIMS) for seed in (0, 1)}
        self.student = 0
        admission = Admission(self.snapshots, self.connect)
        self.pool = EnginePool(self.registry, self.connect, admit=admission, concurrency=64, patience_s=400.0)
        self.sampler = GroupSampler(self.pool, SPEC, samples_per_prompt=2, budget_s=400.0)

    def weights(self) -> dict[str, Tensor]:
        return dict(self.models[self.student].state_dict())

    def publisher(self, sink: Sink | BroadcastSink) -> Publisher:
        def stream() -> Iterator[tuple[str, Tensor]]:
            return iter(self.weights().items())

        match sink:
            case "broadcast":
                made: Any = BroadcastSink(timeout_s=20.0)
            case "disk":
                made = DiskSink(self.snapshots)
            case _:
                made = sink
        return Publisher(
            registry=self.registry,
            connect=self.connect,
            sink=made,
            snapshots=self.snapshots,
            export=stream,
            manifest=[weight_spec(name, t.shape, t.dtype) for name, t in self.weights().items()],
            on_first_head=lambda work: self.runner.run(work()),  # type: ignore[arg-type]
            sync=SyncConfig(bucket_bytes=64 * 1024),
            rollout=RolloutConfig(start_timeout_s=5.0),
        )

    def checksums(self) -> list[dict[str, str]]:
        return self.runner.run(self.connect(self.server.record).checksums())

    def is_paused(self) -> bool:
        return self.runner.run(self.connect(self.server.record).is_paused())

    def gap(self, given: Sequence[Prompt], rollouts: Sequence[Rollout], seed: int) -> float:
        """Largest difference to Hugging Face under the weights of ``seed``, nats."""
        by_id = {prompt.prompt_id: prompt for prompt in given}
        return max(
            (torch.from_numpy(r.logprobs) - logprobs(self.models[seed], by_id[r.rollout_id.prompt], r, 1.0)).abs().max()
            for r in rollouts
        ).item()

    def close(self) -> None:
        self.runner.run(self.http.close())
        self.runner.close()


@pytest.fixture
def run(real_server: RealServer, tmp_path: Path) -> Iterator[Run]:
    one = Run(real_server, tmp_path)
    yield one
    one.close()


@pytest.mark.parametrize("sink", ["broadcast", "disk"])
def test_what_was_published_is_served_bit_by_bit(run: Run, tmp_path: Path, sink: Sink) -> None:
    # What the server reads by itself from files of Hugging Face is what a publication must amount to.
    expected = []
    for seed in (0, 1):
        folder = write_tiny_qwen3(tmp_path / f"hf{seed}", seed=seed, **DIMS)
        run.runner.run(load(run.connect(run.server.record), str(folder), 0))
        expected.append(run.checksums())
    assert expected[0] != expected[1]

    given = prompts(4)
    publisher = run.publisher(sink)
    for version, seed in ((1, 0), (2, 1), (3, 0), (4, 1)):
        run.student = seed
        publisher.publish(version)
        assert run.checksums() == expected[seed]
        # The same prompts every time: a prefix that outlived its weights would show.
        rollouts = run.runner.run(run.sampler.sample(given, version))
        assert run.gap(given, rollouts, seed) < 1e-4
        assert run.gap(given, rollouts, 1 - seed) > 0.1


def test_a_wrong_value_is_found_and_never_served(run: Run) -> None:
    run.publisher("broadcast").publish(1)
    sink = Wrong(timeout_s=20.0)
    sink.weight = "model.layers.1.self_attn.k_proj.weight"
    publisher = run.publisher(sink)
    with pytest.raises(SyncError, match=r"engine0: version 2 differs at model.layers.1.self_attn.qkv_proj.weight"):
        publisher.publish(2)
    assert run.is_paused()
    sink.weight = ""
    publisher.publish(2)
    assert not run.is_paused()
    given = prompts(2)
    assert run.gap(given, run.runner.run(run.sampler.sample(given, 2)), run.student) < 1e-4


def test_a_wrong_shape_in_the_middle_leaves_a_paused_server_that_lives(run: Run) -> None:
    publisher = run.publisher("broadcast")
    publisher.publish(1)
    good = run.weights

    def bad() -> dict[str, Tensor]:
        return good() | {"model.layers.1.mlp.down_proj.weight": torch.zeros(3, 3)}

    run.weights = bad  # type: ignore[method-assign]
    with pytest.raises(SyncError, match=r"gave model.layers.1.mlp.down_proj.weight \[3, 3\] float32 where"):
        publisher.publish(2)
    assert run.is_paused()
    run.weights = good  # type: ignore[method-assign]
    run.student = 1
    publisher.publish(3)
    given = prompts(2)
    assert run.gap(given, run.runner.run(run.sampler.sample(given, 3)), 1) < 1e-4


def test_a_server_killed_in_the_middle_of_a_step_comes_back_alone(run: Run) -> None:
    run.student = 1
    publisher = run.publisher("broadcast")
    publisher.publish(5)
    given = prompts(8)

    async def step() -> list[Rollout]:
        many = GroupSampler(run.pool, SPEC, samples_per_prompt=8, budget_s=400.0)
        task = asyncio.ensure_future(many.sample(given, 5))
        await asyncio.sleep(0.15)
        run.server.kill()
        run.server.start()
        await asyncio.to_thread(run.server.wait)
        run.registry.write(run.server.record)
        return await task

    rollouts = run.runner.run(step())
    assert len(rollouts) == 64
    assert run.server.gen > 0
    assert run.gap(given, rollouts, 1) < 1e-4

    run.student = 0  # the next broadcast goes to a group with the new instance
    publisher.publish(6)
    assert run.gap(given, run.runner.run(run.sampler.sample(given, 6)), 0) < 1e-4
