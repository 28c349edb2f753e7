"""Worlds of several ranks at the price of a fork: torch and Megatron are imported once, each rank of each case is a child.

CPU only: a CUDA context does not survive a fork. No thread may have been started before the fork.
"""

import contextlib
import datetime
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist

torch.set_num_threads(1)


class RankFailed(AssertionError):
    """A rank raised, or was killed by a signal; the text is that of the first one that did."""


class WorldHung(AssertionError):
    """Time was up."""


def run_ranks(case: Callable[..., None], world_size: int, *args: Any, timeout_s: float = 120, **options: Any) -> None:
    """case(rank, *args, **options) on every rank of a new gloo world; the first failure ends all of them."""
    if torch.cuda.is_available():
        raise RuntimeError("a CUDA context does not survive a fork: run these tests with CUDA_VISIBLE_DEVICES=")
    with tempfile.TemporaryDirectory() as folder:
        pids: set[int] = set()
        for rank in range(world_size):
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                _child(case, rank, world_size, Path(folder), timeout_s, args, options)
            pids.add(pid)
        failed, is_late = _wait(pids, time.monotonic() + timeout_s)
        texts = [path.read_text() for path in sorted(Path(folder).glob("failure*"), key=os.path.getmtime)]
    name = f"{getattr(case, '__name__', case)} {options or args}"
    if failed:
        raise RankFailed(f"{name}: {failed}\n" + (texts[0] if texts else "no traceback"))
    if is_late:
        raise WorldHung(f"{name}: not done after {timeout_s} s")


def _wait(pids: set[int], deadline: float) -> tuple[str, bool]:
    """Until all children have ended, one has failed, or time is up; then none is left."""
    failed, is_late = "", False
    while pids and not failed and not is_late:
        for pid in list(pids):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            pids.discard(pid)
            _end_group(pid)
            if status and not failed:
                failed = f"a rank ended with {os.waitstatus_to_exitcode(status)}"
        is_late = bool(pids) and time.monotonic() > deadline
        if pids:
            time.sleep(0.005)
    for pid in pids:
        _end_group(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return failed, is_late


def _end_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _child(
    case: Callable[..., None],
    rank: int,
    world_size: int,
    folder: Path,
    timeout_s: float,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    code = 1
    os.setpgid(0, 0)  # what this rank starts, such as the writer of a checkpoint, ends with it
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        case(rank, *args, **options)
        code = 0
    except BaseException:  # noqa: BLE001 - whatever ended the case, its text belongs to the test
        (folder / f"failure{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no atexit, no destructors of the parent's objects
