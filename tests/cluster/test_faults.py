"""What becomes of a run when its user, other jobs, Slurm, the nodes and the shared folder do not behave."""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from launchers import status
from tests.cluster_runs import LAUNCH_PYTHON, START_S, STEPS, Finding, Run, Site, write_cluster
from tests.mini_slurm import output
from tests.server import ROOT
from tests.supervised import eventually

pytestmark = pytest.mark.full

AWAY_S = 20.0
LONG = 12
"""Steps of a run that goes on while it is disturbed."""
LONGEST = 200
SMALL = "300m"


def complete(run: Run, num_steps: int = STEPS) -> None:
    """Every step is in the curve, in order, and saved; a life does at most the last step of the one before again."""
    steps = run.steps()
    assert sorted(set(steps)) == list(range(num_steps)), steps
    assert all(after - before in (0, 1) for before, after in pairwise(steps)), steps
    assert run.checkpoint() == num_steps


def test_cancelled(site: Site, finding: Finding) -> None:
    """Nothing of it is left, and the same command goes on with it."""
    run = site.launch("cancelled")
    run.until_step(1)
    job, cancelled = run.job, time.monotonic()
    run.cancel()
    assert run.until_over().word == "cancelled"
    run.none_left()
    saved = run.checkpoint()
    assert saved >= 1
    site.launch("cancelled")
    assert run.job != job
    run.until(lambda: run.checkpoint() > saved, "it saves again")
    recovered_s = time.monotonic() - cancelled
    assert run.until_over().word == "done"
    complete(run)
    run.none_left()
    finding(run, recovered_s=round(recovered_s, 1))


def test_preempted(site: Site, finding: Finding) -> None:
    """It makes place for a job of a partition that preempts, and goes on by itself."""
    run = site.launch("preempted")
    run.until_step(1)
    preempted = time.monotonic()
    sbatch("-p", "urgent", "--exclusive", "-N4", "--wrap", "sleep 5")
    run.until_progress(life=1)
    recovered_s = time.monotonic() - preempted
    assert run.until_over().word == "done"
    complete(run)
    assert "requeued" in run.states
    assert run.restarts() == 1
    run.none_left()
    finding(run, recovered_s=round(recovered_s, 1))


def test_two_launches(site: Site, finding: Finding) -> None:
    """Of two commands at the same time one submits, the other one says why it does not."""
    command = site.launch_command("two-launches")
    both = [subprocess.Popen(command, **site.as_user(), stdout=-1, stderr=-1) for _ in range(2)]
    said = [one.communicate(timeout=120) for one in both]
    run = Run(site.slurm, site.shared / "runs" / "two-launches")
    assert len(output("squeue", "-h").splitlines()) == 1, said
    assert sorted(one.returncode for one in both) == [0, 2], said
    (refused,) = [err for one, (_, err) in zip(both, said, strict=True) if one.returncode]
    assert refused.count("--name = ") == 1, refused
    assert "Nothing was submitted." in refused
    assert run.until_over().word == "done"
    complete(run)
    run.none_left()
    finding(run, refused=refused)


def test_controller_restart(site: Site, finding: Finding) -> None:
    """The run does not notice; whoever asks is told that nobody answers."""
    run = site.launch("controller-restart")
    run.until_step(0)
    with watched(run) as seen:
        site.slurm.restart_controller(away_s=AWAY_S)
    assert status.State(word="unknown", detail="Slurm does not answer") in seen
    assert run.until_over().word == "done"
    assert run.steps() == list(range(STEPS))
    assert run.restarts() == 0
    assert set(run.states) <= {"pending", "running", "unknown", "completing", "done"}
    run.none_left()
    finding(run, controller_away_s=AWAY_S)


def test_wrong_settings(site: Site, finding: Finding) -> None:
    """A role that ends with 2 ends the run at once: every other life would end in the same way."""
    run = site.launch("wrong-settings", "feedback.sandbox_workers=4000")
    assert run.until_over().word == "failed"
    assert run.restarts() == 0
    assert run.reason(0).startswith("fatal sandbox-0 calls its settings wrong (exit code 2)"), run.reason(0)
    assert run.reason(0) in run.page()
    assert "4000 workers" in run.diaries(), run.diaries()
    assert "another life would end as this one did" in run.batch_output()
    run.none_left()
    finding(run, reason=run.reason(0))


