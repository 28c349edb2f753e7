"""The output layer and its loss on a GPU, forward and backward, against the three bare matrix products: tools/benchmarks/head_gpu.py.

Two columns, never compared with each other: distillation (cross-entropy to a teacher's K ids, and credit for what comes later)
and the cross-entropy of labels. All variants of a column compute the same loss; they take turns in one process, and the error of
their gradients against the baseline is told beside their time. Prints a table and one JSON line.

    tools/run python tools/benchmarks/head_gpu.py --rows 8192 --slots 20 --out tools/benchmarks/results/head_gpu.json
    tools/run python tools/benchmarks/head_gpu.py --shards 8        the part of a rank of eight, without communication

``times_floor`` is the time divided by that of the products; goal at --shards 1: 1.11 or less for "one pass" (90 %).
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distil import algo
from megatron_distil.algo.objectives.objective import Future
from megatron_distil.algo.vocabulary import Columns
from megatron_distil.trainer.head import kernels
from megatron_distil.trainer.head.columns import HeadInputs, VocabShard, columns
from megatron_distil.trainer.head.onepass import onepass_loss
from megatron_distil.trainer.head.scan import future_credit
from megatron_distil.trainer.head.stages import CreditPlan, credit_plan
from megatron_distil.trainer.head.topk_ce import topk_logprobs

BASELINE = "eager float32"
COLUMNS = ("distillation", "labels")
SEQUENCE = 1024
"""Rows of a sequence."""
GIB = 2**30


@dataclass(frozen=True)
class Problem:
    """One microbatch at the head of one rank."""

    rows: Tensor
    """[N, H], wants a gradient."""
    weight: Any
    """[v, H] with ``main_grad``, wants a gradient."""
    support_ids: Tensor
    teacher_logprobs: Tensor
    sampled_ids: Tensor
    segments: Tensor
    shard: VocabShard
    whole: CreditPlan
    """One stage."""
    staged: CreditPlan

    def program(self, columns: Columns, rows: Tensor, future: Future) -> Tensor:
        """Cross-entropy on the support, and credit."""
        ce = algo.topk_cross_entropy(self.teacher_logprobs[rows], columns, tail="none")
        credit = future(ce.detach(), mean=True, discount=1.0)
        return (ce + credit * columns.sampled).sum() / len(self.rows)

    def labels(self, columns: Columns, rows: Tensor, future: Future) -> Tensor:
        """Cross-entropy of the sampled id."""
        return -columns.sampled.sum() / len(self.rows)

    def everything(self, columns: Columns) -> Tensor:
        """The program on all rows at once."""

        def future(cost: Tensor, *, mean: bool, discount: float) -> Tensor:
            return future_credit(cost, self.whole, None, mean=mean, discount=discount)

        return self.program(columns, torch.arange(len(self.rows), device=self.rows.device), future)

    def inputs(self, column: str) -> HeadInputs:
        """What a head takes; labels need no support."""
        support_ids = self.support_ids if column == "distillation" else self.support_ids[:, :0]
        return HeadInputs(
            rows=self.rows,
            weight=self.weight,
            support_ids=support_ids,
            sampled_ids=self.sampled_ids,
            shard=self.shard,
        )

    def loss(self, found: Columns, column: str) -> Tensor:
        """Of all rows at once."""
        return self.everything(found) if column == "distillation" else -found.sampled.mean()

    @property
    def exps_bytes(self) -> int:
        """Exponentials of all rows."""
        return len(self.rows) * self.shard.width * self.rows.element_size()


def make_problem(options: argparse.Namespace) -> Problem:
    """Inputs of the size asked for, with logits of about the spread of a trained model's."""
    device, dtype = torch.device(options.device), torch.bfloat16 if options.device == "cuda" else torch.float32
    draw = torch.Generator(device).manual_seed(0)
    num_ids, num_rows = options.vocab // options.shards, options.rows
    rows = torch.randn(num_rows, options.hidden, generator=draw, device=device).to(dtype).requires_grad_()
    weight: Any = torch.randn(num_ids, options.hidden, generator=draw, device=device) * 4 / options.hidden**0.5
    weight = torch.nn.Parameter(weight.to(dtype))
    weight.main_grad = torch.zeros(num_ids, options.hidden, device=device)
    weight.grad_added_to_main_grad = False
    # one support for every 64th row: the draw of a permutation is slow, and no variant gains by it
    some = [torch.randperm(num_ids, generator=draw, device=device)[: options.slots] for _ in range(64)]
    support = torch.stack(some).repeat(-(-num_rows // 64), 1)[:num_rows]
    teacher = torch.randn(num_rows, options.slots, generator=draw, device=device).log_softmax(-1) - 0.03
    segments = torch.arange(num_rows) // SEQUENCE
    is_row, order = torch.ones(num_rows, dtype=torch.bool), torch.arange(num_rows)[None]
    whole, staged = (
        credit_plan(order, segments, is_row, 0, stage_rows=at_a_time).to(device) for at_a_time in (None, options.chunk)
    )
    return Problem(
        rows=rows,
        weight=weight,
        support_ids=support,
        teacher_logprobs=teacher,
        sampled_ids=support[:, 0].clone(),
        segments=segments.to(device),
        shard=VocabShard.of(None, vocab_size=num_ids, rows=num_ids),
        whole=whole,
        staged=staged,
    )


Variant = Callable[[Problem], Tensor | None]
"""The loss, whose backward is timed as well; None: the gradients are there already."""


def _one_pass(column: str) -> Variant:
    def run(p: Problem) -> Tensor:
        program = p.program if column == "distillation" else p.labels
        return onepass_loss(p.inputs(column), program, p.staged, None)

    return run


def _composable(share: float, column: str) -> Variant:
    def run(p: Problem) -> Tensor:
        return p.loss(topk_logprobs(p.inputs(column), keep_bytes=int(share * p.exps_bytes)), column)

    return run


def _plain(column: str) -> Variant:
    def run(p: Problem) -> Tensor:
        return p.loss(columns(p.inputs(column)), column)

    return run


def _eager(p: Problem) -> Tensor:
    logprobs = (p.rows @ p.weight.t()).float().log_softmax(-1)
    support = logprobs.gather(1, p.support_ids)
    sampled = logprobs.gather(1, p.sampled_ids[:, None])[:, 0]
    return p.everything(Columns(support=support, tail=torch.zeros_like(sampled), sampled=sampled))


def _eager_labels(p: Problem) -> Tensor:
    return torch.nn.functional.cross_entropy((p.rows @ p.weight.t()).float(), p.sampled_ids)


def _liger(chunk: int | None) -> Variant:
    """With its gradient of the weight in float32, as all others have it."""
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    def run(p: Problem) -> None:
        extra = {}
        if chunk is not None:
            extra["chunk_mem_const"] = -(-chunk * len(p.weight) // p.rows.numel())
        with torch.no_grad():
            # as in its autograd function, whose backward multiplies by the 1 that comes in
            made = fused_linear_cross_entropy_forward(
                p.rows.detach().requires_grad_(), p.weight, p.sampled_ids, accum_dtype=torch.float32, **extra
            )
        for tensor in (x for x in made if isinstance(x, Tensor)):
            if tensor.shape == p.weight.shape:
                p.weight.main_grad.add_(tensor)
            elif tensor.shape == p.rows.shape:
                p.rows.grad = tensor

    return run


def _megatron(name: str) -> Variant:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

    group = _tensor_group()
    is_fused = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None

    def run(p: Problem) -> Tensor:
        logits = linear_with_grad_accumulation_and_async_allreduce(
            p.rows[:, None],
            p.weight,
            bias=None,
            gradient_accumulation_fusion=is_fused,
            allreduce_dgrad=False,
            sequence_parallel=False,
            tp_group=group,
        )
        labels = p.sampled_ids[:, None]
        if name == "fused":
            return fused_vocab_parallel_cross_entropy(logits, labels, group).mean()
        return vocab_parallel_cross_entropy(logits.float(), labels).mean()

    return run


def _tensor_group() -> Any:
    """Megatron's group of one rank."""
    from megatron.core import parallel_state

    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    return parallel_state.get_tensor_model_parallel_group()


def leave_group() -> None:
    """Undo what Megatron's variants began."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def variants(column: str, device: str) -> dict[str, Variant]:
    """By name; what is not installed is left out."""
    is_teacher = column == "distillation"
    found: dict[str, Variant] = {BASELINE: _eager if is_teacher else _eager_labels, "one pass": _one_pass(column)}
    for name, share in (("all", 1.0), ("half", 0.5), ("none", 0.0)):
        found[f"composable, {name} kept"] = _composable(share, column)
    found["plain, chunked"] = _plain(column)
    if is_teacher:
        return found
    with suppress(ImportError):
        found["megatron"] = _megatron("plain")
        found["megatron, fused"] = _megatron("fused")
    if device == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

        found["liger"] = _liger(None)
        if "chunk_mem_const" in inspect.signature(fused_linear_cross_entropy_forward).parameters:
            found["liger, chunks of 4096"] = _liger(4096)
    return found


def step(problem: Problem, variant: Variant) -> None:
    """Forward, backward, and what Megatron's hook does with a gradient of the weight that is not in ``main_grad`` yet."""
    problem.rows.grad = problem.weight.grad = None
    problem.weight.grad_added_to_main_grad = False
    loss = variant(problem)
    if loss is not None:
        loss.backward()
    if problem.weight.grad is not None and not problem.weight.grad_added_to_main_grad:
        problem.weight.main_grad.add_(problem.weight.grad)


class Stopwatch:
    """Times calls in milliseconds on the device, without waiting between the calls of a round."""

    def __init__(self, device: str) -> None:
        self._is_cuda = device == "cuda"
        self._open: list[tuple[str, Any, Any]] = []
        self.times: dict[str, list[float]] = {}

    def run(self, name: str, call: Callable[[], None]) -> None:
        """One timed call."""
        start = self._mark()
        call()
        self._open.append((name, start, self._mark()))

    def close_round(self) -> None:
        """Wait, and read the clocks."""
        if self._is_cuda:
            torch.cuda.synchronize()
        for name, start, end in self._open:
            took = start.elapsed_time(end) if self._is_cuda else 1e3 * (end - start)
            self.times.setdefault(name, []).append(took)
        self._open.clear()

    def _mark(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, and the tenth and ninetieth percentile."""
    ordered = sorted(times)
    at = (len(ordered) - 1) / 10
    return {
        "ms": round(statistics.median(ordered), 4),
        "p10": round(ordered[int(at)], 4),
        "p90": round(ordered[-1 - int(at)], 4),
    }


def gradients(problem: Problem, variant: Variant) -> tuple[Tensor, Tensor]:
    """Of the rows and of the weight."""
    problem.weight.main_grad.zero_()
    step(problem, variant)
    assert problem.rows.grad is not None
    return problem.rows.grad.detach().float(), problem.weight.main_grad.clone()


def extra_gib(problem: Problem, variant: Variant) -> float | None:
    """Peak beyond what lies there before, the inputs and ``main_grad``; None on a CPU."""
    if not problem.rows.is_cuda:
        return None
    problem.rows.grad = problem.weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(problem, variant)
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / GIB, 3)


def tried(problem: Problem, found: Mapping[str, Variant]) -> dict[str, dict[str, Any]]:
    """Error of the gradients and memory of each variant, or why it does not run."""
    results: dict[str, dict[str, Any]] = {}
    want: tuple[Tensor, Tensor] | None = None
    for name, variant in found.items():
        try:
            got = gradients(problem, variant)
            memory = extra_gib(problem, variant)
        except torch.OutOfMemoryError:
            results[name] = {"failed": "out of memory"}
            torch.cuda.empty_cache()
            continue
        if name == BASELINE:
            want = got
        errors = [] if want is None else [float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]
        results[name] = {"extra_gib": memory, "rows_error": None, "weight_error": None}
        results[name].update(zip(("rows_error", "weight_error"), errors, strict=False))
    return results


def floor_products(problem: Problem) -> dict[str, Callable[[], None]]:
    """The three products on buffers of the sizes of the heads; the first into the faster of two types."""
    rows, weight, main = problem.rows.detach(), problem.weight.detach(), problem.weight.main_grad
    exps = torch.rand(len(rows), len(weight), dtype=rows.dtype, device=rows.device)
    products = {"logits": lambda: torch.mm(rows, weight.t(), out=exps), "rows": lambda: exps @ weight}
    if rows.dtype == torch.bfloat16:
        wide = torch.empty(exps.shape, dtype=torch.float32, device=rows.device)
        products["logits, wide"] = lambda: torch.mm(rows, weight.t(), out_dtype=torch.float32, out=wide)
        products["weight"] = lambda: torch.addmm(main, exps.t(), rows, out_dtype=torch.float32, out=main)
    else:
        products["weight"] = lambda: main.addmm_(exps.t(), rows)
    return products


def passes(problem: Problem, chunk: int) -> dict[str, Callable[[], None]]:
    """The kernels on one chunk."""
    num_rows, size = min(chunk, len(problem.rows)), problem.shard.size
    logits = torch.randn(num_rows, problem.shard.width, device=problem.rows.device)
    exps = torch.empty(logits.shape, dtype=problem.rows.dtype, device=logits.device)
    support, sampled = problem.support_ids[:num_rows], problem.sampled_ids[:num_rows]
    entries, ones = torch.ones(support.shape, device=logits.device), torch.ones(num_rows, device=logits.device)
    return {
        "exp_stats": lambda: void(kernels.exp_stats(logits, support, sampled, exps, size)),
        "patch": lambda: kernels.patch(exps, support, sampled, entries, ones, size),
        "block_stats": lambda: void(kernels.block_stats(logits, size, 64)),
    }


def void(_: Any) -> None:
    """Nothing."""


def timed(calls: Mapping[str, Callable[[], Any]], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All of them in turn, round after round."""
    watch = Stopwatch(options.device)
    for number in range(options.warm_up + options.calls):
        if number == options.warm_up:
            watch.times.clear()
        for name, call in calls.items():
            watch.run(name, call)
        watch.close_round()
    return {name: summary(times) for name, times in watch.times.items()}


def floor_of(products: Mapping[str, Mapping[str, float]]) -> float:
    """Milliseconds of the three products."""
    first = min(value["ms"] for name, value in products.items() if name.startswith("logits"))
    return first + products["rows"]["ms"] + products["weight"]["ms"]


def rates(problem: Problem, products: Mapping[str, Any], found: Mapping[str, Any], chunk: int) -> dict[str, float]:
    """TFLOP/s of each product; GB/s of each sweep, one read and one write of each element counted."""
    flops = 2.0 * problem.rows.numel() * len(problem.weight)
    told = {f"{name}_tflops": flops / value["ms"] / 1e9 for name, value in products.items()}
    elements = min(chunk, len(problem.rows)) * problem.shard.size
    told["exp_stats_gbs"] = elements * (4 + problem.rows.element_size()) / found["exp_stats"]["ms"] / 1e6
    told["block_stats_gbs"] = elements * 4 / found["block_stats"]["ms"] / 1e6
    return {name: round(value, 1) for name, value in told.items()}


def table(columns: Mapping[str, Mapping[str, Mapping[str, Any]]], floor: float) -> str:
    """Both columns, one line for each variant."""
    lines = [f"three bare products: {floor:.2f} ms"]
    for column, results in columns.items():
        heads = f"{'median':>8}{'p10':>8}{'p90':>8}{'x floor':>9}{'extra GiB':>11}{'rows err.':>11}{'weight err.':>13}"
        lines += ["", f"{column:28}{heads}"]
        for name, found in results.items():
            if "failed" in found:
                lines.append(f"{name:28} {found['failed']}")
                continue
            cells = [f"{found[key]:8.2f}" for key in ("ms", "p10", "p90")] + [f"{found['times_floor']:9.3f}"]
            forms = {"extra_gib": "11.3f", "rows_error": "11.1e", "weight_error": "13.1e"}
            lines.append(f"{name:28}" + "".join(cells + [_cell(found[key], form) for key, form in forms.items()]))
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return f"{value:{form}}" if value is not None else f"{'-':>{form.split('.')[0]}}"


def column_results(
    problem: Problem, column: str, floor: float, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Everything that is told about each variant of a column."""
    found = variants(column, options.device)
    if options.variant:
        found = {name: variant for name, variant in found.items() if name in (BASELINE, *options.variant)}
    results = tried(problem, found)
    running = {name: variant for name, variant in found.items() if "failed" not in results[name]}
    times = timed({name: lambda v=variant: step(problem, v) for name, variant in running.items()}, options)
    for name, time_ms in times.items():
        results[name].update(time_ms, times_floor=round(time_ms["ms"] / floor, 4))
    return results


def machine(device: str) -> dict[str, Any]:
    """What it ran on; clocks and power as they are after the last call."""
    told: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count(), "load_1min": os.getloadavg()[0]}
    if device == "cuda":
        told["device"] = torch.cuda.get_device_name()
        for name, read in (("sm_mhz", torch.cuda.clock_rate), ("power_mw", torch.cuda.power_draw)):
            with suppress(Exception):  # they need a library of NVIDIA's that may be missing
                told[name] = read()
    told["versions"] = {}
    for name in ("torch", "triton", "megatron-core", "liger-kernel"):
        with suppress(PackageNotFoundError):
            told["versions"][name] = version(name)
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return told | {"commit": asked.stdout.strip()}


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        SystemExit: an argument that cannot work.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="response tokens of a microbatch  [8192]")
    parser.add_argument("--hidden", type=int, default=4096, help="size of a hidden state  [4096]")
    parser.add_argument("--vocab", type=int, default=151_936, help="ids of the model  [151936]")
    parser.add_argument("--slots", type=int, default=20, help="ids of a support  [20]")
    parser.add_argument("--shards", type=int, default=1, help="take the ids of one of so many ranks  [1]")
    parser.add_argument("--chunk", type=int, default=4096, help="rows of a stage of the one-pass head  [4096]")
    parser.add_argument("--warm-up", type=int, default=10, help="calls of each variant, uncounted  [10]")
    parser.add_argument("--calls", type=int, default=50, help="calls of each variant  [50]")
    parser.add_argument("--column", choices=COLUMNS, help="only this one")
    parser.add_argument("--variant", action="append", help="only these and the baseline; may be repeated")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal on a tiny size  [cuda]"
    )
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --rows 64 --hidden 32 --vocab 512 rehearses on a CPU")
    if options.vocab % options.shards:
        fits = options.vocab // options.shards * options.shards
        parser.error(f"--vocab {options.vocab} is no multiple of --shards {options.shards}; --vocab {fits} is")
    if options.slots > options.vocab // options.shards:
        parser.error(f"--slots {options.slots} are more than the {options.vocab // options.shards} ids of a rank")
    return options


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The whole result."""
    problem = make_problem(options)
    products = timed(floor_products(problem), options)
    found = timed(passes(problem, options.chunk), options)
    floor = floor_of(products)
    names = [options.column] if options.column else COLUMNS
    return {
        "benchmark": "head_gpu",
        "baseline": BASELINE,
        "floor_ms": round(floor, 4),
        "columns": {name: column_results(problem, name, floor, options) for name in names},
        "products": products,
        "kernels": found,
        "rates": rates(problem, products, found, options.chunk),
        **{name: getattr(options, name) for name in ("rows", "hidden", "vocab", "slots", "shards", "chunk", "calls")},
        **machine(options.device),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    options = parsed(arguments)
    try:
        result = measured(options)
    finally:
        leave_group()
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["columns"], result["floor_ms"]))
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
