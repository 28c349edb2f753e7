"""Levels are counted, a skip is not a pass, and what was promised must run.

``--full``                          runs long campaigns as well
``DISTIL_LEVELS=pure,e2e``          levels that must have tests; ``tools/test`` sets it
``DISTIL_REQUIRE=gpu,slurm``        a test that skips because of one of these fails instead: its reason says "needs gpu: ..."
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
LEVELS = ("pure", "distributed", "contract", "e2e", "cluster", "gpu")
HAS_GPU = Path("/dev/nvidiactl").exists()

_collected: Counter[str] = Counter()
_ran: Counter[str] = Counter()
_skipped: dict[str, Counter[str]] = {level: Counter() for level in LEVELS}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked `full`: long campaigns")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """First of all plugins: what ``-k`` deselects was collected all the same."""
    for item in items:
        _collected[_level(item.path)] += 1
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="a long campaign: runs with --full"))
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs gpu: this machine has none"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: pytest.TestReport = (yield).get_result()  # type: ignore[misc]
    _fail_a_broken_promise(report)
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped[_level(item.path)][_reason(report)] += 1
    elif report.when == "call":
        _ran[_level(item.path)] += 1


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report: pytest.CollectReport = (yield).get_result()  # type: ignore[misc]
    _fail_a_broken_promise(report)
    if report.skipped and isinstance(collector, pytest.File):
        _collected[_level(collector.path)] += 1
        _skipped[_level(collector.path)][_reason(report)] += 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _collected or terminalreporter.config.option.collectonly:
        return
    terminalreporter.section("levels")
    for level in _wanted():
        terminalreporter.line(_summary(level))
        for reason, count in _skipped[level].most_common():
            terminalreporter.line(f"             {count} x {reason}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == 0 and not session.config.option.collectonly and any(not _collected[level] for level in _wanted()):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def _wanted() -> list[str]:
    asked = os.environ.get("DISTIL_LEVELS", "")
    return asked.split(",") if asked else [level for level in LEVELS if _collected[level]]


def _level(path: Path) -> str:
    return path.relative_to(HERE).parts[0]


def _summary(level: str) -> str:
    ran, skipped = _ran[level], sum(_skipped[level].values())
    if not _collected[level]:
        return f"{level:11}  FAILED: no test was collected"
    if not ran and skipped:
        return f"{level:11}  skipped: all {skipped}"
    return f"{level:11}  {ran} ran, {skipped} skipped"


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def _fail_a_broken_promise(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped:
        return
    promised = os.environ.get("DISTIL_REQUIRE", "").split(",")
    needed = re.match(r"needs (\w+)", _reason(report))
    if needed and needed[1] in promised:
        reason = _reason(report)
        report.outcome = "failed"
        report.longrepr = f"DISTIL_REQUIRE promises {needed[1]}, but the test skipped: {reason}"
