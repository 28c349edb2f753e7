"""The one place where a rank is special: work that the head of a replica does for all of it."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist  # noqa: TID251 - results and errors of a head go to the other ranks

from megatron_distil.errors import ForeignError
from megatron_distil.trainer.groups import Groups

R = TypeVar("R")


class Replica:
    """One copy of the model, as seen from one of its ranks. Every method is collective over the world.

    There is one event loop for the whole run, because connection pools belong to a loop.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._runner: asyncio.Runner | None = None

    def on_head(self, work: Callable[[], Awaitable[list[R]]]) -> list[R]:
        """Runs ``work`` once per replica, on its head, and shares the result in the replica.

        Raises:
            DistilError: on every rank, when any head raised; the first head's error, with its rank as a note.
            Exception: likewise, where it survives pickling; otherwise its text in a ``ForeignError``.
        """
        result: list[list[R] | None] = [None]
        failure: Exception | None = None
        if self._groups.is_head:
            try:
                result[0] = self._loop().run(_awaited(work))
            except Exception as error:  # noqa: BLE001 - whatever it is, every rank must see it
                failure = error
        self._raise_everywhere(failure)
        dist.broadcast_object_list(result, group=self._groups.replica, group_src=0)
        if result[0] is None:
            raise RuntimeError("the head of the replica returned None instead of a list")
        return result[0]

    def exchange(self, items: Sequence[R], group_of: Callable[[R], object], size_of: Callable[[R], int]) -> list[R]:
        """Spreads whole groups over the replicas so that each has about the same size.

        Args:
            items: those of this replica, the same on each of its ranks.
            group_of: items of equal value stay together; the value is unique to the group over all replicas.
            size_of: what is balanced, such as tokens.

        Returns:
            The new share of this replica, in the order of the replicas that had the items.
        """
        if self._groups.dp_size == 1:
            return list(items)
        everyone: list[list[R]] = [[] for _ in range(self._groups.dp_size)]
        dist.all_gather_object(everyone, list(items), group=self._groups.dp)
        by_group: dict[object, list[R]] = {}
        for item in (item for part in everyone for item in part):
            by_group.setdefault(group_of(item), []).append(item)
        whole = list(by_group.values())
        shares = balanced([sum(map(size_of, group)) for group in whole], self._groups.dp_size)
        return [item for index in shares[self._groups.replica_index] for item in whole[index]]

    def sum_over_replicas(self, values: Sequence[float]) -> list[float]:
        """Sums of numbers that are equal on all ranks of a replica; float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self._groups.device)
        dist.all_reduce(total, group=self._groups.dp)
        return total.tolist()

    def gather(self, value: R) -> list[R]:
        """What every replica gives, in their order. The ranks of a replica give the same."""
        if self._groups.dp_size == 1:
            return [value]
        everyone: list[R] = [value] * self._groups.dp_size
        dist.all_gather_object(everyone, value, group=self._groups.dp)
        return everyone

    def any_rank(self, flag: bool) -> bool:
        """Whether it is true on any rank of the world."""
        found = torch.tensor(int(flag))
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._groups.control)
        return bool(found)

    def close(self, last: Callable[[], Awaitable[None]] | None = None) -> None:
        """Ends the event loop of this rank, after ``last`` has closed what lives in it; not collective."""
        if self._runner is not None:
            if last is not None:
                self._runner.run(_awaited(last))
            self._runner.close()

    def _loop(self) -> asyncio.Runner:
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner

    def _raise_everywhere(self, failure: Exception | None) -> None:
        """Raises the error of the first rank that has one; the rank itself raises the original."""
        group = self._groups.control
        failures: list[Exception | None] = [None] * group.size()
        dist.all_gather_object(failures, None if failure is None else portable(failure), group=group)
        first = next((rank for rank, error in enumerate(failures) if error is not None), None)
        if first is None:
            return
        error = failure if first == group.rank() else failures[first]
        if error is not None:
            error.add_note(f"raised on rank {first}")
            raise error


async def _awaited(work: Callable[[], Awaitable[R]]) -> R:
    return await work()


def portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, otherwise its class and text as a ``ForeignError``."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - __reduce__ and __init__ of a foreign class may raise anything
        copy = None
    if type(copy) is type(error) and str(copy) == str(error):
        return error
    text = f"{type(error).__module__}.{type(error).__qualname__}: {error}"
    return ForeignError(text)


def balanced(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of ``sizes`` in ``parts`` shares of nearly equal sums; their counts differ by at most one.

    Largest first, each to the lightest share that has room. The counts are bounded because the shares are later cut into
    the same number of batches. A pure function: ties go to the smaller index, so all ranks find the same.
    """
    fewest, extra = divmod(len(sizes), parts)
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    longer = 0  # shares that hold fewest + 1
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        room = [p for p in range(parts) if len(shares[p]) < fewest or (len(shares[p]) == fewest and longer < extra)]
        part = min(room, key=lambda p: (loads[p], p))
        longer += len(shares[part]) == fewest
        shares[part].append(index)
        loads[part] += sizes[index]
    return [sorted(share) for share in shares]
