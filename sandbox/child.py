"""Runs in the jailed process: untrusted from the first line of user code on. Never holds an expected output.

Descriptors: 0 input (sealed, read-only), 1 stdout, 2 stderr, 3 result. All four are memory files.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import json
import linecache
import os
import random
import resource
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from sandbox import foreign, profiles

FILENAME = "solution.py"
RESULT_FD = 3
THREAD_STACK_BYTES = 8 << 20
MAX_DEPTH = 60
MAX_INT_DIGITS = 50_000

PRELUDE_RECURSION = 50_000
# Names LiveCodeBench makes available without an import. Later ones shadow earlier ones.
_STARS = """string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys
json builtins typing""".split()  # noqa: SIM905 - a list of words
_MODULES = """string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys
json""".split()  # noqa: SIM905 - a list of words
PRELUDE: dict[str, Any] = {}
exec("\n".join([*(f"from {name} import *" for name in _STARS), *(f"import {name}" for name in _MODULES)]), PRELUDE)
del PRELUDE["__builtins__"]

_dumps, _write = json.dumps, os.write  # as they were before user code could replace them


def encode(value: Any, depth: int = 0) -> Any:
    """A result as plain tagged JSON. An object's own __eq__ or __class__ never reaches the judge."""
    if depth > MAX_DEPTH:
        raise TypeError("result nested too deeply")
    kind = type(value)  # never isinstance: it believes a faked __class__
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 63 else {"i": hex(value)}
    if kind is float:
        return value if value - value == 0 else {"f": repr(value)}
    if kind is list:
        return [encode(item, depth + 1) for item in value]
    if kind is tuple:
        return {"t": [encode(item, depth + 1) for item in value]}
    if kind is dict or (issubclass(kind, dict) and kind.__module__ == "collections"):
        return {"d": [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in dict.items(value)]}
    if kind in (set, frozenset):
        return {"s": [encode(item, depth + 1) for item in value]}
    return _encode_other(value, kind, depth)


def _encode_other(value: Any, kind: type, depth: int) -> Any:
    if kind is bytes:
        return {"b": value.hex()}
    if kind.__module__ == "numpy":
        return encode(value.tolist() if getattr(value, "ndim", 0) else value.item(), depth + 1)
    for base in (bool, int, float, str, list, tuple):
        if issubclass(kind, base):
            return encode(base(value), depth + 1)
    raise TypeError(f"cannot serialise a result of type {kind.__name__}")


def set_limits(limits: Mapping[str, float], without: Container[str] = ()) -> None:
    """Kernel back-stops. The keeper's clocks are the real CPU limit; RLIMIT_CPU counts whole seconds."""
    cpu = int(limits["cpu_s"]) + 1
    most = {
        "data" if "data_bytes" in limits else "as": int(limits["memory_bytes"]),
        "fsize": int(limits["output_bytes"]),
        "nofile": 64,
        "core": 0,
        "memlock": 0,
        "msgqueue": 0,
        "nproc": int(limits["pids"]),
    }
    if "rlimits.cpu" not in without:
        _limit(resource.RLIMIT_CPU, cpu, cpu + 1)
    for name, value in most.items():
        if f"rlimits.{name}" not in without:
            _limit(getattr(resource, f"RLIMIT_{name.upper()}"), value)


def _limit(which: int, soft: int, hard: int | None = None) -> None:
    hard = soft if hard is None else hard
    current = resource.getrlimit(which)[1]
    if current != resource.RLIM_INFINITY:
        soft, hard = min(soft, current), min(hard, current)
    resource.setrlimit(which, (soft, hard))


class Call(NamedTuple):
    """What the service asks for, next to the source."""

    mode: str
    function: str
    has_prelude: bool
    seed: int
    input: str = ""
    """Of a function; a program reads descriptor 0."""
    profile: str = "native"
    language: str = "python"
    stage: str = "run"
    """``compile``: the result is the program; then ``run`` gets it in place of the source."""


def run(code: str, **asked: Any) -> int:
    """Execute one test; leaves its result on RESULT_FD and returns the exit status."""
    call = Call(**asked)
    if call.language != "python":
        return _run_foreign(code, call)
    result: dict[str, Any] = {}
    status = 0
    try:
        _execute(code, call, result)
    except SystemExit as error:
        status = _exit_status(error.code)
        result["exit"] = status
    except BaseException as error:  # noqa: BLE001 - whatever the program raised is its result
        status = 1
        _report(error, result)
    if call.profile != "lcb":  # which does not wait for them
        _quietly(threading._shutdown)  # pyright: ignore[reportAttributeAccessIssue] - private
        # join non-daemon threads, on the program's own clock
        if call.mode == "stdin":
            _quietly(atexit._run_exitfuncs)
    _quietly(lambda: sys.stdout.flush())
    _quietly(lambda: sys.stderr.flush())
    _quietly(lambda: _emit(result))
    return status


