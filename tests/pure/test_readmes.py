"""The list of modules says what the modules say of themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "megatron_distil" / "README.md"
MODULES = sorted(
    path
    for folder in ("megatron_distil", "launchers", "sandbox")
    for path in (ROOT / folder).rglob("*.py")
    if path.stat().st_size
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_is_listed_with_the_first_line_of_its_docstring(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, "a module says in one line what it is for"
    row = f"| `{path.relative_to(ROOT)}` | {docstring.splitlines()[0].replace('|', chr(92) + '|')} |"
    assert row in README.read_text(encoding="utf-8").splitlines()


def test_no_module_is_listed_that_is_gone() -> None:
    listed = {line.split("`")[1] for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| `")}
    assert listed <= {str(path.relative_to(ROOT)) for path in MODULES}
