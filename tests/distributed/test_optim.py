"""Megatron's optimizer with our settings does what torch's AdamW does to Hugging Face's model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.tiny_model import tiny_qwen3, write_tiny_qwen3
from tests.tiny_training import LENGTHS, MICROBATCHES, TinyRun
from tests.trainer_config import trainer_config
from tests.world import run_ranks

STEPS, RATE = 5, 1e-3
TRAIN: dict[str, Any] = {
    "learning_rate": RATE,
    "weight_decay": 0.3,
    "clip_grad": 0.5,
    "warmup_steps": 2,
    "decay": "linear",
    "final_rate_frac": 0.5,
}


def rates(count: int) -> list[float]:
    """By hand: 0, half, whole; then a line from the peak at update 2 to half of it at update 10."""
    return [0.0, 0.5 * RATE, RATE, *(RATE * (1 - 0.5 * (n - 2) / 8) for n in range(3, count))][:count]


def reference() -> tuple[dict[str, torch.Tensor], list[float]]:
    hf = tiny_qwen3()
    decayed = [param for param in hf.parameters() if param.dim() > 1]
    exempt = [param for param in hf.parameters() if param.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": exempt, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999))
    norms = []
    for step, rate in enumerate(rates(STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        tokens = torch.randint(0, 256, (MICROBATCHES, sum(LENGTHS) + 1), generator=torch.Generator().manual_seed(step))
        for row in tokens:
            parts = zip(row[:-1].split(LENGTHS), row[1:].split(LENGTHS), strict=True)
            losses = [F.cross_entropy(hf(ids[None]).logits[0], to, reduction="sum") for ids, to in parts]
            (sum(losses) / (MICROBATCHES * sum(LENGTHS))).backward()  # type: ignore[union-attr]
        norms.append(torch.nn.utils.clip_grad_norm_(hf.parameters(), 0.5).item())
        optimizer.step()
    return {name: param.detach() for name, param in hf.named_parameters()}, norms


def train(rank: int, folder: Path, *, is_distributed_optimizer: bool, **parallel: Any) -> None:
    start = {name: param.detach().clone() for name, param in tiny_qwen3().named_parameters()}
    want, want_norms = reference()
    config = trainer_config(train=TRAIN | {"is_distributed_optimizer": is_distributed_optimizer}, parallel=parallel)
    run = TinyRun(folder, config, num_updates=10)
    for step, rate in enumerate(rates(STEPS)):
        assert run.optimizer.learning_rate == pytest.approx(rate)
        assert run.step(step) == pytest.approx(want_norms[step], rel=1e-4)
    got = run.weights()
    for name, tensor in want.items():
        # Adam divides by the root of tiny second moments: an ulp of a gradient shows in the fourth digit of the update
        error = (got[name] - tensor).norm() / (tensor - start[name]).norm()
        assert error < 2e-3, f"the update of {name} differs by {error}"


LAYOUTS: dict[str, dict[str, Any]] = {
    "one_rank": {},
    "tp2_sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
}


@pytest.mark.parametrize("is_distributed_optimizer", [True, False], ids=["distributed", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_updates_equal_adamw_with_warmup_decay_clipping_and_exempt_norms(
    layout: dict[str, Any], is_distributed_optimizer: bool, tmp_path: Path
) -> None:
    folder = write_tiny_qwen3(tmp_path)
    world = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1)
    run_ranks(train, world, folder, is_distributed_optimizer=is_distributed_optimizer, **layout)
