"""The ranks of a group as threads of one process: what they gather, and how often, without a process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch


class ThreadGroup:
    """One rank's view of the group; stands where a ``ProcessGroup`` does."""

    def __init__(self, rank: int, parts: list[Any], barrier: threading.Barrier) -> None:
        self._rank, self._parts, self._barrier = rank, parts, barrier
        self.gathered: list[int] = []
        """Elements that this rank sent, call by call."""

    def size(self) -> int:
        return len(self._parts)

    def gather(self, out: torch.Tensor, mine: torch.Tensor) -> None:
        self.gathered.append(mine.numel())
        self._parts[self._rank] = mine.clone()
        self._barrier.wait()
        out.copy_(torch.cat(self._parts))
        self._barrier.wait()


collectives = SimpleNamespace(all_gather_single=lambda out, mine, group: group.gather(out, mine))
"""Stands where ``torch.distributed`` does in the module that is tested."""


def run_threads(case: Callable[[int, ThreadGroup], Any], size: int) -> list[Any]:
    """case(rank, group) on every rank; what each returns, or the first error."""
    barrier, parts = threading.Barrier(size, timeout=20), [None] * size
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = case(rank, ThreadGroup(rank, parts, barrier))
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread of the test
            errors.append(error)
            barrier.abort()

    if size == 1:
        return [case(0, ThreadGroup(0, parts, barrier))]
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
