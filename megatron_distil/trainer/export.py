"""Local shards -> whole tensors under Hugging Face's names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist  # noqa: TID251 - shards are gathered here
from safetensors.torch import save_file
from torch import Tensor

from megatron_distil.errors import CheckpointError
from megatron_distil.trainer.model import Student
from megatron_distil.trainer.names import Entry, ModelDims, entries, join, shard_shape

_BUCKET_BYTES = 512 * 1024 * 1024
_FILE_BYTES = 4 * 1024 * 1024 * 1024


class TensorSpec(NamedTuple):
    """One tensor of the stream, known before it comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def manifest(dims: ModelDims, dtype: torch.dtype) -> list[TensorSpec]:
    """What ``hf_weights`` yields, in its order."""
    return [
        TensorSpec(name, shape, dtype)
        for entry in entries(dims)
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    ]


@torch.no_grad()
def hf_weights(student: Student, *, bucket_bytes: int = _BUCKET_BYTES) -> Iterator[tuple[str, Tensor]]:
    """Collective over each replica: whole tensors in one fixed order, on every rank.

    A bucket of parameters crosses tp in one all-gather and pp in one broadcast, so that a small model costs a few
    collectives and a large one no more memory than a bucket. Each tensor is the caller's to keep.
    """
    mine = {entry.name: param for entry, param in student.parameters()}
    groups, dims, dtype = student.groups, student.dims, student.transformer.params_dtype
    for stage, bucket in _buckets(student, bucket_bytes):
        shapes = [shard_shape(entry, dims, groups.tp_size) for entry in bucket]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        whole = torch.empty((groups.tp_size, sum(sizes)), dtype=dtype, device=groups.device)
        if stage == groups.pp_rank:
            flat = torch.cat([mine[entry.name].flatten() for entry in bucket])
            dist.all_gather_single(whole.view(-1), flat, group=groups.tp)
        if groups.pp_size > 1:
            dist.broadcast(whole, group=groups.pp, group_src=stage)
        for entry, shape, columns in zip(bucket, shapes, whole.split(sizes, 1), strict=True):
            tensors = join(entry, [row.view(shape) for row in columns], dims)
            yield from zip(entry.hf_names, tensors, strict=True)


def _buckets(student: Student, bucket_bytes: int) -> Iterator[tuple[int, list[Entry]]]:
    """Consecutive parameters of one pipeline stage, together at most ``bucket_bytes`` or one parameter."""
    dims, groups = student.dims, student.groups
    itemsize = student.transformer.params_dtype.itemsize
    for stage, of_stage in groupby(entries(dims), key=lambda entry: _stage_of(entry, dims, groups.pp_size)):
        bucket: list[Entry] = []
        filled = 0
        for entry in of_stage:
            size = sum(torch.Size(shape).numel() for shape in entry.hf_shapes) * itemsize
            if bucket and filled + size > bucket_bytes:
                yield stage, bucket
                bucket, filled = [], 0
            bucket.append(entry)
            filled += size
        yield stage, bucket


def _stage_of(entry: Entry, dims: ModelDims, pp_size: int) -> int:
    parts = entry.name.split(".")
    if parts[0] == "embedding":
        return 0
    return int(parts[2]) * pp_size // dims.num_layers if parts[:2] == ["decoder", "layers"] else pp_size - 1


def save_hf(student: Student, folder: str | Path, source_folder: str | Path) -> None:
    """Writes the student as a folder that transformers loads. Collective over the world; the first head writes.

    Args:
        student: the weights.
        folder: made if absent; files of an earlier model in it are replaced.
        source_folder: the model that training started from: its configuration and tokenizer are copied.

    Raises:
        CheckpointError: on every rank, when the folder cannot be written.
    """
    folder, source = Path(folder), Path(source_folder)
    writer = _Writer(folder, manifest(student.dims, student.transformer.params_dtype))
    is_writer = student.groups.rank == 0
    failure: list[str | None] = [None]
    for name, tensor in hf_weights(student):
        if is_writer and failure[0] is None:
            failure[0] = _failure_of(writer, name, tensor)
    if is_writer and failure[0] is None:
        failure[0] = _copy_source(source, folder, student.transformer.params_dtype)
    dist.broadcast_object_list(failure, group=student.groups.control, group_src=0)
    if failure[0] is not None:
        raise CheckpointError(f"{folder}: the model cannot be written: {failure[0]}")


class _Writer:
    """Collects tensors and writes each safetensors file when its last one has come."""

    def __init__(self, folder: Path, specs: Sequence[TensorSpec]) -> None:
        self._folder = folder
        self._file_of = _files(specs)
        self._waiting: dict[str, set[str]] = {}
        for name, file in self._file_of.items():
            self._waiting.setdefault(file, set()).add(name)
        self._held: dict[str, Tensor] = {}
        self._total_bytes = sum(spec.num_bytes for spec in specs)

    def add(self, name: str, tensor: Tensor) -> None:
        file = self._file_of[name]
        self._held[name] = tensor.cpu().contiguous()
        self._waiting[file].discard(name)
        if self._waiting[file]:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._folder / f"{file}.part"
        save_file(self._held, part, metadata={"format": "pt"})
        part.replace(self._folder / file)
        self._held = {}
        if not any(self._waiting.values()):
            self._finish()

    def _finish(self) -> None:
        """Files of an earlier model go; the index comes last, so that it never names a file that is not there."""
        for old in self._folder.glob("*.safetensors"):
            if old.name not in self._waiting:
                old.unlink()
        index = self._folder / "model.safetensors.index.json"
        if len(self._waiting) == 1:
            index.unlink(missing_ok=True)
            return
        table = {"metadata": {"total_size": self._total_bytes}, "weight_map": self._file_of}
        index.write_text(json.dumps(table, indent=2), encoding="utf-8")


def _files(specs: Sequence[TensorSpec], file_bytes: int = _FILE_BYTES) -> dict[str, str]:
    """File of each tensor: consecutive ones share a file of at most ``file_bytes``."""
    number_of, number, filled = {}, 1, 0
    for spec in specs:
        if filled and filled + spec.num_bytes > file_bytes:
            number, filled = number + 1, 0
        number_of[spec.name] = number
        filled += spec.num_bytes
    if number == 1:
        return dict.fromkeys(number_of, "model.safetensors")
    return {name: f"model-{at:05d}-of-{number:05d}.safetensors" for name, at in number_of.items()}


def _failure_of(writer: _Writer, name: str, tensor: Tensor) -> str | None:
    try:
        writer.add(name, tensor)
    except Exception as error:  # noqa: BLE001 - safetensors raises several kinds; the stream must go on for the others
        return f"{type(error).__name__}: {error}"
    return None


_COPIED = (".json", ".txt", ".model", ".jinja")


def _copy_source(source: Path, folder: Path, dtype: torch.dtype) -> str | None:
    try:
        for path in source.iterdir():
            if (
                path.suffix in _COPIED
                and not path.name.endswith(".index.json")
                and source.resolve() != folder.resolve()
            ):
                shutil.copyfile(path, folder / path.name)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)  # its old name
        config["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None
