"""Checkpoints: complete or absent, loadable in another layout, written in the background.

A checkpoint is a folder ``step_00000010`` in Megatron's torch_dist format with a file ``COMPLETE`` that lists its files. It
is written under another name and renamed when it is whole; what a crash left half-written is ignored and removed.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist  # noqa: TID251 - failures are shared, so that no rank waits for another
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from torch import Tensor

from megatron_distil.config.schema import Config, Identity, Section
from megatron_distil.errors import CheckpointError
from megatron_distil.trainer.model import Student
from megatron_distil.trainer.optim import Optimizer
from megatron_distil.trainer.writer import BackgroundWrite, Checksum, checksum, start_write

_MARKER = "COMPLETE"
_CONFIG = "config.json"
_PROBE_BYTES = 64 * 1024

Extra = Mapping[str, Mapping[str, Tensor]]
"""Further weights by the name of their owner; tensors under the local names of ``gpt.named_parameters()``, in its shapes."""


@dataclass(frozen=True)
class _Pending:
    step: int
    temporary: Path
    write: BackgroundWrite


class Checkpoints:
    """The checkpoints of a run. Every method is collective over the world."""

    def __init__(self, folder: str | Path, config: Config, student: Student, optimizer: Optimizer) -> None:
        self._folder = Path(folder)
        self._config = config
        self._student = student
        self._optimizer = optimizer
        self._control = student.groups.control
        self._is_first = student.groups.rank == 0
        self._pending: _Pending | None = None

    def newest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        found: list[int | None] = [None]
        if self._is_first:
            found[0] = max(complete_steps(self._folder), default=None)
        dist.broadcast_object_list(found, group=self._control, group_src=0)
        return found[0]

    def save(self, step: int, extra: Extra | None = None) -> None:
        """Starts to write the state after ``step`` steps; waits for an earlier one first.

        The state is that of this call, whatever happens to it before the bytes are on disk.

        Raises:
            CheckpointError: on every rank; older checkpoints are as they were.
        """
        self.wait()
        self._optimizer.make_state()
        temporary = self._folder / f".{_name(step)}.tmp"
        self._share_failure(self._prepare, temporary, what=_not_written(temporary))
        state = self._state(extra or {}, is_loading=False)
        state["step"], state["num_updates"] = step, self._optimizer.num_updates
        state["layout"], state["extras"] = self._layout(), sorted(extra or {})
        state["rng"] = self._rng_object(_rng_state())
        with _no_deprecations():
            write = start_write(
                partial(_planned, state, temporary),
                temporary,
                rank=self._student.groups.rank,
                in_background=self._config.checkpoint.is_async,
            )
        self._pending = _Pending(step, temporary, write)
        self.poll()

    def poll(self) -> None:
        """Makes a written checkpoint complete; returns at once while it is being written.

        Raises:
            CheckpointError: on every rank, when it could not be written; older checkpoints are as they were.
        """
        if self._pending is None:
            return
        running = torch.tensor(int(self._pending.write.is_running()))
        dist.all_reduce(running, op=dist.ReduceOp.MAX, group=self._control)
        if not running:
            self._complete(self._pending)

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._pending is not None:
            self._pending.write.join()
            self.poll()

    def load(self, extra: Extra | None = None) -> int:
        """Restores the newest complete checkpoint and removes what is half-written.

        Args:
            extra: filled in place.

        Returns:
            The number of steps that are done; 0 where there is no checkpoint, and nothing is changed.

        Raises:
            CheckpointError: on every rank: it is damaged, or of another run.
        """
        if self._is_first:
            for left in self._folder.glob(".step_*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
        step = self.newest()
        if step is None:
            return 0
        folder = self._folder / _name(step)
        self._share_failure(self._check_files, folder, what=_damaged(folder))
        self._share_failure(self._check_identity, folder, what=f"{folder}: is a checkpoint of another run")
        self._share_failure(self._restore, folder, extra or {}, what=_damaged(folder))
        return step

    # ---- saving

    def _prepare(self, temporary: Path) -> None:
        if not self._is_first:
            return
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / _CONFIG).write_text(self._config.model_dump_json(indent=2), encoding="utf-8")
        probe = temporary / "probe"
        probe.write_bytes(bytes(_PROBE_BYTES))  # later one rank alone would fail while the others wait for it
        probe.unlink()

    def _complete(self, pending: _Pending) -> None:
        self._pending = None
        try:
            what = _not_written(pending.temporary)
            sums = self._share_failure(pending.write.checksums, what=what)
            with _no_deprecations():
                for finalize in pending.write.finalize_fns:
                    finalize()
            merged = {name: found for part in sums for name, found in part.items()}
            self._share_failure(self._publish, pending, merged, what=what)
        except CheckpointError:
            if self._is_first:
                shutil.rmtree(pending.temporary, ignore_errors=True)
            raise

    def _publish(self, pending: _Pending, sums: dict[str, Checksum]) -> None:
        if not self._is_first:
            return
        pending.write.clean(pending.temporary)
        for path in pending.temporary.iterdir():
            if path.name not in sums:
                sums[path.name] = checksum(path)
        marker = pending.temporary / _MARKER
        marker.write_text(json.dumps({"step": pending.step, "files": sums}, indent=1), encoding="utf-8")
        _sync(marker)
        final = self._folder / _name(pending.step)
        shutil.rmtree(final, ignore_errors=True)
        pending.temporary.rename(final)
        _sync(self._folder)
        for old in sorted(complete_steps(self._folder))[: -self._config.checkpoint.keep_last]:
            shutil.rmtree(self._folder / _name(old))

    # ---- loading

    def _check_identity(self, folder: Path) -> None:
        if not self._is_first:
            return
        saved = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        differences = [
            f"{path} = {json.dumps(now)}, and the checkpoint has {json.dumps(_at(saved, path))}"
            for path, now in identity(self._config).items()
            if _at(saved, path) != now
        ]
        if differences:
            way_out = "take the old values, or start in another run directory"
            raise CheckpointError("; ".join([*differences, way_out]))

    def _check_files(self, folder: Path) -> None:
        """Each rank reads its share."""
        files: dict[str, list[int]] = json.loads((folder / _MARKER).read_text(encoding="utf-8"))["files"]
        groups = self._student.groups
        for name in sorted(files)[groups.rank :: groups.world_size]:
            if list(checksum(folder / name)) != files[name]:
                raise CheckpointError(f"{name} is not what was written")

    def _restore(self, folder: Path, extra: Extra) -> None:
        common: Any = dist_checkpointing.load_common_state_dict(str(folder))
        missing = sorted(set(extra) - set(common["extras"]))
        if missing:
            raise CheckpointError(f"holds no {', '.join(missing)}")
        state = self._state(extra, is_loading=True)
        is_same_layout = common["layout"] == self._layout()
        if is_same_layout:
            state["rng"] = self._rng_object(None)
        strategy = get_default_load_sharded_strategy(str(folder))
        with _no_deprecations():
            loaded: Any = dist_checkpointing.load(state, str(folder), strategy)
        self._student.gpt.load_state_dict(loaded["model"])
        with torch.no_grad():  # an fp32 model needs it
            self._optimizer.megatron.load_state_dict(loaded["optimizer"])
            for owner, tensors in extra.items():
                for name, tensor in tensors.items():
                    tensor.copy_(loaded[owner][name])
        self._optimizer.continue_at(common["num_updates"])
        if is_same_layout:
            _set_rng_state(loaded["rng"])

    # ---- the state

    def _state(self, extra: Extra, *, is_loading: bool) -> dict[str, Any]:
        metadata = _metadata() | {"dp_cp_group": self._student.groups.dp_cp}
        model: Any = self._student.gpt.sharded_state_dict(metadata=metadata)
        state: dict[str, Any] = {"model": model}
        for owner, tensors in extra.items():
            state[owner] = {name: _like(model[name], f"{owner}.", tensor) for name, tensor in tensors.items()}
        sharded: Any = self._optimizer.megatron.sharded_state_dict
        state["optimizer"] = sharded(model, is_loading=is_loading, metadata=metadata)
        return state

    def _layout(self) -> list[int]:
        groups = self._student.groups
        return [groups.pp_size, groups.tp_size, groups.dp_cp.size()]

    def _rng_object(self, data: object) -> ShardedObject:
        groups = self._student.groups
        place = (groups.pp_rank, groups.tp_rank, groups.dp_cp.rank())
        return ShardedObject("rng", data, tuple(self._layout()), place, replica_id=0)

    def _share_failure(self, work: Any, *args: Any, what: str) -> list[Any]:
        """Runs ``work(*args)``; its results of all ranks, or one CheckpointError on every rank when any failed."""
        result, failure = None, None
        try:
            result = work(*args)
        except Exception as error:  # noqa: BLE001 - whatever a library raises, no rank may wait for this one
            failure = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        everyone: list[Any] = [None] * self._control.size()
        dist.all_gather_object(everyone, (result, failure), group=self._control)
        failures = list(dict.fromkeys(failure for _, failure in everyone if failure is not None))
        if failures:
            raise CheckpointError(f"{what}: {failures[0]}")
        return [result for result, _ in everyone]


def save_weights(student: Student, folder: Path) -> None:
    """Writes the student alone, for any layout. Collective over the world."""
    metadata = _metadata() | {"dp_cp_group": student.groups.dp_cp}
    state: dict[str, Any] = {"model": student.gpt.sharded_state_dict(metadata=metadata)}
    with _no_deprecations():
        write = start_write(partial(_planned, state, folder), folder, rank=student.groups.rank, in_background=False)
        write.checksums()  # raises what went wrong
        for finalize in write.finalize_fns:
            finalize()
    if student.groups.rank == 0:
        write.clean(folder)


def load_weights(student: Student, folder: Path) -> None:
    """Takes the student from a checkpoint and leaves the rest of it. Collective over the world.

    Raises:
        CheckpointError: it is damaged.
    """
    metadata = _metadata() | {"dp_cp_group": student.groups.dp_cp}
    state: Any = {"model": student.gpt.sharded_state_dict(metadata=metadata)}
    try:
        with _no_deprecations():
            loaded: Any = dist_checkpointing.load(state, str(folder), get_default_load_sharded_strategy(str(folder)))
        student.gpt.load_state_dict(loaded["model"])
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {type(error).__name__}: {error}") from error


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, which need not exist."""
    return [int(path.parent.name.removeprefix("step_")) for path in folder.glob(f"step_*/{_MARKER}")]


