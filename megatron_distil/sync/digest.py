"""Digests of weights as a server on a CPU reports them, made from our own tensors.

A server reports the first 8 bytes of the SHA-256 of each of its tensors, in its precision, after it has fused q|k|v and
gate|up and padded the vocabulary. On a GPU its hash is another one: there servers are compared with each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

VOCABULARY_MULTIPLE = 64
"""Rows of the embedding and of the head are padded with zeros to a multiple of this."""
_FUSED: Mapping[str, tuple[str, tuple[str, ...]]] = {
    part: (fused, parts)
    for fused, parts in {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }.items()
    for part in parts
}
_PADDED = frozenset({"model.embed_tokens.weight", "lm_head.weight"})


class Digests:
    """Takes the tensors of one version, in any order, and holds no more of them than an unfinished fusion needs."""

    def __init__(self, dtype: torch.dtype) -> None:
        """``dtype``: the server's."""
        self._dtype = dtype
        self._pending: dict[str, dict[str, bytes]] = {}
        self._digests: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """One tensor under its Hugging Face name."""
        if ".experts." in name:
            return  # packed into tensors of another layout
        fused, part, parts = _fusion(name)
        pieces = self._pending.setdefault(fused, {})
        pieces[part] = self._as_bytes(name, tensor)
        if len(pieces) == len(parts):
            whole = hashlib.sha256(b"".join(pieces[key] for key in parts))
            self._digests[fused] = whole.hexdigest()[:16]
            del self._pending[fused]

    def result(self) -> dict[str, str]:
        """Fused name -> 16 hexadecimal digits."""
        return dict(self._digests)

    def _as_bytes(self, name: str, tensor: Tensor) -> bytes:
        value = tensor.detach().to("cpu", self._dtype)
        if name in _PADDED and (missing := -value.shape[0] % VOCABULARY_MULTIPLE):
            value = torch.cat([value, value.new_zeros(missing, *value.shape[1:])])
        return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def first_difference(expected: Mapping[str, str], held: Mapping[str, str]) -> str | None:
    """The first weight of ``expected`` that is missing or another in ``held``, with both digests."""
    for name, digest in expected.items():
        if held.get(name) != digest:
            return f"{name} (sent {digest}, holds {held.get(name, 'no such weight')})"
    return None


def _fusion(name: str) -> tuple[str, str, Sequence[str]]:
    """(the server's name, which part of it this is, all parts in order)."""
    for field in name.split("."):
        if field in _FUSED:
            fused, parts = _FUSED[field]
            return name.replace(f".{field}.", f".{fused}."), field, parts
    return name, "", ("",)
