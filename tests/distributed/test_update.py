"""An update: what is not finite reaches no weight on any rank; a replica without a loss takes part."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_distil import algo
from megatron_distil.algo.objectives.ce import Ce
from megatron_distil.algo.objectives.objective import Future, Tokens
from megatron_distil.data.packing import BatchPacker
from megatron_distil.errors import NonFiniteLossError
from megatron_distil.trainer.export import hf_weights
from megatron_distil.trainer.groups import make_groups
from megatron_distil.trainer.model import build_student
from megatron_distil.trainer.optim import make_optimizer
from megatron_distil.trainer.replica import Replica
from megatron_distil.trainer.update import Updater
from megatron_distil.types import Document
from tests.reference_update import random_targets, reference_loss, step_examples
from tests.tiny_model import tiny_qwen3, write_tiny_qwen3
from tests.trainer_config import trainer_config
from tests.world import run_ranks


class Run:
    """A rank that packs and updates."""

    def __init__(self, folder: Path, *, objective: Any = None, parallel: Any = None, **train: Any) -> None:
        self.config = trainer_config(
            objective=objective or {"name": "distil", "future": "sum"},
            parallel=parallel or {},
            train={"max_microbatch_tokens": 64} | train,
            teacher={"top_k": 6},
        )
        self.groups = make_groups(self.config.parallel, collective_timeout_s=60, collect_timeout_s=60)
        self.student = build_student(folder, self.config, self.groups)
        self.packer = BatchPacker(self.config, gather=Replica(self.groups).gather)
        optimizer = make_optimizer(self.student, self.config.train, num_updates=100)
        self.updater = Updater(
            self.student,
            optimizer,
            self.config.objective,
            temperature=1.0,
            head=self.config.train.head,
            run_dir=folder / "run",
        )

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.float().clone() for name, tensor in hf_weights(self.student)}


def _not_finite(rank: int, folder: Path, where: str, parallel: dict[str, Any]) -> None:
    run = Run(folder, parallel=parallel)
    examples = step_examples()
    (batch,) = run.packer.batches(examples, random_targets(examples), 0)
    if run.groups.dp_rank == 0:
        bad = batch.microbatches[-1]
        at = bad.response_mask.nonzero()[0]
        field = getattr(bad, where).clone()
        field[at] = torch.nan
        batch = replace(batch, microbatches=(*batch.microbatches[:-1], replace(bad, **{where: field})))
    before = run.weights()
    with pytest.raises(NonFiniteLossError, match=r"gradient norm nan.*not_finite\.dp\d\.pt"):
        run.updater.update(batch)
    after = run.weights()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    torch.distributed.barrier()
    saved = torch.load(folder / "run" / "logs" / "not_finite.dp0.pt")
    assert torch.equal(saved[-1]["token_ids"], batch.microbatches[-1].token_ids)
    assert saved[-1][where].isnan().any()


@pytest.mark.parametrize("where", ["sampling_logprobs", "teacher_logprobs"])
@pytest.mark.parametrize("parallel", [{"dp": 2}, {"tp": 2, "pp": 2, "sequence_parallel": True}], ids=["dp2", "tp2_pp2"])
def test_a_loss_that_is_not_finite_stops_every_rank_before_the_step(
    where: str, parallel: dict[str, Any], tmp_path: Path
) -> None:
    world_size = torch.tensor([parallel.get(axis, 1) for axis in ("tp", "pp", "dp")]).prod().item()
    run_ranks(_not_finite, world_size, write_tiny_qwen3(tmp_path), where, parallel)


def _invalid_support(rank: int, folder: Path, value: int) -> None:
    run = Run(folder, parallel={"tp": 2})
    examples = step_examples()
    (batch,) = run.packer.batches(examples, random_targets(examples), 0)
    bad = batch.microbatches[-1]
    at = int(bad.response_mask.nonzero()[0])
    ids = bad.support_ids.clone()
    ids[at, 1] = ids[at, 0] if value < 0 else value
    batch = replace(batch, microbatches=(*batch.microbatches[:-1], replace(bad, support_ids=ids)))
    named = rf"1 invalid supports \(support_ids of microbatch \d+, token {at}: .*must differ and lie in 0 to 255"
    before = run.weights()
    with pytest.raises(NonFiniteLossError, match=named):
        run.updater.update(batch)
    assert all(torch.equal(run.weights()[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("value", [-1, 256], ids=["repeated", "out of range"])
def test_a_support_that_is_none_stops_every_rank(value: int, tmp_path: Path) -> None:
    run_ranks(_invalid_support, 2, write_tiny_qwen3(tmp_path), value)


def _scaled(rank: int, folder: Path) -> None:
    run = Run(folder)
    examples = step_examples()
    (batch,) = run.packer.batches(examples, random_targets(examples), 0)
    run.student.transformer.grad_scale_func = lambda loss: loss * 64.0
    with pytest.raises(NonFiniteLossError, match="given another loss scale than the head had assumed"):
        run.updater.update(batch)


def test_a_loss_scale_that_the_head_does_not_know_stops_the_step(tmp_path: Path) -> None:
    run_ranks(_scaled, 1, write_tiny_qwen3(tmp_path))


class Infinite(Ce):
    """A loss without a value, whose gradient is as it should be."""

    def terms(self, tokens: Tokens, future: Future) -> algo.LossTerms:
        terms = super().terms(tokens, future)
        return terms._replace(credit=terms.credit + torch.inf)


def _infinite(rank: int, folder: Path) -> None:
    run = Run(folder)
    run.updater._loss.objective = Infinite(name="ce")
    examples = step_examples()
    (batch,) = run.packer.batches(examples, random_targets(examples), 0)
    with pytest.raises(NonFiniteLossError):
        run.updater.update(batch)


def test_neither_does_an_infinite_loss_whose_gradient_is_finite(tmp_path: Path) -> None:
    run_ranks(_infinite, 1, write_tiny_qwen3(tmp_path))


def _idle_replica(rank: int, folder: Path, parallel: dict[str, Any]) -> None:
    run = Run(folder, parallel=parallel, is_distributed_optimizer=False, clip_grad=1e9)
    examples = step_examples()
    targets = random_targets(examples)
    is_idle = run.groups.dp_rank == 1
    (batch,) = run.packer.batches([] if is_idle else examples, [] if is_idle else targets, 0)
    sums = run.updater.update(batch)
    hf = tiny_qwen3()
    reference_loss(hf, run.config.objective, examples, targets).backward()
    norm = torch.stack([p.grad.norm() for p in hf.parameters()]).norm().item()
    assert sums.sums["train/grad_norm"][0] == pytest.approx(norm, rel=1e-5)
    assert (sums.sums["loss/tokens"][0] == 0) == is_idle


@pytest.mark.parametrize(
    "parallel", [{"dp": 2}, {"dp": 2, "tp": 2, "sequence_parallel": True}, {"dp": 2, "cp": 2}, {"dp": 2, "pp": 2}]
)
def test_a_replica_without_a_loss_takes_part(parallel: dict[str, Any], tmp_path: Path) -> None:
    world_size = torch.tensor([parallel.get(axis, 1) for axis in ("tp", "pp", "cp", "dp")]).prod().item()
    run_ranks(_idle_replica, world_size, write_tiny_qwen3(tmp_path), parallel)


def _learns(rank: int, folder: Path, dtype: str) -> None:
    run = Run(
        folder,
        objective={"name": "ce", "tis_clip": "none"},
        parallel={"tp": 2, "sequence_parallel": True},
        dtype=dtype,
        learning_rate=3e-3,
    )
    examples = step_examples()
    targets = random_targets(examples)
    kl = []
    for step in range(15):
        (batch,) = run.packer.batches(examples, targets, step)
        total, count = run.updater.update(batch).sums["loss/kl_nats"]
        kl.append(total / count)
    assert kl[0] > 1.0
    assert kl[-1] < 0.5 * kl[0], kl


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_divergence_from_a_fixed_teacher_falls(dtype: str, tmp_path: Path) -> None:
    run_ranks(_learns, 2, write_tiny_qwen3(tmp_path), dtype)


def _documents(rank: int, folder: Path) -> None:
    run = Run(folder, objective={"name": "sft"}, parallel={"dp": 2}, is_distributed_optimizer=False, clip_grad=1e9)
    draw = np.random.default_rng(0)
    documents = [
        Document(
            context_ids=draw.integers(0, 256, 3 + i).astype(np.int32),
            response_ids=draw.integers(0, 256, 1 + 2 * i).astype(np.int32),
        )
        for i in range(6)
    ]
    sums = run.updater.update(run.packer.documents(documents[run.groups.dp_rank :: 2]))
    hf = tiny_qwen3()
    total = torch.zeros(())
    for document in documents:
        ids = torch.from_numpy(np.concatenate([document.context_ids, document.response_ids]).astype(np.int64))
        labels = ids.clone()
        labels[: len(document.context_ids)] = -100
        total = total + torch.nn.functional.cross_entropy(hf(ids[None]).logits[0, :-1], labels[1:], reduction="sum")
    (total / sum(len(d.response_ids) for d in documents)).backward()
    norm = torch.stack([p.grad.norm() for p in hf.parameters()]).norm().item()
    assert sums.sums["train/grad_norm"][0] == pytest.approx(norm, rel=1e-5)
    assert "sync/logprob_gap_nats" not in sums.sums


def test_documents_teach_like_the_cross_entropy_of_torch(tmp_path: Path) -> None:
    run_ranks(_documents, 2, write_tiny_qwen3(tmp_path))
