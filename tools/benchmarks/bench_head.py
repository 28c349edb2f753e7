"""What the head costs: tools/run python tools/benchmarks/bench_head.py [--out FILE].

Time and memory of the heads against naive PyTorch, of the teacher's top-k against torch.topk, of the credit scan against a loop.
Prints a table and, as the last line, one JSON object.

Time is processor time of a fresh process with one thread, the best of the rounds; each round runs every variant once, so that a
change of the load hits all of them. Peak is the largest resident size minus that before the call, after a small warm-up of the same
code path; the float32 gradient of the output layer, which every variant needs, is in it.

    tools/run python tools/benchmarks/bench_head.py                      all of it, about 15 minutes
    tools/run python tools/benchmarks/bench_head.py --only head --rounds 3
    tools/run python tools/benchmarks/bench_head.py --device cuda        the table for a GPU (head_gpu.py)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from provenance import described

HERE = Path(__file__).resolve()


class Shape(NamedTuple):
    """A problem: vocabulary, hidden size, rows, support, rows of a chunk."""

    vocab: int
    hidden: int
    rows: int
    k: int
    chunk: int


LARGE = [Shape(151936, 256, rows, 20, 256) for rows in (1024, 2048, 4096)]
OTHERS = [Shape(65536, 512, 2048, 20, 512), Shape(32000, 512, 2048, 20, 512), Shape(32000, 1024, 1024, 100, 512)]
VARIANTS = ("naive", "recompute", "kept", "onepass")
THREADS = 1
"""One: with more, threads that wait for each other on a busy machine count as work."""
NAIVE_ROWS = 2048
"""Above it full logits would take more memory than a small machine has."""


class Problem(NamedTuple):
    """Tensors of a shape: four packed sequences, a teacher whose top-k is known, sampled ids inside its support."""

    hidden: Any
    weight: Any
    ids: Any
    logprobs: Any
    sampled: Any
    segments: Any


def problem(shape: Shape) -> Problem:
    """The same for every variant."""
    import torch

    draw = torch.Generator().manual_seed(0)
    rows = shape.rows
    ids = torch.stack([torch.randperm(shape.vocab, generator=draw)[: shape.k] for _ in range(64)])
    ids = ids.repeat((rows + 63) // 64, 1)[:rows]
    return Problem(
        hidden=torch.randn(rows, shape.hidden, generator=draw).requires_grad_(),
        weight=torch.randn(shape.vocab, shape.hidden, generator=draw).mul_(4 / shape.hidden**0.5).requires_grad_(),
        ids=ids,
        logprobs=torch.randn(rows, shape.k, generator=draw).log_softmax(-1) - 0.03,
        sampled=ids[:, 0].clone(),
        segments=torch.arange(rows) * 4 // rows,
    )


def run_naive(p: Problem, shape: Shape) -> float:
    """Full logits, log_softmax, gather, autograd, a scan over the costs."""
    import torch

    from megatron_distil import algo

    logprobs = (p.hidden @ p.weight.t()).log_softmax(-1)
    ce = -(p.logprobs.exp() * logprobs.gather(1, p.ids)).sum(-1)
    every = torch.ones(shape.rows, dtype=torch.bool)
    credit = algo.future_credit(ce.detach(), every, p.segments, mean=True)
    loss = (ce + credit * logprobs.gather(1, p.sampled[:, None])[:, 0]).sum() / shape.rows
    loss.backward()
    return loss.item()


def run_fused(p: Problem, shape: Shape, *, variant: str) -> float:
    """The same loss by a head of ours."""
    import torch

    from megatron_distil import algo
    from megatron_distil.algo.vocabulary import Columns
    from megatron_distil.trainer.head import passes
    from megatron_distil.trainer.head.columns import HeadInputs, VocabShard
    from megatron_distil.trainer.head.onepass import onepass_loss
    from megatron_distil.trainer.head.scan import future_credit
    from megatron_distil.trainer.head.stages import credit_plan
    from megatron_distil.trainer.head.topk_ce import topk_logprobs

    shard = VocabShard.of(None, vocab_size=shape.vocab, rows=shape.vocab)
    passes.BUFFER_BYTES = 4 * shard.width * shape.chunk
    p.weight.main_grad = torch.zeros_like(p.weight)
    inputs = HeadInputs(p.hidden, p.weight, p.ids, p.sampled, shard)

    def program(columns: Columns, rows: Any, future: Callable[..., Any]) -> Any:
        ce = algo.topk_cross_entropy(p.logprobs[rows], columns, tail="none")
        credit = future(ce, mean=True, discount=1.0)
        return (ce + credit * columns.sampled).sum() / shape.rows

    order, every = torch.arange(shape.rows)[None], torch.ones(shape.rows, dtype=torch.bool)
    if variant == "onepass":
        plan = credit_plan(order, p.segments, every, 0, stage_rows=shape.chunk)
        loss = onepass_loss(inputs, program, plan, None)
    else:
        plan = credit_plan(order, p.segments, every, 0)
        columns = topk_logprobs(inputs, keep_bytes=0 if variant == "recompute" else 2**40)

        def future(cost: Any, *, mean: bool, discount: float) -> Any:
            return future_credit(cost, plan, None, mean=mean, discount=discount)

        loss = program(columns, torch.arange(shape.rows), future)
    loss.backward()
    return loss.item()


def step(variant: str, shape: Shape, p: Problem) -> float:
    """One forward and backward; the loss."""
    return run_naive(p, shape) if variant == "naive" else run_fused(p, shape, variant=variant)


def measured_here(variant: str, shape: Shape) -> dict[str, float]:
    """Seconds and MiB of one variant, in this process."""
    import torch

    torch.set_num_threads(THREADS)
    small = shape._replace(vocab=2048, rows=2 * min(shape.chunk, 64), chunk=min(shape.chunk, 64))
    step(variant, small, problem(small))
    p = problem(shape)
    base, start = resident("VmRSS:"), time.process_time()
    loss = step(variant, shape, p)
    return {"seconds": time.process_time() - start, "peak_mib": resident("VmHWM:") - base, "loss": loss}


def resident(key: str) -> float:
    """MiB from /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key))


