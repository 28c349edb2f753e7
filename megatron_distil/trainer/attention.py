"""Attention, norm and layer specification for Megatron where TransformerEngine is absent.

Parameters have TransformerEngine's names, so that checkpoints and conversion are the same with it. Packed sequences are
computed in buckets of nearly equal length: a microbatch of 4,096 tokens may hold 200 sequences, and one kernel each would
cost more than the arithmetic. Rotation belongs to the attention here, because Megatron's unfused form also loops over the
sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251 - keys and values are gathered over cp
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.distributed import ProcessGroup  # noqa: TID251 - the type of a group


def packed_params(cu_seqlens: Tensor) -> PackedSeqParams:
    """What Megatron must know of one packed row; one object per microbatch, shared by its layers.

    Args:
        cu_seqlens: [S + 1] int32 of the whole row, before any cut over CP; padding included.
    """
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,  # pyright: ignore[reportArgumentType] - Megatron writes `int = None`
        max_seqlen_kv=longest,  # pyright: ignore[reportArgumentType] - Megatron writes `int = None`
    )


def layer_specs(config: Any, rope_theta: float) -> TransformerBlockSubmodules:
    """Dense layers with RMSNorm, q/k norm and our attention."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=LayerNormColumnParallelLinear,
            core_attention=ModuleSpec(module=CoreAttention, params={"rope_theta": rope_theta}),
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm,
            k_layernorm=RMSNorm,
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=LayerNormColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType] - functions are built too
            pre_mlp_layernorm=IdentityOp,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType] - functions are built too
        ),
    )
    count = get_num_layers_to_build(config)
    norm: Any = RMSNorm  # annotated as a module, used as its class
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


class _Normalise(torch.autograd.Function):
    """weight * x / rms(x) over the last axis, float32 inside; half the passes over memory that autograd would make."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x.float()
        rate = torch.linalg.vecdot(y, y).div_(y.size(-1)).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, rate)
        return (y * rate).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, rate = ctx.saved_tensors
        grad, wide = grads[0].float(), weight.float()
        unit = x.float() * rate
        both = (grad * unit).view(-1, x.size(-1))
        along = torch.mv(both, wide).div_(-x.size(-1)).view(rate.shape)
        d_weight = torch.mv(both.t(), both.new_ones(len(both)))
        d_x = (grad * wide).addcmul_(unit, along).mul_(rate)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None


class RMSNorm(torch.nn.Module):
    """Megatron's own refuses sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight: Any = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads sums the gradients of parameters with this mark over TP
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return _Normalise.apply(x, self.weight, self.eps)


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """The norm in front of a column-parallel layer, as one module."""

    _PASSED = ("gather_output", "bias", "skip_bias_add", "is_expert", "tp_comm_buffer_name", "tp_group", "stride")

    def __init__(self, input_size: int, output_size: int, *, config: Any, init_method: Any, **options: Any) -> None:
        passed = {name: value for name, value in options.items() if name in self._PASSED}
        super().__init__(input_size, output_size, config=config, init_method=init_method, **passed)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight: Any = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        normalised = _Normalise.apply(input_, self.layer_norm_weight, self.eps)
        return super().forward(normalised, *args, **kwargs)


@dataclass(frozen=True)
class _Bucket:
    """Sequences that one kernel computes, filled up to one length."""

    num_sequences: int
    mask: Tensor | None
    """[query length, key length] True where a query sees a key; None: causal."""


@dataclass(frozen=True)
class _Plan:
    """How one packed row is laid out for the kernels: bucket after bucket, each sequence in slots of one number.

    A slot that fills up repeats the first row of its sequence. As a key it comes after every query of the sequence, so
    causality hides it; as a query it is dropped.
    """

    buckets: tuple[_Bucket, ...]
    query_slots: tuple[int, ...]
    """Slots of each bucket."""
    key_slots: tuple[int, ...]
    query_rows: Tensor
    """[query slots] the row of each slot."""
    slot_of_query: Tensor
    """[T/cp] the slot of each row."""
    key_rows: Tensor
    """[key slots] the row of each slot, as the rows lie after the gathering over CP."""
    slot_of_key: Tensor
    """[T]"""
    positions: Tensor
    """[T/cp] of each row in its sequence."""


