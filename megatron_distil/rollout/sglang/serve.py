"""Start a stock SGLang server, on a GPU or on a CPU: ``python -m megatron_distil.rollout.sglang.serve --model-path DIR ...``.

The flags are those of ``sglang.launch_server``. Runs in the server's environment, so it imports nothing of ours.

On a GPU it starts the stock server and does nothing else. Without one it adds the flags of ``CPU_FLAGS`` that the
caller did not give, and installs three shims. SGLang's spawned children import the main module again (as
``__mp_main__``) and so get the shims too. Nothing is written to site-packages.

1. torchvision: the wheel of the package index is the CUDA build, and its C library does not load over a CPU torch.
   torchvision works without that library, except that its import registers meta kernels for two operators that the
   library would have declared. They are declared here: schema only, no kernel.
2. sgl_kernel: the published wheels hold CUDA kernels only. Without them SGLang uses PyTorch for every layer of a dense
   model, but some modules import kernels by name (speculative decoding, KV offload, quantisation). The stub gives every
   name a function that raises when it is called. A kernel package that can be imported is left alone.
3. ``torch.cuda.synchronize`` and ``cudaHostRegister`` become no-ops: ``/weights_checker`` and
   ``--enable-return-routed-experts`` call them on every device.

Tried with SGLang 0.5.9 to 0.5.23 over torch 2.13.0 (CPU wheel), Python 3.11.
"""
# ruff: noqa: TID251 - this is an entry point of its own: the server reads its settings from the environment

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

CPU_FLAGS: Mapping[str, str] = {
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--dtype": "float32",
    "--mem-fraction-static": "0.05",
    "--max-total-tokens": "65536",
}
"""What a server without a GPU needs, and what keeps its memory small: ``auto`` would turn float32 into float16, and
the memory of the key-value pool would be a share of the host's."""

CPU_SWITCHES: Sequence[str] = ("--skip-server-warmup", "--sleep-on-idle")
"""The first saves a generation at start. Without the second an idle scheduler burns a core; it wakes within milliseconds."""

ENVIRONMENT: Mapping[str, str] = {
    # /health generates a token by default: 20 s while paused, and a supervisor would restart a healthy server.
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
}

CPU_ENVIRONMENT: Mapping[str, str] = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # Two spinning threads on a shared core are 10 to 50 times slower than one.
    "OMP_NUM_THREADS": "1",
}


def with_cpu_flags(arguments: Sequence[str]) -> list[str]:
    """``arguments`` and every flag of a CPU server that they do not hold."""
    given = {argument.partition("=")[0] for argument in arguments}
    added = [part for flag, value in CPU_FLAGS.items() if flag not in given for part in (flag, value)]
    return [*arguments, *added, *(switch for switch in CPU_SWITCHES if switch not in given)]


def _declare_torchvision_operators() -> None:
    if torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None:
        return
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # declared already
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class _KernelStub(types.ModuleType):
    __path__ = []  # a package: names below it are asked of the finder

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_args: object, **_kwargs: object) -> Any:
            raise NotImplementedError(f"{self.__name__}.{name} has no CPU implementation here")

        missing.__name__ = name
        return missing


class _KernelFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> Any:
        # scalar_type is data, not a kernel; SGLang has a fallback of its own for it.
        if fullname == "sgl_kernel.scalar_type" or fullname.partition(".")[0] != "sgl_kernel":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _KernelStub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        del module


def _stub_sgl_kernel() -> None:
    try:
        importlib.import_module("sgl_kernel")
    except ImportError:  # absent, or the CUDA build without libcuda
        for name in [name for name in sys.modules if name.partition(".")[0] == "sgl_kernel"]:
            del sys.modules[name]
        sys.meta_path.insert(0, _KernelFinder())


def _silence_cuda_host_calls() -> None:
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.cudart = lambda: types.SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)


def _prepare_cpu() -> None:
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _declare_torchvision_operators()
    _stub_sgl_kernel()
    _silence_cuda_host_calls()


HAS_GPU = torch.cuda.is_available()
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
if not HAS_GPU:  # at import: this is what reaches the children
    _prepare_cpu()


def main() -> None:
    """Run the server until it ends; its children end with it."""
    # Late, because the shims come first. The trainer's environment, where types are checked, has no SGLang.
    from sglang.launch_server import run_server  # pyright: ignore[reportMissingImports]
    from sglang.srt.server_args import prepare_server_args  # pyright: ignore[reportMissingImports]
    from sglang.srt.utils import kill_process_tree  # pyright: ignore[reportMissingImports]

    arguments = sys.argv[1:] if HAS_GPU else with_cpu_flags(sys.argv[1:])
    try:
        run_server(prepare_server_args(arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
