"""Weights as files: every version in a folder of its own, complete or absent, that a server can load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_distil.errors import SyncError
from megatron_distil.sync.plan import Bucket, WeightSpec
from megatron_distil.sync.sink import ServedEngine, quiesce, together

WEIGHTS_FILE = "model.safetensors"
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3"}
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


class Snapshots:
    """FOLDER/<version>/: the weights and everything else of the model's folder. The last two versions are kept."""

    def __init__(self, folder: Path, model_folder: Path) -> None:
        """``model_folder``: where configuration and tokenizer are copied from."""
        self.folder = folder.absolute()
        self._model_folder = model_folder

    def path(self, version: int) -> Path:
        """Where a version lies, or would lie."""
        return self.folder / str(version)

    def writer(self, version: int, manifest: Sequence[WeightSpec]) -> SnapshotWriter:
        """Starts a version. Nobody sees it before ``commit``."""
        temporary = self.folder / f".{version}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for source in sorted(self._model_folder.iterdir()):
            if source.is_file() and not source.name.endswith(_WEIGHT_SUFFIXES):
                shutil.copy2(source, temporary / source.name)
        return SnapshotWriter(temporary, self.path(version), manifest)

    def read(self, version: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a version, one at a time."""
        with safe_open(self.path(version) / WEIGHTS_FILE, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)

    def prune(self, version: int) -> None:
        """Keep ``version`` and the newest before it."""
        versions = sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())
        kept = {version, *[v for v in versions if v < version][-1:]}
        for other in versions:
            if other not in kept:
                shutil.rmtree(self.path(other))


class SnapshotWriter:
    """Appends tensors in the order of the manifest; their offsets are known before the first byte."""

    def __init__(self, temporary: Path, final: Path, manifest: Sequence[WeightSpec]) -> None:
        self._temporary = temporary
        self._final = final
        self._left = list(reversed(manifest))
        self._file: BinaryIO = (temporary / WEIGHTS_FILE).open("wb")
        self._file.write(_header(manifest))

    def add(self, bucket: Bucket, tensors: Sequence[Tensor]) -> None:
        """The next tensors."""
        for weight, tensor in zip(bucket.weights, tensors, strict=True):
            if (expected := self._left.pop()) != weight:
                raise SyncError(f"the snapshot expected {expected}, got {weight}")
            flat = tensor.detach().contiguous().flatten().view(torch.uint8)
            self._file.write(flat.cpu().numpy().data)

    def commit(self) -> None:
        """Make the version visible, as a whole."""
        if self._left:
            raise SyncError(f"the snapshot lacks {len(self._left)} weights, the next is {self._left[-1]}")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._final.exists():  # published before, and published again
            shutil.rmtree(self._final)
        self._temporary.rename(self._final)
        _sync_folder(self._final.parent)

    def discard(self) -> None:
        """Forget a version that was not committed."""
        self._file.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


class DiskSink:
    """The servers load the snapshot of the version, from a file system that they see."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots
        self._engines: Sequence[ServedEngine] = ()

    async def open(self, engines: Sequence[ServedEngine]) -> None:
        """The servers go on while the files are written."""
        self._engines = engines

    async def send(self, bucket: Bucket, tensors: Sequence[Tensor], version: int) -> None:
        """The snapshot holds them already."""

    async def close(self, version: int) -> None:
        """Pause, flush, load."""
        await load(self._engines, self._snapshots, version)


async def load(engines: Sequence[ServedEngine], snapshots: Snapshots, version: int) -> None:
    """Servers take a version from its snapshot, and stay paused."""
    await quiesce(engines)
    folder = str(snapshots.path(version))
    await together(engine.update_from_disk(folder, version) for engine in engines)


def _header(manifest: Sequence[WeightSpec]) -> bytes:
    """8 bytes of length, then JSON padded with spaces to a multiple of 8 bytes, as safetensors wants it."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for weight in manifest:
        end = at + weight.num_bytes
        dtype = _SAFETENSORS_DTYPES[weight.dtype]
        table[weight.name] = {"dtype": dtype, "shape": list(weight.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
