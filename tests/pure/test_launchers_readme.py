"""The page of the launcher names every key of a cluster file, and only commands and settings that there are."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from launchers.__main__ import COMMANDS
from launchers.cluster import Cluster, cluster_names
from megatron_distil.config.load import recipe_names
from megatron_distil.sizing import GPUS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "launchers" / "README.md").read_text(encoding="utf-8")
LINES = [line.strip() for line in PAGE.splitlines() if line.startswith("    ")]


def first_cells(header: str) -> list[str]:
    rows = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [row.split(" | ")[0] for row in rows]


def test_every_key_of_a_cluster_file_is_described_with_its_default() -> None:
    named = {
        re.sub(r"[\[\]]|\..*", "", word) for cell in first_cells("| key |") for word in re.findall("`(.+?)`", cell)
    }
    assert named == set(Cluster.model_fields)
    for key in ("time", "warn_s", "retries", "max_lives_without_progress", "restarts_in_place", "monitor_s", "runtime"):
        default = Cluster.model_fields[key].default
        assert f"| `{key}` | {f'`{default}`' if isinstance(default, str) else default} |" in PAGE
    assert all(f"`{gpu}`" in PAGE for gpu in GPUS)


def test_it_is_ten_lines_from_a_login_node_to_a_report() -> None:
    lines = LINES[: next(number for number, line in enumerate(LINES) if " report " in line) + 1]
    assert len(lines) == 10


@pytest.mark.parametrize("line", LINES)
def test_what_a_command_line_names_is_there(line: str) -> None:
    command = line.partition(" # ")[0]
    for path in re.findall(r"(?<!\S)(?:tools|launchers|sandbox)/[\w./]+", command):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"-m (\S+)", command):
        assert importlib.util.find_spec(module), module
    for name in re.findall(r"-m launchers (\w+)", command):
        assert name in COMMANDS
    for recipe in re.findall(r"tools/launch (\w+)", command):
        assert recipe in recipe_names()


def test_the_cluster_files_that_are_to_be_copied_are_named() -> None:
    assert [name for name in cluster_names() if f"`clusters/{name}.toml`" not in PAGE] == ["local"]


def test_every_drill_is_named_and_every_name_is_a_drill() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "cluster").glob("test_*.py")]
    drills = {name for text in texts for name in re.findall(r"^def test_(\w+)", text, re.MULTILINE)}
    table = PAGE.partition("| fault |")[2].partition("\n\n")
    in_rows = {name for row in table[0].splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split(" | ")[-1])}
    assert in_rows <= drills
    assert drills - in_rows <= set(re.findall(r"`(\w+)`", table[2]))
