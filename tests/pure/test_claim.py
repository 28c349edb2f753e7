"""Launches of one run at the same time, as processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers.claim import STALE_S, only_launch
from megatron_distil.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
NUM_RACERS, NUM_ROUNDS = 5, 12
RACER = """
import sys, time
from pathlib import Path
from launchers.claim import only_launch
from megatron_distil.errors import ConfigError

folder, me, racers, rounds, start = Path(sys.argv[1]), *map(int, sys.argv[2:5]), float(sys.argv[5])
for number in range(rounds):
    run = folder / f"run{number}"
    while time.time() < start + 0.1 * number:
        pass
    try:
        with only_launch(run):
            (run / f"won.{me}").touch()
            deadline = time.monotonic() + 3.0
            while len(list(run.glob("refused.*"))) < racers - 1 and time.monotonic() < deadline:
                time.sleep(0.005)
    except ConfigError:
        (run / f"refused.{me}").touch()
"""


def dead_pid() -> int:
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


def leave(run: Path, **holder: object) -> Path:
    """What a launch leaves that died."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "launching").write_text(json.dumps(holder) if holder else "")
    return run


def left_by_the_dead(run: Path, number: int) -> None:
    """Nothing, or one of three things."""
    if number % 4 == 1:
        leave(run, host=socket.gethostname(), pid=dead_pid(), since=time.time())
    elif number % 4 == 2:
        leave(run, host="login2", pid=1, since=time.time() - STALE_S - 1)
    elif number % 4 == 3:
        os.utime(leave(run) / "launching", (time.time() - STALE_S - 1,) * 2)


def test_of_several_at_once_one_launches_also_where_a_dead_one_has_left_its_file(tmp_path: Path):
    for number in range(NUM_ROUNDS):
        left_by_the_dead(tmp_path / f"run{number}", number)
    start = time.time() + 1.0
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, *map(str, (tmp_path, index, NUM_RACERS, NUM_ROUNDS, start))],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for index in range(NUM_RACERS)
    ]
    assert [racer.wait(timeout=60) for racer in racers] == [0] * NUM_RACERS
    for number in range(NUM_ROUNDS):
        names = sorted(path.name.partition(".")[0] for path in (tmp_path / f"run{number}").iterdir())
        assert names == ["refused"] * (NUM_RACERS - 1) + ["won"]


@pytest.mark.parametrize(
    ("holder", "text"),
    [
        ({"host": socket.gethostname(), "pid": os.getpid()}, f"process {os.getpid()} of {socket.gethostname()} launches"),
        ({"host": "login2", "pid": 77}, "process 77 of login2 launches"),
        ({}, "process 0 of an unknown host launches"),
    ],
)  # fmt: skip
def test_a_launch_that_goes_on_is_named(tmp_path: Path, holder: dict[str, object], text: str):
    run = leave(tmp_path / "run", **({**holder, "since": time.time()} if holder else {}))
    before = (run / "launching").read_text()
    with pytest.raises(ConfigError) as refused, only_launch(run):
        pass
    (problem,) = refused.value.problems
    assert str(problem).startswith(f"--name = 'run': {text} it since {time.strftime('%F')}")
    assert f"remove {run}/launching and" in str(problem)
    assert (run / "launching").read_text() == before


def test_the_file_goes_with_the_launch_also_when_it_fails(tmp_path: Path):
    run = tmp_path / "runs" / "run"

    def fail() -> None:
        with only_launch(run):
            assert json.loads((run / "launching").read_text())["pid"] == os.getpid()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(run.iterdir()) == []


def test_what_has_been_taken_over_is_left_to_the_other_one(tmp_path: Path):
    with only_launch(tmp_path):
        leave(tmp_path, host="login2", pid=77, since=time.time())
    assert (tmp_path / "launching").exists()


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path):
    (tmp_path / "file").touch()
    said = r"cannot be written to: Not a directory\. Make room there"
    with pytest.raises(ConfigError, match=said), only_launch(tmp_path / "file" / "run"):
        pass


def test_who_takes_over_and_dies_meanwhile_is_named_as_well(tmp_path: Path):
    run = leave(tmp_path, host="login2", pid=1, since=time.time() - STALE_S - 1)
    (run / "launching.over").touch()
    with pytest.raises(ConfigError, match=r"remove .*/launching and launching\.over"), only_launch(run):
        pass
