"""Mutants of a file, and what is said of them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tools import mutate

ROOT = Path(__file__).resolve().parents[2]


def changes(line: str) -> set[str]:
    return {mutant.new for mutant in mutate.mutants_of("toy.py", line.encode())}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("f(a + b)", {"f(a - b)"}),
        ("f((a) - (b))", {"f((a) + (b))"}),
        ("c = a * b", {"c = -(a * b)"}),
        ("c = torch.zeros(3)", set()),
        ("f(-a)", {"f(a)"}),
        ("f(-1)", set()),
        ("a += b", {"a -= b"}),
        ("f(a + 1)", {"f(a - 1)", "f(a + 0)"}),
        ("f((a) & b)", {"f((a) )", "f( b)"}),
        ("f(~a | b)", {"f(~a )", "f( b)", "f(a | b)"}),
        ("f(a < b <= c)", {"f(a <= b <= c)", "f(a < b < c)"}),
        ("f(a >= b, c != d)", {"f(a > b, c != d)", "f(a >= b, c == d)"}),
        ("f(torch.where(c, a, 0.0))", {"f((a))", "f((0.0))", "f(torch.where(c, a, 1.0))"}),
        ("f(a.masked_fill(m, 0.0))", {"f(a)", "f(a.masked_fill(m, 1.0))"}),
        ("f(a.clamp(min=1))", {"f(a.clamp(max=1))", "f(a.clamp(min=0))"}),
        ("f(a.amax(1), min(b, c))", {"f(a.amin(1), min(b, c))", "f(a.amax(1), max(b, c))"}),
        ("f(np.maximum.accumulate(a))", {"f(np.minimum.accumulate(a))"}),
        ("f((a * b).detach())", {"f((a * b))"}),
        ("f(a.sum(-1))", {"f(a.mean(-1))"}),
        ("f(a[1:], b[:-1], c[2:])", {"f(a[:-1], b[:-1], c[2:])", "f(a[1:], b[1:], c[2:])"}),
        ("f(range(n))", {"f(range((n) - 1))"}),
        ("f(range(0, n, 2))", {"f(range((0) + 1, n, 2))", "f(range(0, (n) - 1, 2))"}),
    ],
)
def test_each_kind_of_mutant(line, expected):
    assert changes(line) == expected


def test_the_operator_is_found_beside_comments_and_wide_characters():
    source = 'x = "é"; f("é", a  # a + b - c\n    + b)\n'.encode()
    (mutant,) = mutate.mutants_of("toy.py", source)
    assert mutant.apply(source).decode() == 'x = "é"; f("é", a  # a + b - c\n    - b)\n'
    assert (mutant.line, mutant.kind) == (2, "sign")


def test_a_guard_against_gradients_is_taken_away():
    source = b"@torch.no_grad()\ndef f():\n    g()\n"
    (mutant,) = mutate.mutants_of("toy.py", source)
    assert mutant.apply(source) == b"\ndef f():\n    g()\n"


def test_texts_and_types_are_left_alone():
    source = '''
        """A docstring: a + b."""
        Bound = Annotated[float, Field(gt=0.0)] | Literal["none"]

        def f(a: int | None, *, b: Literal["x"] | None = None) -> int | None:
            """Another: ~a & b."""
            c: int | None
            f(f"{a + b}")
            raise ValueError(f"{a + b}: give {a - b}" + str(a - b))
    '''
    assert mutate.mutants_of("toy.py", textwrap.dedent(source).encode()) == []


@pytest.mark.parametrize("file", ["megatron_distil/algo/divergence.py", "megatron_distil/trainer/head/columns.py"])
def test_every_mutant_is_another_program(file):
    source = (ROOT / file).read_bytes()
    mutants = mutate.mutants_of(file, source)
    trees = {ast.dump(ast.parse(mutant.apply(source))) for mutant in mutants}
    assert len(trees | {ast.dump(ast.parse(source))}) == len(mutants) + 1
    assert len(mutants) > 50


def test_every_file_has_tests_that_are_there():
    files = mutate.targets(ROOT, "*")
    heads = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_distil" / "trainer" / "head").glob("[!_]*.py")}
    assert heads - set(files) == {"megatron_distil/trainer/head/triton_kernels.py"}
    assert {"megatron_distil/algo/scan.py", "megatron_distil/algo/objectives/distil.py"} < set(files)
    assert all((ROOT / path).exists() for file in files for path in mutate.tests_of(file))


def test_what_is_listed_as_equivalent_is_a_mutant():
    files = {file for file, _, _ in mutate.EQUIVALENT}
    mutants = [mutant for file in files for mutant in mutate.mutants_of(file, (ROOT / file).read_bytes())]
    gone = set(mutate.EQUIVALENT) - {(mutant.file, mutant.old, mutant.new) for mutant in mutants}
    assert not gone, "these lines have changed: take them out of EQUIVALENT, or judge them again"
    assert all(reason.strip() for reason in mutate.EQUIVALENT.values())


def test_a_pattern_without_a_file_is_refused_with_those_that_there_are():
    with pytest.raises(SystemExit, match=r"'\*/loop.py' matches none.*algo/scan.py"):
        mutate.targets(ROOT, "*/loop.py")


TOY = """\
def later(values):
    found, index = [], len(values)
    while index > 0:
        index -= 1
        found.append(sum(values[1:]))
        values = values[1:]
    return found


