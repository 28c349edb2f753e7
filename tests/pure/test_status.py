"""What Slurm's programs print, as seen on a Slurm 22.05.8, and what it means for a run."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launchers import logs, status, stop
from launchers.jobplan import JobPlan, to_json
from launchers.status import Answers, Run, State
from megatron_distil.errors import ConfigError
from megatron_distil.registry import Record, Registry

RUNNING = "RUNNING|None|n[0-2]|2026-08-08T10:00:00\n"
BETWEEN = "PENDING|BeginTime||N/A\n"
SCONTROL = """JobId=7 JobName=a.run
   Priority=4294901759 Nice=0 Account=a QOS=(null)
   JobState=NODE_FAIL Reason=NodeDown Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
"""


class Folder:
    """A run directory of job 7."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "plan.json").write_text(to_json(JobPlan(name="run", registry="", log="", jobs=())))
        (path / "recipe.toml").write_text("[train]\nnum_steps = 100\n")
        (path / "job.json").write_text(json.dumps({"job_id": "7", "cluster": "h200", "folder": "/exp"}))
        self.run = Run.at(str(path))

    def life(self, restart: int, reason: str = "") -> Registry:
        registry = Registry(self.path / "registry" / f"7.{restart}")
        registry.folder.mkdir(parents=True)
        if reason:
            registry.say_reason(reason)
        return registry

    def state(self, squeue: str | None, sacct: str | None = "", scontrol: str | None = "") -> State:
        return status.look(self.run, lambda _: Answers(squeue, sacct, scontrol))

    def log(self, name: str, text: str) -> None:
        path = self.path / "logs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_a_listed_job_is_alive_whatever_the_accounting_says(folder: Folder):
    folder.life(0, "stopped after 3 of 8 steps")
    for sacct in ("NODE_FAIL|0:0|n1\n", "TIMEOUT|0:0|n1\n", "", None):
        assert folder.state(RUNNING, sacct).exit_code is None
    assert folder.state(RUNNING) == State(word="running", detail="life 0 on n[0-2] until 2026-08-08T10:00:00")


def test_of_several_lines_while_it_is_started_again_the_last_counts(folder: Folder):
    folder.life(0, "unavailable no sandbox")
    state = folder.state(f"COMPLETING|None|n0|N/A\n{BETWEEN}")
    assert state == State(word="requeued", detail="waits for its life 1, unavailable no sandbox")


def test_before_its_first_life_it_is_pending(folder: Folder):
    assert folder.state("PENDING|Resources||N/A\n") == State(word="pending", detail="Resources")


def test_a_job_that_waits_for_a_failed_one_is_dead(folder: Folder):
    assert folder.state("PENDING|DependencyNeverSatisfied||N/A\n").exit_code == 1


@pytest.mark.parametrize(
    ("sacct", "scontrol"),
    [
        ("FAILED|0:9|n0\n", ""),
        ("", "   JobState=FAILED Reason=NonZeroExitCode Dependency=(null)\n   BatchFlag=1 Reboot=0 ExitCode=0:9\n"),
    ],
)
def test_a_batch_script_that_was_killed_is_named_and_not_those_that_were_ended_then(
    folder: Folder, sacct: str, scontrol: str
):
    folder.life(0, "stopped by SIGTERM, on n3")
    detail = "the batch script was killed by SIGKILL; launch goes on with the run"
    assert folder.state("", sacct, scontrol) == State(word="failed", detail=detail, exit_code=1)


@pytest.mark.parametrize(
    ("sacct", "reason", "word", "code"),
    [
        ("COMPLETED|0:0|n0\n", "done", "done", 0),
        ("COMPLETED|0:0|n0\n", "stopped after 3 of 8 steps", "stopped", 0),
        ("COMPLETED|0:0|n0\n", "", "ended without finishing", 1),
        ("FAILED|1:0|n0\n", "fatal no progress", "failed", 1),
        ("FAILED|1:0|n0\n", "done", "failed", 1),
        ("FAILED|0:53|n0\n", "", "failed", 1),
        ("CANCELLED by 1000|0:15|n0\n", "", "cancelled", 1),
        ("OUT_OF_MEMORY|0:125|n0\n", "", "out of memory", 1),
        ("FAILED|1:0|n0\nREQUEUED|0:0|n0\n", "", "between two lives", None),
        ("FAILED|1:0|n0\nCOMPLETED|0:0|n0\n", "done", "done", 0),
    ],
)
def test_a_job_that_is_not_listed_is_what_the_accounting_says_last(
    folder: Folder, sacct: str, reason: str, word: str, code: int | None
):
    folder.life(0, "failed train ended with exit code 1")
    folder.life(1, reason)
    state = folder.state("", sacct)
    assert (state.word, state.exit_code) == (word, code)