def _execute(code: str, call: Call, result: dict[str, Any]) -> None:
    module = _prepare(code, call.mode, call.seed)
    if call.has_prelude or call.profile == "lcb":
        streams = {"stdin": sys.stdin, "stdout": sys.stdout, "stderr": sys.stderr}  # sys's own names, as of now
        module.__dict__.update(PRELUDE, **streams)
        sys.setrecursionlimit(PRELUDE_RECURSION)
    if call.profile == "sdpo":
        module.__dict__["debug_print"] = profiles.debug_print
    if call.profile == "lcb" and call.mode == "stdin":
        profiles.run_lcb(module, lambda: _compiled(result, profiles.lcb_program, code))
        result["exit"] = 0
        return
    compiler = _COMPILERS[call.profile] if call.mode == "functional" else _program
    exec(_compiled(result, compiler, code), module.__dict__)
    if call.mode == "functional":
        called, arguments = _CALLS[call.profile](code, module, call.function, call.input)
        value = called(*arguments)
        if call.profile == "lcb":
            profiles.refuse_arrays(value)
        result["value"] = encode(value)


def _run_foreign(code: str, call: Call) -> int:
    try:
        if call.stage == "compile":
            return foreign.compile_program(call.language, code, _write_result)
        foreign.execute(call.language, code, RESULT_FD)
    except OSError as error:
        _write_result(json.dumps({"fault": f"{call.language}: {error}"}).encode())
    return 1


def _program(code: str, filename: str) -> types.CodeType:
    return compile(code, filename, "exec", dont_inherit=True)


def _compiled(result: dict[str, Any], compiler: Callable[[str, str], types.CodeType], code: str) -> types.CodeType:
    """What is raised here is an error of compilation."""
    try:
        return compiler(code, FILENAME)
    except BaseException:
        result["phase"] = "compile"
        raise


def _call(_: str, module: types.ModuleType, function: str, input: str) -> profiles.Call:
    owner = module.__dict__["Solution"]() if "Solution" in module.__dict__ else module
    return getattr(owner, function), [json.loads(line) for line in input.split("\n")]


_COMPILERS = {"native": _program, "lcb": profiles.lcb_module, "sdpo": profiles.sdpo_module}
_CALLS = {"native": _call, "lcb": profiles.lcb_call, "sdpo": profiles.sdpo_call}


def _prepare(code: str, mode: str, seed: int) -> types.ModuleType:
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.argv = [FILENAME]
    random.seed(seed)
    faulthandler.enable(2, all_threads=False)
    faulthandler.register(signal.SIGXCPU, 2, all_threads=True, chain=False)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(MAX_INT_DIGITS)
    module = types.ModuleType("__main__" if mode == "stdin" else "solution")
    module.__file__ = FILENAME
    sys.modules["__main__"] = sys.modules["solution"] = module
    linecache.cache[FILENAME] = (len(code), None, code.splitlines(True), FILENAME)
    threading.stack_size(THREAD_STACK_BYTES)  # else glibc takes the zygote's large RLIMIT_STACK per thread
    gc.enable()
    return module


def _exit_status(code: Any) -> int:
    if code is None:
        return 0
    try:
        return int.__and__(code, 255)  # a plain int even for a hostile subclass
    except TypeError:
        _quietly(lambda: sys.stderr.write(f"{code}\n"))
        return 1


def _report(error: BaseException, result: dict[str, Any]) -> None:
    """The traceback of the program's own frames, to stderr and in short to the result."""
    try:
        text = traceback.TracebackException(type(error), error, error.__traceback__, compact=True, limit=-64)
        frames = [frame for frame in text.stack if frame.filename == FILENAME]
        text.stack[:] = frames if len(frames) <= 12 else frames[:6] + frames[-6:]
        result.update(
            exception=type(error).__name__,
            message=str(error)[:2000],
            frames=[[frame.lineno, frame.name, frame.line] for frame in frames[-6:]],
        )
        printed = "".join(text.format())[-8000:]
    except BaseException:  # noqa: BLE001 - the exception's own code runs here
        printed, result["exception"] = "<traceback unavailable>\n", "Exception"
    _quietly(lambda: sys.stderr.write(printed))


def _emit(result: Mapping[str, Any]) -> None:
    try:
        data = _dumps(result).encode("utf-8", "surrogatepass")
    except BaseException as error:  # noqa: BLE001 - the program may have left anything in it
        data = _dumps({"exception": "ResultError", "message": repr(error)[:200], "frames": []}).encode()
    _write_result(data)


def _write_result(data: bytes) -> None:
    while data:
        data = data[_write(RESULT_FD, data) :]


def _quietly(action: Callable[[], object]) -> None:
    with suppress(BaseException):  # the program's own code runs here
        action()
