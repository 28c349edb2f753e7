"""LiveCodeBench's data set -> rows and files of tests: ``python -m megatron_distil.tasks.livecodebench_data DIR SOURCE ...``.

    DIR/train.jsonl           rows to train on: every problem with a random share of its tests
    DIR/test.jsonl            the same problems with all of their tests
    DIR/tests/<sha256>.json   tests as the sandbox reads them, named by their hash
    DIR/prepared.json         what was asked for and what came of it

The defaults are those of SDPO's release, which DistIL is compared on: contests of February to April 2025, private tests only,
half of them for training, drawn from ``numpy.random.RandomState(0)`` problem after problem (data/split_tests.py; its order is
that of the source). Nothing of the source is executed: private tests are read without an unpickler.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hashlib
import json
import pickletools
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_distil.errors import DataError, DistilError
from megatron_distil.tasks.task import Row
from megatron_distil.types import Case

FORMAT = 1
MARKER = "prepared.json"
MAX_TESTS_BYTES = 1 << 30
"""Decompressed, of one problem: the largest of the data set has a fraction of it."""
MAX_REPORTED = 10
ERRATA: Mapping[str, str] = {
    "abc311_c": "several outputs are right",
    "abc326_d": "several outputs are right",
    "abc327_b": "several outputs are right",
    "abc333_e": "several outputs are right",
    "abc343_e": "several outputs are right",
    "abc362_c": "several outputs are right",
    "find-words-containing-character": "several outputs are right",
    "find-the-peaks": "several outputs are right",
    "generate-binary-strings-without-adjacent-zeros": "several outputs are right",
    "abc337_e": "interactive",
    "abc355_e": "interactive",
    "abc350_c": "wrong tests",
    "apply-operations-to-make-string-empty": "wrong tests",
    "most-frequent-ids": "wrong tests",
}
"""LiveCodeBench's ERRATA.md (6ebcdda). Not trained on unless asked for; kept in evaluations, as in published numbers."""

_STRINGS = frozenset({"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"})
_AROUND_A_STRING = frozenset({"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"})


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which problems and tests are taken."""

    since: str = "2025-02-01"
    """First day of a contest."""
    until: str = "2025-05-01"
    """The day after the last."""
    tests: Literal["private", "all"] = "private"
    train_share: float = 0.5
    """Of each problem's tests, at least one."""
    seed: int = 0
    leave_out: tuple[str, ...] = ()
    """Problems that are in neither file."""
    trains_on_errata: bool = False


class ContestProblem(NamedTuple):
    """A row of the data set, read."""

    row: Row
    """Without tests."""
    date: datetime
    tests: Sequence[Case]


class Prepared(NamedTuple):
    """What was written."""

    num_problems: int
    num_tests: int
    num_train_problems: int
    num_train_tests: int
    largest_tests_bytes: int
    """The sandbox's ``--max-body-bytes`` must be above it."""
    errata_left_out: Sequence[str]


