"""What every form of the kernels of the head must fulfil: in PyTorch, interpreted on a CPU, compiled on a GPU.

Expected values are those of the specification on whole logits in float64, gradients by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_distil import algo
from megatron_distil.algo.vocabulary import Columns
from megatron_distil.trainer.head.kernels import ExpStats, block_stats, exp_stats, patch

VOCAB = 300
SHARDS = {1: ((0, 300),), 2: ((0, 192), (192, 108)), 4: ((0, 100), (100, 100), (200, 100), (300, 0))}
"""First id and size of each rank; the last one of four has none."""


def ids_of(num_rows: int, num_slots: int, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    """Supports with unused slots next to a genuine id 0; sampled ids inside and outside of them."""
    draw = torch.Generator().manual_seed(5)
    support = torch.stack([torch.randperm(vocab, generator=draw)[:num_slots] for _ in range(num_rows)])
    sampled = torch.randint(0, vocab, (num_rows,), generator=draw)
    if num_slots:
        sampled[::2] = support[::2, 0]
        support[1, num_slots // 2 :] = -1
        support[2] = -1
        if num_slots > 1 and not (support[3] == 0).any():
            support[3, 0], support[3, 1] = -1, 0
    return support, sampled


def buffer_of(logits: Tensor, first: int, size: int, dtype: torch.dtype, device: str) -> Tensor:
    """A shard in a buffer of one or more spare columns, which hold NaN."""
    buffer = torch.full((len(logits), (size // 64 + 1) * 64), torch.nan, dtype=dtype, device=device)
    buffer[:, :size] = logits[:, first : first + size]
    return buffer


def local(ids: Tensor, first: int, size: int) -> Tensor:
    """Ids as columns of a shard."""
    return torch.where((ids >= first) & (ids < first + size), ids - first, -1)


def check_gradients(
    device: str, *, dtype: torch.dtype, exps_dtype: torch.dtype, num_shards: int, num_slots: int, tolerance: float
) -> None:
    """``exp_stats``, sums over shards and ``patch`` give the columns and their gradient with respect to every logit."""
    num_rows, draw = 6, torch.Generator().manual_seed(1)
    logits = (torch.randn(num_rows, VOCAB, generator=draw) * 3).to(dtype).double()
    support, sampled = ids_of(num_rows, num_slots)
    upstream = Columns(*(torch.randn(n, generator=draw).double() for n in ((num_rows, num_slots), num_rows, num_rows)))
    upstream = upstream._replace(support=torch.where(support >= 0, upstream.support, 0.0))
    leaf = logits.clone().requires_grad_()
    want = algo.columns(leaf, support, sampled)
    sum((a * b).sum() for a, b in zip(want, upstream, strict=True)).backward()

    parts, exps = [], []
    for first, size in SHARDS[num_shards]:
        buffer = buffer_of(logits, first, size, dtype, device)
        out = buffer if exps_dtype == dtype else torch.full_like(buffer, torch.nan, dtype=exps_dtype)
        here = (local(x, first, size).to(device) for x in (support, sampled))
        parts.append(ExpStats(*(x.cpu().double() for x in exp_stats(buffer, *here, out, size))))
        assert (out[:, size:] == 0).all()
        exps.append(out)
    whole, tail = _combined(parts, support)
    at_support = torch.where(support >= 0, sum(p.support for p in parts) - whole[:, None], 0.0)
    got = Columns(support=at_support, tail=tail - whole, sampled=sum(p.sampled for p in parts) - whole)
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=limit, atol=limit)

    found = []
    total = -(upstream.support.sum(1) + upstream.tail + upstream.sampled)
    for (first, size), part, e in zip(SHARDS[num_shards], parts, exps, strict=True):
        beta = total * (part.peak - whole).exp() + upstream.tail * (part.peak - tail).exp()
        entries = (upstream.support + total[:, None] * got.support.exp()) / beta[:, None]
        is_sampled = (support == sampled[:, None]) & (support >= 0)
        entries = entries + torch.where(is_sampled, upstream.sampled[:, None], 0.0) / beta[:, None]
        entries = torch.where(local(support, first, size) >= 0, entries, torch.nan)  # anything, where it is not used
        alone = (got.sampled + whole - part.peak).exp() + upstream.sampled / beta
        given = (entries, torch.where(is_sampled.any(1), torch.nan, alone))
        here = (local(x, first, size).to(device) for x in (support, sampled))
        patch(e, *here, *(x.to(device, dtype) for x in given), size)
        found.append(beta[:, None] * e[:, :size].cpu().double())
    error = (torch.cat(found, 1) - leaf.grad).norm() / leaf.grad.norm()
    assert error <= tolerance, f"relative error {error:.1e}"


def _combined(parts: list[ExpStats], support: Tensor) -> tuple[Tensor, Tensor]:
    """Logsumexp over all ids, and over those outside the support."""
    tail = torch.stack([p.peak + p.total.log() for p in parts]).logsumexp(0)
    inside = torch.where(support >= 0, sum(p.support for p in parts), -torch.inf)
    return torch.cat([inside, tail[:, None]], 1).logsumexp(1), tail


def check_small_tail(device: str) -> None:
    """A tail of 1e-17 keeps its digits, and so do entries of it."""
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2))
    logits[:, 7] += 45.0
    support = torch.full((4, 1), 7)
    buffer = buffer_of(logits, 0, VOCAB, torch.float32, device)
    stats = exp_stats(buffer, support.to(device), support[:, 0].to(device), buffer, VOCAB)
    outside = logits.double().index_fill(1, torch.tensor([7]), -torch.inf)
    want = outside.logsumexp(1)
    torch.testing.assert_close(stats.peak.cpu().double(), outside.amax(1), rtol=0, atol=0)
    torch.testing.assert_close((stats.peak + stats.total.log()).cpu().double(), want, rtol=0, atol=2e-6)
    torch.testing.assert_close(stats.sampled.cpu(), logits[:, 7], rtol=0, atol=0)


def check_odd_rows(device: str) -> None:
    """Rows of which nothing is outside, or nothing finite; a NaN stays in its row."""
    size = 70
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(3))
    logits[1, 5:] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 64] = torch.nan
    support = torch.full((5, size), -1)
    support[0], support[4, 3] = torch.arange(size), 9
    buffer = buffer_of(logits, 0, size, torch.float32, device)
    stats = exp_stats(buffer, support.to(device), torch.zeros(5, dtype=torch.int64, device=device), buffer, size)
    peak, total, exps = stats.peak.cpu(), stats.total.cpu(), buffer.cpu()
    assert peak[[0, 2]].tolist() == [0.0, 0.0]
    assert total[[0, 2]].tolist() == [0.0, 0.0]
    assert (exps[[0, 2]] == 0).all()
    assert (exps[1, 5:] == 0).all()
    assert total[3].isnan()
    others = exps[[0, 1, 2, 4]]
    assert others.isfinite().all()
    want = (logits[4] - peak[4]).exp().index_fill(0, torch.tensor([9]), 0.0)
    torch.testing.assert_close(exps[4, :size], want, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(stats.support.cpu()[0], logits[0], rtol=0, atol=0)


def check_no_rows(device: str) -> None:
    """Nothing is launched for nothing."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    buffer = torch.zeros(0, 64, device=device)
    stats = exp_stats(buffer, none.view(0, 4), none, buffer, 60)
    assert [len(x) for x in stats] == [0, 0, 0, 0]
    empty = torch.zeros(0, device=device)
    patch(buffer, none.view(0, 4), none, empty.view(0, 4), empty, 60)
    assert block_stats(buffer, 60, 16).maxima.shape == (0, 4)


