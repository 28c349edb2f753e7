"""Who computes together: the process groups of a run, made once, in one order on all ranks."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist  # noqa: TID251 - this module makes the groups
from megatron.core import parallel_state  # noqa: TID251 - this module makes the groups
from torch._C._distributed_c10d import HashStore  # torch.distributed has it, and does not export it
from torch.distributed import ProcessGroup  # noqa: TID251 - the type of a group

from megatron_distil.config.schema import ParallelConfig
from megatron_distil.errors import ConfigError, Problem


@dataclass(frozen=True)
class Groups:
    """Every group of one rank. A function that communicates takes the group it needs from here.

    Ranks are laid out with tp fastest, then cp, dp, pp.
    """

    world: ProcessGroup
    tp: ProcessGroup
    pp: ProcessGroup
    cp: ProcessGroup
    dp: ProcessGroup
    dp_cp: ProcessGroup
    replica: ProcessGroup
    """gloo; the tp * cp * pp ranks of one copy of the model, for objects."""
    control: ProcessGroup
    """gloo; all ranks, for objects; its deadline is ``train.collect_timeout_s``."""
    device: torch.device

    @property
    def rank(self) -> int:
        return self.world.rank()

    @property
    def world_size(self) -> int:
        return self.world.size()

    @property
    def tp_rank(self) -> int:
        return self.tp.rank()

    @property
    def tp_size(self) -> int:
        return self.tp.size()

    @property
    def pp_rank(self) -> int:
        return self.pp.rank()

    @property
    def pp_size(self) -> int:
        return self.pp.size()

    @property
    def cp_rank(self) -> int:
        return self.cp.rank()

    @property
    def cp_size(self) -> int:
        return self.cp.size()

    @property
    def dp_rank(self) -> int:
        return self.dp.rank()

    @property
    def dp_size(self) -> int:
        return self.dp.size()

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_head(self) -> bool:
        """Whether this rank does the I/O of its replica."""
        return self.replica.rank() == 0

    @property
    def replica_index(self) -> int:
        return self.dp_rank


def make_groups(parallel: ParallelConfig, *, collective_timeout_s: float, collect_timeout_s: float) -> Groups:
    """Collective over the world: makes every group, NCCL where CUDA is and gloo where it is not.

    torch.distributed is initialised from torchrun's variables unless it already is; a process that torchrun did not start
    is a world of one.

    Raises:
        ConfigError: the sizes do not multiply to the number of processes.
    """
    if not dist.is_initialized():
        _initialise(collective_timeout_s)
    if parallel.world_size != dist.get_world_size():
        raise ConfigError([_wrong_world(parallel, dist.get_world_size())])
    parallel_state.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        context_parallel_size=parallel.cp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=collective_timeout_s / 60,  # pyright: ignore[reportArgumentType] - of a timedelta
    )
    return Groups(
        world=_group(dist.group.WORLD),
        tp=_group(parallel_state.get_tensor_model_parallel_group()),
        pp=_group(parallel_state.get_pipeline_model_parallel_group()),
        cp=_group(parallel_state.get_context_parallel_group()),
        dp=_group(parallel_state.get_data_parallel_group()),
        dp_cp=_group(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        replica=_own_replica(parallel, collective_timeout_s),
        control=_group(dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=collect_timeout_s))),
        device=torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"),
    )


def close_groups() -> None:
    """Ends torch.distributed in this process."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def replica_ranks(parallel: ParallelConfig, replica: int) -> list[int]:
    """The global ranks of one copy of the model; the first is its head."""
    per_stage = parallel.tp * parallel.cp
    first = [per_stage * (replica + parallel.dp * stage) for stage in range(parallel.pp)]
    return [start + offset for start in first for offset in range(per_stage)]


def _initialise(timeout_s: float) -> None:
    env = os.environ  # noqa: TID251 - torchrun says here who we are
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(env.get("LOCAL_RANK", "0")))
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "nccl" if has_cuda else "gloo"
    if "RANK" in env:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=HashStore(), rank=0, world_size=1)


def _own_replica(parallel: ParallelConfig, timeout_s: float) -> ProcessGroup:
    mine = None
    for index in range(parallel.dp):
        ranks = replica_ranks(parallel, index)
        group = dist.new_group(ranks, backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
        if dist.get_rank() in ranks:
            mine = group
    return _group(mine)


def _group(made: object) -> ProcessGroup:
    """What torch and Megatron annotate as a group or something else; of a rank inside of it, it is a group."""
    if not isinstance(made, ProcessGroup):
        raise TypeError(f"rank {dist.get_rank()} has no such group: {made!r}")
    return made


def _wrong_world(parallel: ParallelConfig, processes: int) -> Problem:
    sizes = f"tp {parallel.tp} * pp {parallel.pp} * cp {parallel.cp} * dp {parallel.dp} = {parallel.world_size}"
    share = parallel.tp * parallel.pp * parallel.cp
    way_out = f"Start {parallel.world_size} processes" + (
        f", or set parallel.dp={processes // share}" if processes % share == 0 else ""
    )
    return Problem("parallel", sizes, f"torchrun started {processes} trainer processes", way_out + ".")