def test_taken_port(site: Site, finding: Finding) -> None:
    """A server chooses another free port; the ranks meet at another place in the next life."""
    run = site.launch("taken-port")
    run.until(lambda: bool(run.life(0).live("rollout", state="starting")), "the server has a port")
    with listening(run.life(0).live("rollout", state="starting")[0].url):
        taken = time.monotonic()
        run.record("rollout", gen=1)
    recovered_s = time.monotonic() - taken
    run.until(lambda: bool(run.life(0).live("rdzv", stale_s=float("inf"))), "the ranks have a place to meet")
    with listening(run.life(0).live("rdzv", stale_s=float("inf"))[0].url):
        run.until(lambda: run.restarts() == 1, "the next life")
    assert run.reason(0).startswith("failed the ranks cannot meet at "), run.reason(0)
    assert "address already in use" in run.reason(0)
    assert run.until_over().word == "done"
    complete(run)
    assert run.restarts() == 1
    run.none_left()
    finding(run, recovered_s=round(recovered_s, 1))


def test_missing_node(site: Site, finding: Finding) -> None:
    """With too few nodes the run waits, the user is told for what, and it starts when there are enough."""
    for name in ("n3", "n4"):
        site.slurm.kill_node(name)
    eventually(lambda: {site.slurm.states()[name] for name in ("n3", "n4")} <= {"down", "down*"}, "down", timeout_s=120)
    run = site.launch("missing-node")
    run.until(lambda: run.look().detail not in ("", "None"), "there is a reason", timeout_s=60)
    waits_for = run.look().detail
    time.sleep(5)
    assert run.look().word == "pending"
    assert waits_for in run.page()
    back = time.monotonic()
    site.slurm.start_node("n3")
    run.until_step(0)
    first_step_s = time.monotonic() - back
    assert run.until_over().word == "done"
    complete(run)
    assert run.restarts() == 0
    run.none_left()
    finding(run, waits_for=waits_for, first_step_s=round(first_step_s, 1))


def test_node_dies_before_start(site: Site, finding: Finding) -> None:
    """A node that is given to the job and is gone when its step shall start is replaced by the spare."""
    run = site.launch("node-dies-before-start")
    run.until(lambda: len(run.nodes()) == 3, "it has nodes")
    dead = run.nodes()[-1]
    killed = time.monotonic()
    site.slurm.kill_node(dead)
    run.until(lambda: run.restarts() >= 1, "it is started again")
    run.until_step(0)
    recovered_s = time.monotonic() - killed
    assert dead not in run.nodes()
    assert run.until_over().word == "done"
    complete(run)
    assert "failed" not in run.states
    run.none_left()
    finding(run, recovered_s=round(recovered_s, 1))


