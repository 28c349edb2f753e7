"""Optimizer and schedule: Megatron's, from our settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import megatron.core.optimizer.distrib_optimizer as megatron_distributed
import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_distil.config.schema import TrainConfig
from megatron_distil.trainer.model import Student


@dataclass(frozen=True)
class Optimizer:
    """Megatron's optimizer and the schedule that sets its rate and weight decay after each update."""

    megatron: MegatronOptimizer
    schedule: OptimizerParamScheduler

    @property
    def num_updates(self) -> int:
        return self.schedule.num_steps

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return self.megatron.param_groups[0]["lr"]

    def zero_grad(self) -> None:
        self.megatron.zero_grad()

    def step(self) -> tuple[bool, float]:
        """Clips and applies the gradients. Collective over the world.

        Returns:
            Whether the update was applied, and the norm of the gradient before clipping.
        """
        megatron: Any = self.megatron  # the base class annotates no result
        is_applied, norm, _ = megatron.step()
        self.schedule.step(1)
        return bool(is_applied), float(norm or 0.0)

    def make_state(self) -> None:
        """Moments of 0 where there has been no update, so that there is something to save."""
        megatron: Any = self.megatron
        for single in getattr(megatron, "chained_optimizers", [megatron]):
            single.init_state_fn(single.optimizer)

    def continue_at(self, num_updates: int) -> None:
        """Takes rate and decay from the settings, also where a checkpoint has brought others."""
        for group in self.megatron.param_groups:
            group["max_lr"], group["min_lr"] = self.schedule.max_lr, self.schedule.min_lr
        self.schedule.num_steps = num_updates
        self.schedule.step(0)


def make_optimizer(student: Student, train: TrainConfig, *, num_updates: int) -> Optimizer:
    """Adam with decoupled weight decay. Collective over the world.

    Args:
        student: whose parameters are trained; its configuration gets the loss scale.
        train: settings.
        num_updates: of the whole run; where the decay ends.
    """
    _install_fused_adam()
    last_rate = train.learning_rate * train.final_rate_frac
    settings = OptimizerConfig(
        optimizer="adam",
        lr=train.learning_rate,
        min_lr=last_rate,
        weight_decay=train.weight_decay,
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        clip_grad=train.clip_grad,
        bf16=student.transformer.bf16,
        params_dtype=student.transformer.params_dtype,
        use_distributed_optimizer=train.is_distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(settings, [student.ddp], use_gloo_process_groups=False)
    student.transformer.grad_scale_func = optimizer.scale_loss
    # Megatron exempts parameters of one dimension from the decay, but only a schedule puts this into effect
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.learning_rate,
        min_lr=last_rate,
        lr_warmup_steps=train.warmup_steps,
        lr_decay_steps=max(num_updates, train.warmup_steps + 1),
        lr_decay_style=train.decay,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return Optimizer(optimizer, schedule)


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the state layout of TransformerEngine's: ``step`` in the parameter group, two moments per parameter.

    Megatron's distributed optimizer trains with torch.optim.AdamW, but cannot load a checkpoint of it.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **_: object,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None, **_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - no loss
        if closure is not None:
            raise ValueError("this optimizer evaluates no closure")
        for group in self.param_groups:
            if group["params"]:
                group["step"] = int(group.get("step", 0)) + 1
                self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        rate, step, (beta1, beta2) = group["lr"], group["step"], group["betas"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            first, second = state["exp_avg"], state["exp_avg_sq"]
            p.mul_(1 - rate * group["weight_decay"])
            first.lerp_(p.grad, 1 - beta1)
            second.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            denominator = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
            p.addcdiv_(first, denominator, value=-rate / (1 - beta1**step))


def _install_fused_adam() -> None:
    """Does nothing where TransformerEngine or Apex gave Megatron its Adam."""
    plain: Any = megatron_optimizer
    distributed: Any = megatron_distributed
    if plain.USING_PYTORCH_OPTIMIZER:
        plain.Adam, plain.USING_PYTORCH_OPTIMIZER = FusedAdam, False
        distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_APEX_OPTIMIZER = FusedAdam, True, True
