"""The kernels of the head, compiled for a GPU of compute capability 9.0 where none is: wide loads, nothing spilled, no atomics."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

triton = pytest.importorskip("triton", reason="needs triton: it is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from megatron_distil.trainer.head import triton_kernels as kernels  # noqa: E402

WHOLE = ("width", "logits_stride", "exps_stride", "stride")
"""What the buffers make a multiple of 16; the size of a vocabulary is none."""


class Built(NamedTuple):
    ptx: str
    resources: str
    """Of the machine code: registers, stack, local memory."""

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))


def built(kernel: Any, pointers: Mapping[str, str], constants: Mapping[str, Any], warps: int, folder: Path) -> Built:
    types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or name in WHOLE
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(done.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    told = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    return Built(ptx=done.asm["ptx"], resources=told.stdout)


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def run(kernel: Any, pointers: Mapping[str, str], constants: Mapping[str, Any], *, warps: int) -> Built:
        made = built(kernel, pointers, constants, warps, tmp_path)
        assert re.search(r"STACK:0 .*LOCAL:0 ", made.resources), f"registers were spilled: {made.resources}"
        assert made.count(r"\b(?:atom|red)\.") == 0, "a kernel whose result depends on the order of threads"
        return made

    return run


@pytest.mark.parametrize("exps", ["*bf16", "*fp32"])
@pytest.mark.parametrize("num_slots", [1, 20, 1000])
def test_exp_stats_reads_four_logits_at_a_time(build, exps, num_slots):
    pointers = dict.fromkeys(("logits", "peaks", "totals", "at_support", "at_sampled"), "*fp32")
    ids = dict.fromkeys(("support", "sampled"), "*i64")
    constants = {"SLOTS": kernels._slots(num_slots), "BLOCK": kernels._BLOCK}
    made = build(kernels.exp_stats_kernel, {**pointers, **ids, "exps": exps}, constants, warps=kernels._WARPS)
    each = kernels._BLOCK // (32 * kernels._WARPS * 4)
    assert made.count(r"ld\.global\S*\.v4\.b32") == 2 * each, "two sweeps, four logits a load"
    assert made.count(r"st\.global\S*\.v[24]\.b32") >= each // 2, "exponentials leave in wide stores"
    assert made.count(r"ex2\.approx") == 4 * each
    read, written, swept, *_ = made.ptx.split("bar.sync")
    assert "ld.global.b32" in read
    assert "st.global.b32" in written, "the support is written after every thread has read its logits"
    assert ".v4" not in read + written, "and swept after every thread has written"
    assert ".v4" in swept


@pytest.mark.parametrize("exps", ["*bf16", "*fp32"])
@pytest.mark.parametrize("num_slots", [1, 20, 1000])
def test_patch_needs_one_warp_and_no_barrier(build, exps, num_slots):
    pointers = dict.fromkeys(("at_support", "at_sampled"), "*fp32")
    ids = dict.fromkeys(("support", "sampled"), "*i64")
    constants = {"SLOTS": kernels._slots(num_slots)}
    made = build(kernels.patch_kernel, {**pointers, **ids, "exps": exps}, constants, warps=1)
    assert made.count(r"bar\.sync") == 0


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_block_statistics_read_four_logits_at_a_time(build, block):
    pointers = dict.fromkeys(("logits", "maxima", "peaks", "totals", "moments"), "*fp32")
    constants = {"BLOCK": block, "COUNT": kernels._TILE // block}
    made = build(kernels.block_stats_kernel, pointers, constants, warps=8)
    each = kernels._TILE // (32 * 8 * 4)
    assert made.count(r"ld\.global\S*\.v4\.b32") == each, "one sweep"
    assert made.count(r"ld\.global") == each, "and nothing else is read"