def test_without_accounting_scontrol_is_asked_and_then_the_files(folder: Folder):
    folder.life(0)
    assert folder.state("", None, SCONTROL).word == "node fail"
    assert folder.state("", None, "").word == "lost"
    folder.life(10, "done")
    assert folder.state("", None, "") == State(word="done", exit_code=0)


def test_nothing_is_said_of_a_job_that_slurm_does_not_know_yet_or_does_not_answer_for(folder: Folder):
    assert folder.state("", "", "").exit_code is None
    assert folder.state(None, None, None) == State(word="unknown", detail="Slurm does not answer")


def test_only_two_equal_answers_are_an_end(folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys):
    folder.life(0)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    seen: Iterator[Answers] = iter(
        [
            Answers(RUNNING),
            Answers("", "NODE_FAIL|0:0|n0\n", ""),  # once, while it is started again
            Answers(BETWEEN),
            Answers(RUNNING),
            Answers("", "FAILED|1:0|n0\n", ""),
            Answers("", "COMPLETED|0:0|n0\n", ""),
            Answers("", "COMPLETED|0:0|n0\n", ""),
        ]
    )
    folder.life(1, "done")
    assert status.follow(folder.run, asked=lambda _: next(seen)) == 0
    assert next(seen, None) is None
    assert "node fail" in capsys.readouterr().out


def test_ctrl_c_ends_the_looking_and_not_the_run(folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys):
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    assert status.follow(folder.run, asked=lambda _: Answers(RUNNING)) == 130
    assert "the run goes on" in capsys.readouterr().out


def test_the_page_tells_lives_steps_and_services(folder: Folder):
    folder.life(0, "stopped after 53 of 100 steps")
    registry = folder.life(1)
    (folder.path / "checkpoints/step_00000053").mkdir(parents=True)
    (folder.path / "checkpoints/step_00000053/COMPLETE").touch()
    for index, state in enumerate(("ready", "ready", "starting")):
        registry.write(Record("rollout", f"rollout-{index}", "http://n1:3000", 1, 1, state, index, time.time()))  # type: ignore[arg-type]
    registry.write(Record("sandbox", "sandbox-0", "http://n1:6000", 1, 1, "ready", 0, time.time() - 60))
    lines = status.page(folder.run, folder.state(RUNNING)).splitlines()
    assert lines[0] == f"{folder.path.name}: running, life 1 on n[0-2] until 2026-08-08T10:00:00"
    assert [line.strip() for line in lines[1:]] == [
        "job 7 on h200, checkpoint 53 of 100",
        "rollout: 2 ready, 1 starting, 1 restarts",
        "sandbox: 0 ready",
        "life 0: stopped after 53 of 100 steps",
        "life 1: no reason yet",
    ]


def test_the_page_does_not_wait_for_the_word_of_a_life_that_is_over(folder: Folder):
    folder.life(0)
    folder.life(1)
    told = [line.strip() for line in status.page(folder.run, folder.state(RUNNING)).splitlines()]
    assert [line for line in told if line.startswith("life")] == [
        "life 0: ended without a word, as on a lost node or a full disk",
        "life 1: no reason yet",
    ]
    assert "no reason yet" not in status.page(folder.run, folder.state("PENDING|BeginTime|||\n"))
    assert "no reason yet" not in status.page(folder.run, folder.state("", "NODE_FAIL|1:0|n0\n"))


def test_a_failed_run_repeats_the_last_words_of_its_trainer(folder: Folder):
    folder.life(0, "failed train ended with exit code 1")
    folder.log("7.0/trainer-node0.log", "rank 3 was killed by SIGKILL\n")
    assert "rank 3 was killed by SIGKILL" in status.page(folder.run, folder.state("", "FAILED|1:0|n0\n"))


