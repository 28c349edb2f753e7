"""One step's gradient is the same for every layout, microbatch size and packing: that of an unsharded model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_distil.data.packing import BatchPacker
from megatron_distil.trainer.groups import make_groups
from megatron_distil.trainer.model import Student, build_student
from megatron_distil.trainer.names import join
from megatron_distil.trainer.optim import make_optimizer
from megatron_distil.trainer.replica import Replica
from megatron_distil.trainer.update import Updater
from tests.reference_update import random_targets, reference_loss, step_examples
from tests.tiny_model import tiny_qwen3, write_tiny_qwen3
from tests.trainer_config import trainer_config
from tests.world import run_ranks

OBJECTIVES = {
    "distil_sum": {"name": "distil", "future": "sum"},
    "distil_mean": {
        "name": "distil",
        "future": "mean",
        "reduction": "seq-mean-token-mean",
        "cost": "kl",
        "discount": 0.9,
    },
    "ce": {"name": "ce", "tail": "renorm", "reduction": "seq-mean-token-sum"},
    "grpo": {"name": "grpo"},
}


def whole_gradients(student: Student) -> dict[str, torch.Tensor]:
    """Gradients under Hugging Face's names; collective."""
    mine = {}
    for entry, param in student.parameters():
        shards = [torch.empty_like(param.main_grad) for _ in range(student.groups.tp_size)]
        dist.all_gather(shards, param.main_grad, group=student.groups.tp)
        mine |= dict(zip(entry.hf_names, join(entry, shards, student.dims), strict=True))
    stages: list[Any] = [None] * student.groups.pp_size
    dist.all_gather_object(stages, mine, group=student.groups.pp)
    return {name: grad for stage in stages for name, grad in stage.items()}


def case(
    rank: int,
    folder: Path,
    *,
    objective: str = "distil_sum",
    tokens: int = 128,
    is_tied: bool = False,
    temperature: float = 1.0,
    head: str = "auto",
    **parallel: Any,
) -> None:
    config = trainer_config(
        objective=OBJECTIVES[objective],
        parallel=parallel,
        train={"is_distributed_optimizer": False, "clip_grad": 1e9, "max_microbatch_tokens": tokens},
    )
    groups = make_groups(config.parallel, collective_timeout_s=60, collect_timeout_s=60)
    student = build_student(folder, config, groups)
    replica = Replica(groups)
    examples = step_examples()
    targets = random_targets(examples)
    mine = slice(groups.dp_rank, None, groups.dp_size)
    packer = BatchPacker(config, gather=replica.gather)
    (batch,) = packer.batches(examples[mine], targets[mine], 0)
    updater = Updater(
        student,
        make_optimizer(student, config.train, num_updates=3),
        config.objective,
        temperature=temperature,
        head=head,
        run_dir=folder,
    )
    sums = updater.update(batch)

    hf = tiny_qwen3(is_tied=is_tied)
    reference_loss(hf, config.objective, examples, targets, temperature=temperature).backward()
    got, want = whole_gradients(student), {name: param.grad for name, param in hf.named_parameters()}
    assert set(got) == set(want)
    error, name = max(((got[n] - w).norm().item() / w.norm().item(), n) for n, w in want.items())
    assert error < 1e-5, f"the gradient of {name} differs by {error}"
    norm = torch.stack([w.norm() for w in want.values()]).norm().item()
    assert sums.sums["train/grad_norm"][0] == pytest.approx(norm, rel=1e-5)
    assert sums.sums["train/learning_rate"] == (config.train.learning_rate, 1.0)
    everywhere: list[Any] = [None] * groups.world_size
    dist.all_gather_object(everywhere, (groups.dp_rank, sums))
    of_my_replica = [other for replica_index, other in everywhere if replica_index == groups.dp_rank]
    assert all(other == sums for other in of_my_replica), "every rank of a replica has the same counts"
    per_replica = dict(everywhere).values()
    taught = sum(
        len(e.rollout.token_ids)
        for e, t in zip(examples, targets, strict=True)
        if e.feedback.reward is not None and (t is not None or not config.objective.needs_teacher)
    )
    assert sum(s.sums["loss/tokens"][0] for s in per_replica) == taught
    if groups.world_size == 4 and objective == "distil_sum" and temperature == 1.0:
        compare_counts(hf, examples, targets, list(per_replica))


