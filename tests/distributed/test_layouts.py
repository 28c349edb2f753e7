"""The student equals Hugging Face's model in every parallel layout: logits and every gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_distil.trainer.attention import packed_params, zigzag_pieces
from megatron_distil.trainer.groups import make_groups
from megatron_distil.trainer.model import Student, build_student
from megatron_distil.trainer.names import join
from tests.tiny_model import tiny_qwen3, write_tiny_qwen3
from tests.trainer_config import trainer_config
from tests.world import run_ranks

PACKS = [[37, 64, 18], [5, 90, 3], [50, 50, 49], [8, 70, 16, 1, 1]]  # different totals and counts


def sequences(vocab: int) -> list[list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [[torch.randint(0, vocab, (n + 1,), generator=draw) for n in pack] for pack in PACKS]


def packed(pack: list[torch.Tensor], multiple: int) -> tuple[torch.Tensor, ...]:
    """ids, next ids, positions, weights of a row whose sequences are filled up to ``multiple``; and cu_seqlens."""
    padded = [-(-(len(s) - 1) // multiple) * multiple for s in pack]
    pad = [(0, n - len(s) + 1) for s, n in zip(pack, padded, strict=True)]
    ids = torch.cat([F.pad(s[:-1], p) for s, p in zip(pack, pad, strict=True)])
    following = torch.cat([F.pad(s[1:], p) for s, p in zip(pack, pad, strict=True)])
    weights = torch.cat([F.pad(torch.ones(len(s) - 1), p) for s, p in zip(pack, pad, strict=True)])
    positions = torch.cat([torch.arange(n) for n in padded])
    return ids, following, positions, weights, F.pad(torch.tensor(padded).cumsum(0), (1, 0)).int()


def reference(hf: Any, packs: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """Logits of each sequence alone; leaves the gradient of the mean cross-entropy over all tokens in ``hf``."""
    tokens = sum(len(s) - 1 for pack in packs for s in pack)
    found = []
    for pack in packs:
        logits = [hf(s[None, :-1]).logits[0] for s in pack]
        for row, s in zip(logits, pack, strict=True):
            (F.cross_entropy(row, s[1:], reduction="sum") / tokens).backward()
        found.append([row.detach() for row in logits])
    return found


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
    rank: int, folder: Path, *, is_tied: bool = False, vocab: int = 256, recompute: str = "none", **parallel: Any
) -> None:
    config = trainer_config(parallel=parallel, train={"is_distributed_optimizer": False, "recompute": recompute})
    groups = make_groups(config.parallel, collective_timeout_s=60, collect_timeout_s=60)
    student = build_student(folder, config, groups)
    if groups.is_last_stage:
        student.gpt.output_layer.emit_hidden = False
    hf, packs = tiny_qwen3(is_tied=is_tied, vocab_size=vocab), sequences(vocab)
    want_logits = reference(hf, packs)
    tokens = sum(len(s) - 1 for pack in packs for s in pack)
    multiple = 2 * groups.cp_size * groups.tp_size
    worst = [0.0]

    def forward_step(iterator: Any, _model: Any) -> Any:
        pack, want = next(iterator)
        ids, following, positions, weights, ends = packed(pack, multiple)
        lengths = (ends[1:] - ends[:-1]).tolist()
        own = torch.cat(
            [
                start + zigzag_pieces(n, groups.cp_size, groups.cp_rank)
                for start, n in zip(ends.tolist(), lengths, strict=False)
            ]
        )
        out = student.ddp(ids[own][None], positions[own][None], None, packed_seq_params=packed_params(ends))
        out = out[0] if groups.is_last_stage else out

        def loss(logits: torch.Tensor) -> Any:
            whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits.detach().clone())[:, :vocab]
            filled = torch.cat([F.pad(row, (0, 0, 0, n - len(row))) for row, n in zip(want, lengths, strict=True)])
            worst[0] = max(worst[0], ((whole - filled[own]) * weights[own, None]).abs().max().item())
            columns = torch.arange(logits.size(1)) + groups.tp_rank * logits.size(1)
            logits = logits.masked_fill(columns >= vocab, -1e9)
            losses = tensor_parallel.vocab_parallel_cross_entropy(
                logits[:, None].float().contiguous(), following[own, None]
            )
            return (losses[:, 0] * weights[own]).sum() / tokens, torch.tensor(1, dtype=torch.int), {}

        return out, loss

    share = len(packs) // groups.dp_size
    mine = slice(groups.dp_rank * share, (groups.dp_rank + 1) * share)
    student.ddp.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(zip(packs[mine], want_logits[mine], strict=True)),
        model=student.ddp,
        num_microbatches=share,
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    assert worst[0] < 1e-5, f"logits differ by {worst[0]}"  # 4 layers of float32 sums over 64 to 128 terms
    got, want = whole_gradients(student), {name: param.grad for name, param in hf.named_parameters()}
    assert set(got) == set(want)
    error, name = max(((got[n] - w).norm().item() / w.norm().item(), n) for n, w in want.items())
    assert error < 1e-5, f"the gradient of {name} differs by {error}"


LAYOUTS = {
    "one_rank": {},
    "one_rank_tied": {"is_tied": True},
    "tp2": {"tp": 2},
    "tp2_tied": {"tp": 2, "is_tied": True},
    "tp2_sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2_tied": {"pp": 2, "is_tied": True},
    "cp2": {"cp": 2},
    "dp2": {"dp": 2},
    "tp2_pp2_sp_tied": {"tp": 2, "pp": 2, "sequence_parallel": True, "is_tied": True},
    "tp2_cp2_sp": {"tp": 2, "cp": 2, "sequence_parallel": True},
    "cp2_dp2": {"cp": 2, "dp": 2},
    "tp2_and_an_odd_vocabulary": {"tp": 2, "vocab": 255},
    "full_recompute": {"recompute": "full"},
    "selective_recompute_tp2_sp": {"recompute": "selective", "tp": 2, "sequence_parallel": True},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_logits_and_gradients_equal_hugging_face(layout: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path, is_tied=layout.get("is_tied", False), vocab_size=layout.get("vocab", 256))
    sizes = [layout.get(axis, 1) for axis in ("tp", "pp", "cp", "dp")]
    run_ranks(case, torch.tensor(sizes).prod().item(), folder, **layout)
