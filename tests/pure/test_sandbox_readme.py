"""The page of the sandbox names every route, field, verdict, profile and language, and none that there is not."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sandbox import judge, languages, probe
from sandbox.behaviours import BEHAVIOURS

FOLDER = Path(__file__).resolve().parents[2] / "sandbox"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
OPENAPI = json.loads((FOLDER / "openapi.json").read_text(encoding="utf-8"))


def table(header: str) -> list[str]:
    """First cells of the rows below a header."""
    rows = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [row.split(" | ")[0] for row in rows]


def words(cells: list[str]) -> set[str]:
    return {word for cell in cells for word in re.findall(r"`([^`]+)`", cell)}


def test_every_field_of_a_request_is_described() -> None:
    fields = set(OPENAPI["components"]["schemas"]["Request"]["properties"]) - {"protocol"}
    assert words(table("| field of a request")) == fields


def test_every_verdict_is_described() -> None:
    verdicts = {value for name, value in vars(judge).items() if name.isupper() and isinstance(value, str)}
    assert words(table("| verdict")) == {verdict for verdict in verdicts if verdict.islower()}


def test_every_route_is_named() -> None:
    named = " ".join(table("| route"))
    assert [path for path in OPENAPI["paths"] if path not in named] == []


def test_the_number_of_behaviours_is_true() -> None:
    at_level_2 = sum(behaviour.level <= 2 for behaviour in BEHAVIOURS)
    assert f"shows {at_level_2} behaviours at level 2" in PAGE


def test_levels_profiles_and_languages_are_named() -> None:
    known = (*probe.LEVEL_NAMES, *judge.PROFILES, *languages.LANGUAGES)
    assert [name for name in known if f"`{name}`" not in PAGE] == []
