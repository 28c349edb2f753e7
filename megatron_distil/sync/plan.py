"""What is sent, in which order, in which pieces. Pure: every rank and every server plans the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_distil.errors import SyncError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
"""Names are those of torch and of the servers."""


class WeightSpec(NamedTuple):
    """One tensor under its Hugging Face name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """On the wire and on disk."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype}"


def weight_spec(name: str, shape: Iterable[int], dtype: object) -> WeightSpec:
    """``dtype`` may be torch's: its name is what counts."""
    return WeightSpec(name, tuple(shape), str(dtype).removeprefix("torch."))


@dataclass(frozen=True, slots=True)
class Bucket:
    """Consecutive tensors that travel as one."""

    weights: tuple[WeightSpec, ...]
    is_last: bool

    @property
    def num_bytes(self) -> int:
        """Of all its tensors."""
        return sum(weight.num_bytes for weight in self.weights)


def plan_buckets(manifest: Iterable[WeightSpec], bucket_bytes: int) -> tuple[Bucket, ...]:
    """Cut the manifest, in its order, into buckets of at most ``bucket_bytes``; a larger tensor is one of its own.

    Raises:
        SyncError: nothing to send, a name twice (a server would take both and say nothing), or an unknown dtype.
    """
    parts: list[list[WeightSpec]] = []
    seen: set[str] = set()
    size = 0
    for weight in manifest:
        if weight.name in seen:
            raise SyncError(f"the export holds {weight.name} twice")
        if weight.dtype not in DTYPE_BYTES:
            raise SyncError(f"{weight}: no server takes this dtype; known are {', '.join(DTYPE_BYTES)}")
        seen.add(weight.name)
        if not parts or size + weight.num_bytes > bucket_bytes:
            parts.append([])
            size = 0
        parts[-1].append(weight)
        size += weight.num_bytes
    if not parts:
        raise SyncError("the export holds no weights")
    return tuple(Bucket(tuple(part), is_last=part is parts[-1]) for part in parts)


def check_bucket(bucket: Bucket, found: Sequence[WeightSpec]) -> None:
    """What is about to be sent is what was planned: a server ignores an unknown name and dies of a wrong shape.

    Raises:
        SyncError: names the first weight that differs.
    """
    for index, expected in enumerate(bucket.weights):
        if index >= len(found):
            raise SyncError(f"the export ended before {expected}")
        if found[index] != expected:
            raise SyncError(f"the export gave {found[index]} where the manifest has {expected}")
    if len(found) > len(bucket.weights):
        raise SyncError(f"the export gave {found[len(bucket.weights)]}, which is not in the manifest")
