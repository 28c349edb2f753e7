import json
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.cluster import Cluster, load_cluster
from launchers.jobplan import (
    ClusterPlan,
    Job,
    JobPlan,
    RolePlan,
    ServicePlan,
    cluster_from_json,
    filled,
    from_json,
    to_json,
)
from launchers.plan import Places, Training, services, training_job
from launchers.quickstart import known_recipes, quickstart_plan, result_lines
from megatron_distil.config.load import load_config
from megatron_distil.errors import ConfigError

PLACES = Places(run="/run", cwd="/cwd", trainer_python="/trainer/python", server_python="/server/python")
CLUSTER = Cluster(name="one", env={"all": {"A": "1", "B": "1"}, "rollout": {"B": "2"}})


def config(*overrides: str):
    return load_config("program_induction", overrides)


def test_a_plan_survives_json():
    service = ServicePlan(
        role="rollout",
        name="rollout-0",
        command=("serve", "--port", "{port}", "a b", '"'),
        env={"A": "1"},
        allowed_env=("PATH",),
        cwd="/cwd",
        log="/log",
        port=3000,
        health_path="/health",
        ready_facts=("isolation",),
        start_timeout_s=1.5,
        max_restarts=0,
        start_after="prepare",
        info={"gpus": 1, "model": "tiny"},
    )
    jobs = (Job(name="prepare", command=("sh", "-c", "true"), cwd="/"), Job(name="b", command=("x",), cwd="/", log="l"))
    plan = JobPlan(name="n", registry="/r", log="/l", services=(service,), jobs=jobs)
    assert from_json(to_json(plan)) == plan


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"services": [], "jobs": [{"nme": "x", "command": []}]}'])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match=r"not a job plan|Expecting value"):
        from_json(text)


