"""The start of a life, run by a plain bash: no Slurm is needed to see whether a job would go on."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launchers.life import setup_text
from megatron_distil.registry import Registry


class Job:
    """Lives of job 7 in a run directory with a space in its name."""

    def __init__(self, run: Path, max_same: int) -> None:
        self.run, self.text = run, setup_text(str(run), ["trainer", "rollout"], max_lives_without_progress=max_same)

    def live(self, restart: int, then: str = "echo alive") -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "SLURM_JOB_ID": "7"} | ({"SLURM_RESTART_COUNT": str(restart)} if restart else {})
        script = f"set +e\n{self.text}\n{then}\n"
        return subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=False, timeout=20)

    def folder(self, restart: int) -> Path:
        return self.run / "registry" / f"7.{restart}"

    def say_reason(self, restart: int, text: str) -> None:
        (self.folder(restart) / "REASON").write_text(text + "\n")

    def save(self, step: int) -> None:
        checkpoint = self.run / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "COMPLETE").touch()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    run = tmp_path / "the run's"
    run.mkdir()
    return Job(run, max_same=2)


def test_a_first_life_goes_on_and_has_a_folder_and_no_core_files(job: Job):
    ran = job.live(0, "echo alive; ulimit -c")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "alive\n0\n", "")
    assert job.folder(0).is_dir()


@pytest.mark.parametrize("reason", ["stopped by USR1", "unavailable no sandbox", "failed rank 0 ended with 1", ""])
def test_a_life_after_one_that_may_be_repeated_goes_on(job: Job, reason: str):
    job.live(0)
    if reason:
        job.say_reason(0, reason)
    assert job.live(1).stdout == "alive\n"


def test_after_a_fatal_reason_the_job_ends_and_repeats_it(job: Job):
    job.live(0)
    job.say_reason(0, "fatal train ended with exit code 2")
    ran = job.live(1)
    assert ran.returncode == 1
    assert "alive" not in ran.stdout
    assert (job.folder(1) / "REASON").read_text() == "fatal train ended with exit code 2\n"


ENDED = "pids[0]=11; pids[1]=12; pid=12; exitcode=137"
"""What nemo-run's script knows after the end of the second step."""


def requeue(job: Job, *, refusals: int, restarts_after: int = 100) -> tuple[int, int]:
    """What nemo-run's script does at the end of life 0, whose second step was killed, with so many refusals of the controller: exit code, questions.

    After ``restarts_after`` of them Slurm has started the job by itself.
    """
    programs, asked = job.run / "bin", job.run / "asked"
    programs.mkdir()
    count = f'"$(wc -l <{str(asked)!r})"'
    shown = f'[ {count} -ge {restarts_after} ]\necho "   Requeue=1 Restarts=$((1 - $?)) BatchFlag=1 Reboot=0"\n'
    answer = f'if [ "$1" = show ]; then\n{shown}exit 0\nfi\necho "$@" >>{str(asked)!r}\n[ {count} -gt {refusals} ]\n'
    for name, text in {"scontrol": answer, "sleep": "exit 0\n"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}")
        (programs / name).chmod(0o755)
    asked.touch()
    ran = job.live(0, f'PATH={str(programs)!r}:$PATH\n{ENDED}\nset -e\nscontrol requeue "$SLURM_JOB_ID"\nexit 9')
    questions = asked.read_text().splitlines()
    assert set(questions) <= {"requeue 7"}
    return ran.returncode, len(questions)


def test_another_life_is_asked_for_until_the_controller_answers(job: Job):
    assert requeue(job, refusals=3) == (9, 4)


def test_a_controller_that_never_answers_is_given_up(job: Job):
    assert requeue(job, refusals=100) == (1, 60)


@pytest.mark.parametrize("tries", [0, 2])
def test_a_life_that_was_given_up_does_not_end_the_one_that_took_over(job: Job, tries: int):
    assert requeue(job, refusals=100, restarts_after=tries) == (9, tries)


@pytest.mark.parametrize(("reason", "expected"), [("stopped after 3 of 6 steps", (0, 0)), ("failed train", (9, 1))])
def test_no_other_life_is_asked_for_when_a_run_has_saved_that_was_asked_to_end(
    job: Job, reason: str, expected: tuple[int, int]
):
    Registry(job.folder(0)).request_end()
    job.say_reason(0, reason)
    assert requeue(job, refusals=0) == expected


def test_another_life_is_asked_for_after_a_time_limit(job: Job):
    Registry(job.folder(0)).request_stop()
    job.say_reason(0, "stopped after 3 of 6 steps")
    assert requeue(job, refusals=0) == (9, 1)


def test_no_other_life_is_asked_for_after_a_fatal_reason(job: Job):
    job.folder(0).mkdir(parents=True)
    job.say_reason(0, "fatal train ended with exit code 2")
    assert requeue(job, refusals=0) == (9, 0)


