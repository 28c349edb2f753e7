"""A run of all roles on a real Slurm, and what becomes of it when something breaks."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from launchers.cluster import load_cluster
from launchers.plan import Places, Training, job_plan, training_job
from megatron_distil.config.load import load_config
from tests.cluster_runs import STEPS, Finding, Run, Site
from tests.quickstart import launched
from tests.server import ROOT

LONG = 60
"""Steps of a run that is interrupted: Slurm looks at the limits of its jobs every 30 s."""


def test_finish(site: Site, finding: Finding) -> None:
    began = time.monotonic()
    run = site.launch("finish")
    run.until_step(0)
    first_step_s = time.monotonic() - began
    assert run.until_over().word == "done"
    assert run.steps() == list(range(STEPS))
    assert run.reason(0) == "done"
    run.none_left()
    finding(run, first_step_s=round(first_step_s, 1))


def test_killed_server(site: Site, finding: Finding) -> None:
    """It is started again in the same life, gets the weights of the present step, and no step is lost."""
    run = site.launch("killed-server")
    run.until_step(1)
    start_s = run.start_s("rollout-0", gen=0)
    killed = run.kill(run.record("rollout").pid)
    run.record("rollout", gen=1)
    recovered_s = time.monotonic() - killed
    assert run.until_over().word == "done"
    assert run.steps() == list(range(STEPS))
    assert run.restarts() == 0
    assert "rollout-0 was killed by SIGKILL; start 1 in 0.5 s" in run.diaries()
    assert "rollout-0, start 1: gets version" in run.trainer_output()
    run.none_left()
    finding(run, recovered_s=round(recovered_s, 1), server_start_s=start_s)


def test_walltime_requeue_resume(site: Site, finding: Finding, tmp_path: Path) -> None:
    """Slurm's own signal: the limit is lowered to what is left when the run is well under way, and then raised again.

    An uninterrupted run on the rollouts that both lives have logged ends with the same weights.
    """
    run = site.launch("walltime", f"train.num_steps={LONG}", "cluster.warn_s=120")
    run.until_step(2)
    run.bring_the_time_limit_near()
    run.until(lambda: run.reason(0).startswith("stopped"), "the first life has stopped")
    stopped = time.monotonic()
    run.until(lambda: run.restarts() == 1, "it is started again")
    saved = run.checkpoint()
    run.set_time_limit(minutes=10)
    run.until_progress(life=1)
    recovered_s = time.monotonic() - stopped
    assert run.until_over().word == "done"
    assert 2 < saved < LONG
    assert set(run.states) <= {"pending", "running", "completing", "requeued", "done"}, "never failed"
    assert run.steps() == list(range(LONG)), "every step once"
    run.none_left()
    again = replayed(run, site, tmp_path)
    assert weights_of(run.folder, site, tmp_path / "of-run") == weights_of(again, site, tmp_path / "of-replay")
    finding(run, recovered_s=round(recovered_s, 1), saved_at_step=saved)


def replayed(run: Run, site: Site, folder: Path) -> Path:
    """An uninterrupted run on the logged rollouts, on one node and without servers."""
    again = folder / "again"
    places = Places(run=str(again), cwd=str(site.shared), server_python="")
    training = Training(
        command="train", recipe=str(run.folder / "recipe.toml"), run=str(again), overrides=("--replay", str(run.folder))
    )
    config, cluster = load_config(str(run.folder / "recipe.toml")), load_cluster("local")
    job = training_job("train", training, config, cluster, places)
    with launched(job_plan("replay", [job], [], places), again) as running:
        assert running.wait() == 0, running.text()[-3000:]
    return again


def weights_of(run: Path, site: Site, folder: Path) -> bytes:
    """The newest checkpoint in Hugging Face's format."""
    newest = max((run / "checkpoints").glob("step_*"))
    command = ["tools/export", str(newest), str(folder), "--model", str(site.shared / "data" / "model")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.full
def test_killed_supervisor_of_one_of_two_rollout_nodes(site: Site, finding: Finding) -> None:
    """The other one goes on to serve, but not with all servers that the run needs: the life ends, and the next has all."""
    run = site.launch("one-of-two", "rollout.num_engines=2", f"train.num_steps={LONG}")
    run.until_step(1)
    killed = run.kill(run.supervisor("rollout", node=1))
    run.until_progress(life=1)
    recovered_s = time.monotonic() - killed
    assert run.reason(0) == "failed rollout ended with exit code 137, and nobody said why"
    assert run.until_over().word == "done"
    assert run.steps() == list(range(LONG))
    run.none_left()
    finding(run, recovered_s=round(recovered_s, 1))
