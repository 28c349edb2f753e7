"""The text that Slurm gets, against files that were reviewed; and a submission to an sbatch that only writes down what it got.

    sbatch/CASE.txt             all that is written for a case
    sbatch/recipes/CASE.txt     of every recipe on every cluster what the other cases do not have: flags, steps, roles

After a change that is wanted: delete the files in ``tests/contract/sbatch`` and run this twice. The first run writes them.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_distil.config.load import recipe_names

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "sbatch"
CODE = "cluster.code=/shared/distil/code"
ONE_NODE = ("parallel.tp=4", "parallel.dp=1", "rollout.num_engines=4")
EXPERT = ("teacher.weights=expert", "teacher.model=models/Qwen3-32B", "teacher.engine_tp=8", "teacher.support=teacher")
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "8b-h200": ("qwen3_8b_livecodebench", "h200", ()),
    "8b-h200-expert": ("qwen3_8b_livecodebench", "h200", (*EXPERT, "cluster.placement.sandbox=own")),
    "8b-h200-apptainer": ("qwen3_8b_livecodebench", "h200", ("cluster.runtime=apptainer",)),
    "8b-generic-one-node": ("qwen3_8b_livecodebench", "generic", ONE_NODE),
    "32b-h200": ("qwen3_32b_livecodebench", "h200", ()),
    "30b-a3b-h200": ("qwen3_30b_a3b_livecodebench", "h200", ()),
    "235b-a22b-h200": ("qwen3_235b_a22b_livecodebench", "h200", ()),
    "drill-generic": (
        "drill",
        "generic",
        ("cluster.gpus_per_node=0", "cluster.processes_per_node=1", "cluster.placement.rollout=own"),
    ),
    "sft-generic": ("two_roads_sft", "generic", ()),
    "quoting": (
        "drill",
        "generic",
        ('cluster.env.all.A=it\'s "$HOME" $$ `a` \\ b', "cluster.sbatch.comment=two words"),
    ),
}
PLACES: dict[str, tuple[str, tuple[str, ...]]] = {
    "h200": ("h200", ()),
    "h200-apptainer": ("h200", ("cluster.runtime=apptainer",)),
    "generic": ("generic", ("cluster.placement.rollout=own",)),
}
RECIPES = {
    f"{recipe}-on-{place}": (recipe, cluster, overrides)
    for recipe in recipe_names()
    for place, (cluster, overrides) in PLACES.items()
}
OWN = (
    *("#SBATCH ", "srun --output", "export ", "distil_run=", "distil_roles=", "unset ", "cd ", "exec ", "====="),
    "  if ! timeout 900 srun ",  # the preflight
)
"""What lines begin with that the case decides."""


def launch_python() -> str:
    python = os.environ.get("DISTIL_LAUNCH_PYTHON", "")
    if not python:
        pytest.skip("needs nemo-run: its environment could not be made (tools/environment.sh, wish launch)")
    return python


@functools.cache
def texts() -> dict[str, str]:
    """All cases in one process, since the import of nemo-run takes seconds."""
    cases = {**CASES, **RECIPES}
    asked = [[recipe, cluster, [CODE, *overrides]] for recipe, cluster, overrides in cases.values()]
    ran = subprocess.run(
        [launch_python(), "-m", "tests.sbatch_texts"],
        input=json.dumps(asked),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    scripts = json.loads(ran.stdout[ran.stdout.index("[[") :])
    pages = ["".join(f"===== {path}\n{text}\n" for path, text in case) for case in scripts]
    return dict(zip(cases, pages, strict=True))


def own_lines(page: str) -> str:
    """What the case decides."""
    return "".join(f"{line}\n" for line in page.splitlines() if line.startswith(OWN))


def common_lines(page: str) -> set[str]:
    """The rest, which is in every batch script."""
    lines = {line for line in page.splitlines() if not line.startswith(OWN)}
    return {line for line in lines if not re.fullmatch(r"# Command \d|sleep 0", line)}  # between steps


@pytest.mark.parametrize("name", CASES)
def test_the_scripts_are_those_that_were_reviewed(name: str):
    compare(texts()[name], GOLDEN / f"{name}.txt")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_launched_everywhere_as_it_was_reviewed(name: str):
    compare(own_lines(texts()[name]), GOLDEN / "recipes" / f"{name}.txt")
    whole = "8b-generic-one-node" if name.endswith("generic") else "8b-h200"
    assert common_lines(texts()[name]) == common_lines(texts()[whole])


def compare(text: str, golden: Path) -> None:
    if not golden.exists():
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
        pytest.fail(f"{golden} was not there and has been written: review it")
    assert text == golden.read_text()


@pytest.mark.parametrize("name", [*CASES, *RECIPES])
def test_bash_reads_every_script(name: str):
    for script in re.split(r"^===== .*\n", texts()[name], flags=re.MULTILINE)[1:]:
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_there_is_no_file_of_a_case_that_is_gone():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES)
    assert {path.stem for path in GOLDEN.glob("recipes/*.txt")} == set(RECIPES)


def test_values_with_quotes_and_dollars_reach_the_roles():
    exports = [line for line in texts()["quoting"].splitlines() if line.startswith("export A=")]
    assert len(exports) == 4  # the batch shell, and before each of three steps
    for line in exports:
        ran = subprocess.run(["bash", "-c", f'{line}\nprintf %s "$A"'], capture_output=True, text=True, check=True)
        assert ran.stdout == 'it\'s "$HOME" $$ `a` \\ b'


class Login:
    """A login node: a shared folder with all that a drill needs, and an sbatch of our own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shared, self.bin = folder, folder / "shared", folder / "bin"
        shutil.copytree(ROOT / "tests" / "data" / "models" / "Qwen3-8B", self.shared / "data" / "model")
        (self.shared / "data" / "train.jsonl").touch()
        (self.shared / "code" / "launchers").mkdir(parents=True)
        (self.shared / "code" / "launchers" / "node.py").touch()
        self.bin.mkdir()
        self.sbatch('echo "$@" > {folder}/sbatch.arguments; echo 4242')
        self.cluster = folder / "c.toml"
        self.cluster.write_text(
            'name = "c"\naccount = "a"\npartition = "p"\ngpus_per_node = 0\nprocesses_per_node = 2\n'
            f'shared = "{self.shared}"\ncode = "{self.shared}/code"\n[secrets]\ntrainer = ["HF_TOKEN"]\n'
        )

    def sbatch(self, script: str) -> None:
        self.program("sbatch", script)

    def program(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text("#!/bin/sh\n" + script.replace("{folder}", str(self.folder)) + "\n")
        path.chmod(0o755)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        env = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.folder), "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [launch_python(), "-m", "launchers.launch", "drill", str(self.cluster), *arguments],
            env={**env, **environment},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def launch(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        with self.start(*arguments, **environment) as process:
            said = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, *said)


