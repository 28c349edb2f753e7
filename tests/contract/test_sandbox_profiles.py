"""The profiles of other harnesses against what those harnesses said of the same programs."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox import interpreter, judge, limits, probe, request
from sandbox.executor import Task, Worker

FOLDER = Path(__file__).parent / "sandbox"
LIMITS = limits.complete({"cpu_s": 4.0, "idle_s": 4.0})
BEST = probe.probe().level
PYTHON = interpreter.find()
CASES = json.loads((FOLDER / "lcb_verdicts.json").read_text())["cases"]
NATIVE_DIFFERS = {  # the native judge passes what LiveCodeBench's harness cannot run, but for the last
    "for line in sys.stdin",
    "sys.stdin.buffer.readline twice",
    "open(0).read",
    "os.read(0)",
    "sys.stdout.buffer.write",
    "os.write(1)",
    "global statement",
    "from __future__",
    "threading without join",
    "os._exit",
    "call numpy array",
    "sys.exit(1) after right output",
}


@pytest.fixture(scope="module")
def numpy_folder() -> Iterator[str]:
    """A copy that every user can read, for the Python of the sandbox; empty where numpy is of another version."""
    spec = importlib.util.find_spec("numpy")
    assert spec
    assert spec.origin
    package = Path(spec.origin).parent
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # inside, /tmp is the program's own
        Path(folder).chmod(0o755)
        for source in (package, package.with_name("numpy.libs")):
            if source.is_dir():
                ignored = shutil.ignore_patterns("tests", "__pycache__", "*.pyi", "f2py")
                shutil.copytree(source, Path(folder) / source.name, ignore=ignored)
        yield folder


def verdicts(cases: list[dict[str, Any]], profile: str, numpy: str) -> dict[str, bool]:
    async def run() -> dict[str, bool]:
        python = replace(PYTHON, read_only=(*PYTHON.read_only, numpy))
        found: dict[str, bool] = {}
        async with await Worker.start(BEST, python) as worker:
            for case in cases:
                path = f"import sys; sys.path.insert(0, {numpy!r})\n" if "numpy" in case["code"] else ""
                task = Task(
                    code=path + case["code"],
                    input=case["input"],
                    mode=case["mode"],
                    function=case["fn"] or "",
                    has_prelude=True,
                    profile=profile,
                    limits=LIMITS,
                )
                record = await worker.run(task)
                said = judge.judge(record, case["mode"], case["expected"], LIMITS, profile)
                found[case["name"]] = said.verdict == judge.PASSED
        return found

    return asyncio.run(run())


def test_lcb_says_of_every_program_what_livecodebench_says(numpy_folder: str) -> None:
    wanted = {case["name"]: case["passes"] for case in CASES}
    assert len(wanted) == len(CASES) == 98
    found = verdicts(CASES, "lcb", numpy_folder)
    assert {name for name in wanted if found[name] != wanted[name]} == set()


def test_native_differs_from_livecodebench_in_twelve_programs_of_sixty_and_no_other(numpy_folder: str) -> None:
    cases = [case for case in CASES if case["group"] == "judges differ"]
    found = verdicts(cases, "native", numpy_folder)
    assert len(cases) == 60
    assert {case["name"] for case in cases if found[case["name"]] != case["passes"]} == NATIVE_DIFFERS


def test_the_streams_of_the_prelude_are_those_of_the_program() -> None:
    async def run() -> judge.Record:
        async with await Worker.start(BEST, PYTHON) as worker:
            code = "stdout.write(str(int(stdin.readline()) + int(input())))"
            return await worker.run(Task(code=code, input="1\n2\n", has_prelude=True, limits=LIMITS))

    assert asyncio.run(run()).stdout == b"3"


def test_a_profile_brings_its_limits_and_lcb_runs_python_alone() -> None:
    body = {"code": "x", "tests": [{"input": "1", "output": "2"}]}
    low = request.Rules(ceilings={**limits.CEILINGS, "memory_bytes": 256 << 20}, languages={"python": "", "cpp": ""})

    def memory(rules: request.Rules | None = None, **more: Any) -> float:
        return request.parse({**body, **more}, rules).limits["memory_bytes"]

    assert memory(profile="sdpo") == 1 << 30
    assert memory(profile="lcb") == memory() == 512 << 20
    assert memory(profile="sdpo", limits={"memory_bytes": 128 << 20}) == 128 << 20
    assert memory(low, profile="sdpo") == 256 << 20
    with pytest.raises(request.BadRequest, match=r"^profile: 'lcb' is for python; for cpp take 'native'"):
        request.parse({**body, "language": "cpp", "profile": "lcb"}, low)
