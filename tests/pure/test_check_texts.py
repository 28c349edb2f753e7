import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_texts.py"
TO_DO = "TO" + "DO"


def found(path: Path) -> str:
    ended = subprocess.run([sys.executable, TOOL, path], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == (1 if ended.stdout.strip() else 0), ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.md", "[there](b.md) and [gone](c.md#part)", ":1: link to c.md, which is not there"),
        ("a.py", f"x = 1  # {TO_DO}: make it better", f":1: {TO_DO} without a condition"),
        ("a.py", "# FIX" + "ME: when it rains", "ME without a condition"),
        ("a.toml", 'index = "https://py' + 'pi.org/simple"', "the host of a package index: py" + "pi.org"),
        ("a.sh", "cd /ro" + "ot/project", "a path of one machine: /ro" + "ot/p"),
    ],
)
def test_what_must_not_be_there_is_found(tmp_path, name, text, expected):
    (tmp_path / "b.md").touch()
    (tmp_path / name).write_text(text + "\n")
    assert expected in found(tmp_path / name)
    assert len(found(tmp_path / name).strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.md", "[there](b.md#part), [web](https://example.org/x), `[code](gone.md)`, [here](#part)"),
        ("a.md", "```\n[code](gone.md)\n```\n"),
        ("a.py", f"# {TO_DO}: drop when SGLang >= 0.6 answers at once"),
        ("a.py", "path = folder / 'root' / 'x'"),
    ],
)
def test_what_may_be_there_is_left_alone(tmp_path, name, text):
    (tmp_path / "b.md").touch()
    (tmp_path / name).write_text(text + "\n")
    assert found(tmp_path / name).strip() == ""