def compare_counts(hf: Any, examples: list[Any], targets: list[Any], per_replica: list[Any]) -> None:
    """Counts summed over replicas against a loop over whole sequences."""
    from tests.reference_update import response_logits

    want = {"loss/ce_nats": 0.0, "sync/logprob_gap_nats": 0.0, "teacher/entropy_nats": 0.0}
    for example, target in zip(examples, targets, strict=True):
        if target is None or example.feedback.reward is None:
            continue
        with torch.no_grad():
            logprobs = response_logits(hf, example.prompt.token_ids, example.rollout.token_ids).log_softmax(-1)
        for row, ids, weights, token, sampled in zip(
            logprobs,
            target.support_ids,
            target.logprobs,
            example.rollout.token_ids,
            example.rollout.logprobs,
            strict=True,
        ):
            kept = ids >= 0
            probs = torch.from_numpy(weights[kept]).exp()
            inside = torch.zeros(256, dtype=torch.bool)
            inside[torch.from_numpy(ids[kept]).long()] = True
            want["loss/ce_nats"] -= (probs * row[torch.from_numpy(ids[kept]).long()]).sum().item()
            want["loss/ce_nats"] -= (1 - probs.sum()).item() * row[~inside].logsumexp(-1).item()
            want["sync/logprob_gap_nats"] += abs(row[int(token)].item() - float(sampled))
        want["teacher/entropy_nats"] += float(target.entropy.sum())
    for name, value in want.items():
        assert sum(s.sums[name][0] for s in per_replica) == pytest.approx(value, rel=1e-4), name


LAYOUTS: dict[str, dict[str, Any]] = {
    "one_rank": {},
    "one_rank_small_microbatches": {"tokens": 36},
    "tp2": {"tp": 2, "tokens": 64},
    "tp2_sp_at_another_temperature": {"tp": 2, "sequence_parallel": True, "temperature": 0.7},
    "pp2": {"pp": 2, "tokens": 64},
    "cp2": {"cp": 2, "tokens": 64},
    "dp2": {"dp": 2, "tokens": 64},
    "tp2_pp2_sp_tied": {"tp": 2, "pp": 2, "sequence_parallel": True, "tokens": 64, "is_tied": True},
    "tp2_cp2_sp": {"tp": 2, "cp": 2, "sequence_parallel": True, "tokens": 64},
    "cp2_dp2": {"cp": 2, "dp": 2, "tokens": 64},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_gradient_of_a_step_does_not_see_the_layout(layout: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path, is_tied=layout.get("is_tied", False))
    sizes = [layout.get(axis, 1) for axis in ("tp", "pp", "cp", "dp")]
    run_ranks(case, torch.tensor(sizes).prod().item(), folder, **layout)


@pytest.mark.parametrize("objective", ["distil_mean", "ce", "grpo"])
@pytest.mark.parametrize("layout", [{"dp": 2, "tokens": 64}, {"tp": 2, "cp": 2, "sequence_parallel": True}])
def test_neither_does_that_of_another_objective(objective: str, layout: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path)
    world_size = layout.get("tp", 1) * layout.get("cp", 1) * layout.get("dp", 1)
    run_ranks(case, world_size, folder, objective=objective, **layout)


@pytest.mark.parametrize("head", ["composable", "plain"])
@pytest.mark.parametrize(
    "layout",
    [{"tokens": 64, "is_tied": True}, {"tp": 2, "cp": 2, "sequence_parallel": True}, {"pp": 2, "is_tied": True}],
    ids=["one_rank_tied", "tp2_cp2_sp", "pp2_tied"],
)
def test_neither_does_that_of_another_head(head: str, layout: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path, is_tied=layout.get("is_tied", False))
    world_size = layout.get("tp", 1) * layout.get("cp", 1) * layout.get("pp", 1)
    run_ranks(case, world_size, folder, objective="distil_mean", head=head, **layout)
