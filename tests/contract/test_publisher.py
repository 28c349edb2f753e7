"""The order of a publication, and what is left when it fails: fake servers, the real client, real files."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_distil.config.schema import RolloutConfig, SyncConfig
from megatron_distil.errors import EngineUnavailable, RegistryError, SyncError
from megatron_distil.http import Http
from megatron_distil.registry import Registry
from megatron_distil.rollout.sglang.client import Deadlines, connector
from megatron_distil.sync.disk import DiskSink, Snapshots
from megatron_distil.sync.plan import Bucket, weight_spec
from megatron_distil.sync.publish import Admission, NoEngines, Publisher
from megatron_distil.sync.sink import ServedEngine, WeightSink, quiesce, together
from tests.fakes import FakeServer

Weights = dict[str, Tensor]


def weights(seed: int) -> Weights:
    """Names and fusions of a Qwen3 layer; the vocabulary needs no padding."""
    generator = torch.Generator().manual_seed(seed)
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (64, 8),
        f"{layer}.self_attn.k_proj.weight": (4, 8),  # in the order of the alphabet, which is not that of the fusion
        f"{layer}.self_attn.q_proj.weight": (8, 8),
        f"{layer}.self_attn.v_proj.weight": (4, 8),
        f"{layer}.mlp.up_proj.weight": (16, 8),
        f"{layer}.mlp.gate_proj.weight": (16, 8),
        "model.norm.weight": (8,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@dataclass
class StreamingSink:
    """Opens an update, remembers the buckets, and on ``close`` makes the fakes load the snapshot."""

    snapshots: Snapshots
    sent: list[list[str]] = field(default_factory=list)
    dies_at_bucket: int | None = None
    engines: Sequence[ServedEngine] = ()

    async def open(self, engines: Sequence[ServedEngine]) -> None:
        self.engines = engines
        self.sent.clear()
        await quiesce(engines)
        await together(engine.begin() for engine in engines)

    async def send(self, bucket: Bucket, tensors: Sequence[Tensor], version: int) -> None:
        if len(self.sent) == self.dies_at_bucket:
            self.dies_at_bucket = None
            raise EngineUnavailable("engine1: connection closed by peer")
        self.sent.append([weight.name for weight in bucket.weights])

    async def close(self, version: int) -> None:
        await together(engine.end() for engine in self.engines)
        folder = str(self.snapshots.path(version))
        await together(engine.update_from_disk(folder, version) for engine in self.engines)


class Run:
    """Fake servers, and one trainer rank that is the first head."""

    def __init__(self, folder: Path, servers: int, *, sink: Literal["disk", "streaming"] = "disk") -> None:
        self.runner = asyncio.Runner()
        self.registry = Registry(folder / "registry")
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text("{}")
        (model / "model.safetensors").write_bytes(b"the start weights are not copied")
        self.snapshots = Snapshots(folder / "weights", model)
        self.servers = [FakeServer(f"engine{k}", self.registry) for k in range(servers)]
        self.http = Http()
        self.connect = connector(self.http, str, Deadlines(2.0, 2.0))
        self.sink: WeightSink = DiskSink(self.snapshots) if sink == "disk" else StreamingSink(self.snapshots)
        self.weights = weights(0)
        for server in self.servers:
            self.runner.run(server.start())

    def publisher(self, *, export: Callable[[], Weights] | None = None, **sync: Any) -> Publisher:
        def stream() -> Iterator[tuple[str, Tensor]]:
            return iter((export() if export is not None else self.weights).items())

        return Publisher(
            registry=self.registry,
            connect=self.connect,
            sink=self.sink,
            snapshots=self.snapshots,
            export=stream,
            manifest=[weight_spec(name, tensor.shape, tensor.dtype) for name, tensor in weights(0).items()],
            on_first_head=lambda work: self.runner.run(work()),  # type: ignore[arg-type]
            sync=SyncConfig(bucket_bytes=1024, **sync),
            rollout=RolloutConfig(num_engines=len(self.servers), start_timeout_s=1.0),
        )

    def close(self) -> None:
        for server in self.servers:
            self.runner.run(server.die())
        self.runner.run(self.http.close())
        self.runner.close()

    def calls(self, server: int = 0) -> list[str]:
        """What the server was asked, without questions that change nothing."""
        quiet = {"model_info", "server_info", "ready"}
        return [call for call in self.servers[server].calls if call not in quiet]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    started: list[Run] = []

    def start(servers: int = 1, **options: Any) -> Run:
        started.append(Run(tmp_path, servers, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_files_are_loaded_between_a_pause_and_a_proof(run: Callable[..., Run]) -> None:
    one = run(2)
    one.publisher().publish(7)
    order = ["freeze_gc", "pause_generation", "flush_cache", "update_weights_from_disk", "weights_checker"]
    assert one.calls(0) == one.calls(1) == [*order, "continue_generation"]
    assert [server.version for server in one.servers] == ["7", "7"]
    assert not any(server.is_paused for server in one.servers)


def test_buckets_are_sent_in_an_update_between_a_pause_and_a_proof(run: Callable[..., Run]) -> None:
    one = run(1, sink="streaming")
    publisher = one.publisher()
    publisher.publish(1)
    publisher.publish(2)
    order = ["pause_generation", "flush_cache", "begin_weight_update", "end_weight_update"]
    order += ["update_weights_from_disk", "weights_checker", "continue_generation"]
    assert one.calls() == ["freeze_gc", *order, *order]
    assert isinstance(one.sink, StreamingSink)
    assert [name for part in one.sink.sent for name in part] == list(weights(0))
    assert len(one.sink.sent) > 2


def test_an_update_that_a_dead_publisher_left_open_is_closed_first(run: Callable[..., Run]) -> None:
    one = run(1, sink="streaming")
    one.servers[0].has_session = True
    one.publisher().publish(1)
    assert one.servers[0].version == "1"
    assert not one.servers[0].is_paused


def test_the_proof_is_made_as_often_as_asked_and_always_at_first(run: Callable[..., Run]) -> None:
    one = run(1)
    publisher = one.publisher(verify_every=3)
    proofs = []
    for version in (4, 5, 6, 7):
        publisher.publish(version)
        proofs.append(one.calls().count("weights_checker"))
    assert proofs == [1, 1, 2, 2]


def test_a_server_that_holds_something_else_stays_paused_with_all_others(run: Callable[..., Run]) -> None:
    one = run(2)
    weight = "model.layers.0.self_attn.qkv_proj.weight"
    one.servers[1].corrupts = weight
    with pytest.raises(SyncError, match=rf"engine1: version 3 differs at {weight} \(sent \w+, holds f{{16}}\)"):
        one.publisher().publish(3)
    assert [server.is_paused for server in one.servers] == [True, True]
    assert "continue_generation" not in one.calls(0) + one.calls(1)


def test_a_publication_that_was_repaired_serves_again(run: Callable[..., Run]) -> None:
    one = run(1)
    one.servers[0].corrupts = "model.norm.weight"
    publisher = one.publisher()
    with pytest.raises(SyncError):
        publisher.publish(3)
    one.servers[0].corrupts = ""
    publisher.publish(3)
    assert not one.servers[0].is_paused


def test_a_refusal_is_an_error_that_names_the_server(run: Callable[..., Run]) -> None:
    one = run(2)
    one.servers[0].refuses["update_weights_from_disk"] = "Invalid HF URI"
    with pytest.raises(SyncError, match=r"version 1 was refused: engine0 .*Invalid HF URI"):
        one.publisher().publish(1)
    assert [server.is_paused for server in one.servers] == [True, True]


def test_a_server_that_is_lost_on_the_way_is_left_out(run: Callable[..., Run]) -> None:
    one = run(2, sink="streaming")
    publisher = one.publisher()
    publisher.publish(1)
    assert isinstance(one.sink, StreamingSink)
    one.sink.dies_at_bucket = 2
    one.runner.run(one.servers[1].die())
    publisher.publish(2)
    assert one.servers[0].version == "2"
    assert one.servers[1].version == "1"
    assert not one.servers[0].is_paused


def test_the_first_publication_waits_for_every_server(run: Callable[..., Run]) -> None:
    one = run(2)
    one.registry.remove("rollout", "engine1")
    with pytest.raises(RegistryError, match="need 2 services, have 1 ready"):
        one.publisher().publish(0)


def test_without_a_server_that_answers_the_error_names_them(run: Callable[..., Run]) -> None:
    one = run(1)
    publisher = one.publisher()
    publisher.publish(1)
    one.runner.run(one.servers[0].die())
    with pytest.raises(RegistryError, match=r"0 of 1 servers answer, the publication needs 1: engine0 \(http"):
        publisher.publish(2)


BAD_EXPORTS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "a wrong shape": (
        lambda w: w | {"model.norm.weight": torch.zeros(9)},
        r"gave model.norm.weight \[9\] float32 where the manifest has model.norm.weight \[8\] float32",
    ),
    "a wrong dtype": (
        lambda w: {name: tensor.bfloat16() for name, tensor in w.items()},
        r"gave model.embed_tokens.weight \[64, 8\] bfloat16 where",
    ),
    "a wrong name": (
        lambda w: {name.replace("up_proj", "upper_proj"): tensor for name, tensor in w.items()},
        "gave model.layers.0.mlp.upper_proj.weight",
    ),
    "another order": (lambda w: dict(reversed(w.items())), "gave model.norm.weight"),
    "too little": (lambda w: dict(list(w.items())[:-1]), r"ended before model.norm.weight \[8\]"),
    "too much": (lambda w: w | {"lm_head.weight": torch.zeros(64, 8)}, "gave lm_head.weight, which is not"),
}


@pytest.mark.parametrize("what", BAD_EXPORTS)
def test_an_export_that_is_not_the_manifest_reaches_no_server(run: Callable[..., Run], what: str) -> None:
    edit, message = BAD_EXPORTS[what]
    one = run(1)
    with pytest.raises(SyncError, match=message):
        one.publisher(export=lambda: edit(weights(0))).publish(1)
    assert one.calls() == ["freeze_gc"]
    assert [path.name for path in one.snapshots.folder.iterdir()] == []


def test_a_snapshot_is_a_model_and_the_last_two_are_kept(run: Callable[..., Run]) -> None:
    one = run(1)
    publisher = one.publisher()
    for version in (8, 9, 10):
        one.weights = weights(version)
        publisher.publish(version)
    assert sorted(path.name for path in one.snapshots.folder.iterdir()) == ["10", "9"]
    assert (one.snapshots.path(10) / "config.json").read_text() == "{}"
    for version in (9, 10):
        held = load_file(one.snapshots.path(version) / "model.safetensors")
        assert held.keys() == weights(version).keys()
        assert all(torch.equal(held[name], tensor) for name, tensor in weights(version).items())


def test_a_run_that_resumed_earlier_publishes_its_own_versions(run: Callable[..., Run]) -> None:
    one = run(1)
    one.publisher().publish(9)
    one.publisher().publish(10)
    resumed = one.publisher()
    one.weights = weights(5)
    resumed.publish(5)
    resumed.publish(6)
    assert sorted(path.name for path in one.snapshots.folder.iterdir()) == ["5", "6"]
    one.weights = weights(77)
    resumed.publish(6)  # again, with other weights
    held = load_file(one.snapshots.path(6) / "model.safetensors")
    assert torch.equal(held["model.norm.weight"], weights(77)["model.norm.weight"])


def test_a_restarted_server_is_brought_up_alone(run: Callable[..., Run]) -> None:
    one = run(2)
    one.publisher().publish(4)
    one.runner.run(one.servers[1].restart())
    before = len(one.servers[0].calls)
    one.runner.run(Admission(one.snapshots, one.connect)(one.servers[1].record, 4))  # type: ignore[arg-type]
    assert one.servers[1].version == "4"
    assert not one.servers[1].is_paused
    assert len(one.servers[0].calls) == before


def test_two_heads_bring_a_server_up_once(run: Callable[..., Run]) -> None:
    one = run(1)
    one.publisher().publish(4)
    one.runner.run(one.servers[0].restart())
    one.servers[0].load_s = 0.3
    one.servers[0].calls.clear()

    async def both() -> None:
        heads = [Admission(one.snapshots, one.connect) for _ in range(2)]
        await asyncio.gather(*(head(one.servers[0].record, 4) for head in heads))

    one.runner.run(both())
    assert one.calls().count("update_weights_from_disk") == 1
    assert not one.servers[0].is_paused


def test_a_restarted_server_that_loads_something_else_is_not_admitted(run: Callable[..., Run]) -> None:
    one = run(1)
    one.publisher().publish(4)
    one.runner.run(one.servers[0].restart())
    one.servers[0].corrupts = "model.layers.0.mlp.gate_up_proj.weight"
    with pytest.raises(SyncError, match=r"engine0: version 4 differs at model.layers.0.mlp.gate_up_proj.weight"):
        one.runner.run(Admission(one.snapshots, one.connect)(one.servers[0].record, 4))  # type: ignore[arg-type]
    assert one.servers[0].is_paused


def test_without_the_snapshot_nobody_is_admitted(run: Callable[..., Run]) -> None:
    one = run(1)
    with pytest.raises(EngineUnavailable, match=r"engine0: there is no snapshot .*/weights/4"):
        one.runner.run(Admission(one.snapshots, one.connect)(one.servers[0].record, 4))  # type: ignore[arg-type]


def test_servers_whose_weights_we_cannot_hash_are_compared_with_each_other(run: Callable[..., Run]) -> None:
    one = run(2)
    one.servers[1].corrupts = "model.norm.weight"
    for server in one.servers:
        server.device = "cuda"
    with pytest.raises(SyncError, match=r"engine1: version 2 differs from engine0 on .* rank 0 at model.norm.weight"):
        one.publisher().publish(2)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _until(pid: int, states: str) -> str:
    deadline = time.monotonic() + 5
    while _state(pid) not in states and time.monotonic() < deadline:
        time.sleep(0.01)
    return _state(pid)


def test_idle_servers_are_stopped_and_continued_and_it_is_said_first(run: Callable[..., Run]) -> None:
    one = run(1)
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        one.servers[0].pgid = child.pid
        one.servers[0].register()
        publisher = one.publisher(idle_engines="stop")
        publisher.publish(1)
        publisher.release()
        assert _until(child.pid, "T") == "T"
        assert one.registry.is_paused("rollout", "engine0")
        publisher.publish(2)
        assert _until(child.pid, "SR") in "SR"
        assert not one.registry.is_paused("rollout", "engine0")
        publisher.release()
        publisher.close()  # the run ends: nothing stays stopped
        assert _until(child.pid, "SR") in "SR"
        assert not one.registry.is_paused("rollout", "engine0")
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def test_servers_that_an_earlier_attempt_stopped_are_continued(run: Callable[..., Run]) -> None:
    one = run(1)
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        one.servers[0].pgid = child.pid
        one.servers[0].register()
        one.registry.mark_paused(one.servers[0].record)
        os.killpg(child.pid, signal.SIGSTOP)
        one.registry.write(replace(one.servers[0].record, ts=time.time()))
        one.publisher().publish(1)
        assert _until(child.pid, "SR") in "SR"
        assert not one.registry.is_paused("rollout", "engine0")
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def test_by_default_idle_servers_run_on(run: Callable[..., Run]) -> None:
    one = run(1)
    publisher = one.publisher()
    publisher.publish(1)
    publisher.release()
    assert not one.registry.is_paused("rollout", "engine0")


def test_a_replay_needs_no_servers() -> None:
    nobody = NoEngines()
    nobody.publish(3)
    nobody.release()
