"""What a recipe on a cluster becomes, before nemo-run sees it."""

from __future__ import annotations

import shlex
import subprocess
import time
from pathlib import Path

import pytest

from launchers.cluster import cluster_names, load_cluster
from launchers.jobplan import cluster_from_json, filled, to_json
from launchers.launch import Prepared, prepare
from launchers.plan import cluster_plan
from megatron_distil.config.load import load_config, recipe_names, to_toml
from megatron_distil.errors import ConfigError

CODE = "cluster.code=/shared/distil/code"
SLURM = [name for name in cluster_names() if load_cluster(name).scheduler == "slurm"]
RECIPES = recipe_names()


def planned(recipe: str = "qwen3_8b_livecodebench", cluster: str = "h200", *overrides: str) -> Prepared:
    # on one node of `generic`, where the servers are beside the ranks
    fits = (
        ["parallel.tp=4", "parallel.dp=1", "rollout.num_engines=4"] if cluster == "generic" and "qwen" in recipe else []
    )
    return prepare(recipe, cluster, [CODE, *fits, "parallel.pp=1", *overrides] if fits else [CODE, *overrides])


@pytest.mark.parametrize("cluster", SLURM)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_plan_on_every_cluster(recipe: str, cluster: str):
    plan = planned(recipe, cluster, "cluster.placement.rollout=own").plan
    assert cluster_from_json(to_json(plan)) == plan
    assert plan.roles[0].name == "trainer"
    assert plan.roles[0].first_node == 0
    for role in plan.roles:
        assert len(role.node_plans) == role.nodes
        assert role.first_node + role.nodes <= plan.nodes
        assert {f"--nodes={role.nodes}", f"--relative={role.first_node}", "--overlap"} <= set(role.srun_args)
    text = "\n".join([plan.setup, *(role.script for role in plan.roles)])
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_written_out_is_the_same_recipe(recipe: str, tmp_path: Path):
    config = load_config(recipe, ['log.wandb_project=a "b" c\'s $d \\ \N{SNOWMAN} \N{GRINNING FACE}'])
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("preset", "name", "updates"),
    [("release-coding", "distil", 32), ("sdpo-coding", "sdpo", 32), ("grpo-off-policy", "grpo", 4)],
)
def test_the_compared_methods_are_one_override_each(preset: str, name: str, updates: int):
    config = planned("qwen3_8b_livecodebench", "h200", f"preset={preset}").config
    assert (config.objective.name, config.train.updates_per_step, config.train.learning_rate) == (name, updates, 1e-6)
    assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt) == (32, 8)


def test_the_cross_entropy_of_the_ablation_is_one_override():
    assert (
        planned("qwen3_8b_livecodebench", "h200", "objective.future=none").config.objective.model_dump()["future"]
        == "none"
    )


def test_ranks_meet_at_an_address_that_only_the_nodes_know():
    trainer = planned("drill", "generic", "parallel.dp=16", "cluster.restarts_in_place=2", "rollout.prompts_per_step=16",
                      "cluster.placement.rollout=own").plan.role("trainer")  # fmt: skip
    (job,) = trainer.node_plans[1].jobs
    assert " ".join(job.command) == (
        "/shared/distil/envs/trainer/bin/python -m launchers.torchrun --nnodes 2 --nproc-per-node 8 "
        "--rdzv-backend c10d --rdzv-endpoint {rdzv} --rdzv-id {life} --local-addr {host} --max-restarts 2 "
        "--log-dir /shared/distil/runs/drill/logs/{life}/train-node1 "
        "--redirects 0:3,1:3,2:3,3:3,4:3,5:3,6:3,7:3 --tee 0:3 "
        "-m -- megatron_distil train /shared/distil/runs/drill/recipe.toml --run /shared/distil/runs/drill"
    )
    assert job.registry == "/shared/distil/runs/drill/registry/{life}"
    assert job.env["MEGATRON_DISTIL_REGISTRY"] == job.registry
    assert job.env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
    assert job.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert (job.cwd, trainer.needs) == ("/shared/distil", {"rollout": 1, "sandbox": 1})


