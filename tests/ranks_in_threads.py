"""The ranks of a group as threads of one process: what they gather, and how often, without a process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

torch.set_num_threads(1)  # tensors are small here, and the ranks are threads already


class Meeting:
    """Where the ranks wait for each other. One of them runs at a time: threads that compete are slower."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.turn = threading.Lock()
        self.parts: list[list[Any]] = [[None] * size, [None] * size]
        """Of even and of odd calls: a rank may write its next part while another still reads."""


class ThreadGroup:
    """One rank's view of the group; stands where a ``ProcessGroup`` does."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        self._rank, self._size, self._meeting = rank, size, meeting
        self.gathered: list[int] = []
        """Elements that this rank sent, call by call."""

    def size(self) -> int:
        return self._size

    def gather(self, out: torch.Tensor, mine: torch.Tensor) -> None:
        parts = self._meeting.parts[len(self.gathered) % 2]
        self.gathered.append(mine.numel())
        parts[self._rank] = mine
        self._meeting.turn.release()
        try:
            self._meeting.barrier.wait()
        finally:
            self._meeting.turn.acquire()
        out.copy_(torch.cat(parts))


collectives = SimpleNamespace(all_gather_single=lambda out, mine, group: group.gather(out, mine))
"""Stands where ``torch.distributed`` does in the module that is tested."""


def run_threads(case: Callable[[int, ThreadGroup], Any], size: int) -> list[Any]:
    """case(rank, group) on every rank; what each returns, or the first error."""
    meeting = Meeting(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            with meeting.turn:
                results[rank] = case(rank, ThreadGroup(rank, size, meeting))
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread of the test
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
