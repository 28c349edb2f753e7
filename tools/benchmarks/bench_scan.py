"""What the future-credit scan costs beside one running sum.

    tools/run python tools/benchmarks/bench_scan.py --out tools/benchmarks/results/scan_cpu2.json

One packed row on one rank, float64, the plan made before. Named baselines of the same call:

    cumsum    torch.cumsum over the whole row: what cannot be undercut (it knows no sequences)
    padded    scatter to [sequences, longest], suffix sums of each row by torch.cumsum, gather
    doubling  algo.future_credit, the specification
    loop      a Python loop over sequences, algo.future_credit of each
    bare loop the same loop, of torch.cumsum: plain sums only

Time is processor time with one thread, the best of the rounds; each round runs every variant once, so that a change of the load hits
all of them. Prints a table and, as the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # with more, threads that wait for each other count as work

import torch
from provenance import described
from torch import Tensor

from megatron_distil import algo
from megatron_distil.trainer.head.scan import future_credit
from megatron_distil.trainer.head.stages import credit_plan

TOKENS = (2**16, 2**18, 2**20)
TOKENS_OF_A_SEQUENCE = 256
"""On average: 2^20 tokens are 4,096 sequences."""
LENGTHS = ("equal", "uneven")
STAGE_ROWS = 4096


def sequence_lengths(total: int, kind: str) -> list[int]:
    """Lengths that add up to ``total``; uneven: between cuts at random places."""
    count = total // TOKENS_OF_A_SEQUENCE
    if kind == "equal":
        return [TOKENS_OF_A_SEQUENCE] * count
    cuts = torch.randperm(total - 1, generator=torch.Generator().manual_seed(0))[: count - 1] + 1
    ends = torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([total])])
    return ends.diff().tolist()


def loop(cost: Tensor, lengths: list[int]) -> Tensor:
    """The specification, sequence by sequence."""
    parts = [
        algo.future_credit(part, torch.ones_like(part).bool(), torch.zeros_like(part)) for part in cost.split(lengths)
    ]
    return torch.cat(parts)


def bare_loop(cost: Tensor, lengths: list[int]) -> Tensor:
    """Suffix sums without the row itself, sequence by sequence."""
    parts = [part.flip(0).cumsum(0).flip(0) - part for part in cost.split(lengths)]
    return torch.cat(parts)


def padded(lengths: list[int]) -> Callable[[Tensor], Tensor]:
    """The same on rows of equal length; the places are known before."""
    size, count = max(lengths), len(lengths)
    ends = torch.tensor(lengths).cumsum(0)
    later = ends.repeat_interleave(torch.tensor(lengths)) - 1 - torch.arange(int(ends[-1]))
    slots = later + torch.arange(count).repeat_interleave(torch.tensor(lengths)) * size  # reversed: sums run backwards

    def scan(cost: Tensor) -> Tensor:
        rows = cost.new_zeros(count * size).scatter_(0, slots, cost).view(count, size)
        return rows.cumsum(1).view(-1).index_select(0, slots) - cost

    return scan


def best_times(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of processor time of each variant, interleaved."""
    best = dict.fromkeys(variants, float("inf"))
    for round_ in range(rounds + 1):
        for name, run in variants.items():
            began = time.process_time()
            run()
            if round_:  # the first one warms up
                best[name] = min(best[name], time.process_time() - began)
    return best


def measure(total: int, kind: str, rounds: int) -> dict[str, float]:
    """Milliseconds of every variant on one row, and the error of the scan."""
    lengths = sequence_lengths(total, kind)
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    everyone, order = torch.ones(total, dtype=torch.bool), torch.arange(total)[None]
    plan = credit_plan(order, segments, everyone, 0)
    cost = torch.rand(total, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    in_rows = padded(lengths)

    def ours(*, mean: bool, discount: float) -> Callable[[], Tensor]:
        return lambda: future_credit(cost, plan, None, mean=mean, discount=discount)

    want = bare_loop(cost, lengths)
    error = (ours(mean=False, discount=1.0)() - want).abs().max() / want.abs().max()
    variants: dict[str, Callable[[], object]] = {
        "cumsum": lambda: cost.cumsum(0),
        "sum": ours(mean=False, discount=1.0),
        "mean": ours(mean=True, discount=1.0),
        "discounted": ours(mean=False, discount=0.99),
        "padded": lambda: in_rows(cost),
        "doubling": lambda: algo.future_credit(cost, everyone, segments),
        "loop": lambda: loop(cost, lengths),
        "bare loop": lambda: bare_loop(cost, lengths),
        "plan": lambda: credit_plan(order, segments, everyone, 0),
        "plan in stages": lambda: credit_plan(order, segments, everyone, 0, stage_rows=STAGE_ROWS),
    }
    times = best_times(variants, rounds)
    return {name: round(1e3 * seconds, 3) for name, seconds in times.items()} | {"relative error": float(error)}


def table(cases: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each case: milliseconds of the running sum and of the plan, all else as multiples of the running sum."""
    names = ("sum", "mean", "discounted", "padded", "doubling", "loop", "bare loop")
    lines = ["| tokens, lengths | cumsum, ms | " + " | ".join(names) + " | plan, ms | plan in stages, ms |"]
    lines.append("|" + "---|" * (len(names) + 4))
    for case, found in cases.items():
        ratios = [f"{found[name] / found['cumsum']:.1f}" for name in names]
        plans = [f"{found['plan']:.0f}", f"{found['plan in stages']:.0f}"]
        cells = [case, f"{found['cumsum']:.2f}", *ratios, *plans]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of each variant, interleaved  [15]")
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = {f"{total:,}, {kind}": measure(total, kind, options.rounds) for kind in LENGTHS for total in TOKENS}
    largest = {kind: cases[f"{TOKENS[-1]:,}, {kind}"] for kind in LENGTHS}
    result = {
        "benchmark": "scan",
        "baseline": "cumsum",
        "times_of_cumsum": {kind: round(found["sum"] / found["cumsum"], 2) for kind, found in largest.items()},
        "faster_than_loop": {kind: round(found["loop"] / found["sum"], 1) for kind, found in largest.items()},
        "faster_than_bare_loop": {kind: round(found["bare loop"] / found["sum"], 1) for kind, found in largest.items()},
        "ns_per_token": {
            case: round(1e6 * c["sum"] / int(case.split(", ")[0].replace(",", "")), 2) for case, c in cases.items()
        },
        "cases_ms": cases,
        "rounds": options.rounds,
        **described("torch"),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(cases))
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
