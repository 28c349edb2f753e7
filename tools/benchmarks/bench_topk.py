"""What the teacher's top-k costs: tools/run python tools/benchmarks/bench_topk.py [--out FILE].

Time and memory of ``trainer.head.topk.top_k``, which keeps no logits, against torch.topk on kept full float32 logits. The product
with the output layer is in every figure. Prints a table and, as the last line, one JSON object.

    select    full logits, torch.topk: ids and logits, no log-probabilities
    naive     the same, and logsumexp: ids and log-probabilities
    entropy   the same, and the entropy of the whole row
    tiles     ours: ids, log-probabilities, that of the sampled id, entropy; ids in a fixed order among equals

Time is processor time of a fresh process with one thread, the best of the rounds; each round runs every variant once, so that a
change of the load hits all of them. Peak is the largest resident size minus that before the call, after a small warm-up of the same
code path.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench_head import THREADS, in_turn, ratio, resident
from provenance import described

HERE = Path(__file__).resolve()
VARIANTS = ("select", "naive", "entropy", "tiles")


class Shape(NamedTuple):
    """A problem: vocabulary, hidden size, rows, support."""

    vocab: int
    hidden: int
    rows: int
    k: int


SHAPES = [Shape(151936, 256, 1024, 20), Shape(151936, 256, 1024, 100)]
OTHERS = [Shape(32000, 512, 2048, 20), Shape(32000, 512, 2048, 100), Shape(151936, 1024, 512, 20)]
CHECKED_ROWS = 128
"""Rows whose whole logits are sorted."""


class Problem(NamedTuple):
    """Tensors of a shape."""

    hidden: Any
    weight: Any
    sampled: Any


def problem(shape: Shape) -> Problem:
    """The same for every variant."""
    import torch

    draw = torch.Generator().manual_seed(0)
    return Problem(
        hidden=torch.randn(shape.rows, shape.hidden, generator=draw),
        weight=torch.randn(shape.vocab, shape.hidden, generator=draw).mul_(
            4 / shape.hidden**0.5
        ),  # no copy in the peak
        sampled=torch.randint(0, shape.vocab, (shape.rows,), generator=draw),
    )


def run_naive(p: Problem, k: int, *, variant: str) -> tuple[Any, ...]:
    """Full logits."""
    logits = p.hidden @ p.weight.t()
    top = logits.topk(k, dim=-1)
    if variant == "select":
        return top.indices, top.values
    if variant == "naive":
        return top.indices, top.values - logits.logsumexp(-1)[:, None]
    logprobs = logits.log_softmax(-1)
    return top.indices, logprobs.gather(-1, top.indices), -(logprobs.exp() * logprobs).sum(-1)


def run_tiles(p: Problem, k: int) -> tuple[Any, ...]:
    """Ours, on one rank."""
    from megatron_distil.trainer.head.columns import VocabShard
    from megatron_distil.trainer.head.topk import Voice, top_k

    vocab = len(p.weight)
    shard = VocabShard.of(None, vocab_size=vocab, rows=vocab)
    return tuple(top_k([Voice(p.hidden, p.weight, 1.0)], k, p.sampled, shard, temperature=1.0))


def run(variant: str, p: Problem, k: int) -> tuple[Any, ...]:
    """One call of a variant."""
    return run_tiles(p, k) if variant == "tiles" else run_naive(p, k, variant=variant)


def measured_here(variant: str, shape: Shape) -> dict[str, float]:
    """Seconds and MiB of one variant, in this process."""
    import torch

    torch.set_num_threads(THREADS)
    run(variant, problem(shape._replace(vocab=8192, rows=64)), shape.k)
    p = problem(shape)
    base, start = resident("VmRSS:"), time.process_time()
    run(variant, p, shape.k)
    return {"seconds": time.process_time() - start, "peak_mib": resident("VmHWM:") - base}


def is_exact(shape: Shape) -> bool:
    """Whether our ids are those of whole logits that are sorted, the smaller id first among equals."""
    p = problem(shape._replace(rows=CHECKED_ROWS))
    whole = (p.hidden @ p.weight.t()).sort(dim=-1, descending=True, stable=True).indices[:, : shape.k]
    return bool((run_tiles(p, shape.k)[0] == whole).all())


def results(rounds: int, *, all_shapes: bool = False) -> dict[str, Any]:
    """Figures of the teacher's top-k; prints the table that they come from.

    ``topk_speedup_kK`` is against ``naive``, ``topk_peak_vs_naive`` against the smallest peak of those that keep logits.
    """
    shapes = SHAPES + (OTHERS if all_shapes else [])
    cases = [{**shape._asdict(), "variants": in_turn(HERE, VARIANTS, shape, rounds)} for shape in shapes]
    for case in cases:
        print_case(case)
    found: dict[str, Any] = {"topk_cases": cases, "topk_ids_equal": all(is_exact(shape) for shape in SHAPES)}
    for case in cases[: len(SHAPES)]:
        v, k = case["variants"], case["k"]
        found[f"topk_speedup_k{k}"] = ratio(v["naive"]["seconds"], v["tiles"]["seconds"])
        found[f"topk_speedup_vs_select_k{k}"] = ratio(v["select"]["seconds"], v["tiles"]["seconds"])
        found[f"topk_speedup_vs_entropy_k{k}"] = ratio(v["entropy"]["seconds"], v["tiles"]["seconds"])
    v = cases[0]["variants"]
    least = min(entry["peak_mib"] for name, entry in v.items() if name != "tiles")
    return found | {"topk_peak_vs_naive": ratio(v["tiles"]["peak_mib"], least)}


def print_case(case: dict[str, Any]) -> None:
    """One shape, a line for each variant; how much faster and smaller ours is."""
    print(f"V={case['vocab']} d={case['hidden']} T={case['rows']} K={case['k']}")
    ours = case["variants"]["tiles"]
    for name, entry in case["variants"].items():
        speed, peak = entry["seconds"] / ours["seconds"], entry["peak_mib"] / ours["peak_mib"]
        print(
            f"  {name:8} {entry['seconds']:6.2f} s (ours x{speed:.2f})  {entry['peak_mib']:6.0f} MiB (ours x{peak:.1f} less)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of every variant  [3]")
    parser.add_argument("--all-shapes", action="store_true", help="other vocabularies and hidden sizes as well")
    parser.add_argument("--out", type=Path, help="also write the result there")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SHAPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured_here(options.one[0], Shape(*map(int, options.one[1].split(","))))))
        return
    found = {"benchmark": "topk", "baseline": "naive: full logits, torch.topk, logsumexp"}
    found |= results(options.rounds, all_shapes=options.all_shapes) | described("torch")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
