"""A rank of a small run: a student, its optimizer, and steps of plain cross-entropy."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_distil.config.schema import Config
from megatron_distil.trainer.attention import packed_params
from megatron_distil.trainer.export import hf_weights
from megatron_distil.trainer.groups import Groups, make_groups
from megatron_distil.trainer.model import build_student
from megatron_distil.trainer.optim import make_optimizer

MICROBATCHES, LENGTHS = 4, [20, 12, 32]


class TinyRun:
    """Collective. Every replica trains on its share of the same batches, whatever the layout."""

    def __init__(self, folder: Path, config: Config, *, num_updates: int = 20) -> None:
        self.groups: Groups = make_groups(config.parallel, collective_timeout_s=60, collect_timeout_s=60)
        self.student = build_student(folder, config, self.groups)
        self.optimizer = make_optimizer(self.student, config.train, num_updates=num_updates)
        if self.groups.is_last_stage:
            self.student.gpt.output_layer.emit_hidden = False

    def step(self, seed: int) -> float:
        """The norm of the gradient of the mean over all tokens."""
        draw = torch.Generator().manual_seed(seed)
        batches = torch.randint(0, self.student.dims.vocab_size, (MICROBATCHES, sum(LENGTHS) + 1), generator=draw)
        self.student.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        share = MICROBATCHES // self.groups.dp_size
        get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iter(batches[self.groups.dp_rank * share :][:share]),
            model=self.student.ddp,
            num_microbatches=share,
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )
        return self.optimizer.step()[1]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.float().clone() for name, tensor in hf_weights(self.student)}

    def _forward(self, batches: Any, _model: Any) -> Any:
        tokens = next(batches)
        ends = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
        positions = torch.cat([torch.arange(n) for n in LENGTHS])
        packed = packed_params(ends)
        out = self.student.ddp(tokens[None, :-1], positions[None], None, packed_seq_params=packed)
        out = out[0] if self.groups.is_last_stage else out

        def loss(logits: torch.Tensor) -> Any:
            losses = tensor_parallel.vocab_parallel_cross_entropy(
                logits[:, None].float().contiguous(), tokens[1:, None].contiguous()
            )
            return losses.sum() / (MICROBATCHES * sum(LENGTHS)), torch.tensor(1, dtype=torch.int), {}

        return out, loss