def check_block_stats(device: str, *, size: int, block: int) -> None:
    """Maxima exactly; logsumexp and entropy of rows with banned ids, with a peak that rises late, and of none at all."""
    draw = torch.Generator().manual_seed(4)
    wide = torch.randn(6, size + 3, generator=draw) * 4
    wide[0, : size // 2] = -torch.inf
    wide[1, size - 1] += 60.0
    wide[2] = torch.linspace(-300.0, 50.0, size + 3)
    wide[3] = -torch.inf
    wide[:, size:] = torch.nan
    logits = wide[:, :size]
    got = block_stats(wide.to(device), size, block)
    padded = torch.nn.functional.pad(logits, (0, -size % block), value=-torch.inf)
    assert torch.equal(got.maxima.cpu(), padded.unflatten(1, (-1, block)).amax(-1))
    assert torch.equal(got.peak.cpu(), logits.amax(1))
    assert got.total[3] == 0.0
    assert got.moment[3] == 0.0
    real = [0, 1, 2, 4, 5]
    logprobs = logits[real].double().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1)
    peak, total, moment = (x.cpu()[real].double() for x in got[1:])
    lse = logits[real].double().logsumexp(1)
    torch.testing.assert_close(peak + total.log(), lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(total.log() - moment / total, entropy, rtol=2e-6, atol=2e-6)
