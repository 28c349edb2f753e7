"""Lets unmodified megatron-core (0.16.1, 0.19.2) run where there is no CUDA; does nothing where CUDA is.

The real ``torch.cuda`` is never touched: torch._dynamo asserts when two of its names are one function. Every module under
``megatron.`` gets, as its global name ``torch``, a proxy that forwards to torch, except that ``proxy.cuda`` is a stand-in and
factory calls with ``device="cuda"`` go to the CPU. Our own code and every other library see the real torch.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import logging
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = [
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "eye",
    "full",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
]


class _Nothing:
    """Stands for Stream and Event: every method exists and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., _Nothing]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: _Nothing()  # record_event() and the like are chained

    def elapsed_time(self, other: object) -> float:
        return 0.0

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *exc: object) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Nothing)

    __hash__ = object.__hash__


class _Cuda(types.ModuleType):
    """Stands for torch.cuda. ``is_available`` is the real one: it stays False."""

    Stream = Event = _Nothing
    current_device = staticmethod(lambda: _CPU)  # every torch factory accepts a torch.device
    device_count = staticmethod(lambda: 1)
    synchronize = empty_cache = set_device = ipc_collect = staticmethod(lambda *args, **kwargs: None)
    reset_peak_memory_stats = staticmethod(lambda *args, **kwargs: None)
    memory_allocated = max_memory_allocated = memory_reserved = staticmethod(lambda *args, **kwargs: 0)
    mem_get_info = staticmethod(lambda *args, **kwargs: (8 << 30, 8 << 30))
    current_stream = default_stream = staticmethod(lambda *args, **kwargs: _Nothing())
    stream = staticmethod(lambda stream: contextlib.nullcontext())
    manual_seed = staticmethod(lambda seed: torch.default_generator.manual_seed(seed) and None)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Torch(types.ModuleType):
    """Stands for torch inside megatron."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return made


def _proxy() -> types.ModuleType:
    proxy: Any = _Torch("torch")
    proxy.cuda = _Cuda("torch.cuda")
    for name in _FACTORIES:
        setattr(proxy, name, _on_cpu(getattr(torch, name)))
    return proxy


class _Hook(importlib.abc.MetaPathFinder):
    """Gives the proxy to every megatron module, right after its code has run."""

    def __init__(self) -> None:
        self._proxy = _proxy()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] != "megatron":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        exec_module = spec.loader.exec_module

        def run(module: types.ModuleType) -> None:
            with warnings.catch_warnings():  # it warns of every CUDA library that it does not find
                warnings.simplefilter("ignore")
                exec_module(module)
            self.fix(module)

        spec.loader.exec_module = run
        return spec

    def fix(self, module: Any) -> None:
        if module.__dict__.get("torch") is torch:
            module.torch = self._proxy
        if module.__name__ == "megatron.core.jit":
            module.jit_fuser = lambda function: function  # torch.compile: seconds of imports in every process
        if module.__name__ == "megatron.core.tensor_parallel.random":
            # The tracker then forks the CPU generator: dropout and initialisation draw from it as they would on a GPU.
            module._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
            module._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
            logging.getLogger(module.__name__).addFilter(
                lambda record: "CPU RNG state changed" not in record.getMessage()
            )


def _patch_tensor() -> None:
    """Methods cannot be scoped by module: three patches for the process, harmless without CUDA."""
    typename = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = typename(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(result, str) and caller.startswith("megatron.core.optimizer"):
            return result.replace("torch.", "torch.cuda.", 1)  # it compares with 'torch.cuda.FloatTensor'
        return result

    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args, **kwargs: self
    tensor.type = type_


def install() -> bool:
    """Call it before the first ``import megatron``; a second call changes nothing.

    Returns:
        Whether it was installed by this call.
    """
    if torch.cuda.is_available() or any(isinstance(finder, _Hook) for finder in sys.meta_path):
        return False
    hook = _Hook()
    sys.meta_path.insert(0, hook)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "megatron":
            hook.fix(module)
    _patch_tensor()
    return True