def test_the_supervisor_and_all_that_it_imports_are_standard_library():
    code = (
        "import sys; import launchers.supervisor; "
        "print([m for m in sys.modules if m.partition('.')[0] in ('pydantic', 'torch', 'numpy', 'aiohttp', 'rich')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == "[]\n"


def test_as_many_services_as_the_recipe_says_each_with_its_seed():
    found = services(
        config("rollout.num_engines=2", "feedback.num_sandboxes=1", "train.seed=5"), CLUSTER, PLACES, model="/model"
    )
    assert [(s.role, s.name) for s in found] == [
        ("rollout", "rollout-0"),
        ("rollout", "rollout-1"),
        ("sandbox", "sandbox-0"),
    ]
    assert [s.command[-2:] for s in found[:2]] == [("--random-seed", "5"), ("--random-seed", "6")]
    assert len({s.log for s in found}) == 3


def test_the_command_of_a_server():
    (server, *_) = services(
        config("rollout.engine_tp=2", "rollout.start_timeout_s=77.0"),
        CLUSTER,
        PLACES,
        model="/m",
        start_servers_after="a",
    )
    assert " ".join(server.command) == (
        "/server/python -m megatron_distil.rollout.sglang.serve --model-path /m --host 127.0.0.1 --port {port} "
        "--dtype float32 --tp-size 2 --random-seed 0"
    )
    assert server.env == {"A": "1", "B": "2", "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
    assert (server.health_path, server.start_timeout_s, server.start_after) == ("/health", 77.0, "a")


def test_an_expert_has_servers_of_its_own_where_the_objective_has_a_teacher():
    settings = ["teacher.weights=expert", "teacher.model=/larger", "teacher.num_engines=2", "teacher.engine_tp=4"]
    found = services(config(*settings), CLUSTER, PLACES, model="/m")
    assert [service.name for service in found] == ["rollout-0", "teacher-0", "teacher-1", "sandbox-0"]
    expert = found[2]
    assert " ".join(expert.command) == (
        "/server/python -m megatron_distil.rollout.sglang.serve --model-path /larger --host 127.0.0.1 --port {port} "
        "--dtype float32 --tp-size 4 --random-seed 1"
    )
    assert (expert.role, expert.health_path, expert.start_after) == ("teacher", "/health", "")
    assert expert.env == {"A": "1", "B": "1", "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
    assert "/larger" not in found[0].command
    without = services(config(*settings, "objective.name=grpo"), CLUSTER, PLACES, model="/m")
    assert [service.role for service in without] == ["rollout", "sandbox"]


def test_the_sandbox_gets_the_level_of_the_recipe_and_nothing_of_the_users_environment():
    *_, sandbox = services(
        config("feedback.min_isolation=2", "feedback.sandbox_workers=3"), CLUSTER, PLACES, model="/m"
    )
    assert " ".join(sandbox.command) == (
        "/trainer/python -m sandbox.server --host 127.0.0.1 --port {port} --workers 3 --min-level 2 --drain-s 2"
    )
    assert "PATH" in sandbox.allowed_env
    assert not {"HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"} & set(sandbox.allowed_env)
    assert sandbox.health_path == "/readyz"


def test_torchrun_starts_as_many_ranks_as_the_layout_has_and_only_the_first_writes_to_the_terminal():
    training = Training(command="train", recipe="r.toml", run="/run", export="/run/hf", overrides=("a.b=1",))
    job = training_job("train", training, config("parallel.tp=2", "parallel.dp=2"), CLUSTER, PLACES)
    assert " ".join(job.command) == (
        "/trainer/python -m launchers.torchrun --nnodes 1 --nproc-per-node 4 --rdzv-backend c10d "
        "--rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1 --max-restarts 0 "
        "--log-dir /run/logs/train --redirects 1:3,2:3,3:3 "
        "-m -- megatron_distil train r.toml --run /run --export /run/hf a.b=1"
    )
    assert job.registry == "/run/registry"
    assert job.rank_logs == "/run/logs/train"


def test_one_rank_needs_no_files():
    training = Training(command="sft", recipe="r", run="/run/sft")
    job = training_job("sft", training, config("parallel.tp=1"), CLUSTER, PLACES)
    assert "--redirects" not in job.command
    assert "--export" not in job.command
    assert job.rank_logs == ""
    assert job.registry == "/run/sft/registry"


@pytest.mark.parametrize("recipe", ["program_induction", "two_roads"])
def test_the_quickstart_is_the_plan_that_was_reviewed(recipe):
    """The golden file is the plan; after a change that is wanted: delete it and run the test twice."""
    golden = Path(__file__).parent / "golden" / f"quickstart_{recipe}.json"
    # what a recipe may tune without a change of the plan
    pinned = ["train.seed=0", "rollout.start_timeout_s=600.0", "feedback.sandbox_workers=2", "feedback.min_isolation=1"]
    text = to_json(quickstart_plan(recipe, PLACES, overrides=["train.num_steps=3", *pinned]))
    if not golden.exists():
        golden.write_text(text)
        pytest.fail(f"{golden} was not there and has been written: review it")
    assert json.loads(text) == json.loads(golden.read_text())


def test_a_quickstart_overrides_last_what_its_user_says_last():
    plan = quickstart_plan("two_roads", PLACES, overrides=["data.train=/mine.jsonl"])
    (train,) = [job for job in plan.jobs if job.name == "train"]
    assert train.command[-1] == "data.train=/mine.jsonl"


def test_a_quickstart_of_another_objective_is_one_word():
    plan = quickstart_plan("program_induction", PLACES, overrides=["objective.name=grpo"])
    assert plan.jobs[2].command[-1] == "objective.name=grpo"


def test_a_quickstart_refuses_a_wrong_setting_before_anything_is_started():
    with pytest.raises(ConfigError, match=r"train\.num_stps"):
        quickstart_plan("two_roads", PLACES, overrides=["train.num_stps=3"])
    with pytest.raises(ConfigError, match=r"train\.num_stps"):
        quickstart_plan("two_roads", PLACES, warm_start=["train.num_stps=3"])


def test_every_recipe_with_a_warm_start_can_be_a_quickstart():
    assert known_recipes() == ["program_induction", "two_roads"]


def test_the_result_is_the_first_and_the_last_evaluation(tmp_path):
    rows = [
        {"step": 0, "eval/avg_at_8": 0.125, "loss/ce_nats": 2.0},
        {"step": 1, "loss/ce_nats": 1.0},
        {"step": 35, "eval/avg_at_8": 0.25},
        {"step": 70, "eval/avg_at_8": 0.875, "eval/new_avg_at_8": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = list(result_lines(tmp_path))
    assert lines[0].split() == ["before", "after"]
    assert lines[1].split() == ["eval/avg_at_8", "0.125", "0.875"]
    assert lines[2].split() == ["eval/new_avg_at_8", "0.500", "0.500"]
    assert lines[3] == "after step 70"
    assert lines[-1].split() == ["report", str(tmp_path / "report.html")]


def test_the_local_cluster_stays_on_this_machine():
    cluster = load_cluster("local")
    assert cluster.env_of("trainer")["GLOO_SOCKET_IFNAME"] == "lo"
    assert cluster.env_of("rollout")["GLOO_SOCKET_IFNAME"] == "lo"


def test_everything_that_is_wrong_with_a_cluster_file_is_said_at_once(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('nam = "x"\nscheduler = "none"\n[env.all]\nA = 1\n[env.train]\nB = "1"\n')
    with pytest.raises(ConfigError) as caught:
        load_cluster(file)
    text = str(caught.value)
    assert "4 problems" in text
    assert "nam = 'x': not a key of a cluster file. Did you mean name?" in text
    assert "env.all.A = 1: must be a text" in text
    assert "env.train" in text


def test_a_cluster_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ConfigError, match=r"cluster = 'h20': No such file or directory\. Known: .*local"):
        load_cluster("h20")


def node_plan() -> JobPlan:
    service = ServicePlan(
        role="rollout",
        name="rollout-0",
        command=("serve", "--host", "{host}", "--port", "{port}", '{"a": 1}'),
        env={"FOLDER": "/r/{life}"},
        cwd="/",
        log="/l/{life}/rollout-0.log",
        health_path="/health",
        start_timeout_s=1.0,
    )
    job = Job(name="train", command=("torchrun", "{rdzv}", "{rdzv}"), cwd="/", rank_logs="/l/{life}")
    return JobPlan(name="n", registry="/r/{life}", log="/l", services=(service,), jobs=(job,))


def test_a_plan_of_many_nodes_survives_json():
    role = RolePlan(
        name="trainer",
        nodes=2,
        first_node=0,
        node_plans=(node_plan(), node_plan()),
        needs={"rollout": 2},
        script="exec python 'a b'\n",
        srun_args=("--overlap", "--nodes=2"),
        env={"A": 'b "c"'},
        mounts=("/a:/b",),
        container_env=("A",),
    )
    plan = ClusterPlan(
        name="n", run="/run", account="a", partition="p", time="1-00:00:00", nodes=2, gpus_per_node=8,
        signal="B:USR1@600", retries=100, monitor_s=10, setup="true\n", roles=(role,), export=("PATH",),
        sbatch={"no_kill": True, "qos": "high", "nice": 5},
    )  # fmt: skip
    assert cluster_from_json(to_json(plan)) == plan
    assert plan.role("trainer") is role
    with pytest.raises(KeyError, match="no role 'sandbox'; the plan has trainer"):
        plan.role("sandbox")


@pytest.mark.parametrize("text", ["[]", "{}", '{"roles": [{"srun_args": []}], "export": []}'])
def test_what_is_no_plan_of_many_nodes_is_refused(text):
    with pytest.raises(ValueError, match="not a cluster plan"):
        cluster_from_json(text)


def test_what_a_node_knows_is_filled_in_everywhere_and_other_braces_stay():
    plan = filled(node_plan(), {"host": "10.0.0.1", "life": "7.2", "rdzv": "10.0.0.2:1400"})
    (service,), (job,) = plan.services, plan.jobs
    assert service.command == ("serve", "--host", "10.0.0.1", "--port", "{port}", '{"a": 1}')
    assert (service.env, service.log) == ({"FOLDER": "/r/7.2"}, "/l/7.2/rollout-0.log")
    assert (job.command, job.rank_logs) == (("torchrun", "10.0.0.2:1400", "10.0.0.2:1400"), "/l/7.2")
    assert plan.registry == "/r/7.2"
