"""Every rule of a cluster file, each broken alone, and all at once."""

from __future__ import annotations

import pytest

from launchers.cluster import Cluster, cluster_names, load_cluster
from megatron_distil.errors import ConfigError

RIGHT = {
    "name": '"mine"',
    "account": '"a"',
    "partition": '"p"',
    "shared": '"/shared"',
}


@pytest.fixture
def load(tmp_path):
    """A right file with some lines of one's own, the tables last."""

    def from_text(tables: str = "", **keys: str) -> Cluster:
        file = tmp_path / "mine.toml"
        lines = [f"{key} = {value}" for key, value in {**RIGHT, **keys}.items() if value]
        file.write_text("\n".join([*lines, tables]))
        return load_cluster(file)

    return from_text


def problems_of(load, tables: str = "", **keys: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tables, **keys)
    return [str(problem) for problem in caught.value.problems]


def test_a_right_file_is_taken_with_its_defaults(load):
    cluster = load("[python]\nall = '/py'\nrollout = '/server'\n[placement]\nsandbox = 'trainer'")
    assert (cluster.gpus_per_node, cluster.slots, cluster.time_s) == (8, 8, 4 * 3600)
    assert [cluster.python_of(role) for role in ("trainer", "rollout", "teacher", "sandbox")] == [
        "/py", "/server", "/server", "/py"
    ]  # fmt: skip
    assert cluster.image_of("teacher") == ""


def test_days_count_in_a_time_limit(load):
    assert load(time='"2-01:00:30"').time_s == 2 * 86400 + 3600 + 30


@pytest.mark.parametrize("name", cluster_names())
def test_the_clusters_that_come_with_us_are_right(name):
    assert load_cluster(name).name == name


@pytest.mark.parametrize(
    ("keys", "tables", "text"),
    [
        ({"acount": '"x"'}, "", "acount = 'x': not a key of a cluster file. Did you mean account?"),
        ({}, "[placement]\nsandbx = 'own'", "placement.sandbx = 'own': not a key of a cluster file. Did you mean sandbox?"),
        ({}, "[placement]\nrollout = 'shared'", "placement.rollout = 'shared': must be 'own' or 'trainer'."),
        ({"account": ""}, "", "account = '': has to be stated. sacctmgr show assoc lists yours."),
        ({"partition": '"a b"'}, "", "partition = 'a b': has characters other than letters, digits and _ . , -. sinfo lists yours."),
        ({"name": ""}, "", 'name: must be stated. For example name = "mine".'),
        ({"gpus_per_node": "-1"}, "", "gpus_per_node = -1: must be greater than or equal to 0."),
        ({"gpus_per_node": "true"}, "", "gpus_per_node = True: must be a valid integer."),
        ({"gpus_per_node": "0"}, "", "processes_per_node = 0: a node without GPUs takes as many processes as it is said to. Try 4."),
        ({"gpu": '"h20"'}, "", "gpu = 'h20': its memory is not known. Use h200, h100, or leave it out."),
        ({"time": '"4h"'}, "", "time = '4h': not [D-]HH:MM:SS. Try \"04:00:00\"."),
        ({"time": '"00:10:00"'}, "", "warn_s = 600: with three monitor intervals of 10 s nothing is left of the limit of 600 s. Try 150, or a longer time."),
        ({"time": '"00:10:20"'}, "", "warn_s = 600: with three monitor intervals of 10 s nothing is left of the limit of 620 s. Try 155, or a longer time."),
        ({"monitor_s": "60", "warn_s": "120"}, "", "warn_s = 120: the monitor takes up to three intervals of 60 s of it, and nothing is left to save. Try 240."),
        ({"shared": ""}, "", "shared = '': has to be stated. A folder that all nodes see, for example /shared/distil."),
        ({"shared": '"distil"'}, "", "shared = 'distil': not an absolute path. Try /distil."),
        ({"shared": '"/my runs"'}, "", "shared = '/my runs': has characters other than letters, digits and _ . / -, which nemo-run would not quote. Try a link without them."),
        ({"shared": '"/a/nemo_run"'}, "", "shared = '/a/nemo_run': holds /nemo_run, which nemo-run replaces in its scripts. Try another name."),
        ({"code": '"../code"'}, "", "code = '../code': not an absolute path. Try /code."),
        ({}, "[env.all]\nno_proxy = '*'", "env.all.no_proxy = '*': not upper case, digits and underscores; nemo-run writes names in upper case. Try NO_PROXY."),
        ({}, "[env.trainr]\nA = '1'", "env.trainr = {'A': '1'}: not a role. Use all, trainer, rollout, teacher, sandbox."),
        ({}, "[env.all]\nA = 1", 'env.all.A = 1: must be a text. Try "1".'),
        ({}, "[secrets]\nsandbox = ['HF_TOKEN']", "secrets.sandbox = ('HF_TOKEN',): it runs programs that nobody has read, and must know no secret. Leave it out."),
        ({}, "[sbatch]\nnodes = 4", "sbatch.nodes = 4: is decided by the launcher. Leave it out."),
        ({}, "[sbatch]\nno_kill = true", "sbatch.no_kill = True: is decided by the launcher. A dead first node would leave a job that nothing ends."),
        ({}, "[sbatch]\nmail-type = 'END'", "sbatch.mail-type = 'END': not the long name of a flag, with underscores. Try mail_type."),
        ({}, "[image]\ntrainer = '/a.sqsh'\n[mounts]\n'/shared' = '/shared'", "image = {'trainer': '/a.sqsh'}: images for some roles only; rollout, sandbox have none. Give one to every role, or to none."),
        ({}, "[image]\ntrainer = '/a'\nrollout = '/b'\nsandbox = '/c'", "mounts = {}: the shared folder /shared is not in the images under the same path. Add \"/shared\" = \"/shared\"."),
        ({}, "[mounts]\n'/a b' = '/a'", "mounts (/a b) = '/a b': a mount cannot have spaces, commas or colons in its path. Rename the folder."),
    ],
)  # fmt: skip
def test_one_thing_is_wrong(load, keys, tables, text):
    assert problems_of(load, tables, **keys) == [text]


