import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from launchers import guard
from launchers import torchrun as torchrun_command
from launchers.jobplan import Job
from megatron_distil.registry import HEARTBEAT_S, Registry
from tests.supervised import eventually, is_alive, job, none_alive, service, shell, supervised


def everything(folder: Path, running, count: int) -> list[int]:
    eventually(lambda: len(running.pids()) >= count, f"{count} processes in {folder}")
    return running.pids()


def test_the_exit_code_of_a_failed_job_is_ours_and_the_next_job_does_not_run(tmp_path):
    jobs = (shell(tmp_path, "exit 7", "first"), shell(tmp_path, "touch second", "second"))
    with supervised(tmp_path, *jobs) as running:
        code, text = running.finished()
        reason = running.registry.reason()

    assert code == 7
    assert "first ended with exit code 7" in text
    assert reason == "failed first ended with exit code 7"
    assert not (tmp_path / "second").exists()


def test_jobs_run_one_after_another_and_services_end_with_the_last(tmp_path):
    jobs = (shell(tmp_path, "sleep 0.3; echo 1 >> order", "a"), shell(tmp_path, "echo 2 >> order; sleep 1", "b"))
    with supervised(tmp_path, *jobs, services=(service(tmp_path),)) as running:
        pids = everything(tmp_path, running, 2)
        code, text = running.finished()

        assert code == 0
        assert (tmp_path / "order").read_text() == "1\n2\n"
        assert none_alive(pids)
        assert running.registry.reason() == "done"
        assert "rollout-0 is ready" in text
        assert running.registry.live("rollout", state=None) == []


def test_a_service_starts_after_the_job_that_it_waits_for(tmp_path):
    jobs = (
        shell(tmp_path, "sleep 1; test ! -e pids && touch first_was_alone", "first"),
        shell(tmp_path, "while ! test -e pids; do sleep 0.05; done", "second"),
    )
    with supervised(tmp_path, *jobs, services=(service(tmp_path, start_after="first"),)) as running:
        assert running.finished()[0] == 0
    assert (tmp_path / "first_was_alone").exists()


def test_a_killed_service_comes_back_under_a_new_number_and_port(tmp_path):
    with supervised(tmp_path, job(tmp_path), services=(service(tmp_path),)) as running:
        first = running.record(gen=0)
        old = running.pids()
        os.kill(first.pid, signal.SIGKILL)
        second = running.record(gen=1)

        assert second.pid != first.pid
        assert second.url != first.url
        eventually(lambda: none_alive([first.pid]), "the first instance is gone")
        still = [pid for pid in old if is_alive(pid)]
        assert str(first.pid) not in map(str, still)


def test_what_a_killed_service_had_started_is_killed_as_well(tmp_path):
    with supervised(tmp_path, shell(tmp_path, "sleep 60"), services=(service(tmp_path),)) as running:
        first = running.record(gen=0)
        old = everything(tmp_path, running, 2)
        os.kill(first.pid, signal.SIGKILL)
        eventually(lambda: none_alive(old), "service and descendant are gone")
        running.record(gen=1)


