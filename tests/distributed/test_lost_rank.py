"""What a rank says when another one dies in a collective: gloo tells it by a text, and we go by that text."""

import os

import pytest
import torch
import torch.distributed as dist
import typer

from megatron_distil.cli import _reported
from tests.world import RankFailed, run_ranks


def _dies(rank: int) -> None:
    dist.barrier()
    if rank == 1:
        os._exit(0)
    with pytest.raises(typer.Exit) as ended:
        _reduce_for_ever()
    assert ended.value.exit_code == 1


def _reduce_for_ever() -> None:
    """Until the connection is known to be broken."""
    with _reported():
        while True:
            dist.all_reduce(torch.zeros(2**16))


def test_the_survivor_says_it_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(_dies, 2)
    said = capfd.readouterr().err
    assert "rank 0: the connection to another rank broke; torchrun says which one ended first" in said


def _fails(rank: int) -> None:
    with _reported():
        raise RuntimeError("gloo is not to blame")


def test_another_error_is_not_taken_for_it(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankFailed):
        run_ranks(_fails, 1)
    assert "rank 0: RuntimeError: gloo is not to blame" in capfd.readouterr().err
