"""The page of an objective has its settings as they are, presets that exist, and command lines that work."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from launchers.plan import Places
from launchers.quickstart import quickstart_plan
from megatron_distil.algo.objectives import objective_class, objective_names
from megatron_distil.config.load import load_config
from megatron_distil.config.preset import preset_names, read_preset

DOCS = Path(__file__).resolve().parents[2] / "megatron_distil" / "docs"
PLACES = Places(run="/run", cwd="/cwd", trainer_python="python", server_python="python")


def page(name: str) -> str:
    return (DOCS / "objectives" / f"{name}.md").read_text(encoding="utf-8")


def test_every_objective_has_a_page_that_the_method_links_to():
    assert sorted(path.stem for path in (DOCS / "objectives").glob("*.md")) == objective_names()
    method = (DOCS / "method.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\(objectives/(\w+)\.md\)", method)) == objective_names()
    listed = re.findall(r"`([\w-]+)`", method.partition("each number with its source): ")[2].partition(". ")[0])
    assert sorted(listed) == preset_names()


@pytest.mark.parametrize("name", objective_names())
def test_a_page_has_every_setting_with_its_default_and_no_other(name: str):
    rows = re.findall(r"^\| `(\w+)` \| (always stated|`[^`]*`) \| ", page(name), re.MULTILINE)
    fields = {key: info for key, info in objective_class(name).model_fields.items() if key != "name"}
    assert dict(rows) == {
        key: "always stated" if info.is_required() else f"`{json.dumps(info.default)}`" for key, info in fields.items()
    }


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_named_on_the_page_of_its_objective(name: str):
    assert f"`{name}`" in page(read_preset(name)["objective"]["name"])


@pytest.mark.parametrize("name", objective_names())
def test_the_command_lines_of_a_page_work(name: str):
    lines = [line for line in page(name).partition("## Run")[2].splitlines() if line.startswith("    ")]
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)
        match words:
            case ["tools/quickstart", recipe, *overrides]:
                quickstart_plan(recipe, PLACES, overrides=overrides)
            case ["tools/run", "megatron-distil", "check", recipe, *overrides]:
                load_config(recipe, overrides)
            case _:
                pytest.fail(line)