def test_a_killed_guard_leaves_nothing_either(tmp_path):
    with supervised(tmp_path, shell(tmp_path, "sleep 60"), services=(service(tmp_path),)) as running:
        first = running.record(gen=0)
        old = everything(tmp_path, running, 2)
        parent = int(Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(parent, signal.SIGKILL)
        eventually(lambda: none_alive(old), "service and descendant are gone")
        running.record(gen=1)


def test_kill_minus_9_of_the_supervisor_leaves_no_orphan(tmp_path):
    with supervised(tmp_path, job(tmp_path), services=(service(tmp_path),)) as running:
        running.record()
        pids = everything(tmp_path, running, 4)
        assert all(map(is_alive, pids))
        running.process.kill()
        eventually(lambda: none_alive(pids), f"all of {pids} are gone", timeout_s=10.0)


def test_the_death_of_a_job_takes_its_workers_along(tmp_path):
    with supervised(tmp_path, job(tmp_path)) as running:
        pids = everything(tmp_path, running, 2)
        os.kill(pids[0], signal.SIGKILL)
        code, text = running.finished()

    assert code == 128 + signal.SIGKILL
    assert "train was killed by SIGKILL" in text
    assert none_alive(pids)


def test_one_ctrl_c_lets_the_job_save_and_ends_with_130(tmp_path):
    with supervised(tmp_path, job(tmp_path), services=(service(tmp_path),)) as running:
        running.record()
        pids = everything(tmp_path, running, 4)
        running.process.send_signal(signal.SIGINT)
        code, text = running.finished()

        assert code == 130
        assert (tmp_path / "saved").exists()
        assert none_alive(pids)
        assert running.registry.reason() == "stopped by SIGINT"
        assert "train saves and ends" in text


def test_two_ctrl_c_end_a_job_that_does_not_listen(tmp_path):
    with supervised(tmp_path, job(tmp_path, "for ever", stop_grace_s=600.0)) as running:
        pids = everything(tmp_path, running, 2)
        running.process.send_signal(signal.SIGINT)
        eventually(running.registry.stop_requested, "STOP is there")
        assert is_alive(pids[0])
        running.process.send_signal(signal.SIGINT)
        code, _ = running.finished(timeout_s=10.0)

    assert code == 130
    assert none_alive(pids)


def test_a_job_that_ignores_stop_is_ended_at_its_deadline(tmp_path):
    with supervised(tmp_path, job(tmp_path, "for ever", stop_grace_s=1.0)) as running:
        pids = everything(tmp_path, running, 2)
        running.process.send_signal(signal.SIGTERM)
        code, text = running.finished(timeout_s=20.0)

    assert code == 143
    assert "train did not end within 1 s" in text
    assert none_alive(pids)


def test_a_fixed_port_in_use_is_named(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with supervised(tmp_path, shell(tmp_path, "sleep 60"), services=(service(tmp_path, port=port),)) as running:
            code, text = running.finished()

    assert code == 2
    assert f"port {port} of rollout-0 is in use on 127.0.0.1" in text


def test_a_silent_service_is_started_again(tmp_path):
    silent = service(tmp_path, probe_every_s=0.3, probe_misses=3)
    with supervised(tmp_path, shell(tmp_path, "sleep 60"), services=(silent,)) as running:
        first = running.record()
        os.killpg(first.pgid, signal.SIGSTOP)
        assert running.record(gen=1).pid != first.pid
        eventually(lambda: not is_alive(first.pid), "the stopped one is gone")


def test_a_paused_service_is_not_judged_and_is_continued_before_it_is_ended(tmp_path):
    paused = service(tmp_path, probe_every_s=0.2, probe_misses=3, stop_grace_s=10.0)
    with supervised(tmp_path, job(tmp_path), services=(paused,)) as running:
        record = running.record()
        running.registry.mark_paused(record)
        os.killpg(record.pgid, signal.SIGSTOP)
        time.sleep(3.0)  # more than four times what it takes to be called dead
        assert running.record(gen=0).pid == record.pid
        assert is_alive(record.pid)
        running.process.send_signal(signal.SIGINT)
        assert running.finished()[0] == 130

    assert (tmp_path / "ended").exists(), "it never got its SIGTERM"


def test_a_service_that_hangs_at_its_start_does_not_stop_the_heartbeat_of_another(tmp_path):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "hang").touch()
    services = (service(tmp_path / "slow", "rollout-1", start_timeout_s=5.0), service(tmp_path))
    with supervised(tmp_path, shell(tmp_path, "sleep 60"), services=services) as running:
        running.record()
        for _ in range(16):
            age = time.time() - running.record().ts
            assert age < 2 * HEARTBEAT_S
            time.sleep(0.5)
        log = (tmp_path / "supervisor.log").read_text()

    assert "rollout-1 gave no health answer at /health within 5 s; start 1 in 0.5 s" in log


def test_a_service_that_dies_too_often_ends_the_run_with_its_last_words(tmp_path):
    broken = service(tmp_path, command=("sh", "-c", "echo no such model >&2; exit 1"), max_restarts=2)
    with supervised(tmp_path, job(tmp_path), services=(broken,)) as running:
        pids = everything(tmp_path, running, 2)
        code, text = running.finished()

    assert code == 75
    assert "rollout-0 | no such model" in text
    assert "rollout-0 died 3 times within 10 minutes, last: ended with exit code 1" in text
    assert none_alive(pids)


def test_a_service_with_wrong_settings_is_not_started_again(tmp_path):
    wrong = service(tmp_path, command=("sh", "-c", "echo --port: too large; exit 2"))
    with supervised(tmp_path, shell(tmp_path, "sleep 60"), services=(wrong,)) as running:
        code, text = running.finished()
        reason = running.registry.reason()

    assert code == 2
    assert "rollout-0 | --port: too large" in text
    assert reason.startswith("fatal rollout-0")


def test_a_job_that_was_done_is_skipped_until_its_command_changes(tmp_path):
    def count(text: str) -> int:
        marked = shell(tmp_path, text, "prepare", done_marker=str(tmp_path / "done.json"))
        with supervised(tmp_path, marked) as running:
            assert running.finished()[0] == 0
        return len((tmp_path / "runs").read_text().split())

    assert count("echo x >> runs") == 1
    assert count("echo x >> runs") == 1
    assert count("echo x >> runs ") == 2


def test_a_second_supervisor_of_a_folder_is_refused(tmp_path):
    with supervised(tmp_path, shell(tmp_path, "sleep 60")) as first:
        eventually(lambda: (tmp_path / "supervisor.log").exists(), "the first one runs")
        with supervised(tmp_path, shell(tmp_path, "true")) as second:
            code, text = second.finished()
        assert first.process.poll() is None

    assert code == 2
    assert f"another run works in {tmp_path / 'registry'}" in text


def test_a_service_sees_only_what_it_may_see_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2")
    monkeypatch.setenv("ALLOWED", "yes")
    printing = service(
        tmp_path, command=("sh", "-c", "env > seen; sleep 60"), allowed_env=("PATH", "ALLOWED"), env={"OURS": "1"}
    )
    with supervised(
        tmp_path, shell(tmp_path, "while ! test -s seen; do sleep 0.05; done"), services=(printing,)
    ) as run:
        assert run.finished()[0] == 0

    seen = (tmp_path / "seen").read_text()
    assert "ALLOWED=yes" in seen
    assert "OURS=1" in seen
    assert "hunter2" not in seen


def test_a_job_that_cannot_be_asked_to_stop_is_ended(tmp_path):
    asked = tmp_path / "asked"
    with supervised(tmp_path, job(tmp_path, registry=str(asked))) as running:
        eventually((tmp_path / "job.pid").exists, "the job runs")
        shutil.rmtree(asked, ignore_errors=True)
        asked.touch()  # a folder that takes nothing
        running.process.send_signal(signal.SIGTERM)
        code, text = running.finished()
        assert none_alive(running.pids())

    assert code == 143
    assert "train cannot be asked to: " in text
    assert "Traceback" not in text
    assert running.registry.reason() == "stopped by SIGTERM"


def test_a_damaged_plan_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text('{"name": "x"}')
    ended = subprocess.run(
        [sys.executable, "-m", "launchers.supervisor", str(tmp_path / "plan.json")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 2
    assert "plan.json: not a job plan" in ended.stderr


RANK = """
import os, sys, time
rank = os.environ["RANK"]
open(f"rank{rank}", "w").write(str(os.getpid()))
time.sleep(600)
"""


def torchrun(folder: Path) -> Job:
    (folder / "rank.py").write_text(RANK)
    words = ("--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
    command = (sys.executable, "-m", "launchers.torchrun", *words, "--local-addr", "127.0.0.1", "rank.py")
    return Job(name="train", command=command, cwd=str(folder))


def ranks(folder: Path) -> list[int]:
    files = [folder / "rank0", folder / "rank1"]
    eventually(lambda: all(f.exists() and f.read_text() for f in files), "both ranks run", timeout_s=120.0)
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize("victim", ["rank", "torchrun", "supervisor"])
def test_no_rank_survives_the_death_of_a_rank_of_torchrun_or_of_the_supervisor(tmp_path, victim):
    with supervised(tmp_path, torchrun(tmp_path)) as running:
        pids = ranks(tmp_path)
        parent = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
        target = {"rank": pids[1], "torchrun": parent, "supervisor": running.process.pid}[victim]
        os.kill(target, signal.SIGKILL)
        eventually(lambda: none_alive([*pids, parent]), "ranks and torchrun are gone", timeout_s=60.0)
        code, text = running.finished()

    assert code == (-9 if victim == "supervisor" else 137)
    assert ("rank 1 was killed by SIGKILL" in text) == (victim == "rank")


def test_ranks_that_cannot_meet_say_where_and_why(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        words = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--local-addr", "127.0.0.1")
        ended = subprocess.run(
            [sys.executable, "-m", "launchers.torchrun", *words, "rank.py"],
            env={**os.environ, "MEGATRON_DISTIL_REGISTRY": str(tmp_path), "SLURM_PROCID": "0"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert ended.returncode == 1
    assert f"the ranks cannot meet at {place}: " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert Registry(tmp_path).reason().startswith(f"failed the ranks cannot meet at {place}: ")
    assert "address already in use" in Registry(tmp_path).reason()


@pytest.mark.parametrize("node", [0, 1])
def test_whoever_loses_the_store_of_another_node_leaves_the_reason_to_that_one(tmp_path, monkeypatch, capsys, node):
    def lost(_: object) -> None:
        raise RendezvousConnectionError("connection reset")

    monkeypatch.setattr(torchrun_command.run, "run", lost)
    monkeypatch.setenv("MEGATRON_DISTIL_REGISTRY", str(tmp_path))
    monkeypatch.setenv("SLURM_PROCID", str(node))
    assert torchrun_command.main(["--nnodes", "2", "--rdzv-endpoint", "n1:29500", "rank.py"]) == 1
    assert capsys.readouterr().err == "the ranks cannot meet at n1:29500: connection reset\n"
    expected = "" if node else "failed the ranks cannot meet at n1:29500: connection reset"
    assert Registry(tmp_path).reason() == expected


def guarded(command: list[str], parent: int) -> subprocess.Popen[bytes]:
    reading, writing = os.pipe()
    argv = [sys.executable, "-I", "-S", guard.__file__, str(parent), str(writing), *command]
    process = subprocess.Popen(argv, pass_fds=(writing,), stderr=subprocess.DEVNULL)
    os.close(writing)
    os.read(reading, 64)
    os.close(reading)
    return process


def test_a_guard_hands_on_how_its_command_ended():
    for script, code in (("exit 0", 0), ("exit 75", 75), ("kill -9 $$", 137), ("kill -TERM $$", 143)):
        assert guarded(["sh", "-c", script], os.getpid()).wait(20) == code
    assert guarded(["/no/such/program"], os.getpid()).wait(20) == 127


def test_a_guard_alone_kills_the_orphans_of_its_command(tmp_path):
    script = f"setsid sh -c 'echo $$ > {tmp_path}/orphan; sleep 600' & while ! test -s {tmp_path}/orphan; do :; done"
    assert guarded(["sh", "-c", script], os.getpid()).wait(20) == 0
    assert not is_alive(int((tmp_path / "orphan").read_text()))


def test_a_guard_whose_parent_has_ended_before_it_came_up_starts_nothing(tmp_path):
    somebody_else = 1
    assert guarded(["touch", str(tmp_path / "started")], somebody_else).wait(20) == 137
    assert not (tmp_path / "started").exists()