def _bucket_length(length: int) -> int:
    """Rounds up to at most four lengths per octave, none below 16."""
    step = max(16, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def _make_plan(cu_seqlens: Sequence[int], local_rows: int, *, cp_size: int, cp_rank: int) -> _Plan:
    """Rows behind the last sequence are a sequence of their own."""
    ends = [*cu_seqlens, local_rows * cp_size]
    starts_by_length: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(ends):
        if end > start:
            # under CP the mask depends on the length, so sequences of different lengths do not share a kernel
            filled = _bucket_length(end - start) if cp_size == 1 else end - start
            starts_by_length.setdefault(filled, []).append((start, end - start))
    buckets, queries, keys, places, real = [], [], [], [], []
    for filled, sequences in sorted(starts_by_length.items()):
        start, length = torch.tensor(sequences).t()[:, :, None]
        position = torch.arange(filled)[None].expand(len(sequences), -1)
        own, mask = position, None
        if cp_size == 1:
            key = query = torch.where(position < length, start + position, start)
        else:
            order = torch.cat([zigzag_pieces(filled, cp_size, rank) for rank in range(cp_size)]).argsort()
            per_rank = filled // cp_size
            key = start // cp_size + (order // per_rank * local_rows + order % per_rank)[None]
            query = start // cp_size + torch.arange(per_rank)[None]
            pieces = zigzag_pieces(filled, cp_size, cp_rank)
            own, mask = pieces[None].expand(len(sequences), -1), pieces[:, None] >= torch.arange(filled)[None]
        buckets.append(_Bucket(len(sequences), mask))
        queries.append(query.flatten())
        keys.append(key.flatten())
        places.append(own.flatten())
        real.append((own < length).flatten())
    query_rows, key_rows, valid = torch.cat(queries), torch.cat(keys), torch.cat(real)
    slots = torch.arange(len(query_rows))[valid]
    slot_of_query = torch.empty(local_rows, dtype=torch.int64)
    slot_of_query[query_rows[valid]] = slots
    slot_of_key = slot_of_query
    if cp_size > 1:
        slot_of_key = torch.empty(local_rows * cp_size, dtype=torch.int64)
        slot_of_key[key_rows] = torch.arange(len(key_rows))
    return _Plan(
        buckets=tuple(buckets),
        query_slots=tuple(len(rows) for rows in queries),
        key_slots=tuple(len(rows) for rows in keys),
        query_rows=query_rows,
        slot_of_query=slot_of_query,
        key_rows=key_rows,
        slot_of_key=slot_of_key,
        positions=torch.cat(places)[slot_of_query],
    )


def _rotation(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cos and sin, [T/cp, 1, d/2] float32."""
    rate = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = (positions[:, None].float() * rate)[:, None]
    return angle.cos(), angle.sin()


class _Rotate(torch.autograd.Function):
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) on the halves of the last axis; backward: the other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _Rotate._turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, sin = ctx.saved_tensors
        return _Rotate._turned(grads[0], cos, -sin), None, None

    @staticmethod
    def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        (x1, x2), turned = x.chunk(2, -1), torch.empty_like(x)
        y1, y2 = turned.chunk(2, -1)
        torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
        torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
        return turned


class _Take(torch.autograd.Function):
    """x[index], where each row of x is taken once but for filling, whose gradient is 0: the backward is a take too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _, inverse = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _Put(torch.autograd.Function):
    """The inverse of ``_Take``: drops the filling; its gradient there is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.slots = len(index)
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inverse,) = ctx.saved_tensors
        out = grads[0].new_zeros((ctx.slots, *grads[0].shape[1:]))
        out[inverse] = grads[0]
        return out, None, None


class _GatherSequence(torch.autograd.Function):
    """All-gather along dim 0 over CP; backward: reduce-scatter (sum)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty((group.size() * x.size(0), *x.shape[1:]))
        dist.all_gather_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0].contiguous()
        out = grad.new_empty((grad.size(0) // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_single(out, grad, group=ctx.group)
        return out, None


def zigzag_pieces(length: int, cp_size: int, cp_rank: int) -> Tensor:
    """Positions, within a sequence, of the part of one CP rank.

    Each sequence is cut into 2 * cp_size pieces; rank r owns pieces r and 2 * cp_size - 1 - r.
    """
    if length % (2 * cp_size):
        raise ValueError(f"a sequence of {length} tokens does not divide into {2 * cp_size} pieces; pad it")
    piece = length // (2 * cp_size)
    both = (cp_rank, 2 * cp_size - 1 - cp_rank)
    return torch.cat([torch.arange(p * piece, (p + 1) * piece) for p in both])


class CoreAttention(MegatronModule):
    """Causal attention with rotation, on packed rows ``[T/cp, h, d]`` or equal sequences ``[s, b, h, d]``.

    Under CP keys and values are gathered and masked by position: right, with memory O(T) per rank; meant for a CPU.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        rope_theta: float,
        pg_collection: Any = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        if config.attention_dropout != 0.0:
            raise ValueError("this attention has no dropout")
        self._scale = 1.0 / math.sqrt(config.kv_channels)
        self._rope_theta = rope_theta
        self._cp_size = config.context_parallel_size
        self._cp: ProcessGroup | None = pg_collection.cp if self._cp_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: object,
    ) -> Tensor:
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        length, batch = query.shape[:2]
        whole = length * self._cp_size
        ends = torch.arange(0, (batch + 1) * whole, whole, dtype=torch.int32)
        rows = [x.transpose(0, 1).flatten(0, 1) for x in (query, key, value)]
        out = self._packed(rows[0], rows[1], rows[2], packed_params(ends))
        return out.view(batch, length, -1).transpose(0, 1)

    def _layout(self, packed: PackedSeqParams, query: Tensor) -> tuple[_Plan, Tensor, Tensor]:
        """Made by the first layer, kept on the object for the others."""
        layout = packed.__dict__.get("_layout")
        if layout is None:
            ends = packed.cu_seqlens_q_padded if packed.cu_seqlens_q_padded is not None else packed.cu_seqlens_q
            rank = 0 if self._cp is None else self._cp.rank()
            plan = _make_plan(ends.tolist(), query.size(0), cp_size=self._cp_size, cp_rank=rank)
            cos, sin = _rotation(plan.positions, query.size(-1), self._rope_theta)
            layout = packed.__dict__["_layout"] = (plan, cos.to(query.dtype), sin.to(query.dtype))
        return layout

    def _packed(self, query: Any, key: Any, value: Any, packed: PackedSeqParams) -> Tensor:
        """[T/cp, h * d]."""
        plan, cos, sin = self._layout(packed, query)
        query, key = _Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin)
        if self._cp is not None:
            key, value = _GatherSequence.apply(key, self._cp), _GatherSequence.apply(value, self._cp)
        query = _Take.apply(query, plan.query_rows, plan.slot_of_query).split(plan.query_slots)
        key = _Take.apply(key, plan.key_rows, plan.slot_of_key).split(plan.key_slots)
        value = _Take.apply(value, plan.key_rows, plan.slot_of_key).split(plan.key_slots)
        outs = [self._bucket(*parts) for parts in zip(plan.buckets, query, key, value, strict=True)]
        return _Put.apply(torch.cat(outs), plan.query_rows, plan.slot_of_query)

    def _bucket(self, bucket: _Bucket, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (bucket.num_sequences, -1)).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=bucket.mask,
            is_causal=bucket.mask is None,
            scale=self._scale,
            enable_gqa=q.size(1) != k.size(1),
        )
        return out.transpose(1, 2).flatten(2).flatten(0, 1)