def test_every_service_is_planned_once_with_gpus_of_its_own_and_listens_where_others_reach_it():
    plan = planned("qwen3_8b_livecodebench", "h200", "feedback.num_sandboxes=2").plan
    assert (plan.nodes, plan.gpus_per_node, plan.signal) == (2, 8, "B:USR1@900")
    (servers,) = [node.services for node in plan.role("rollout").node_plans]
    assert [service.name for service in servers] == [f"rollout-{index}" for index in range(8)]
    assert [service.env["CUDA_VISIBLE_DEVICES"] for service in servers] == [str(index) for index in range(8)]
    for service in servers:
        assert service.command[service.command.index("--host") + 1] == "{host}"
        assert service.command[service.command.index("--model-path") + 1] == "models/Qwen3-8B"
    (boxes,) = [node.services for node in plan.role("sandbox").node_plans]
    assert [service.name for service in boxes] == ["sandbox-0", "sandbox-1"]
    token = "/shared/distil/runs/qwen3_8b_livecodebench/sandbox.token"
    for service in boxes:
        assert service.command[service.command.index("--token-file") + 1] == token
        assert "CUDA_VISIBLE_DEVICES" not in service.env
    assert "--gpus-per-node=0" in plan.role("sandbox").srun_args
    assert "--gpus-per-node=0" not in plan.role("rollout").srun_args
    # nemo-run's own --kill-on-bad-exit=1 stands: a supervisor that is lost ends the life, also where others of its role go on
    assert not any("kill-on-bad-exit" in flag or "--wait" in flag for role in plan.roles for flag in role.srun_args)


def test_the_trainer_asks_for_the_token_that_the_sandboxes_want():
    assert planned().config.feedback.token_file == "/shared/distil/runs/qwen3_8b_livecodebench/sandbox.token"
    assert planned("drill", "generic", "feedback.token_file=/mine").config.feedback.token_file == "/mine"
    without = planned("two_roads", "generic")
    assert without.config.feedback.token_file == ""


def test_roles_that_share_a_node_of_the_trainer_stay_off_its_gpus():
    plan = planned("qwen3_8b_livecodebench", "generic").plan
    assert plan.nodes == 1
    (job,) = plan.role("trainer").node_plans[0].jobs
    taken = [job.env["CUDA_VISIBLE_DEVICES"]]
    taken += [service.env["CUDA_VISIBLE_DEVICES"] for service in plan.role("rollout").node_plans[0].services]
    assert ",".join(taken) == "0,1,2,3,4,5,6,7"
    assert {role.first_node for role in plan.roles} == {0}


def test_supervised_training_is_one_role():
    plan = planned("two_roads_sft", "generic").plan
    assert [role.name for role in plan.roles] == ["trainer"]
    (job,) = plan.roles[0].node_plans[0].jobs
    assert " ".join(job.command).endswith(
        "-m -- megatron_distil sft /shared/distil/runs/two_roads_sft/recipe.toml --run /shared/distil/runs/two_roads_sft"
    )
    assert plan.roles[0].needs == {}


def test_an_expert_is_a_role():
    expert = [
        "teacher.weights=expert",
        "teacher.model=models/Qwen3-32B",
        "teacher.engine_tp=8",
        "teacher.support=teacher",
    ]
    plan = planned("qwen3_8b_livecodebench", "h200", *expert).plan
    assert [role.name for role in plan.roles] == ["trainer", "rollout", "teacher", "sandbox"]
    assert plan.role("trainer").needs == {"rollout": 8, "teacher": 1, "sandbox": 1}
    assert plan.role("teacher").image == "/shared/distil/images/server.sqsh"
    assert plan.role("teacher").first_node == 2