@pytest.fixture
def login(tmp_path: Path) -> Login:
    return Login(tmp_path)


def test_a_launch_leaves_a_job_a_run_that_describes_itself_and_no_secret(login: Login):
    ran = login.launch(HF_TOKEN="planted-marker", UNRELATED="planted-marker")
    assert ran.returncode == 0, ran.stderr
    assert "job 4242" in ran.stdout
    run = login.shared / "runs" / "drill"
    job = json.loads((run / "job.json").read_text())
    assert (job["job_id"], job["cluster"]) == ("4242", "c")
    script = Path(job["folder"]) / "rl_sbatch.sh"
    assert (login.folder / "sbatch.arguments").read_text().split() == ["--requeue", "--parsable", str(script)]
    assert f"#SBATCH --output={job['folder']}/rl/sbatch_drill.rl-0_%j.out\n" in script.read_text()
    assert f"bash {job['folder']}/rl/scripts/rl-0.sh" in script.read_text()
    assert "#SBATCH --export=PATH,HOME," in script.read_text()
    assert ",HF_TOKEN\n" in script.read_text()
    assert (run / "sandbox.token").stat().st_mode & 0o777 == 0o600
    token = (run / "sandbox.token").read_text().strip()
    assert len(token) > 30
    for path in login.folder.rglob("*"):
        if path.is_file():
            assert b"planted-marker" not in path.read_bytes(), path
            assert path.name == "sandbox.token" or token.encode() not in path.read_bytes(), path
    assert "planted-marker" not in ran.stdout + ran.stderr


def test_what_slurm_refuses_is_repeated_without_a_traceback(login: Login):
    login.sbatch('echo "sbatch: error: Invalid account" >&2; exit 1')
    ran = login.launch(HF_TOKEN="x")
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-2:] == ["launch: sbatch: error: Invalid account", "Nothing was submitted."]
    assert "Traceback" not in ran.stderr
    assert not (login.shared / "runs" / "drill" / "job.json").exists()


def test_a_missing_secret_is_said_before_anything_is_written(login: Login):
    ran = login.launch()
    assert ran.returncode == 2
    assert "cluster.secrets.trainer = 'HF_TOKEN': is named as a secret, and this shell does not have it" in ran.stderr
    assert not (login.shared / "runs").exists()
    assert not (login.folder / "sbatch.arguments").exists()


def test_of_two_launches_at_once_one_submits_and_the_other_says_which(login: Login):
    login.sbatch("echo once >>{folder}/submitted; sleep 2; echo 4242")
    login.program("squeue", 'test -e {folder}/submitted && echo "PENDING|Priority||N/A"; true')
    both = [login.start(HF_TOKEN="x") for _ in range(2)]
    texts = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], texts
    (refused,) = [text for text in texts if "Nothing was submitted" in text]
    first = next(process.pid for process in both if process.returncode == 0)
    # the second, where it began so late that the first was through
    assert f"process {first} of " in refused or "job 4242 works in" in refused
    assert (login.folder / "submitted").read_text() == "once\n"
    assert not (login.shared / "runs" / "drill" / "launching").exists()
    login.sbatch("echo twice >>{folder}/submitted; echo 4243")
    assert "job 4242 works in" in login.launch(HF_TOKEN="x").stderr
    assert json.loads((login.shared / "runs" / "drill" / "job.json").read_text())["job_id"] == "4242"


def test_a_launch_that_died_keeps_nobody_from_another(login: Login):
    login.sbatch("kill -9 $(cat {folder}/pid)")
    with login.start(HF_TOKEN="x") as process:
        (login.folder / "pid").write_text(str(process.pid))
        process.communicate(timeout=120)
    assert process.returncode == -9
    assert (login.shared / "runs" / "drill" / "launching").exists()
    login.sbatch("echo 4242")
    assert login.launch(HF_TOKEN="x").returncode == 0
    assert not (login.shared / "runs" / "drill" / "launching").exists()
