"""The student: an unmodified GPTModel of Megatron, with our head's entrance and Hugging Face's weights."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_distil.config.schema import Config
from megatron_distil.errors import DataError
from megatron_distil.trainer.attention import layer_specs
from megatron_distil.trainer.groups import Groups
from megatron_distil.trainer.names import Entry, ModelDims, cut, entries, global_name, shard_shape, tied_copy

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Student:
    """The model of this rank."""

    gpt: GPTModel
    ddp: DistributedDataParallel
    """Wraps ``gpt``; what Megatron's schedules and optimizer take."""
    transformer: TransformerConfig
    dims: ModelDims
    groups: Groups
    has_tied_copy: bool
    """Whether the output layer is a second copy of a tied embedding; finalize sums their gradients."""

    def hidden(self, token_ids: Tensor, positions: Tensor, packed: PackedSeqParams) -> Tensor:
        """The forward of this pipeline stage.

        Args:
            token_ids: [T/cp] int64.
            positions: [T/cp] int64.
            packed: made once per microbatch by ``attention.packed_params``.

        Returns:
            On the last stage the hidden states before the output layer, [T/cp, H] or [T/cp/tp, H] with sequence
            parallelism; on the others what the next stage needs.
        """
        options: dict[str, Any] = (
            {"fp32_output": False} if self.transformer.bf16 else {}
        )  # the head knows where it needs it
        if self.groups.is_last_stage and has_output_processor():
            options["output_processor"] = _hand_out
        out = self.ddp(token_ids[None], positions[None], None, packed_seq_params=packed, **options)
        return out[0] if self.groups.is_last_stage else out

    @property
    def head_weight(self) -> torch.nn.Parameter:
        """[padded V/tp, H] of the output layer, on the last stage; the embedding's where they are one."""
        tied = self.gpt.share_embeddings_and_output_weights
        weight: Any = self.gpt.shared_embedding_or_output_weight() if tied else self.gpt.output_layer.weight
        return weight

    def parameters(self) -> list[tuple[Entry, torch.nn.Parameter]]:
        """The parameters of this rank with their entries, in Megatron's order."""
        known = {entry.name: entry for entry in entries(self.dims)}
        if self.has_tied_copy:
            known["output_layer.weight"] = tied_copy(self.dims)
        layers: Any = self.gpt.decoder.layers
        first_layer = layers[0].layer_number - 1
        return [(known[global_name(name, first_layer)], param) for name, param in self.gpt.named_parameters()]


@functools.cache
def has_output_processor() -> bool:
    """Whether this Megatron lets us take the place of its output layer (core 0.18 and newer; PR 4686)."""
    return "output_processor" in inspect.signature(GPTModel.forward).parameters


def _hand_out(*, hidden_states: Tensor, **_: Any) -> Tensor:
    """[T, 1, H] -> [1, T, H], as Megatron lays out logits."""
    return hidden_states.transpose(0, 1)


class HiddenHead(ColumnParallelLinear):
    """The output layer with a switch: it hands its input through, so that GPTModel returns hidden states.

    For a Megatron without ``output_processor``. An output layer becomes one by assignment to its ``__class__``: parameters,
    tying and checkpoints stay as they are.
    """

    emit_hidden: bool = True

    def forward(self, input_: Tensor, *args: Any, **options: Any) -> Any:
        if self.emit_hidden:
            return input_, None
        return super().forward(input_, *args, **options)


def build_student(folder: str | Path, config: Config, groups: Groups, *, load_weights: bool = True) -> Student:
    """The student of this rank. Collective over the world.

    Args:
        folder: a model in Hugging Face's format.
        config: of the run.
        groups: of this rank.
        load_weights: False where a checkpoint follows: the parameters are 0 until then.

    Raises:
        DataError: ``config.json`` or the weights are missing, damaged or of another shape; everything in one error.
        ConfigError: the parallel sizes do not divide the model.
    """
    dims = ModelDims.from_hf(folder)
    dims.check_layout(config.parallel)
    transformer = transformer_config(dims, config)
    tensor_parallel.model_parallel_cuda_manual_seed(config.train.seed)
    gpt = _build_gpt(dims, transformer, groups)
    ddp = _wrapped(gpt, transformer, is_distributed_optimizer=config.train.is_distributed_optimizer)
    has_tied_copy = dims.is_tied and groups.is_last_stage and not groups.is_first_stage
    student = Student(gpt, ddp, transformer, dims, groups, has_tied_copy)
    if load_weights:
        load_hf(student, folder)
    return student


def transformer_config(dims: ModelDims, config: Config) -> TransformerConfig:
    """Megatron's configuration. Nothing in it depends on the device but where weights are made.

    Gradients are plain sums: with ``calculate_per_token_loss`` and no count of tokens Megatron divides nothing
    (finalize_model_grads.py, ``num_tokens is not None``).
    """
    parallel, train = config.parallel, config.train
    dtype = _DTYPES[train.dtype]
    recompute: dict[str, Any] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[train.recompute]
    return TransformerConfig(
        num_layers=dims.num_layers,
        hidden_size=dims.hidden_size,
        ffn_hidden_size=dims.ffn_size,
        num_attention_heads=dims.num_heads,
        num_query_groups=dims.num_kv_heads,
        kv_channels=dims.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=dims.norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        # jit, Triton and Apex fusions: none on a CPU, and a compilation of 13 s
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        cuda_graph_scope=[],  # the default warns that it is deprecated
        batch_p2p_comm=False,
        deallocate_pipeline_outputs=False,  # over gloo the buffer of a send is freed before it was sent
        variable_seq_lengths=parallel.pp > 1,
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths asks for it, also of a dense model
        calculate_per_token_loss=True,
        finalize_model_grads_func=_finalize_as_sums,
        **recompute,
    )


