"""The arithmetic of ``megatron_distil.sizing`` against the bytes of real Megatron models on a CPU."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_distil.sizing.layout import Layout
from megatron_distil.sizing.shape import ModelShape
from megatron_distil.sizing.trainer import (
    HEAD_BUFFER_BYTES,
    HEAD_LEAST_CHUNK,
    KEPT_ON_CPU,
    SCORES_BUFFER_BYTES,
    forward_bytes,
    head_chunk_rows,
    stage_parts,
)
from megatron_distil.trainer.attention import packed_params
from megatron_distil.trainer.groups import make_groups
from megatron_distil.trainer.head import columns, passes
from megatron_distil.trainer.model import Student, build_student
from megatron_distil.trainer.optim import Optimizer, make_optimizer
from megatron_distil.trainer.teacher import make_teacher
from tests.tiny_model import write_tiny_qwen3
from tests.trainer_config import trainer_config
from tests.world import run_ranks

# No two of them equal, so that a wrong one shows; heads of 32 make q twice as wide as the hidden state.
DIMS = {"hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
RUNS: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    # layout, settings of the training, whether embedding and head are one
    ({}, {"dtype": "bfloat16"}, False),
    ({}, {"dtype": "float32"}, True),
    ({"tp": 2, "sequence_parallel": True}, {"dtype": "bfloat16"}, True),
    ({"tp": 2, "pp": 2}, {"dtype": "bfloat16"}, False),
    ({"pp": 2}, {"dtype": "bfloat16"}, True),
    ({"dp": 2}, {"dtype": "bfloat16", "is_distributed_optimizer": False}, False),
    ({"dp": 2}, {"dtype": "float32"}, False),
    ({"dp": 2, "cp": 2}, {"dtype": "bfloat16"}, False),
]


def _storages(tensors: Iterator[Tensor] | list[Tensor]) -> dict[int, int]:
    """Bytes of each storage, once."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _optimizers(optimizer: Optimizer) -> Iterator[Any]:
    megatron: Any = optimizer.megatron
    for one in getattr(megatron, "chained_optimizers", [megatron]):
        yield one.optimizer


def _measured(student: Student, optimizer: Optimizer, teacher: Any) -> dict[str, float]:
    """Bytes by part, of the tensors that are there."""
    ddp: Any = student.ddp
    weights = _storages(list(student.gpt.parameters()))
    found = {"weights": sum(weights.values())}
    found["gradients"] = sum(_storages([buffer.grad_data for buffer in ddp.buffers]).values())
    main = [p for o in _optimizers(optimizer) for group in o.param_groups for p in group["params"]]
    found["main weights"] = sum(size for at, size in _storages(main).items() if at not in weights)
    moments = [x for o in _optimizers(optimizer) for s in o.state.values() for x in s.values() if torch.is_tensor(x)]
    found["optimizer"] = sum(_storages(moments).values())
    found["teacher"] = sum(_storages(list(teacher.state().values())).values())
    return found


def _states(rank: int, folder: Path, parallel: dict[str, Any], train: dict[str, Any]) -> None:
    config = trainer_config(train=train, parallel=parallel, objective={"name": "distil", "future": "sum"})
    groups = make_groups(config.parallel, collective_timeout_s=60, collect_timeout_s=60)
    student = build_student(folder, config, groups)
    optimizer = make_optimizer(student, config.train, num_updates=10)
    optimizer.make_state()
    teacher = make_teacher(student, config, lambda _: [])
    layout = Layout.of(config.parallel)
    stage = 0 if groups.is_first_stage else layout.pp - 1
    parts = stage_parts(config, ModelShape.from_folder(folder), layout, stage=stage)
    planned = {part.name: part.bytes for part in parts}
    for name, measured in _measured(student, optimizer, teacher).items():
        assert planned.get(name, 0.0) == pytest.approx(measured, rel=0.02), name


@pytest.mark.parametrize(("parallel", "train", "is_tied"), RUNS, ids=str)
def test_states_of_a_rank(parallel: dict[str, Any], train: dict[str, Any], is_tied: bool, tmp_path: Path):
    # the vocabulary divides by tp, as published ones do; the tolerance is for the padding of sharded buffers
    folder = write_tiny_qwen3(tmp_path, is_tied=is_tied, **DIMS)
    run_ranks(
        _states,
        math.prod(size for axis, size in parallel.items() if axis in ("tp", "pp", "dp", "cp")),
        folder,
        parallel,
        train,
    )


def _kept(rank: int, folder: Path, dtype: str, parallel: dict[str, Any], recompute: str) -> None:
    config = trainer_config(train={"dtype": dtype, "recompute": recompute}, parallel=parallel)
    groups = make_groups(config.parallel, collective_timeout_s=60, collect_timeout_s=60)
    student = build_student(folder, config, groups)
    ddp: Any = student.ddp
    own = {*_storages(list(student.gpt.parameters()))}
    own |= {*_storages([buffer.param_data for buffer in ddp.buffers if buffer.param_data is not None])}
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    tokens, length = 512, 64
    ids, positions = torch.randint(0, 256, (tokens,)), torch.arange(length).repeat(tokens // length)
    ends = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student.hidden(ids, positions, packed_params(ends))
    measured = sum(size for at, size in _storages(held).items() if at not in own)
    shape, layout = ModelShape.from_folder(folder), Layout.of(config.parallel)
    planned = forward_bytes(config, shape, layout, tokens, stage=0, kept=KEPT_ON_CPU)
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("parallel", "dtype", "recompute"), [
    ({}, "float32", "none"), ({}, "bfloat16", "none"), ({}, "bfloat16", "full"), ({"tp": 2}, "bfloat16", "none"),
    ({"tp": 2, "sequence_parallel": True}, "float32", "none"), ({"tp": 2, "sequence_parallel": True}, "bfloat16", "full"),
], ids=str)  # fmt: skip
def test_activations_that_autograd_keeps(parallel: dict[str, Any], dtype: str, recompute: str, tmp_path: Path):
    folder = write_tiny_qwen3(tmp_path, num_hidden_layers=8, **DIMS)
    run_ranks(_kept, parallel.get("tp", 1), folder, dtype, parallel, recompute)


@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen3-32B", "Qwen3-30B-A3B", "Qwen3-235B-A22B"])
def test_parameters_are_those_that_transformers_would_make(name: str):
    folder = Path(__file__).parents[1] / "data" / "models" / name
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert ModelShape.from_folder(folder).parameters == sum(param.numel() for param in model.parameters())


def test_the_head_is_cut_as_the_head_cuts():
    assert (HEAD_BUFFER_BYTES, HEAD_LEAST_CHUNK) == (passes.BUFFER_BYTES, passes.LEAST_CHUNK)
    assert SCORES_BUFFER_BYTES == columns.CHUNK_BYTES
    assert head_chunk_rows(151936 // 4, 2) == 4096  # 1,792 rows would have filled the buffer
    assert head_chunk_rows(256, 2) == 2**27 // (320 * 2) // 256 * 256
