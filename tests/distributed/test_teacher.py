"""The teacher's targets equal those of an unsharded model that reads context and response; its weights move as they should."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_distil import algo
from megatron_distil.data.packing import BatchPacker
from megatron_distil.errors import NonFiniteLossError
from megatron_distil.trainer.groups import make_groups
from megatron_distil.trainer.model import build_student, load_hf
from megatron_distil.trainer.replica import Replica
from megatron_distil.trainer.teacher import NoTeacher, SelfTeacher, check_finite, make_teacher
from megatron_distil.types import Targets
from tests.reference_update import response_logits, step_examples
from tests.tiny_model import tiny_qwen3, write_tiny_qwen3
from tests.trainer_config import trainer_config
from tests.world import run_ranks

K, TEMPERATURE = 7, 0.8


def wanted(first: Any, live: Any, example: Any, *, weights: str, support: str, rate: float) -> tuple[algo.TopK, Any]:
    """Support and log-probabilities of the sampled ids [R], from whole logits of Hugging Face's models."""
    response = example.rollout.token_ids
    with torch.no_grad():
        own = response_logits(first, example.context.token_ids, response) / TEMPERATURE
        now = response_logits(live, example.context.token_ids, response) / TEMPERATURE
        student = response_logits(live, example.prompt.token_ids, response) / TEMPERATURE
    logits = {"live": now, "frozen": own, "ema": own, "trust_region": (1 - rate) * own + rate * now}[weights]
    logprobs = logits.log_softmax(-1)
    sampled = logprobs.gather(-1, torch.from_numpy(response).long()[:, None])[:, 0]
    if support == "student":
        ids = algo.top_k(student, K).ids
        return algo.TopK(ids, logprobs.gather(-1, ids), algo.top_k(logits, K).entropy), sampled
    return algo.top_k(logits, 256 if support == "full" else K), sampled


def case(rank: int, folders: list[Path], *, weights: str, support: str, is_tied: bool = False, **parallel: Any) -> None:
    config = trainer_config(
        objective={"name": "distil", "future": "sum"},
        parallel=parallel,
        rollout={"temperature": TEMPERATURE},
        teacher={"weights": weights, "support": support, "top_k": K, "rate": 0.3},
        train={"max_microbatch_tokens": 96},
    )
    groups = make_groups(config.parallel, collective_timeout_s=60, collect_timeout_s=60)
    student = build_student(folders[0], config, groups)
    packer = BatchPacker(config, gather=Replica(groups).gather)
    teacher = make_teacher(student, config, packer.sequences)
    load_hf(student, folders[1])  # the student has moved, its teacher has not
    before = [p.detach().clone() for p in student.gpt.parameters()]
    examples = step_examples()[groups.dp_rank :: groups.dp_size]
    targets = teacher.score(examples)
    assert all(torch.equal(a, b) for a, b in zip(before, student.gpt.parameters(), strict=True)), "buffers are restored"

    first, live = tiny_qwen3(is_tied=is_tied), tiny_qwen3(is_tied=is_tied, seed=1)
    for example, target in zip(examples, targets, strict=True):
        assert (target is None) == (example.context is None)
        if target is not None:
            compare(target, *wanted(first, live, example, weights=weights, support=support, rate=0.3))
    everywhere: list[Any] = [None] * groups.world_size
    dist.all_gather_object(everywhere, [None if t is None else columns_of(t) for t in targets])
    mine = everywhere[rank]
    for other in everywhere if groups.dp_size == 1 else []:
        for a, b in zip(mine, other, strict=True):
            assert (a is None) == (b is None)
            assert a is None or all((x == y).all() for x, y in zip(a, b, strict=True))


def columns_of(target: Targets) -> tuple[Any, ...]:
    return target.support_ids, target.logprobs, target.entropy, target.sampled


def compare(target: Targets, want: algo.TopK, sampled: torch.Tensor) -> None:
    got = torch.from_numpy(target.support_ids).long()
    order, want_order = got.argsort(-1), want.ids.argsort(-1)
    assert torch.equal(got.gather(-1, order), want.ids.gather(-1, want_order))
    near = {"rtol": 1e-4, "atol": 1e-5}  # 4 layers of float32
    torch.testing.assert_close(
        torch.from_numpy(target.logprobs).gather(-1, order), want.logprobs.gather(-1, want_order), **near
    )
    torch.testing.assert_close(torch.from_numpy(target.entropy), want.entropy, **near)
    torch.testing.assert_close(torch.from_numpy(target.sampled), sampled, **near)


LAYOUTS: dict[str, dict[str, Any]] = {
    "one_rank": {},
    "dp2": {"dp": 2},
    "tp2_sp": {"tp": 2, "sequence_parallel": True},
    "pp2_tied": {"pp": 2, "is_tied": True},
    "cp2": {"cp": 2},
    "tp2_cp2_sp": {"tp": 2, "cp": 2, "sequence_parallel": True},
    "cp2_pp2": {"cp": 2, "pp": 2},
}


def folders(tmp_path: Path, *, is_tied: bool = False) -> list[Path]:
    return [
        write_tiny_qwen3(tmp_path / "first", is_tied=is_tied),
        write_tiny_qwen3(tmp_path / "moved", is_tied=is_tied, seed=1),
    ]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_targets_equal_those_of_an_unsharded_teacher(layout: dict[str, Any], tmp_path: Path) -> None:
    world_size = torch.tensor([layout.get(axis, 1) for axis in ("tp", "pp", "cp", "dp")]).prod().item()
    both = folders(tmp_path, is_tied=layout.get("is_tied", False))
    run_ranks(case, world_size, both, weights="ema", support="teacher", **layout)


