"""What an objective is: settings and formula together, chosen by name in a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field

from megatron_distil import algo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Clip = Annotated[float, Field(gt=0.0)] | Literal["none"]
"""A bound, or none."""


class Tokens(NamedTuple):
    """One microbatch as an objective sees it: no vocabulary, no shards, no groups."""

    student: algo.Columns
    """Carries gradient; K = 0 without a teacher."""
    teacher_logprobs: Tensor
    """[T, K] at the support, -inf in unused slots; constant."""
    teacher_sampled: Tensor
    """[T] the teacher at the sampled id, inside or outside the support; constant."""
    sampling_logprobs: Tensor
    """[T] of the engine that sampled; constant."""
    old_logprobs: Tensor
    """[T] of the sampled id under the trainer before the first update of the step; constant. One update: ``student.sampled``."""
    advantages: Tensor
    """[T] 0 unless the objective needs rewards; constant."""
    baseline: Tensor
    """[T] what is taken off the credit; 0 unless the objective asks for one; constant."""
    weights: Tensor
    """[T] 0 outside the loss; the reduction and the denominator are in here."""


class Future(Protocol):
    """The time axis, as an objective sees it."""

    def __call__(self, cost: Tensor, *, mean: bool, discount: float) -> Tensor:
        """``algo.future_credit`` over whole sequences, however they are sharded. [T] -> [T], no gradient."""
        ...


class Objective(BaseModel):
    """One loss. A subclass is one file here, one recipe and one test."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    needs_teacher: ClassVar[bool] = True
    needs_support: ClassVar[bool] = True
    """Whether it reads the teacher at a support; if not, only at the sampled id (K = 0)."""
    needs_rewards: ClassVar[bool] = False
    reads_samples: ClassVar[bool] = True
    """Whether the tokens were drawn by an engine, which said how probable it found them."""

    name: str
    """Its file name; the registry picks the class by it."""
    reduction: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = "token-mean"
    """How tokens become one number: mean over all tokens; mean over sequences of their token means; ... of their sums."""

    def terms(self, tokens: Tokens, future: Future) -> algo.LossTerms:
        """The weighted sums whose gradient is the update.

        It is called once for each part of a microbatch, and the terms of the parts are added up. A part is any set of
        tokens; of one sequence, later tokens come in the same part or in an earlier one. So nothing here may be a sum or
        a mean over tokens but the weighted sums themselves and the counts, and only ``future`` looks along a sequence.

        Args:
            tokens: what the head left of some tokens; there may be none.
            future: the credit scan, given in: an objective does not know how sequences are sharded.

        Returns:
            The terms; their ``counts`` are sums over the tokens of the loss and their ``maxima`` the largest among them,
            under the names of metrics.
        """
        raise NotImplementedError

    @property
    def needs_baseline(self) -> bool:
        """Whether the credit of a step has to be known before its first update."""
        return False

    def credit(self, tokens: Tokens, future: Future) -> Tensor:
        """What each token answers for, before a baseline is taken off; asked only where one is needed.

        Returns:
            [T] without gradient.
        """
        raise NotImplementedError

    def baselines(self, credits: Sequence[Tensor], group_ids: Sequence[int]) -> list[Tensor]:
        """What is taken off the credit of each rollout; asked only where a baseline is needed.

        Args:
            credits: [R] of every rollout of the step that carries a loss.
            group_ids: equal for the rollouts of one prompt.

        Returns:
            [R] of each rollout; constant, and no function of its own credit.
        """
        raise NotImplementedError

    def advantages(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """What each rollout did better than expected; asked only where the objective needs rewards.

        Args:
            rewards: [N] float.
            group_ids: [N] int. Equal for the rollouts of one prompt.

        Returns:
            [N] of the dtype of ``rewards``; equal for equal rewards of one group.
        """
        raise NotImplementedError


def weighted(tokens: Tokens, *, ratio_clip: Clip, tis_clip: Clip) -> tuple[Tensor, dict[str, Tensor]]:
    """The weights of tokens times their truncated importance weights, and the counts of those that were cut.

        w_t  min(pi(a_t) / pi_old(a_t), ratio_clip)  min(pi_old(a_t) / pi_sampler(a_t), tis_clip)

    Args:
        tokens: of an objective.
        ratio_clip: the policy that is trained against the one before the step; none: 1.
        tis_clip: that one against the engine that sampled; none: 1.

    Returns:
        [T] without gradient, and sums under the names of metrics.
    """
    counts: dict[str, Tensor] = {}
    weights = tokens.weights
    is_in_loss = tokens.weights != 0
    for name, newer, older, clip in (
        ("train/ratio_clipped_frac", tokens.student.sampled, tokens.old_logprobs, ratio_clip),
        ("train/tis_clipped_frac", tokens.old_logprobs, tokens.sampling_logprobs, tis_clip),
    ):
        if not isinstance(clip, str):
            ratio = algo.truncated_ratio(newer, older, clip=clip)
            weights = weights * ratio
            counts[name] = ((ratio >= clip) & is_in_loss).sum()
    return weights, counts


def largest(values: Tensor, tokens: Tokens) -> Tensor:
    """[] the largest of ``values`` [T] among the tokens of the loss; -inf where there are none."""
    values = values.detach().masked_fill(tokens.weights == 0, float("-inf"))
    return values.amax() if len(values) else values.new_full((), float("-inf"))