def _finalize_as_sums(model: Any, num_tokens: Tensor | None = None, **options: Any) -> None:
    """The packer has divided the weights by the global denominator: the count of tokens is withheld."""
    finalize_model_grads(model, None, **options)


def _build_gpt(dims: ModelDims, transformer: TransformerConfig, groups: Groups) -> GPTModel:
    specs, position_embedding = _layers(dims, transformer)
    gpt = GPTModel(
        config=transformer,
        transformer_layer_spec=specs,  # pyright: ignore[reportArgumentType] - it takes both kinds of specification
        vocab_size=dims.padded_vocab_size(groups.tp_size),
        max_sequence_length=dims.max_positions,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=dims.is_tied,
        position_embedding_type=position_embedding,
        rotary_base=dims.rope_theta,  # pyright: ignore[reportArgumentType] - annotated int, used as a float
    )
    if groups.is_last_stage and not has_output_processor():
        gpt.output_layer.__class__ = HiddenHead
    with torch.no_grad():
        for param in gpt.parameters():
            param.zero_()
    _mark_shards(gpt)
    return gpt.to(groups.device)


def _mark_shards(gpt: GPTModel) -> None:
    """Says which parameters are cut over tp: Megatron does so while it draws weights, and here it draws none.

    Without the mark the gradient norm takes a shard for a copy and counts that of the first tensor rank only.
    """
    cut_along = ((ColumnParallelLinear, 0), (VocabParallelEmbedding, 0), (RowParallelLinear, 1))
    for module in gpt.modules():
        for kind, dim in cut_along:
            weight = getattr(module, "weight", None)
            if isinstance(module, kind) and weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def _layers(dims: ModelDims, transformer: TransformerConfig) -> tuple[TransformerBlockSubmodules, Any]:
    """Our layers where CUDA is absent; TransformerEngine's, with the same parameter names, where it is (never run here)."""
    if not torch.cuda.is_available():
        return layer_specs(transformer, dims.rope_theta), "none"
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # optional hardware

    return get_gpt_decoder_block_spec(transformer, use_transformer_engine=True), "rope"


def _wrapped(
    gpt: GPTModel, transformer: TransformerConfig, *, is_distributed_optimizer: bool
) -> DistributedDataParallel:
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=is_distributed_optimizer, overlap_grad_reduce=False
    )
    module = Float16Module(transformer, gpt) if transformer.bf16 else gpt
    return DistributedDataParallel(transformer, ddp, module)


@torch.no_grad()
def load_hf(student: Student, folder: str | Path) -> None:
    """Puts the weights of a folder into the student; reads what this rank needs.

    Raises:
        DataError: a file or tensor is missing, superfluous, damaged or of another shape; everything in one error.
    """
    files = _checked_files(Path(folder), student.dims)
    size, rank = student.groups.tp_size, student.groups.tp_rank
    with ExitStack() as stack:
        opened = functools.cache(lambda path: stack.enter_context(safe_open(path, framework="pt")))
        for entry, param in student.parameters():
            whole = [opened(files[name]).get_tensor(name) for name in entry.hf_names]
            shard = cut(entry, whole, student.dims, tp_size=size, tp_rank=rank)
            if shard.shape != param.shape or param.shape != shard_shape(entry, student.dims, size):
                raise RuntimeError(
                    f"{entry.name}: {tuple(param.shape)} in Megatron, {tuple(shard.shape)} from {folder}"
                )
            param.copy_(shard)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those of its index, or ``model.safetensors``.

    Raises:
        DataError: the index is damaged, or there is no file.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise DataError(f"{folder}: holds neither model.safetensors nor model.safetensors.index.json")
        return [single]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index}: is not an index of safetensors files: {error!r}") from error
    return sorted(folder / name for name in names)


def _checked_files(folder: Path, dims: ModelDims) -> dict[str, Path]:
    """Which file holds which tensor, when all are there with the right shape and nothing else is."""
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    wrong: list[str] = []
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as tensors:
                found |= {name: (path, tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            wrong.append(f"{path.name}: cannot be read: {error}")
    wanted = {n: shape for entry in entries(dims) for n, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)}
    if dims.is_tied:
        found.pop("lm_head.weight", None)  # some writers repeat the embedding
    wrong += [f"{name}: is missing, expected {list(shape)}" for name, shape in wanted.items() if name not in found]
    wrong += [
        f"{name}: is not of this model, found {list(shape)}" for name, (_, shape) in found.items() if name not in wanted
    ]
    wrong += [
        f"{name}: expected {list(shape)}, found {list(found[name][1])}"
        for name, shape in wanted.items()
        if name in found and found[name][1] != shape
    ]
    if wrong:
        raise DataError(_all_wrong(folder, wrong))
    return {name: path for name, (path, _) in found.items()}


def _all_wrong(folder: Path, wrong: Sequence[str], shown: int = 20) -> str:
    more = [f"  and {len(wrong) - shown} more"] if len(wrong) > shown else []
    head = f"{folder}: the weights do not fit config.json ({len(wrong)} problems):"
    return "\n".join([head, *(f"  - {line}" for line in wrong[:shown]), *more])