@pytest.fixture
def small_site(site: Site, tmp_path: Path) -> Iterator[Site]:
    """Its shared folder is a file system of its own."""
    shared = tmp_path / "shared"
    shared.mkdir()
    mounted = mount("-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(shared))
    if mounted:
        pytest.skip(f"needs root that may mount: {mounted}")
    try:
        shutil.copytree(site.shared / "data", shared / "data")
        yield Site(site.slurm, write_cluster(tmp_path, shared, ROOT), shared)
    finally:
        subprocess.run(["scancel", "--user", site.slurm.user], timeout=30, check=False, capture_output=True)
        eventually(lambda: not any(map(site.slurm.processes, site.slurm.nodes)), "nothing is left", timeout_s=60)
        subprocess.run(["umount", "--lazy", str(shared)], timeout=30, check=True)


def test_full_folder(small_site: Site, finding: Finding) -> None:
    """Nothing that was saved is lost, and the run goes on when there is space again."""
    run = small_site.launch("full-folder", f"train.num_steps={LONG}")
    run.until_step(1)
    hog = small_site.shared / "hog"
    fill(hog)
    saved = run.checkpoint()
    time.sleep(AWAY_S)
    assert run.checkpoint() >= saved
    hog.unlink()
    again = time.monotonic()
    run.until(lambda: run.checkpoint() > saved, "it saves again")
    recovered_s = time.monotonic() - again
    assert run.until_over().word == "done"
    complete(run, LONG)
    assert "No space left on device" in run.diaries()
    assert run.reason(0), "a reason is left as soon as there is space for it"
    run.none_left()
    finding(run, full_s=AWAY_S, recovered_s=round(recovered_s, 1))


def test_read_only_folder(small_site: Site, finding: Finding) -> None:
    """The life ends, and the next one begins when the folder can be written again."""
    shared = str(small_site.shared)
    run = small_site.launch("read-only-folder", f"train.num_steps={LONG}")
    run.until_step(1)
    assert mount("--bind", shared, shared) == ""
    try:
        assert mount("-o", "remount,ro,bind", shared) == ""
        saved = run.checkpoint()
        run.until(lambda: "cannot be written, try 1 of 60\n" in run.batch_output(), "the life ends and waits")
        assert run.checkpoint() >= saved
    finally:
        subprocess.run(["umount", "--lazy", shared], timeout=30, check=True)
    again = time.monotonic()
    run.until(lambda: run.checkpoint() > saved, "it saves again")
    recovered_s = time.monotonic() - again
    assert run.until_over().word == "done"
    complete(run, LONG)
    assert run.reason(0) == "failed the shared folder could not be written"
    run.none_left()
    finding(run, recovered_s=round(recovered_s, 1))


def test_fatal_data(site: Site, finding: Finding) -> None:
    """Data that are replaced by nonsense: the next life says so, and is the last."""
    data = site.shared / "data" / "replaced.jsonl"
    data.write_bytes((site.shared / "data" / "train.jsonl").read_bytes())
    run = site.launch("fatal-data", "data.train=data/replaced.jsonl")
    run.until_step(1)
    data.write_text('{"no": "prompt"}\n')
    run.kill(run.rank(0))
    assert run.until_over().word == "failed"
    assert run.restarts() == 1
    assert run.reason(1).startswith("fatal "), run.reason(1)
    assert "replaced.jsonl" in run.reason(1), run.reason(1)
    assert run.reason(1) in run.page()
    assert run.checkpoint() >= 1
    run.none_left()
    finding(run, reason=run.reason(1))


def test_no_progress(site: Site, finding: Finding) -> None:
    """Lives without a step end by themselves."""
    run = site.launch("no-progress", "rollout.start_timeout_s=1", "cluster.max_lives_without_progress=2")
    assert run.until_over().word == "failed"
    assert run.restarts() == 2
    assert run.reason(0).startswith("unavailable"), run.reason(0)
    assert run.reason(2) == "fatal no progress: the newest checkpoint is none since 2 lives"
    assert all(run.reason(life) in run.page() for life in range(3))
    run.none_left()
    finding(run)


def test_stop(site: Site, finding: Finding) -> None:
    """``launchers stop`` saves; whoever follows is told so; the same command goes on, and follows to the end."""
    run = site.launch("stop")
    follower = command(site, "status", str(run.folder), "--follow")
    run.until_step(1)
    stopped = time.monotonic()
    assert finished(command(site, "stop", str(run.folder)))[0] == 0
    state = run.until_over()
    took_s = time.monotonic() - stopped
    assert (state.word, run.restarts()) == ("stopped", 0)
    code, said = finished(follower)
    assert code == 0
    assert "stopped after" in said
    saved = run.checkpoint()
    assert saved == len(run.steps()) < STEPS
    run.none_left()
    for role, text in {"trainer": "train started", "rollout": "is ready after", "sandbox": "isolation"}.items():
        code, said = finished(command(site, "logs", str(run.folder), role))
        assert (code, text in said) == (0, True), said
    code, said = finished(command(site, "logs", str(run.folder), "cook"))
    assert code == 2
    assert "There is rollout, sandbox, trainer" in said
    again = subprocess.Popen([*site.launch_command("stop"), "--follow"], **site.as_user(), stdout=-1, stderr=-2)
    code, said = finished(again)
    assert code == 0, said
    assert "stop: done" in said
    complete(run)
    run.none_left()
    finding(run, stopped_s=round(took_s, 1))


def test_follow_failed(site: Site, finding: Finding) -> None:
    """Whoever follows a run that ends without finishing gets 1 and the culprit."""
    command = [*site.launch_command("follow-failed", "feedback.sandbox_workers=4000"), "--follow"]
    code, said = finished(subprocess.Popen(command, **site.as_user(), stdout=-1, stderr=-2))
    run = Run(site.slurm, site.shared / "runs" / "follow-failed")
    assert run.look().word == "failed"
    assert code == 1, said
    assert "follow-failed: failed, fatal sandbox-0 calls its settings wrong" in said
    run.none_left()
    finding(run)


def test_three_time_limits(site: Site, finding: Finding) -> None:
    """Each life saves, is started again and goes on where the one before ended."""
    run = site.launch("three-time-limits", f"train.num_steps={LONGEST}", "cluster.warn_s=120")
    saved: list[int] = []
    for life in range(3):
        run.until(lambda life=life: run.restarts() == life, f"life {life}")
        run.set_time_limit(minutes=20)  # for the start, which takes what it takes
        run.until_step(run.checkpoint() + 1)
        run.bring_the_time_limit_near()
        run.until(lambda life=life: bool(run.reason(life)), f"life {life} ends", timeout_s=180)
        saved.append(run.checkpoint())
    run.until(lambda: run.restarts() == 3, "the last life")
    run.set_time_limit(minutes=20)
    assert run.until_over(timeout_s=900).word == "done"
    assert run.steps() == list(range(LONGEST)), "every step once"
    assert saved == sorted(set(saved)), "each life has saved more"
    reasons = [run.reason(life) for life in range(4)]
    assert all(reason.startswith("stopped") for reason in reasons[:3]), reasons
    assert reasons[3] == "done"
    assert set(run.states) <= {"pending", "running", "completing", "requeued", "between two lives", "unknown", "done"}
    run.none_left()
    finding(run, saved_at_steps=saved)


def test_planted_secret(site: Site, finding: Finding, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret of the trainer is in its environment, and neither in another role's nor in any file beside Slurm's own."""
    marker = f"marker{secrets.token_hex(16)}"
    monkeypatch.setenv("HF_TOKEN", marker)
    run = site.launch("planted-secret", 'cluster.secrets.trainer=["HF_TOKEN"]')
    run.until_step(1)
    knows = {role: marker in environment_of(run.supervisor(role)) for role in ("trainer", "rollout", "sandbox")}
    assert knows == {"trainer": True, "rollout": False, "sandbox": False}
    services = {role: marker in environment_of(run.record(role).pid) for role in ("rollout", "sandbox")}
    assert services == {"rollout": False, "sandbox": False}
    assert run.until_over().word == "done"
    complete(run)
    run.none_left()
    assert holders(site.shared, marker) == []
    at_slurm = holders(site.slurm.root, marker)
    assert at_slurm, "Slurm has to know what it starts the job with"
    assert all(path.startswith("state/hash.") and path.endswith("/environment") for path in at_slurm), at_slurm
    finding(run, kept_by_slurm=at_slurm)


def command(site: Site, *words: str) -> subprocess.Popen[str]:
    """``python -m launchers ...`` of a user."""
    return subprocess.Popen([LAUNCH_PYTHON, "-m", "launchers", *words], **site.as_user(), stdout=-1, stderr=-2)


def finished(process: subprocess.Popen[str], timeout_s: float = START_S) -> tuple[int, str]:
    """Its exit code, and all that it has said."""
    try:
        said, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, said


@contextmanager
def watched(run: Run) -> Iterator[list[status.State]]:
    """What a user sees who looks all the time meanwhile."""
    seen: list[status.State] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.5):
            seen.append(run.look())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        is_over.set()
        watcher.join()


@contextmanager
def listening(url: str) -> Iterator[None]:
    """Somebody else has this port, and answers nothing."""
    host, _, port = url.rpartition("/")[2].partition(":")
    with socket.create_server((host, int(port))):
        yield


def mount(*words: str) -> str:
    """Why it is refused; empty: it is done."""
    done = subprocess.run(["mount", *words], capture_output=True, text=True, timeout=30, check=False)
    return done.stderr.strip() or f"mount ends with {done.returncode}" if done.returncode else ""


def fill(path: Path) -> None:
    """Until there is no space left."""
    done = subprocess.run(["dd", "if=/dev/zero", f"of={path}", "bs=4k"], capture_output=True, text=True, check=False)
    assert "No space left" in done.stderr, done.stderr


def environment_of(pid: int) -> str:
    """Of a process that lives."""
    return Path(f"/proc/{pid}/environ").read_text(errors="replace")


def holders(folder: Path, marker: str) -> list[str]:
    """Files below a folder that hold the marker."""
    found = subprocess.run(
        ["grep", "-rlFa", "--devices=skip", marker, "."], cwd=folder, capture_output=True, text=True, check=False
    )
    return sorted(line.removeprefix("./") for line in found.stdout.splitlines())


def sbatch(*words: str) -> str:
    """Submit another job; returns its number."""
    done = subprocess.run(
        ["sbatch", "--parsable", "-o", "/dev/null", *words], capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout.strip()
