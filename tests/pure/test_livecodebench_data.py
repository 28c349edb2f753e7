"""The data set's files -> rows and tests: what is taken, what is drawn, and what nobody may smuggle in."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_distil.config.schema import TaskConfig
from megatron_distil.errors import DataError
from megatron_distil.tasks import livecodebench_data as data
from megatron_distil.tasks.livecodebench import LiveCodeBench
from megatron_distil.tasks.livecodebench_data import Selection, main, prepare, private_tests_text, training_tests
from megatron_distil.types import Case
from tests.contest import IN_WINDOW, packed, write_upstream

ROOT = Path(__file__).resolve().parents[2]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def private_of(folder: Path, row: dict[str, Any]) -> list[dict[str, str]]:
    payload = (folder / "tests" / f"{row['tests']}.json").read_bytes()
    assert hashlib.sha256(payload).hexdigest() == row["tests"]
    return json.loads(payload)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_upstream(tmp_path / "upstream.jsonl")
    return tmp_path / "upstream.jsonl"


def changed(source: Path, change: dict[str, object], index: int = 3) -> Path:
    rows = lines(source)
    rows[index] |= change
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return source


# ---------------------------------------------------------------------------------------- what is taken
def test_evaluation_rows_have_all_private_tests_of_the_problems_in_the_window(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lcb"
    prepared = prepare(folder, [str(source)], Selection())
    rows = lines(folder / "test.jsonl")
    assert [row["id"] for row in rows] == [contest.name for contest in IN_WINDOW]
    for row, contest in zip(rows, IN_WINDOW, strict=True):
        private = contest.cases()[1:]
        assert private_of(folder, row) == [{"input": one["input"], "output": one["output"]} for one in private]
        assert (row["num_tests"], row["function"]) == (len(private), contest.function)
        assert (row["question"], row["starter_code"]) == (contest.question, contest.starter_code)
    task = LiveCodeBench(TaskConfig(name="livecodebench", tests=str(folder / "tests")))
    assert [problem for row in rows for problem in task.problems(row)] == []
    assert (prepared.num_problems, prepared.num_tests) == (21, sum(row["num_tests"] for row in rows))
    assert json.loads((folder / "prepared.json").read_text())["num_problems"] == 21


def test_training_rows_have_the_tests_that_the_release_draws(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lcb"
    prepare(folder, [str(source)], Selection())
    np.random.seed(0)  # the rule of the release, in its own words: one global stream over all problems
    for row, contest in zip(lines(folder / "train.jsonl"), IN_WINDOW, strict=True):
        private = contest.cases()[1:]
        keep = np.sort(np.random.choice(len(private), size=max(1, int(len(private) * 0.5)), replace=False))
        assert private_of(folder, row) == [
            {"input": private[index]["input"], "output": private[index]["output"]} for index in keep
        ]
        assert row["num_tests"] == len(keep) < len(private)


def test_a_problem_keeps_one_test_at_least() -> None:
    cases = [Case(str(index), "") for index in range(3)]
    for share, count in ((0.01, 1), (0.5, 1), (0.67, 2), (1.0, 3)):
        kept = training_tests(cases, share, np.random.RandomState(1))
        assert len(kept) == count
        assert kept == sorted(kept)


def test_errata_are_evaluated_on_and_not_trained_on_and_draw_all_the_same(source: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "a", [str(source)], Selection())
    changed(source, {"question_id": "abc350_c"})
    prepared = prepare(tmp_path / "b", [str(source)], Selection())
    assert prepared.errata_left_out == ["abc350_c"]
    before, after = lines(tmp_path / "a" / "train.jsonl"), lines(tmp_path / "b" / "train.jsonl")
    assert after == before[:3] + before[4:]
    assert len(lines(tmp_path / "b" / "test.jsonl")) == 21
    prepare(tmp_path / "c", [str(source)], Selection(trains_on_errata=True))
    assert len(lines(tmp_path / "c" / "train.jsonl")) == 21


def test_the_window_public_tests_and_single_problems_are_options(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lcb"
    assert main([str(folder), str(source), "--since", "2024-01-01", "--until", "2025-02-01", "--tests", "all"]) == 0
    (row,) = lines(folder / "test.jsonl")
    assert (row["id"], row["num_tests"], row["contest_date"]) == ("old-problem", 5, "2024-12-31")
    assert main([str(folder), str(source), "--leave-out", "leap", "stairs"]) == 0
    assert len(lines(folder / "test.jsonl")) == 19


def test_the_same_arguments_write_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        prepare(tmp_path / name, [str(source)], Selection(seed=7))
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) > 40
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


# ------------------------------------------------------------------------------------ what is refused
BAD = [
    ({"private_test_cases": "[{"}, "private_test_cases: not JSON"),
    ({"private_test_cases": "@@@"}, "private_test_cases: neither a JSON list nor base64"),
    ({"private_test_cases": packed("{}")}, "private_test_cases: is a dict, not a list"),
    ({"private_test_cases": "[]"}, "private_test_cases: there are none"),
    ({"private_test_cases": '[{"input": "1"}]'}, r"private_test_cases\[0\]: not an object with the texts"),
    (
        {"private_test_cases": '[{"input": "1", "output": "1", "testtype": "functional"}]'},
        r"private_test_cases\[0\]: testtype is 'functional'",
    ),
    ({"private_test_cases": None}, "private_test_cases: is 'None', not a text"),
    ({"question_content": 3}, "question_content: is '3', not a text"),
    ({"contest_date": "soon"}, "contest_date: 'soon' is no date"),
    ({"metadata": "{"}, "metadata: not JSON"),
    ({"metadata": '{"func_name": "a b"}'}, "metadata: func_name is 'a b'"),
    ({"question_id": "two-apples"}, "question_id: 'two-apples' is in .*upstream.jsonl:1 as well"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(index) for index in range(len(BAD))])
def test_a_bad_row_is_named_with_line_and_field(
    source: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=rf"upstream\.jsonl:4: {message}") as raised:
        prepare(tmp_path / "lcb", [str(changed(source, change))], Selection())
    assert "--leave-out" in str(raised.value)
    assert not (tmp_path / "lcb" / "prepared.json").exists()


def test_an_expected_value_that_nothing_can_return_is_found_here_and_not_in_a_run(source: Path, tmp_path: Path) -> None:
    broken = {"private_test_cases": '[{"input": "[1]", "output": "one", "testtype": "functional"}]'}
    with pytest.raises(DataError, match=r"private_test_cases\[0\]: output is not JSON, so nothing can pass"):
        prepare(tmp_path / "lcb", [str(changed(source, broken, index=12))], Selection())


def test_an_empty_window_says_so(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "lcb"), str(source), "--since", "2030-01-01", "--until", "2031-01-01"]) == 2
    assert "no problem of" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--since", "March"], ["--train-share", "0"], ["--train-share", "1.1"]])
def test_options_that_make_no_sense_are_refused(source: Path, tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main([str(tmp_path / "lcb"), str(source), *words])
    assert raised.value.code == 2


class Evil:
    """What a pickle can do to those who load it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_a_pickle_that_does_something_is_refused_and_does_nothing(tmp_path: Path) -> None:
    target = tmp_path / "made"
    payload = packed(Evil(str(target)))
    with pytest.raises(DataError, match=r"it has the instruction .*which is not run"):
        private_tests_text(payload)
    assert not target.exists()
    pickle.loads(zlib.decompress(base64.b64decode(payload)))  # it would have
    assert target.exists()