def read_source(source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a JSON-lines file, or of a data set on the hub (``id`` or ``id@revision``, its split ``test``), and their places.

    Raises:
        DataError: it cannot be read.
    """
    path = Path(source)
    if path.suffix == ".jsonl" or path.is_file():
        yield from _read_file(path)
        return
    from datasets import load_dataset  # a second to import, and files need it not
    from datasets.exceptions import DatasetNotFoundError

    name, _, revision = source.partition("@")
    try:
        rows = load_dataset(name, split="test", revision=revision or None)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError, RuntimeError, ValueError) as error:
        hint = "a .jsonl file of the data set works, or livecodebench/code_generation_lite@refs/pr/6"
        raise DataError(f"{source}: cannot be loaded: {error}; {hint}") from error
    for index, row in enumerate(rows):
        yield f"{source} row {index}", dict(row)


def _read_file(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    yield f"{path}:{line}", _object(text, f"{path}:{line}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}; a .jsonl file of LiveCodeBench works") from error


def _object(text: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: is a {type(value).__name__}, not an object")
    return value


def private_tests_text(field: str) -> str:
    """The JSON text of ``private_test_cases``: the field itself, or base64(zlib(pickle(text))).

    The pickle is read as the one string that it must be: any instruction that could do more is refused unseen.

    Raises:
        DataError: it is neither, or larger than ``MAX_TESTS_BYTES``.
    """
    if field.lstrip()[:1] in ("[", "{"):
        return field
    try:
        unpacking = zlib.decompressobj()
        pickled = unpacking.decompress(base64.b64decode(field, validate=True), MAX_TESTS_BYTES + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise DataError(f"neither a JSON list nor base64(zlib(pickle(text))): {error}") from error
    if len(pickled) > MAX_TESTS_BYTES:
        raise DataError(f"more than {MAX_TESTS_BYTES} bytes when it is decompressed")
    if not unpacking.eof:
        raise DataError("the compressed data end too early")
    return _pickled_string(pickled)


def _pickled_string(pickled: bytes) -> str:
    found: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name in _STRINGS and isinstance(argument, str):
                found.append(argument)
            elif opcode.name not in _AROUND_A_STRING:
                raise DataError(
                    f"the pickle is no single string: it has the instruction {opcode.name}, which is not run"
                )
    except (ValueError, IndexError) as error:  # a pickle that is cut or no pickle
        raise DataError(f"not a pickle: {error}") from error
    if len(found) != 1:
        raise DataError(f"the pickle holds {len(found)} strings, not one")
    return found[0]


def problem_of(row: Mapping[str, Any], which: Literal["private", "all"]) -> ContestProblem:
    """A row of the data set, checked.

    Raises:
        DataError: names the field and what is wrong with it.
    """
    texts = {name: row.get(name) for name in _FIELDS}
    for name, value in texts.items():
        if name != "contest_date" and not isinstance(value, str):
            raise DataError(f"{name}: is {str(value)[:80]!r}, not a text")
    date = _date(texts["contest_date"])
    function = _function(str(texts["metadata"]))
    tests = _tests("private_test_cases", field_text=str(texts["private_test_cases"]), function=function)
    if which == "all":
        tests = [*_tests("public_test_cases", field_text=str(texts["public_test_cases"]), function=function), *tests]
    if not tests:
        raise DataError("private_test_cases: there are none")
    kept = {
        "id": texts["question_id"],
        "question": texts["question_content"],
        "starter_code": texts["starter_code"],
        "function": function,
        "title": texts["question_title"],
        "platform": texts["platform"],
        "difficulty": texts["difficulty"],
        "contest_date": date.date().isoformat(),
    }
    return ContestProblem(kept, date, tests)


_FIELDS = (
    *("question_id", "question_title", "question_content", "platform", "difficulty", "contest_date", "starter_code"),
    *("public_test_cases", "private_test_cases", "metadata"),
)


def _date(value: object) -> datetime:
    if isinstance(value, datetime):  # the hub's own type
        return value.replace(tzinfo=None)
    try:
        return datetime.fromisoformat(str(value)).replace(tzinfo=None)
    except ValueError as error:
        raise DataError(f"contest_date: {value!r} is no date like 2025-02-01T00:00:00") from error


def _function(metadata: str) -> str:
    value = _object(metadata, "metadata") if metadata.strip() else {}
    name = value.get("func_name") or ""
    if name and (not isinstance(name, str) or not name.isidentifier()):
        raise DataError(f"metadata: func_name is {name!r}, not the name of a function")
    return name


def _tests(field: str, *, field_text: str, function: str) -> list[Case]:
    try:
        text = private_tests_text(field_text)
    except DataError as error:
        raise DataError(f"{field}: {error}") from error
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{field}: not JSON: {error}") from error
    if not isinstance(entries, list):
        raise DataError(f"{field}: is a {type(entries).__name__}, not a list of tests")
    return [_case(entry, f"{field}[{index}]", function) for index, entry in enumerate(entries)]


def _case(entry: Any, where: str, function: str) -> Case:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("input", "output")):
        raise DataError(f"{where}: not an object with the texts input and output")
    kind, wanted = entry.get("testtype"), "functional" if function else "stdin"
    if kind != wanted:
        raise DataError(f"{where}: testtype is {kind!r}, and metadata say {wanted!r}")
    if function:
        try:
            json.loads(entry["output"])
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: output is not JSON, so nothing can pass: {error}") from error
    return Case(entry["input"], entry["output"])


def selected(rows: Iterable[tuple[str, Mapping[str, Any]]], selection: Selection) -> Iterator[ContestProblem]:
    """The problems of the window, in the order of the rows.

    Raises:
        DataError: names every bad row of the window.
    """
    since, until = datetime.fromisoformat(selection.since), datetime.fromisoformat(selection.until)
    bad: list[str] = []
    seen: dict[str, str] = {}
    for where, row in rows:
        try:
            name = str(row.get("question_id"))
            if not since <= _date(row.get("contest_date")) < until or name in selection.leave_out:
                continue
            if name in seen:
                raise DataError(f"question_id: {name!r} is in {seen[name]} as well")
            seen[name] = where
            problem = problem_of(row, selection.tests)
        except DataError as error:
            bad.append(f"  - {where}: {error}")
            continue
        yield problem
    if bad:
        more = [f"  ... and {len(bad) - MAX_REPORTED} more"] if len(bad) > MAX_REPORTED else []
        hint = "--leave-out QUESTION_ID goes on without one"
        raise DataError("\n".join([f"{len(bad)} bad rows; {hint}:", *bad[:MAX_REPORTED], *more]))


def prepare(folder: Path, sources: Sequence[str], selection: Selection) -> Prepared:
    """Write rows and tests; the marker comes last, so that an interrupted run is seen.

    Raises:
        DataError: a source cannot be read, names every bad row, or there is no problem in the window.
    """
    tests_folder = folder / "tests"
    tests_folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).unlink(missing_ok=True)
    draws = np.random.RandomState(selection.seed)
    num_tests = num_train = num_train_tests = num_problems = largest = 0
    errata: list[str] = []
    rows = (row for source in sources for row in read_source(source))
    with (
        (folder / "train.jsonl").open("w", encoding="utf-8") as train,
        (folder / "test.jsonl").open("w", encoding="utf-8") as test,
    ):
        for problem in selected(rows, selection):
            kept = training_tests(problem.tests, selection.train_share, draws)  # always drawn: the stream is the same
            largest = max(largest, _write_row(test, tests_folder, problem.row, problem.tests))
            num_problems, num_tests = num_problems + 1, num_tests + len(problem.tests)
            if problem.row["id"] in ERRATA and not selection.trains_on_errata:
                errata.append(str(problem.row["id"]))
                continue
            _write_row(train, tests_folder, problem.row, kept)
            num_train, num_train_tests = num_train + 1, num_train_tests + len(kept)
    if not num_problems:
        raise DataError(
            f"no problem of {', '.join(sources)} is of {selection.since} or later and before {selection.until}"
        )
    prepared = Prepared(num_problems, num_tests, num_train, num_train_tests, largest, errata)
    record = {"format": FORMAT, "sources": list(sources), **asdict(selection), **prepared._asdict()}
    (folder / MARKER).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return prepared


def training_tests(tests: Sequence[Case], share: float, draws: np.random.RandomState) -> list[Case]:
    """A random share of the tests, at least one, in their order."""
    count = max(1, int(len(tests) * share))
    indices = np.sort(draws.choice(len(tests), size=count, replace=False))
    return [tests[index] for index in indices]


def _write_row(file: Any, folder: Path, row: Row, tests: Sequence[Case]) -> int:
    """Returns the bytes of the tests."""
    payload = json.dumps([{"input": case.input, "output": case.expected} for case in tests]).encode()
    sha256 = hashlib.sha256(payload).hexdigest()
    (folder / f"{sha256}.json").write_bytes(payload)
    file.write(json.dumps({**row, "tests": sha256, "num_tests": len(tests)}) + "\n")
    return len(payload)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options = _parser().parse_args(arguments)
    folder: Path = options.folder
    selection = Selection(
        since=options.since,
        until=options.until,
        tests=options.tests,
        train_share=options.train_share,
        seed=options.seed,
        leave_out=tuple(options.leave_out),
        trains_on_errata=options.trains_on_errata,
    )
    try:
        prepared = prepare(folder, options.sources, selection)
    except DistilError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    left_out = ", ".join(prepared.errata_left_out) or "none"
    sys.stdout.write(
        f"{folder / 'test.jsonl'}: {prepared.num_problems} problems, {prepared.num_tests} tests\n"
        f"{folder / 'train.jsonl'}: {prepared.num_train_problems} problems, {prepared.num_train_tests} tests; "
        f"left out as errata: {left_out}\n"
        f"{folder / 'tests'}: the largest file has {prepared.largest_tests_bytes} bytes\n"
    )
    return 0


def _day(text: str) -> str:
    try:
        return datetime.strptime(text, "%Y-%m-%d").date().isoformat()  # noqa: DTZ007 - contests have days, not zones
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no day like 2025-02-01") from error


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no share above 0 and up to 1; 0.5 works")
    return share


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron_distil.tasks.livecodebench_data", description="Write LiveCodeBench's data in our form."
    )
    default = Selection()
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR")
    add("sources", nargs="+", metavar="SOURCE", help="test6.jsonl of the data set, or its id on the hub [@revision]")
    add("--since", type=_day, default=default.since, metavar="DAY", help="first day of a contest  [%(default)s]")
    add("--until", type=_day, default=default.until, metavar="DAY", help="the day after the last  [%(default)s]")
    add("--tests", choices=("private", "all"), default=default.tests, help="all: public ones too  [%(default)s]")
    add("--train-share", type=_share, default=default.train_share, help="of the tests, in train.jsonl  [%(default)s]")
    add("--seed", type=int, default=default.seed, help="of that choice  [%(default)s]")
    add("--leave-out", nargs="+", default=[], metavar="QUESTION_ID", help="problems that are in neither file")
    add("--trains-on-errata", action="store_true", help="keep problems that upstream's ERRATA.md names in train.jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(main())