def test_exports_have_the_same_names_in_every_role_and_the_rest_goes_to_the_processes():
    plan = planned().plan
    assert len({tuple(sorted(role.env)) for role in plan.roles}) == 1
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in plan.roles[0].env
    assert plan.roles[0].node_plans[0].jobs[0].env["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in plan.role("rollout").node_plans[0].services[0].env


def test_no_role_knows_the_secrets_of_another_and_no_value_is_in_the_plan(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "planted-marker")
    monkeypatch.setenv("UNRELATED", "planted-marker")
    plan = planned("qwen3_8b_livecodebench", "h200", "cluster.secrets.rollout=['MODEL_TOKEN']").plan
    assert "planted-marker" not in to_json(plan)
    assert "UNRELATED" not in to_json(plan)
    assert {"HF_TOKEN", "MODEL_TOKEN", "PATH"} <= set(plan.export)
    unset = {role.name: role.script.splitlines()[0] for role in plan.roles}
    assert unset == {
        "trainer": "unset MODEL_TOKEN",
        "rollout": "unset HF_TOKEN",
        "sandbox": "unset HF_TOKEN MODEL_TOKEN",
    }
    assert "HF_TOKEN" not in plan.role("sandbox").node_plans[0].services[0].allowed_env


def test_spaces_and_quotes_survive_the_script_of_a_role(tmp_path: Path):
    code = tmp_path / 'my code\'s "place" $HOME'
    code.mkdir()
    python = tmp_path / "py thon"
    python.write_text('#!/bin/sh\npwd; echo "$PYTHONPATH"; printf "%s|" "$@"\n')
    python.chmod(0o755)
    prepared = prepare("drill", "generic", [f"cluster.code={code}", f"cluster.python.trainer={python}"])
    ran = subprocess.run(["bash", "-c", prepared.plan.roles[0].script], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [str(code), str(code), f"-m|launchers.node|trainer|{prepared.run.plan}|"]


def test_without_pyxis_the_script_starts_the_image():
    prepared = planned(
        "qwen3_8b_livecodebench", "h200", "cluster.runtime=apptainer", 'cluster.image.trainer="/i/my image.sif"'
    )
    scripts = {role.name: shlex.split(role.script.splitlines()[-1]) for role in prepared.plan.roles}
    assert scripts["trainer"][:6] == [
        "exec",
        "apptainer",
        "exec",
        "--nv",
        "--bind=/shared/distil:/shared/distil",
        "/i/my image.sif",
    ]
    assert scripts["trainer"][6:] == ["python3", "-m", "launchers.node", "trainer", prepared.run.plan]
    assert "--nv" not in scripts["sandbox"]
    assert {role.image for role in prepared.plan.roles} == {""}


def test_a_node_fills_in_what_it_knows():
    plan = planned("drill", "generic").plan.role("rollout").node_plans[0]
    known = filled(plan, {"host": "10.0.0.7", "life": "41.0", "rdzv": "unused"})
    assert "{" not in to_json(known).replace("{port}", "").replace("{\n", "").replace("{}", "")
    assert known.services[0].log == "/shared/distil/runs/drill/logs/41.0/rollout-0.log"


def test_recipe_and_cluster_are_refused_together():
    with pytest.raises(ConfigError) as caught:
        prepare("drill", "generic", ["train.num_stps=1", "cluster.tim=x"])
    assert [problem.path for problem in caught.value.problems] == ["train.num_stps", "cluster.tim"]
    with pytest.raises(ConfigError, match=r"--name = 'a b': .* Try a-b\."):
        prepare("drill", "generic", [], name="a b")


def test_a_plan_of_128_nodes_takes_less_than_a_second():
    settings = ["parallel.tp=8", "parallel.dp=64", "rollout.num_engines=512", "rollout.prompts_per_step=64"]
    prepared = planned("qwen3_8b_livecodebench", "h200", *settings, "train.updates_per_step=1")
    assert prepared.plan.nodes == 128
    started = time.process_time()
    again = cluster_plan(prepared.config, prepared.cluster, prepared.run)
    cluster_from_json(to_json(again))
    assert time.process_time() - started < 1.0
    assert again == prepared.plan