def _wrapped(pickled: bytes) -> str:
    return base64.b64encode(zlib.compress(pickled)).decode()


SHAPES = [
    (packed(["[]"]), "instruction EMPTY_LIST"),
    (packed(3), "instruction BININT1"),
    (packed(("[]", "[]")), "strings|instruction"),
    (packed(b"[]"), "instruction"),
    (_wrapped(b"\x80\x04r\xff\xff\xff\xff."), "holds 0 strings"),
    (_wrapped(b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc."), "not a pickle"),
    (_wrapped(b"hello"), "instruction|not a pickle"),
    (_wrapped(b""), "not a pickle"),
    (_wrapped(b"\x80\x04\x8c\x02[]"), "not a pickle"),
    (base64.b64encode(zlib.compress(pickle.dumps("[]"))[:-6]).decode(), "end too early|Error"),
    (base64.b64encode(b"no zlib").decode(), "neither a JSON list"),
]


@pytest.mark.parametrize(("field", "message"), SHAPES, ids=[str(index) for index in range(len(SHAPES))])
def test_anything_but_one_packed_string_is_refused(field: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        private_tests_text(field)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_one_string_is_read_from_every_protocol(protocol: int) -> None:
    text = json.dumps([{"input": "\u00e4\n\ud800", "output": "x" * 300, "testtype": "stdin"}], ensure_ascii=False)
    assert private_tests_text(_wrapped(pickle.dumps(text, protocol))) == text


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_TESTS_BYTES", 10**6)
    bomb = packed("[" + " " * 10**7 + "]")
    tracemalloc.start()
    with pytest.raises(DataError, match="more than 1000000 bytes"):
        private_tests_text(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 10**6


def test_the_command_line_says_what_it_wrote(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_distil.tasks.livecodebench_data", str(tmp_path / "lcb"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "test.jsonl: 21 problems, 83 tests" in done.stdout
    assert "left out as errata: none" in done.stdout
