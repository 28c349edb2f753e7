"""Every preset against the design's table of methods and hyperparameters, typed out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_distil.config.load import config_from_json, flat, load_config, to_json
from megatron_distil.config.preset import PRESETS, preset_names, read_preset
from megatron_distil.errors import ConfigError
from tests.recipe import RECIPE, write_recipe

DISTIL = {"future_coef": 1.0, "future_clip": "none", "cost": "ce", "baseline": "none", "token_clip": "none"}
CLIPS = {"ratio_clip": 2.0, "tis_clip": 2.0}
VERL = {
    "objective.reduction": "seq-mean-token-mean",
    "rollout.prompts_per_step": 32,
    "rollout.samples_per_prompt": 8,
    "rollout.temperature": 1.0,
    "train.clip_grad": 1.0,
    "train.weight_decay": 0.01,
    "train.beta1": 0.9,
    "train.beta2": 0.999,
    "train.decay": "constant",
}
MATHS = {
    "objective.reduction": "token-mean",
    "teacher.weights": "frozen",
    "teacher.support": "teacher",
    "teacher.top_k": 100,
    "teacher.demonstration": "reference",
    "teacher.feedback": "never",
    "rollout.prompts_per_step": 32,
    "rollout.samples_per_prompt": 1,
    "rollout.temperature": 0.7,
    "train.learning_rate": 5e-6,
    "train.clip_grad": 0.1,
    "train.updates_per_step": 1,
}


def objective(name: str, **settings: Any) -> dict[str, Any]:
    return {"objective.name": name, **{f"objective.{key}": value for key, value in settings.items()}}


def teacher(weights: str, support: str, top_k: int, **settings: Any) -> dict[str, Any]:
    named = {"weights": weights, "support": support, "top_k": top_k, **settings}
    return {f"teacher.{key}": value for key, value in named.items()}


def steps(rate: float, updates: int, warmup: int) -> dict[str, Any]:
    return {"train.learning_rate": rate, "train.updates_per_step": updates, "train.warmup_steps": warmup}


NOTHING_CUT = DISTIL | {"ratio_clip": "none", "tis_clip": "none"}
EXPECTED: dict[str, dict[str, Any]] = {
    "paper-eq1": {
        **objective("distil", future="sum", future_form="score", tail="none", reduction="seq-mean-token-sum"),
        **objective("distil", **NOTHING_CUT),
        "teacher.support": "full",
        "rollout.temperature": 1.0,
    },
    "release-science": {
        **VERL,
        **objective("distil", future="mean", future_form="score", tail="bucket", **DISTIL, **CLIPS),
        **teacher("ema", "student", 100, rate=0.01, feedback="never"),
        **steps(5e-5, 1, 10),
    },
    "release-coding": {
        **VERL,
        **objective("distil", future="mean", future_form="score", tail="bucket", **DISTIL, **CLIPS),
        **teacher("ema", "student", 20, rate=0.01, feedback="without_solution"),
        **steps(1e-6, 32, 0),
    },
    "paper-maths": {**MATHS, **objective("distil", future="mean", future_form="score", **NOTHING_CUT)},
    "release-maths": {
        **MATHS,
        **objective("distil", **(NOTHING_CUT | {"token_clip": 0.05})),
        **objective("distil", future="mean", future_form="reweight", tail="renorm"),
    },
    "sdpo-science": {
        **VERL,
        **objective("sdpo", divergence="js", mix=0.5, tail="bucket", **CLIPS),
        **teacher("ema", "student", 100, rate=0.05, feedback="never"),
        **steps(1e-5, 1, 10),
    },
    "sdpo-coding": {
        **VERL,
        **objective("sdpo", divergence="rkl", tail="bucket", **CLIPS),
        **teacher("ema", "student", 20, rate=0.01, feedback="without_solution"),
        **steps(1e-6, 32, 0),
    },
    "opsd": {**MATHS, **objective("opsd", divergence="fkl", tail="renorm", entry_clip=0.05)},
    "grpo-on-policy": {
        **VERL,
        **objective("grpo", clip_low=0.2, clip_high=0.28, dual_clip=3.0, tis_clip=2.0, normalise_std=False),
        **steps(1e-5, 1, 10),
    },
    "grpo-off-policy": {
        **VERL,
        **objective("grpo", clip_low=0.2, clip_high=0.28, dual_clip=3.0, tis_clip=2.0, normalise_std=False),
        **steps(1e-6, 4, 10),
    },
    "opd": {
        **objective("opd", coef=1.0, discount=0.0),
        "teacher.weights": "expert",
        "teacher.context": "prompt",
        "rollout.temperature": 1.0,
    },
}


def asked(name: str) -> list[str]:
    """The overrides that a preset needs on any recipe."""
    return [f"preset={name}", *(["teacher.model=larger"] if name == "opd" else [])]


def test_there_is_a_preset_for_every_row():
    assert preset_names() == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_on_a_recipe_that_is_tuned_otherwise_has_the_values_of_the_table(name: str):
    config = flat(load_config("program_induction", asked(name)))
    assert {path: config[path] for path in EXPECTED[name]} == EXPECTED[name]
    assert config["preset"] == name
    own = {key for table in ("data", "parallel", "feedback", "sync") for key in config if key.startswith(f"{table}.")}
    recipe = flat(load_config("program_induction"))
    assert {key: config[key] for key in own} == {key: recipe[key] for key in own}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_states_its_whole_objective_and_every_number_has_its_source(name: str):
    stated = read_preset(name)["objective"].keys()
    assert stated == load_config("program_induction", asked(name)).objective.model_dump().keys()
    lines = (PRESETS / f"{name}.toml").read_text().splitlines()
    assert [line for line in lines if "=" in line and line[-1].isdigit() and "#" not in line] in (
        [],
        ["discount = 1.0"],
    )


def preset_recipe(folder: Path, text: str, name: str = "release-coding") -> Path:
    return write_recipe(folder, f'preset = "{name}"\n{text}')


def test_what_the_recipe_says_goes_before_its_preset(tmp_path: Path):
    config = load_config(preset_recipe(tmp_path, RECIPE))
    assert config.objective.model_dump()["future"] == "sum"
    assert config.teacher.top_k == 10
    assert config.objective.model_dump()["reduction"] == "seq-mean-token-mean"
    assert (config.teacher.support, config.train.learning_rate, config.preset) == ("student", 1e-6, "release-coding")


def test_a_recipe_with_a_preset_need_not_state_an_objective(tmp_path: Path):
    text = RECIPE.replace('[objective]\nname = "distil"\nfuture = "sum"\n', "")
    assert load_config(preset_recipe(tmp_path, text, "sdpo-coding")).objective.name == "sdpo"


def test_a_recipe_with_another_objective_takes_of_its_preset_what_fits(tmp_path: Path):
    text = RECIPE.replace('name = "distil"\nfuture = "sum"', 'name = "ce"')
    config = load_config(preset_recipe(tmp_path, text))
    assert config.objective.model_dump() == {
        "name": "ce", "tail": "bucket", "token_clip": "none", **CLIPS, "reduction": "seq-mean-token-mean",
    }  # fmt: skip


@pytest.mark.parametrize("order", [1, -1])
def test_the_command_line_goes_before_a_preset_that_it_asks_for_and_that_before_the_recipe(tmp_path: Path, order: int):
    overrides = ["preset=release-science", "teacher.top_k=7", "objective.future_coef=0.5"][::order]
    config = load_config(preset_recipe(tmp_path, RECIPE), overrides)
    assert config.objective.model_dump()["future"] == "mean"
    assert config.objective.model_dump()["future_coef"] == 0.5
    assert (config.teacher.top_k, config.train.learning_rate, config.preset) == (7, 5e-5, "release-science")
    assert config.train.updates_per_step == 1  # nothing of the preset that the recipe names
    assert config.train.num_steps == 100


def test_another_objective_on_a_preset_keeps_what_it_has_too(tmp_path: Path):
    config = load_config(write_recipe(tmp_path), ["preset=release-coding", "objective.name=sdpo"])
    assert config.objective.model_dump()["tail"] == "bucket"
    assert config.objective.name == "sdpo"


def test_an_unknown_preset_is_one_error_with_near_names(tmp_path: Path):
    recipe = write_recipe(tmp_path)
    for overrides, text in (
        (["preset=release-maths", "preset=relase-code"], "not a preset. Did you mean release-coding"),
        (["preset=zzz"], "not a preset. Presets: grpo-off-policy, "),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(recipe, overrides)
        (problem,) = caught.value.problems
        assert problem.path == "preset"
        assert text in str(problem)
    with pytest.raises(ConfigError, match="preset = 3: must be a valid string"):
        load_config(recipe, ["preset=3"])


def test_the_tree_of_a_preset_is_plain_values(tmp_path: Path):
    config = load_config(write_recipe(tmp_path), ["preset=release-coding", "teacher.top_k=7"])
    again = config_from_json(to_json(config))
    assert again == config
    assert again.teacher.top_k == 7


def test_presets_have_settings_of_the_method_and_none_of_a_machine():
    for name in preset_names():
        tables = read_preset(name)
        assert tables.keys() <= {"objective", "teacher", "rollout", "train"}
        assert tables.get("rollout", {}).keys() <= {"temperature", "prompts_per_step", "samples_per_prompt"}
