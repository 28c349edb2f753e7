"""The launcher's command line, and what it refuses, on a machine without nemo-run and Slurm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from launchers import admission, slurm
from launchers.jobplan import from_json
from launchers.launch import Prepared, main, prepare, write_run
from megatron_distil.config.load import load_config, recipe_names

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "tests" / "data" / "models"
MODEL_BY_RECIPE = {
    "qwen3_8b_livecodebench": "Qwen3-8B",
    "qwen3_32b_livecodebench": "Qwen3-32B",
    "qwen3_30b_a3b_livecodebench": "Qwen3-30B-A3B",
    "qwen3_235b_a22b_livecodebench": "Qwen3-235B-A22B",
}


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A shared folder with everything that the recipes name."""
    folder = tmp_path / "shared"
    shutil.copytree(MODELS, folder / "models")
    shutil.copytree(MODELS / "Qwen3-8B", folder / "data" / "model")
    (folder / "data" / "livecodebench" / "tests").mkdir(parents=True)
    for name in ("train", "sft", "eval", "new", "livecodebench/train", "livecodebench/test"):
        (folder / "data" / f"{name}.jsonl").touch()
    for place in ("code/launchers/node.py", "envs/trainer/bin/python", "envs/server/bin/python"):
        (folder / place).parent.mkdir(parents=True)
        (folder / place).touch(mode=0o755)
    return folder


def prepared(shared: Path, recipe: str = "drill", *overrides: str) -> Prepared:
    pythons = {"trainer": "trainer", "rollout": "server", "sandbox": "trainer"}
    places = [f"cluster.python.{role}={shared}/envs/{name}/bin/python" for role, name in pythons.items()]
    return prepare(recipe, "generic", [f"cluster.shared={shared}", f"cluster.code={shared}/code", *places, *overrides])


def refused(shared: Path, recipe: str = "drill", *overrides: str, **environment: str) -> list[str]:
    found = prepared(shared, recipe, *overrides)
    return [str(problem) for problem in admission.problems(found.config, found.cluster, found.run, environment)]


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_is_admitted_where_everything_is_there(shared: Path, recipe: str):
    # model and data of program_induction stand for those of every small task
    assert refused(shared, recipe, "cluster.placement.rollout=own") == []


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["cluster.mounts./nowhere=/nowhere"], "cluster.mounts = '/nowhere': there is no such folder to mount."),
        (["cluster.code=/nowhere"], "cluster.code = '/nowhere': holds no launchers/node.py."),
        (["cluster.python.rollout=/nowhere/python"], "cluster.python.rollout = '/nowhere/python': no interpreter that can be run."),
        (["data.train=data/none.jsonl"], "data.train = 'data/none.jsonl': there is no {shared}/data/none.jsonl that can be read."),
        (["model=Qwen/Qwen3-8B"], "model = 'Qwen/Qwen3-8B': {shared}/Qwen/Qwen3-8B/config.json: No such file or directory"),
        (["teacher.weights=expert", "teacher.model=models/none"], "teacher.model = 'models/none': holds no config.json."),
        (["cluster.secrets.trainer=['HF_TOKEN']"], "cluster.secrets.trainer = 'HF_TOKEN': is named as a secret, and this shell does not have it."),
        (["parallel.tp=3", "parallel.dp=1", "train.max_microbatch_tokens=1026"], "parallel.tp = 3: the model has 32 attention heads. Try 2."),
    ],
)  # fmt: skip
def test_what_would_fail_on_the_nodes_is_said_here(shared: Path, overrides: list[str], text: str):
    (found,) = refused(shared, "drill", *overrides)
    assert found.startswith(text.format(shared=shared))


def test_an_image_that_cannot_be_read_is_said_here(shared: Path):
    images = [f"cluster.image.{role}={shared}/{role}.sqsh" for role in ("trainer", "rollout", "sandbox")]
    found = refused(shared, "drill", *images, f"cluster.mounts.{shared}={shared}")
    assert [text.split(":")[0].split(" =")[0] for text in found] == [
        "cluster.image.trainer", "cluster.image.rollout", "cluster.image.sandbox"
    ]  # fmt: skip


def test_a_plan_that_does_not_fit_the_memory_is_refused_where_the_gpu_is_known(shared: Path):
    layout = ["parallel.tp=1", "parallel.dp=1", "rollout.num_engines=1", "parallel.sequence_parallel=false"]
    assert refused(shared, "qwen3_32b_livecodebench", *layout) == []
    (found,) = refused(shared, "qwen3_32b_livecodebench", *layout, "cluster.gpu=h200")
    assert "a trainer rank needs" in found


