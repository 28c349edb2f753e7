"""How the ranks of a trainer share a model, and what of it each of them holds."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_distil.config.schema import ParallelConfig
from megatron_distil.sizing.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the groups."""

    tp: int
    pp: int
    cp: int
    dp: int
    ep: int = 1
    """Ranks that share the experts of a layer; each holds its experts whole. Divides tp x cp x dp."""
    sequence_parallel: bool = False

    @classmethod
    def of(cls, parallel: ParallelConfig, *, ep: int = 1) -> Layout:
        """Of a configuration, which knows no experts."""
        return cls(
            tp=parallel.tp,
            pp=parallel.pp,
            cp=parallel.cp,
            dp=parallel.dp,
            ep=ep,
            sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        )

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def residual_share(self) -> int:
        """Ranks that share the tokens between the tensor-parallel regions."""
        return self.tp if self.sequence_parallel else 1

    @property
    def groups(self) -> int:
        """Communicators that a rank belongs to: the world, and one for each axis that is cut."""
        return 1 + sum(size > 1 for size in (self.tp, self.pp, self.cp, self.dp, self.ep))


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Parameters of one rank."""

    shared: float
    """Everything but experts; its optimizer is cut over dp x cp ranks."""
    experts: float
    """Cut over tp x cp x dp / ep ranks; 0 for a dense model."""

    @property
    def count(self) -> float:
        """All of them."""
        return self.shared + self.experts


def held(shape: ModelShape, layout: Layout, *, stage: int) -> Held:
    """What a rank of pipeline stage ``stage`` holds.

    The norms and the router are whole on every tensor rank; the vocabulary is filled up to a multiple of tp. A tied head
    is a copy where first and last stage are different ranks. Experts are not cut over tp (``expert_tensor_parallel_size`` 1).
    """
    layers, is_mixture = shape.layers / layout.pp, shape.experts > 1
    matrices = shape.attention_parameters + (0 if is_mixture else shape.expert_parameters)
    shared = layers * (matrices / layout.tp + shape.router_parameters + shape.norm_parameters)
    is_first, is_last = stage == 0, stage == layout.pp - 1
    vocabulary = -(-shape.vocab // layout.tp) * shape.hidden
    shared += vocabulary * (1 if is_first and is_last and shape.is_tied else is_first + is_last)
    shared += shape.hidden if is_last else 0
    experts = layers * shape.experts * shape.expert_parameters / layout.ep if is_mixture else 0.0
    return Held(shared=shared, experts=experts)