@pytest.mark.parametrize(
    ("weights", "support"),
    [("frozen", "full"), ("live", "teacher"), ("trust_region", "teacher"), ("ema", "student")],
)
@pytest.mark.parametrize("layout", [{}, {"tp": 2, "cp": 2, "sequence_parallel": True}], ids=["one_rank", "tp2_cp2_sp"])
def test_so_do_those_of_every_kind(weights: str, support: str, layout: dict[str, Any], tmp_path: Path) -> None:
    world_size = layout.get("tp", 1) * layout.get("cp", 1)
    run_ranks(case, world_size, folders(tmp_path), weights=weights, support=support, **layout)


def _sampled_case(rank: int, folders: list[Path], **parallel: Any) -> None:
    config = trainer_config(
        objective={"name": "opd"},
        parallel=parallel,
        rollout={"temperature": TEMPERATURE},
        teacher={"weights": "frozen", "support": "student"},
        train={"max_microbatch_tokens": 96},
    )
    groups = make_groups(config.parallel, collective_timeout_s=60, collect_timeout_s=60)
    student = build_student(folders[0], config, groups)
    packer = BatchPacker(config, gather=Replica(groups).gather)
    teacher = make_teacher(student, config, packer.sequences)
    load_hf(student, folders[1])
    first = tiny_qwen3()
    examples = step_examples()
    for example, target in zip(examples, teacher.score(examples), strict=True):
        if target is not None:
            assert target.support_ids.shape == target.logprobs.shape == (len(example.rollout.token_ids), 0)
            want, sampled = wanted(first, first, example, weights="frozen", support="teacher", rate=0.0)
            compare(target, algo.TopK(want.ids[:, :0], want.logprobs[:, :0], want.entropy), sampled)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"cp": 2}], ids=["one_rank", "tp2", "cp2"])
def test_an_objective_without_a_support_gets_the_sampled_token_alone(layout: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(_sampled_case, max(layout.values(), default=1), folders(tmp_path), **layout)


def _not_finite_case(rank: int, folder: Path, **parallel: Any) -> None:
    config = trainer_config(
        objective={"name": "distil", "future": "sum"}, parallel=parallel, train={"max_microbatch_tokens": 96}
    )
    groups = make_groups(config.parallel, collective_timeout_s=60, collect_timeout_s=60)
    student = build_student(folder, config, groups)
    packer = BatchPacker(config, gather=Replica(groups).gather)
    teacher = make_teacher(student, config, packer.sequences)
    examples = [example for example in step_examples() if example.context is not None]
    if groups.is_last_stage and groups.tp_rank == groups.tp_size - 1:
        teacher.state()["output_layer.weight"][-1] = torch.nan  # one id on one rank
    length = len(examples[0].rollout.token_ids)
    with pytest.raises(NonFiniteLossError) as caught:
        teacher.score(examples)
    assert str(caught.value).startswith(
        f"the teacher's context of rollout {examples[0].rollout.rollout_id}: logits are not finite at "
        f'{length} of {length} response tokens, first at token 0, with the weights that are read, "ema"'
    )
    after = student.gpt.parameters()
    assert all(p.isfinite().all() for p in after), "the student's weights are back"


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}], ids=["one_rank", "tp2", "pp2"])
def test_logits_that_are_not_finite_are_an_error_on_every_rank(layout: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(_not_finite_case, max(layout.values(), default=1), write_tiny_qwen3(tmp_path), **layout)


def test_the_error_names_the_sequence_and_the_first_token() -> None:
    fine = np.zeros((5, 2), dtype=np.float32)
    bad = fine.copy()
    bad[3, 1] = -np.inf
    ids, five = np.zeros((5, 2), dtype=np.int32), np.zeros(5, dtype=np.float32)
    found = [Targets(support_ids=ids, logprobs=rows, entropy=five, sampled=five) for rows in (fine, bad)]
    with pytest.raises(NonFiniteLossError, match=r"second: logits are not finite at 1 of 5 .* first at token 3"):
        check_finite(["first", "second"], found, "live")


def _ema_case(rank: int, folder: Path, dtype: str) -> None:
    config = trainer_config(
        objective={"name": "distil", "future": "sum"}, teacher={"rate": 0.01}, train={"dtype": dtype}
    )
    groups = make_groups(config.parallel, collective_timeout_s=60, collect_timeout_s=60)
    student = build_student(folder, config, groups)
    teacher = make_teacher(student, config, lambda _: [])
    assert isinstance(teacher, SelfTeacher)
    name = "decoder.final_layernorm.weight"
    param = student.gpt.get_parameter(name)
    hand = param.detach().double()
    for step in range(20):
        with torch.no_grad():
            param.copy_(torch.full_like(param, 1.0 + step))
        hand = 0.99 * hand + 0.01 * (1.0 + step)
        teacher.follow()
    mine = teacher.state()[name]
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine.double(), hand, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_average_is_kept_in_float32_and_moves_once_per_step(dtype: str, tmp_path: Path) -> None:
    run_ranks(_ema_case, 1, write_tiny_qwen3(tmp_path), dtype)


def test_an_objective_without_a_teacher_has_none() -> None:
    config = trainer_config(objective={"name": "grpo"})
    teacher = make_teacher(None, config, lambda _: [])  # type: ignore[arg-type]
    assert isinstance(teacher, NoTeacher)
    examples = step_examples()
    assert teacher.score(examples) == [None] * len(examples)
    teacher.follow()
    assert teacher.state() == {}