@pytest.mark.parametrize(
    "line", ["WANDB_API_KEY = 'planted'", "AWS_SECRET_ACCESS_KEY = 'planted'", "X = 'hf_planted'", "Y = 'sk-planted'"]
)
def test_what_looks_like_a_secret_is_refused_and_not_repeated(load, line):
    (text,) = problems_of(load, f"[env.rollout]\n{line}")
    assert "looks like a secret" in text
    assert f'secrets.rollout = ["{line.split()[0]}"]' in text
    assert "planted" not in text


def test_a_value_in_the_place_of_a_name_is_not_repeated_either(load):
    (text,) = problems_of(load, "[secrets]\ntrainer = ['hf_planted']")
    assert "not the name of a variable" in text
    assert "planted" not in text


def test_everything_is_said_at_once(load):
    found = problems_of(
        load,
        "[env.all]\nA = 1\nlower = 'x'\n[placement]\nsandbox = 'there'",
        acount='"x"',
        partition="",
        time='"soon"',
        retries='"many"',
    )
    assert len(found) == 7
    for part in ("acount", "partition", "time", "retries", "env.all.A", "env.all.lower", "placement.sandbox"):
        assert any(text.startswith(part) for text in found), part


def test_overrides_replace_what_the_file_says_and_are_checked_like_it():
    cluster = load_cluster("generic", ["time=1-00:00:00", "placement.sandbox=own", "env.all.A=two words"])
    assert (cluster.time, cluster.placement.sandbox, cluster.env["all"]["A"]) == ("1-00:00:00", "own", "two words")
    with pytest.raises(ConfigError, match=r"tim = 3: not a key of a cluster file\. Did you mean time\?"):
        load_cluster("generic", ["tim=3"])
    with pytest.raises(ConfigError, match="must be path=value"):
        load_cluster("generic", ["time"])