def identity(config: Section, prefix: str = "") -> dict[str, object]:
    """Path and JSON value of every field that says what a run is."""
    found: dict[str, object] = {}
    values = config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if any(isinstance(mark, Identity) for mark in field.metadata):
            found[prefix + name] = values[name]
        elif isinstance(value, Section):
            found |= identity(value, f"{prefix}{name}.")
    return found


def _at(table: Any, path: str) -> object:
    for name in path.split("."):
        table = table.get(name) if isinstance(table, dict) else None
    return table


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _not_written(temporary: Path) -> str:
    free = shutil.disk_usage(temporary.parent if temporary.parent.exists() else "/").free
    return f"{temporary}: cannot be written ({free // 2**20} MiB are free there; older checkpoints are intact)"


def _damaged(folder: Path) -> str:
    older = [step for step in complete_steps(folder.parent) if _name(step) < folder.name]
    others = f"resume from {_name(max(older))}" if older else "start from the beginning"
    return f"{folder}: cannot be loaded (remove this folder to {others})"


@contextmanager
def _no_deprecations() -> Iterator[None]:
    """Megatron saves and loads through torch's ShardedTensor, and every tensor would warn that this will go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _planned(state: dict[str, Any], folder: Path) -> Any:
    """What is to be written, as Megatron plans it."""
    takes = inspect.signature(dist_checkpointing.save).parameters
    newer: dict[str, Any] = {"async_strategy": "mcore"} if "async_strategy" in takes else {}
    kind: Any = ("torch_dist", 1) if inspect.signature(get_default_save_sharded_strategy).parameters else ()
    return dist_checkpointing.save(
        state,
        str(folder),
        get_default_save_sharded_strategy(*kind),
        async_sharded_save=True,
        content_metadata=_metadata(),
        **newer,
    )


def _like(sharded: Any, prefix: str, tensor: Tensor) -> Any:
    """The place of a parameter in the whole model, for another tensor of its shape."""
    if isinstance(sharded, ShardedTensorFactory):
        return replace(sharded, key=prefix + sharded.key, data=tensor)
    return replace(sharded, key=prefix + sharded.key, data=tensor, dtype=tensor.dtype)


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