def test_a_run_without_slurm_is_known_by_its_lock_and_its_reason(folder: Folder):
    (folder.path / "job.json").unlink()
    registry = Registry(folder.path / "registry")
    registry.folder.mkdir()
    assert status.look(folder.run).word == "not running"
    with open(registry.folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert status.look(folder.run).word == "running"
    registry.say_reason("fatal the model is no folder")
    assert status.look(folder.run).exit_code == 1


def test_a_run_that_runs_is_not_launched_again(folder: Folder):
    (problem,) = status.already_running(folder.run, lambda _: Answers(BETWEEN))
    assert f"python -m launchers stop {folder.path}" in str(problem)
    assert status.already_running(folder.run, lambda _: Answers("", "FAILED|1:0|n0\n")) == []
    assert status.already_running(folder.run, lambda _: Answers(None)) == []


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys):
    for command in (status, stop, logs):
        assert command.main([str(tmp_path / "nothing")]) == 2
        assert "holds no plan.json" in capsys.readouterr().err


@pytest.fixture
def slurm(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scancel and a scontrol; what was cancelled is in the file."""
    programs = folder.path / "bin"
    programs.mkdir()
    cancelled = folder.path / "cancelled"
    for name, text in {"scancel": f"echo $1 >> {cancelled}", "scontrol": f"echo '{SCONTROL}'"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    return cancelled


def test_a_run_that_runs_is_asked_to_save_and_to_end_in_its_present_life(folder: Folder, slurm: Path):
    before = folder.life(1)  # the second restart has no folder yet
    assert "saves and ends" in stop.stop(folder.run, folder.state(RUNNING))
    assert Registry(folder.path / "registry" / "7.2").end_requested()
    assert not before.stop_requested()
    assert not slurm.exists()


def test_a_run_that_waits_is_cancelled(folder: Folder, slurm: Path):
    folder.life(0, "failed")
    assert stop.stop(folder.run, folder.state(BETWEEN)) == "job 7 is cancelled"
    assert slurm.read_text() == "7\n"


def test_nothing_is_done_to_a_run_that_has_ended_and_none_is_guessed(folder: Folder, slurm: Path):
    folder.life(0, "done")
    assert stop.stop(folder.run, folder.state("", "COMPLETED|0:0|n0\n")) == "it does not run: done"
    with pytest.raises(stop.StopError, match="Slurm does not answer"):
        stop.stop(folder.run, folder.state(None))
    assert not slurm.exists()


@pytest.fixture
def written(folder: Folder) -> Folder:
    folder.life(0)
    folder.life(1)
    folder.log("7.0/trainer-node0.log", "old\n")
    folder.log("7.1/trainer-node0.log", "a\nb\nc\n")
    folder.log("7.1/rollout-0.log", "server\n")
    folder.log("7.1/train-node0/7.1_x/attempt_0/0/stdout.log", "rank\n")
    return folder


def test_logs_are_those_of_the_newest_life_by_role(written: Folder, capsys):
    assert logs.main([str(written.path), "trainer", "-n", "2"]) == 0
    text = capsys.readouterr().out
    assert text == "==> trainer-node0.log\nb\nc\n==> train-node0/7.1_x/attempt_0/0/stdout.log\nrank\n"
    assert logs.main([str(written.path), "--life", "0"]) == 0
    assert capsys.readouterr().out == "==> trainer-node0.log\nold\n"


def test_a_role_or_a_life_without_logs_is_named_with_those_that_have_some(written: Folder, capsys):
    assert logs.main([str(written.path), "sandbox"]) == 2
    assert "There is rollout, trainer." in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"There is 7\.0, 7\.1"):
        logs.folder_of(written.run, "5")


def test_new_lines_are_told_once_and_complete_from_files_that_are_new_as_well(written: Folder):
    tail = logs.Tail(written.path / "logs" / "7.1", "rollout")
    assert tail.new() == []
    with (written.path / "logs/7.1/rollout-0.log").open("a") as file:
        file.write("one\ntwo, no")
    written.log("7.1/rollout-1.log", "new\n")
    assert tail.new() == [("rollout-0.log", "one"), ("rollout-1.log", "new")]
    with (written.path / "logs/7.1/rollout-0.log").open("a") as file:
        file.write(" more\n")
    assert tail.new() == [("rollout-0.log", "two, no more")]
