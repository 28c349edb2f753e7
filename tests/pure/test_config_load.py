from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_distil.algo.objectives import objective_names
from megatron_distil.config.load import (
    RENAMED,
    config_from_json,
    differences,
    flat,
    identity_differences,
    load_config,
    recipe_names,
    to_json,
)
from megatron_distil.errors import ConfigError
from tests.recipe import RECIPE, write_recipe

OBJECTIVES = ", ".join(objective_names())


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def lines(recipe: Path | str, *overrides: str) -> list[str]:
    """The problems, one per line, without the heading."""
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]]


def test_a_recipe_is_read_with_everything_it_leaves_out(recipe: Path):
    config = load_config(recipe)
    assert config.train.num_steps == 100
    assert config.objective.name == "distil"
    assert config.objective.model_dump()["future"] == "sum"
    assert config.teacher.weights == "ema"


def test_overrides_are_applied_from_left_to_right_in_toml_syntax(recipe: Path):
    config = load_config(
        recipe,
        [
            "train.num_steps=7",
            "train.num_steps=8",
            "train.learning_rate = 3e-4",
            "checkpoint.is_async=false",
            "teacher.weights=frozen",
            'data.train="a=b.jsonl"',
            "model=/models/x.y=z",
            'eval.sets=[{data="a"}, {data="b", prefix="new_"}]',
        ],
    )
    assert config.train.num_steps == 8
    assert config.train.learning_rate == 3e-4
    assert config.checkpoint.is_async is False
    assert config.teacher.weights == "frozen"
    assert config.data.train == "a=b.jsonl"
    assert config.model == "/models/x.y=z"
    assert [one.prefix for one in config.eval.sets] == ["", "new_"]


def test_a_table_as_override_replaces_the_whole_table(recipe: Path):
    config = load_config(recipe, ['objective={name="grpo"}'])
    assert config.objective.name == "grpo"


def test_another_objective_keeps_of_the_recipe_what_it_has_too(tmp_path: Path):
    path = write_recipe(tmp_path, RECIPE.replace('future = "sum"', 'future = "sum"\nreduction = "seq-mean-token-sum"'))
    before, after = load_config(path), load_config(path, ["objective.clip_low=0.1", "objective.name=grpo"])
    assert after.objective.model_dump() == {
        **load_config(path, ['objective={name="grpo"}']).objective.model_dump(),
        "clip_low": 0.1,
        "reduction": "seq-mean-token-sum",
    }
    assert before.model_dump(exclude={"objective"}) == after.model_dump(exclude={"objective"})


def test_only_what_the_recipe_says_of_its_own_method_is_dropped_for_another_one(tmp_path: Path):
    path = write_recipe(tmp_path, RECIPE.replace("future =", "futur ="))
    said = lines(path, "objective.name=grpo", "objective.cost=kl", "objective.tail=none")
    assert [line.partition(". ")[0] for line in said] == [
        "objective.futur = 'sum': not a setting",
        "objective.cost = 'kl': not a setting",
        "objective.tail = 'none': not a setting",
    ]


def test_lists_become_tuples(recipe: Path):
    config = load_config(recipe, ['eval.sets=[{data="a"}]'])
    assert isinstance(config.eval.sets, tuple)


def test_a_frozen_tree_takes_no_assignment(recipe: Path):
    with pytest.raises(ValueError, match="frozen"):
        load_config(recipe).train.num_steps = 3


def test_every_recipe_of_the_repository_loads():
    assert len(recipe_names()) >= 4
    for name in recipe_names():
        assert load_config(name).train.num_steps > 0


def test_all_problems_of_the_first_pass_come_at_once(recipe: Path):
    said = lines(
        recipe,
        "rollout.samples_per_promt=8",
        'train.num_steps="200"',
        "train.learning_rate=0.0",
        "objective.futur=sum",
        "parallel.tp=true",
        "teacher.weights=emma",
    )
    assert sorted(said) == [
        "objective.futur = 'sum': not a setting. Did you mean objective.future?",
        "parallel.tp = True: must be a valid integer.",
        "rollout.samples_per_promt = 8: not a setting. Did you mean rollout.samples_per_prompt?",
        "teacher.weights = 'emma': must be 'ema', 'frozen', 'live', 'trust_region' or 'expert'.",
        "train.learning_rate = 0.0: must be greater than 0.",
        "train.num_steps = '200': must be a valid integer. Write 200 without quotes.",
    ]


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.top_k=3", "train.top_k = 3: not a setting. Did you mean teacher.top_k?"),
        ("teachr.top_k=3", "teachr = {'top_k': 3}: not a setting. Did you mean teacher?"),
        (
            'eval.sets=[{data="a", prefx="b"}]',
            "eval.sets[0].prefx = 'b': not a setting. Did you mean eval.sets[0].prefix?",
        ),
        (
            'eval.sets=[{prefix="b_"}]',
            "eval.sets[0].data: has to be stated. A JSON-lines file, or the id of a data set on the hub.",
        ),
        ("log.zzz=1", "log.zzz = 1: not a setting. log has rollouts_kept, tensorboard, wandb_project."),
        ("objective.tis_clip=-1", "objective.tis_clip = -1: must be greater than 0 or 'none'."),
        ("objective.name=distl", "objective.name = 'distl': not an objective. Did you mean distil?"),
        ("objective.name=zzz", f"objective.name = 'zzz': not an objective. Objectives: {OBJECTIVES}."),
        ("train.num_steps=0", "train.num_steps = 0: must be greater than or equal to 1."),
        ("train.dtype=float16", "train.dtype = 'float16': must be 'float32' or 'bfloat16'."),
        ("rollout.temperature=3", "rollout.temperature = 3: must be less than or equal to 2."),
        ("train.lr=1e-3", "train.lr = 0.001: goes by another name. Write train.learning_rate."),
        ("train.num_steps", "override = 'train.num_steps': must be path=value. For example train.num_steps=100."),
        ("train..x=1", "override = 'train..x=1': must be path=value. For example train.num_steps=100."),
        ("model.x=1", "model.x = 1: model is no table, it is 'data/model'."),
        ("train=3", "train = 3: must be a valid dictionary or instance of TrainConfig."),
        (
            'eval.sets=[{data="a"}',
            "eval.sets = '[{data=\"a\"}': not a value in TOML: Unclosed array (at end of document). "
            "In a shell, put the override into single quotes.",
        ),
    ],
)
def test_a_wrong_override_is_told_what_is_wrong_with_it(recipe: Path, override: str, text: str):
    assert lines(recipe, override) == [text]