@pytest.mark.parametrize("said", ["", "stopped by SIGTERM, on n2"])
def test_a_step_that_was_killed_is_the_reason_where_nobody_left_a_better_one(job: Job, said: str):
    job.folder(0).mkdir(parents=True)
    if said:
        job.say_reason(0, said)
    requeue(job, refusals=0)
    text = "failed rollout ended with exit code 137, and nobody said why"
    assert Registry(job.folder(0)).reason() == text


def test_a_reason_is_kept(job: Job):
    job.folder(0).mkdir(parents=True)
    job.say_reason(0, "failed train was killed by SIGKILL, on n2")
    requeue(job, refusals=0)
    assert Registry(job.folder(0)).reason() == "failed train was killed by SIGKILL, on n2"


def test_a_run_that_was_asked_to_end_and_was_lost_before_it_could_is_not_started_again(job: Job):
    job.live(0)
    Registry(job.folder(0)).request_end()
    job.say_reason(0, "failed train was killed by SIGKILL")
    ran = job.live(1)
    assert (ran.returncode, ran.stdout) == (0, "distil: the run was asked to end\n")
    assert Registry(job.folder(1)).reason().startswith("stopped")


def test_a_time_limit_that_comes_after_the_wish_to_end_takes_nothing_from_it(job: Job):
    job.live(0)
    Registry(job.folder(0)).request_end()
    (job.folder(0) / "STOP").touch()  # as the trap does
    assert "alive" not in job.live(1).stdout


def test_a_time_limit_alone_is_followed_by_another_life(job: Job):
    job.live(0)
    Registry(job.folder(0)).request_stop()
    assert job.live(1).stdout == "alive\n"


def test_lives_without_a_new_checkpoint_are_counted_and_ended(job: Job):
    assert [job.live(life).returncode for life in range(3)] == [0, 0, 1]
    assert (job.folder(2) / "REASON").read_text() == "fatal no progress: the newest checkpoint is none since 2 lives\n"


def test_a_new_checkpoint_starts_the_count_again(job: Job):
    codes = []
    for life in range(7):
        codes.append(job.live(life).returncode)
        if life in (1, 3):
            job.save(8 + life)  # 9 and 11: not the order of the digits
    assert codes == [0, 0, 0, 0, 0, 0, 1]
    assert "step_00000011 since 2 lives" in (job.folder(6) / "REASON").read_text()


def test_a_checkpoint_that_is_not_complete_is_no_progress(job: Job):
    job.live(0)
    (job.run / "checkpoints" / "step_00000005").mkdir(parents=True)
    assert [job.live(life).returncode for life in (1, 2)] == [0, 1]


def test_the_signal_asks_the_run_to_stop_and_the_shell_goes_on(job: Job):
    env = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "3"}
    script = f"{job.text}\necho ready\nwhile [ ! -e go ]; do sleep 0.05; done\necho went on\n"
    with subprocess.Popen(["bash", "-c", script], env=env, cwd=job.run, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        assert shell.stdout.readline() == "ready\n"
        shell.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not (job.folder(3) / "STOP").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (job.run / "go").touch()
        assert shell.stdout.read().splitlines()[-1] == "went on"
    assert shell.returncode == 0


def live_with_a_short_sleep(job: Job, programs: Path, sleep: str) -> subprocess.CompletedProcess[str]:
    """With another ``sleep`` on the path."""
    programs.mkdir()
    (programs / "sleep").write_text(f"#!/bin/sh\n{sleep}\n")
    (programs / "sleep").chmod(0o755)
    job.text = f"PATH={str(programs)!r}:$PATH\n{job.text}"
    return job.live(0)


def test_a_folder_that_cannot_be_written_ends_the_job_with_a_word_about_it(tmp_path: Path):
    file = tmp_path / "file"
    file.touch()
    ran = live_with_a_short_sleep(Job(file, max_same=2), tmp_path / "bin", "exit 0")
    assert ran.returncode == 1
    assert f"distil: {file}/registry/7.0 cannot be written, try 60 of 60\n" in ran.stdout


def test_another_life_is_asked_for_when_the_folder_can_be_written_again(job: Job):
    job.live(0)
    programs = job.run / "bin"
    programs.mkdir()
    life = shlex.quote(str(job.folder(0)))
    for name, text in {"scontrol": "echo asked >&2", "sleep": f"rm -f {life}"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    ran = job.live(
        0, f"PATH={shlex.quote(str(programs))}:$PATH\n{ENDED}\nrm -r {life}; touch {life}\nset -e\nscontrol requeue 7"
    )
    assert f"{job.folder(0)} cannot be written, try 1 of 60" in ran.stdout
    assert ran.stderr.endswith("asked\n")
    assert (job.folder(0) / "REASON").read_text() == "failed the shared folder could not be written\n"


def test_a_folder_that_can_be_written_again_is_waited_for(tmp_path: Path):
    file = tmp_path / "file"
    file.touch()
    ran = live_with_a_short_sleep(Job(file, max_same=2), tmp_path / "bin", f"rm -f '{file}'; mkdir -p '{file}'")
    assert ran.returncode == 0
    assert ran.stdout == f"distil: {file}/registry/7.0 cannot be written, try 1 of 60\nalive\n"
