"""What a step knows of its first policy: log-probabilities under the trainer, and baselines over the groups of all replicas."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_distil import algo
from megatron_distil.data.packing import BatchPacker
from megatron_distil.trainer.groups import make_groups
from megatron_distil.trainer.model import build_student
from megatron_distil.trainer.optim import make_optimizer
from megatron_distil.trainer.replica import Replica
from megatron_distil.trainer.update import Updater
from megatron_distil.types import Batch, Example, Microbatch, Targets
from tests.reference_update import random_targets, response_logits, step_examples
from tests.tiny_model import tiny_qwen3, write_tiny_qwen3
from tests.tokens import tokens_of
from tests.trainer_config import trainer_config
from tests.world import run_ranks


class Step:
    """A rank with the batches of one step."""

    def __init__(self, folder: Path, objective: dict[str, Any], *, updates: int, **parallel: Any) -> None:
        config = trainer_config(
            objective=objective,
            parallel=parallel,
            train={"max_microbatch_tokens": 64, "updates_per_step": updates, "is_distributed_optimizer": False},
        )
        self.objective = config.objective
        self.groups = make_groups(config.parallel, collective_timeout_s=60, collect_timeout_s=60)
        self.examples, self.replica = step_examples(), Replica(self.groups)
        self.targets = random_targets(self.examples)
        student = build_student(folder, config, self.groups)
        optimizer = make_optimizer(student, config.train, num_updates=10)
        self.updater = Updater(
            student, optimizer, config.objective, temperature=1.0, head=config.train.head, run_dir=folder
        )
        mine = slice(self.groups.dp_rank, None, self.groups.dp_size)
        packer = BatchPacker(config, gather=self.replica.gather)
        self.batches = packer.batches(self.examples[mine], self.targets[mine], 0)

    def anchored(self) -> list[Batch]:
        return self.updater.anchored(self.batches, self.replica.gather)


def by_response(microbatch: Microbatch, vector: torch.Tensor) -> dict[tuple[int, ...], torch.Tensor]:
    """[R] of each taught response, by its tokens."""
    found = {}
    for index in range(int(microbatch.segment_ids.max()) + 1):
        here = microbatch.response_mask & (microbatch.segment_ids == index)
        found[tuple(microbatch.sampled_ids[here].tolist())] = vector[here]
    return found


def reference_tokens(hf: Any, example: Example, target: Targets | None) -> algo.Columns:
    """Columns of a response, from Hugging Face's forward."""
    response = example.rollout.token_ids
    with torch.no_grad():
        logits = response_logits(hf, example.prompt.token_ids, response)
    ids = torch.zeros(len(response), 0) if target is None else torch.from_numpy(target.support_ids)
    return algo.columns(logits, ids.long(), torch.from_numpy(response).long())


def _ratio(rank: int, folder: Path, **parallel: Any) -> None:
    step = Step(folder, {"name": "grpo"}, updates=2, **parallel)
    before = {tuple(e.rollout.token_ids.tolist()): reference_tokens(tiny_qwen3(), e, None) for e in step.examples}
    first, second = step.anchored()
    step.updater.update(first)
    assert all(one.old_logprobs is None for one in first.microbatches)
    if step.groups.is_last_stage:
        seen = 0
        for one in second.microbatches:
            for response, logprobs in by_response(one, one.old_logprobs).items():
                torch.testing.assert_close(logprobs, before[response].sampled, rtol=1e-5, atol=1e-5)
                seen += 1
        assert seen
    sums = step.updater.update(second).sums
    ratio, count = sums["train/ratio"]
    assert ratio / count != 1.0, "the first update has moved the policy"
    assert abs(ratio / count - 1.0) < 0.2


@pytest.mark.parametrize("parallel", [{}, {"tp": 2, "pp": 2, "sequence_parallel": True}, {"cp": 2}, {"dp": 2}], ids=str)
def test_the_ratio_is_taken_to_the_policy_before_the_step(parallel: dict[str, Any], tmp_path: Path) -> None:
    world_size = parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("cp", 1) * parallel.get("dp", 1)
    run_ranks(_ratio, world_size, write_tiny_qwen3(tmp_path), **parallel)


def _first_ratio(rank: int, folder: Path) -> None:
    step = Step(folder, {"name": "grpo"}, updates=1)
    (batch,) = step.anchored()
    assert batch is step.batches[0], "one update costs no forward"
    ratio, count = step.updater.update(batch).sums["train/ratio"]
    assert ratio == count


def test_one_update_has_a_ratio_of_one(tmp_path: Path) -> None:
    run_ranks(_first_ratio, 1, write_tiny_qwen3(tmp_path))


def _baseline(rank: int, folder: Path, *, kind: str, **parallel: Any) -> None:
    step = Step(folder, {"name": "distil", "future": "sum", "baseline": kind}, updates=2, **parallel)
    hf, credits, groups, names = tiny_qwen3(), [], [], []
    for example, target in zip(step.examples, step.targets, strict=True):
        if target is None or example.feedback.reward is None:
            continue
        length = len(example.rollout.token_ids)
        columns = reference_tokens(hf, example, target)

        def future(cost: torch.Tensor, *, mean: bool, discount: float) -> torch.Tensor:
            every, one = torch.ones(len(cost), dtype=torch.bool), torch.zeros(len(cost), dtype=torch.int64)
            return algo.future_credit(cost, every, one, mean=mean, discount=discount)

        tokens = tokens_of(columns, torch.from_numpy(target.logprobs), weights=torch.ones(length) / 100)
        credits.append(step.objective.credit(tokens, future))
        groups.append(int(example.prompt.prompt_id[1:]))
        names.append(tuple(example.rollout.token_ids.tolist()))
    want = dict(zip(names, step.objective.baselines(credits, groups), strict=True))
    assert np.mean([b.abs().sum().item() for b in want.values()]) > 1.0
    seen = 0
    for batch in step.anchored():
        for one in batch.microbatches:
            assert one.baseline is not None
            if not one.response_mask.any():
                continue
            for response, baseline in by_response(one, one.baseline).items():
                torch.testing.assert_close(baseline, want[response].float(), rtol=1e-4, atol=1e-4)
                seen += 1
        step.updater.update(batch)
    shares = step.replica.gather(seen)
    assert sum(shares) == len(want)


@pytest.mark.parametrize("kind", ["loo_position", "loo_batch"])
@pytest.mark.parametrize("parallel", [{"dp": 2, "cp": 2}, {"dp": 2, "pp": 2}], ids=str)
def test_a_baseline_is_that_of_the_whole_step(parallel: dict[str, Any], kind: str, tmp_path: Path) -> None:
    run_ranks(_baseline, 4, write_tiny_qwen3(tmp_path), kind=kind, **parallel)