def test_a_renamed_setting_is_not_said_to_be_missing_too(tmp_path: Path):
    path = write_recipe(tmp_path, RECIPE.replace("num_steps", "steps"))
    assert lines(path) == ["train.steps = 100: goes by another name. Write train.num_steps."]


def test_every_new_name_of_a_renamed_setting_exists(recipe: Path):
    known = flat(load_config(recipe))
    assert [new for new in RENAMED.values() if new not in known] == []


def test_the_objective_is_always_stated(tmp_path: Path):
    without = RECIPE.replace('[objective]\nname = "distil"\nfuture = "sum"\n', "")
    assert lines(write_recipe(tmp_path, without)) == [f"objective.name: has to be stated. Objectives: {OBJECTIVES}."]


def test_the_future_of_distil_is_always_stated(tmp_path: Path):
    (text,) = lines(write_recipe(tmp_path, RECIPE.replace('future = "sum"\n', "")))
    assert text.startswith("objective.future: has to be stated. What a token answers for")


def test_what_a_missing_table_had_to_say_is_named(tmp_path: Path):
    path = write_recipe(tmp_path, 'model = "m"\n[objective]\nname = "grpo"\n')
    assert lines(path) == [
        "task.name: has to be stated. A module of ``megatron_distil.tasks``.",
        "data.train: has to be stated. A JSON-lines file, or the id of a data set on the hub.",
        "train.num_steps: has to be stated. Turns of the loop.",
    ]


def test_a_syntax_error_names_file_and_line(tmp_path: Path):
    path = write_recipe(tmp_path, 'model = "m"\n[train\n')
    (text,) = lines(path)
    assert text.startswith(f"recipe = '{path}': not TOML: ")
    assert "line 2" in text


def test_a_recipe_that_is_not_there_is_named_with_those_that_are():
    assert lines("two_raods") == [
        "recipe = 'two_raods': no such file, and no recipe of that name. Did you mean two_roads?"
    ]
    (text,) = lines("zzz/nowhere.toml")
    assert text.startswith("recipe = 'zzz/nowhere.toml': no such file, and no recipe of that name. Recipes: ")


def test_a_configuration_error_crosses_ranks(recipe: Path):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, ["train.num_steps=x", "objective={}"])
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.problems == caught.value.problems


def test_a_tree_survives_the_run_directory(recipe: Path):
    config = load_config(recipe, ['eval.sets=[{data="a"}]', "objective.tis_clip=none"])
    assert config_from_json(to_json(config)) == config


def test_differences_say_which_of_them_make_another_run(recipe: Path):
    old = load_config(recipe)
    new = load_config(recipe, ["model=other", "train.num_steps=200", "objective.future=mean", "task.name=two_roads"])
    assert identity_differences(old, new) == ["model", "task.name", "objective.future"]
    assert [str(one) for one in differences(old, new) if not one.is_identity] == ["train.num_steps: 100 -> 200"]


def test_another_objective_differs_in_all_that_only_one_of_them_has(recipe: Path):
    found = identity_differences(load_config(recipe), load_config(recipe, ['objective={name="grpo"}']))
    assert {"objective.name", "objective.future", "objective.clip_low"} <= set(found)


def test_a_tree_does_not_differ_from_itself(recipe: Path):
    assert differences(load_config(recipe), load_config(recipe)) == []


@given(text=st.text(max_size=40))
def test_no_override_raises_anything_but_a_configuration_error(text: str, tmp_path_factory: pytest.TempPathFactory):
    recipe = write_recipe(tmp_path_factory.getbasetemp())
    with pytest.raises(ConfigError):  # a number of steps has no unit
        load_config(recipe, [text, f"model={text}", "train.num_steps=7x"])