def unread(a, b):
    return a + b
"""
TESTS_OF_TOY = """\
import toy


def test_slow():
    assert toy.later([1, 2, 3]) == [5, 3, 0]


def test_quick():
    assert toy.later([5]) == [0]
"""
CAMPAIGN = """\
import os
import sys
from pathlib import Path

import pytest  # once, before the forks
from tools import mutate

os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
mutate.TESTS = {"toy.py": ("test_toy.py",)}
mutate.PATIENCE, mutate.LEAST_DEADLINE_S = 0, 4.0
mutate.EQUIVALENT = {("toy.py", "while index > 0:", "while index >= 0:"): "not run"}
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
known = mutate.known_of(out) if out.exists() else {}
campaign = mutate.Campaign(known, out)
campaign.run([folder], mutate.still_there(folder, known) or mutate.chosen(folder, ["toy.py"], None, 0))
mutate.report(campaign.records)
"""


def campaign(folder: Path, out: Path) -> tuple[str, dict]:
    ended = subprocess.run(
        [sys.executable, "-c", CAMPAIGN, folder, out], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout, json.loads(out.read_text())


def test_a_campaign_tells_kills_hangs_and_survivors_and_goes_on_where_it_stopped(tmp_path):
    folder, out = tmp_path / "toy", tmp_path / "out.json"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    (folder / "test_toy.py").write_text(TESTS_OF_TOY)
    printed, result = campaign(folder, out)
    ends = {entry["new"]: (entry["status"], entry["by"]) for entry in result["mutants"]}
    assert ends["index += 1"] == ("killed", "hung")
    assert ends["found.append(sum(values[:-1]))"] == ("killed", "test_toy.py::test_slow")
    assert ends["while index >= 0:"] == ("equivalent", "not run")
    survivors = {new for new, (status, _) in ends.items() if status == "survived"}
    assert survivors == {"return a - b", "return -(a + b)"}
    assert "  - return a + b\n  + return a - b\n" in printed
    killed = len(ends) - 3
    assert result["files"] == [
        {"file": "toy.py", "mutants": len(ends), "killed": killed, "survived": 2, "equivalent": 1}
    ]
    assert (folder / "toy.py").read_text() == TOY

    printed, again = campaign(folder, out)
    assert again["mutants"] == result["mutants"]
    assert "mutants for" not in printed, "all is known"

    (folder / "test_toy.py").write_text(TESTS_OF_TOY + "\n\ndef test_sum():\n    assert toy.unread(2, 3) == 5\n")
    printed, stronger = campaign(folder, out)
    assert "2 mutants for test_toy.py: 3 tests" in printed, "those that survived meet the new test"
    assert stronger["files"][0]["survived"] == 0


def test_a_campaign_on_tests_that_fail_is_refused(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "test_toy.py").write_text("def test_it():\n    assert False\n")
    ended = subprocess.run(
        [sys.executable, "-c", CAMPAIGN, tmp_path, tmp_path / "out.json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=ROOT,
    )
    assert ended.returncode == 1
    assert "without a mutant: test_toy.py::test_it; repair that first" in ended.stderr
