"""Modules and preflight at the start of a life, run by a plain bash."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launchers.cluster import load_cluster
from launchers.life import setup_text
from launchers.preflight import step_command
from launchers.prelude import modules_text, preflight_text

LMOD = """module() { echo "module $*"; [ "$3" != bad ]; }
"""
GOOD = ["sh", "-c", "echo tried; echo all 5 checks passed"]
BAD = ["sh", "-c", "echo it\\'s tried; echo 2 of 5 checks failed; echo srun: error; exit 1"]


def live(run: Path, text: str, *, before: str = "", restart: int = 0) -> subprocess.CompletedProcess[str]:
    script = f"set +e\n{before}{setup_text(str(run), ['trainer'], max_lives_without_progress=3)}{text}\necho alive\n"
    env = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restart)}
    return subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=False, timeout=20)


def reason(run: Path) -> str:
    path = run / "registry" / "7.0" / "REASON"
    return path.read_text().strip() if path.exists() else ""


def test_nothing_asked_for_is_nothing_done():
    assert modules_text([]) == preflight_text(GOOD, "never") == ""


def test_modules_are_loaded_before_the_first_step(tmp_path: Path):
    assert (
        live(tmp_path, modules_text(["cuda/13.0", "gcc"]), before=LMOD).stdout == "module load cuda/13.0 gcc\nalive\n"
    )


@pytest.mark.parametrize("before", [LMOD, "module() { return 1; }\n"])
def test_a_module_that_is_not_there_ends_the_job_with_its_name(tmp_path: Path, before: str):
    ran = live(tmp_path, modules_text(["gcc", "bad"]), before=before)
    assert ran.returncode == 1
    assert "alive" not in ran.stdout
    assert reason(tmp_path) == "fatal modules cannot be loaded: gcc bad"


def test_a_preflight_that_passes_lets_the_life_begin_and_leaves_its_table(tmp_path: Path):
    assert live(tmp_path, preflight_text(GOOD, "first")).stdout == "alive\n"
    assert (tmp_path / "logs" / "7.0" / "preflight.log").read_text() == "tried\nall 5 checks passed\n"


def test_a_preflight_that_fails_ends_the_job_with_what_it_said(tmp_path: Path):
    run = tmp_path / "it's a run"
    ran = live(run, preflight_text(BAD, "first"))
    assert ran.returncode == 1
    assert "it's tried" in ran.stdout
    assert reason(run) == f"fatal preflight: 2 of 5 checks failed; {run}/logs/7.0/preflight.log"


@pytest.mark.parametrize(("when", "code"), [("first", 0), ("every", 1)])
def test_later_lives_are_tried_only_where_that_is_asked_for(tmp_path: Path, when: str, code: int):
    live(tmp_path, "")
    assert live(tmp_path, preflight_text(BAD, when), restart=1).returncode == code


def test_in_a_job_every_node_is_tried_in_its_image():
    command = step_command(load_cluster("h200"), 4, "/code", "/run/preflight", 2)
    assert command[:4] == ["srun", "--overlap", "--nodes=4", "--ntasks=4"]
    assert "--container-image=/shared/distil/images/trainer.sqsh" in command
    assert "--container-workdir=/code" in command
    assert command[command.index("--gpus") + 1] == "8"
    assert command[-2:] == ["--min-level", "0"]
    bare = step_command(load_cluster("generic"), 4, "/code", "/run/preflight", 2)
    assert "--chdir=/code" in bare
    assert bare[bare.index("--server-python") + 1] == "/shared/distil/envs/server/bin/python"
    assert bare[-2:] == ["--min-level", "2"]