def in_turn(script: Path, variants: Sequence[str], shape: Sequence[int], rounds: int) -> dict[str, dict[str, float]]:
    """Best time and largest peak of each variant of a script, each in a fresh process: ``--one VARIANT SHAPE``."""
    found: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for variant in variants:
            command = [sys.executable, str(script), "--one", variant, ",".join(map(str, shape))]
            output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
            new = json.loads(output.splitlines()[-1])
            known = found.setdefault(variant, new)
            known["seconds"] = min(known["seconds"], new["seconds"])
            known["peak_mib"] = max(known["peak_mib"], new["peak_mib"])
    return found


def compared(shape: Shape, rounds: int) -> dict[str, dict[str, float]]:
    """Best time and largest peak of each variant."""
    found = in_turn(HERE, [v for v in VARIANTS if v != "naive" or shape.rows <= NAIVE_ROWS], shape, rounds)
    losses = [entry["loss"] for entry in found.values()]
    if max(losses) - min(losses) > 1e-4 * abs(losses[0]):
        raise SystemExit(f"the variants disagree about the loss of {shape}: {losses}")
    return found


def head_results(rounds: int, shapes: Sequence[Shape]) -> dict[str, Any]:
    """Figures of the heads, and the table that they come from."""
    cases = [{**shape._asdict(), "variants": compared(shape, rounds)} for shape in shapes]
    for case in cases:
        print_case(case)
    by_rows = {case["rows"]: case["variants"] for case in cases if case["vocab"] == LARGE[0].vocab}
    found: dict[str, Any] = {"cases": cases}
    for rows in (1024, 2048):
        if rows in by_rows:
            v = by_rows[rows]
            found[f"speedup_vs_naive_{rows}"] = ratio(v["naive"]["seconds"], v["onepass"]["seconds"])
            found[f"speedup_vs_recompute_{rows}"] = ratio(v["recompute"]["seconds"], v["onepass"]["seconds"])
            found[f"peak_vs_naive_{rows}"] = ratio(v["onepass"]["peak_mib"], v["naive"]["peak_mib"])
    if 1024 in by_rows and 4096 in by_rows:
        own = {rows: by_rows[rows]["onepass"]["peak_mib"] - rows * LARGE[0].hidden * 4 / 2**20 for rows in (1024, 4096)}
        found["peak_4096_vs_1024"] = ratio(own[4096], own[1024])
    for name in ("speedup_vs_naive", "speedup_vs_recompute", "peak_vs_naive"):
        if f"{name}_1024" in found:
            found[name] = found[f"{name}_2048" if name == "peak_vs_naive" and 2048 in by_rows else f"{name}_1024"]
    return found


def ratio(a: float, b: float) -> float:
    """Three digits."""
    return round(a / b, 3)


def print_case(case: Mapping[str, Any]) -> None:
    """One shape, a line for each variant, ratios against naive (recompute where naive was not run)."""
    print(f"V={case['vocab']} d={case['hidden']} T={case['rows']} K={case['k']} chunk={case['chunk']}")
    variants = case["variants"]
    base = variants.get("naive", variants["recompute"])
    for name, entry in variants.items():
        speed, peak = base["seconds"] / entry["seconds"], base["peak_mib"] / entry["peak_mib"]
        print(f"  {name:10} {entry['seconds']:7.2f} s (x{speed:.2f})  {entry['peak_mib']:7.0f} MiB (x{peak:.1f} less)")


def results(options: argparse.Namespace) -> dict[str, Any]:
    """Every part that was asked for."""
    found: dict[str, Any] = {"benchmark": "head", "baseline": "naive: full logits, autograd"}
    if options.only in (None, "head"):
        found |= head_results(options.rounds, LARGE + (OTHERS if options.all_shapes else []))
    for name in ("topk", "scan"):
        if options.only in (None, name):
            part = beside(f"bench_{name}.py", options.rounds)
            found[name] = part
            found |= {key: value for key, value in part.items() if key.startswith(name)}
    if "scan" in found:
        found["scan_times_of_cumsum"] = found["scan"]["times_of_cumsum"]
        found["scan_faster_than_loop"] = found["scan"]["faster_than_loop"]
    return found | described("torch")


def beside(script: str, rounds: int) -> dict[str, Any]:
    """What a neighbour measures; its table is printed."""
    command = [sys.executable, str(HERE.parent / script), "--rounds", str(rounds)]
    *table, last = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, timeout=3600
    ).stdout.splitlines()
    print("\n".join(table))
    return json.loads(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: head_gpu.py, with its arguments  [cpu]"
    )
    parser.add_argument("--only", choices=["head", "topk", "scan"], help="one part")
    parser.add_argument("--rounds", type=int, default=3, help="of every variant  [3]")
    parser.add_argument("--all-shapes", action="store_true", help="smaller vocabularies as well")
    parser.add_argument("--out", type=Path, help="also write the result there")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SHAPE"), help=argparse.SUPPRESS)
    options, others = parser.parse_known_args()
    if options.device == "cuda":
        subprocess.run([sys.executable, str(HERE.parent / "head_gpu.py"), "--device", "cuda", *others], check=True)
        return
    if others:
        parser.error(f"unknown arguments: {' '.join(others)}")
    if options.one:
        print(json.dumps(measured_here(options.one[0], Shape(*map(int, options.one[1].split(","))))))
        return
    found = results(options)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