def test_a_shared_folder_that_is_not_there_is_all_that_is_said(tmp_path: Path):
    assert [text.split(" =")[0] for text in refused(tmp_path / "none")] == ["cluster.shared"]


def test_a_run_describes_itself_and_keeps_its_token(shared: Path):
    found = prepared(shared)
    write_run(found)
    run = shared / "runs" / "drill"
    assert load_config(run / "recipe.toml") == found.config
    token = run / "sandbox.token"
    assert found.config.feedback.token_file == str(token)
    assert token.stat().st_mode & 0o777 == 0o600
    before = token.read_text()
    write_run(prepared(shared))
    assert token.read_text() == before


@pytest.fixture
def no_nemo_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "has_nemo_run", lambda: False)
    monkeypatch.setenv("PATH", "/nowhere")


@pytest.mark.usefixtures("no_nemo_run")
@pytest.mark.parametrize("recipe", recipe_names())
def test_a_dry_run_shows_the_plan_and_what_is_missing_here(recipe: str, capsys: pytest.CaptureFixture[str]):
    assert main([recipe, "h200", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{recipe} on h200: ")
    assert f"exec python3 -m launchers.node trainer /shared/distil/runs/{recipe}/plan.json" in shown.out
    assert "nemo-run = 'missing'" in shown.err
    assert "sbatch = 'missing'" in shown.err


@pytest.mark.usefixtures("no_nemo_run")
def test_without_nemo_run_nothing_is_written_and_the_code_is_2(shared: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["drill", "generic", f"cluster.shared={shared}", f"cluster.code={shared}/code"]) == 2
    said = capsys.readouterr().err
    assert (
        "nemo-run = 'missing': it submits the job, and is not in this Python. Use tools/launch, or pip install 'megatron_distil[launch]'."
        in said
    )
    assert "cluster.python.trainer" in said
    assert said.endswith("Nothing was submitted.\n")
    assert not (shared / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "needs one RECIPE and one CLUSTER"),
        (["drill"], "needs one RECIPE and one CLUSTER; everything else is KEY=VALUE. Recipes: drill, "),
        (["dril", "generic"], "Did you mean drill?"),
        (["drill", "generc"], "Known: generic, h200, local."),
        (["drill", "h200", "cluster.time=soon", "cluster.acount=x"], "2 problems"),
        (["qwen3_8b_livecodebench", "generic"], "and the ranks leave 0"),
        (["drill", "h200", "--name", "a/b"], "--name = 'a/b': names a folder and a job"),
    ],
)
def test_what_is_wrong_is_said_and_the_code_is_2(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    assert text in capsys.readouterr().err


def test_on_this_machine_the_same_recipe_is_a_plan_of_one_supervisor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTIL_SERVER_PYTHON", "/server/python")
    assert main(["drill", "--local", "--dry-run"]) == 0
    plan = from_json(capsys.readouterr().out)
    assert [service.role for service in plan.services] == ["rollout", "sandbox"]
    assert plan.services[0].command[0] == "/server/python"
    assert "127.0.0.1" in plan.services[0].command
    (job,) = plan.jobs
    assert str(tmp_path / "runs" / "drill" / "recipe.toml") in job.command
    assert main(["drill", "local", "--dry-run"]) == 0
    assert from_json(capsys.readouterr().out) == plan


def test_a_login_node_needs_neither_torch_nor_nemo_run():
    code = (
        "import sys; from launchers import launch; launch.main(['drill', 'generic', '--dry-run', 'cluster.gpus_per_node=8']); "
        "print([m for m in sys.modules if m.partition('.')[0] in ('torch', 'numpy', 'nemo_run', 'megatron')], file=sys.stderr)"
    )
    env = {**os.environ, "PATH": "/nowhere"}
    code = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'nemo_run' else f(n, *a); "
        + code
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=env)
    assert ran.stderr.splitlines()[-1] == "[]"
    assert json.dumps("drill on generic")[1:-1] in ran.stdout


def test_the_extra_and_the_environment_of_the_launcher_have_the_same_pins():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["launch"]
    lines = (ROOT / "tools" / "requirements" / "launch.txt").read_text().splitlines()
    assert extra == [line for line in lines if line.startswith(("nemo-run", "leptonai"))]
    exact = (ROOT / "tools" / "requirements" / "launch.constraints.txt").read_text()
    assert "nemo_run==0.11.1\n" in exact
    (lepton,) = [line for line in exact.splitlines() if line.startswith("leptonai==")]
    assert tuple(map(int, lepton.removeprefix("leptonai==").split(".")[:2])) < (0, 47)
