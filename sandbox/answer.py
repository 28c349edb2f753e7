"""The answer to a request, built from what its tests left behind."""

from __future__ import annotations

import hashlib
from typing import Any

from sandbox import feedback, judge
from sandbox.request import Request, Test

Answer = dict[str, Any]
STDOUT_BYTES, STDERR_BYTES = 2000, 2000
RAN_STDOUT_BYTES = 64 << 10
"""Of a test that is not judged here: its output is the answer."""
MAX_DETAIL = 300


class Tally:
    """What is kept of the tests that ran: never a whole record, of which there may be a thousand of megabytes each."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._rows: list[dict[str, Any]] = []
        self._shown: list[feedback.Shown] = []
        self._outputs = hashlib.sha256()
        self._failed = self._timeouts = 0

    @property
    def is_over(self) -> bool:
        """Whether enough tests have failed."""
        request = self._request
        return self._failed >= request.stop_after or self._timeouts >= request.stop_after_timeouts

    def add(self, test: Test, record: judge.Record, judgement: judge.Judgement, output: str) -> None:
        """The next test, and the digest of its output."""
        index = len(self._rows)
        self._rows.append(_row(index, record, judgement))
        self._shown.append(_shown(index, test, record, judgement))
        self._outputs.update(output.encode())
        self._failed += judgement.verdict not in (judge.PASSED, judge.RAN)
        self._timeouts += judgement.verdict in (judge.TIME_LIMIT, judge.WALL_LIMIT)

    def answer(self) -> Answer:
        """What the program did; tests that were not run count as not passed."""
        passed, total = sum(row["verdict"] == judge.PASSED for row in self._rows), len(self._request.tests)
        return {
            "status": "ok",
            "passed": passed,
            "ran": len(self._rows),
            "total": total,
            "pass_all": passed == total,
            "pass_fraction": passed / total,
            "tests": self._rows,
            "feedback": feedback.render(self._shown, self._request.feedback),
            "outputs_digest": self._outputs.hexdigest(),
        }


def fault(detail: str) -> Answer:
    """No partial verdicts that someone could take for a result."""
    return {"status": "sandbox_error", "detail": detail[:MAX_DETAIL], "tests": []}


def _row(index: int, record: judge.Record, judgement: judge.Judgement) -> dict[str, Any]:
    cap = RAN_STDOUT_BYTES if judgement.verdict == judge.RAN else STDOUT_BYTES
    return {
        "index": index,
        "verdict": judgement.verdict,
        "why": judgement.why,
        "got": judgement.got,
        "cpu_s": round(record.cpu_s, 4),
        "wall_s": round(record.wall_s, 4),
        "run_delay_s": round(record.run_delay_s, 4),
        "max_rss_bytes": record.max_rss_bytes,
        "exit_code": max(record.exit, 0),
        "signal": -record.exit if record.exit < 0 else None,
        "stdout": record.stdout[:cap].decode("utf-8", "replace"),
        "stdout_bytes": record.stdout_bytes,
        "stderr": record.stderr[-STDERR_BYTES:].decode("utf-8", "replace"),
        "stderr_bytes": record.stderr_bytes,
    }


def _shown(index: int, test: Test, record: judge.Record, judgement: judge.Judgement) -> feedback.Shown:
    return feedback.Shown(
        number=index + 1,
        verdict=judgement.verdict,
        why=judgement.why,
        input=test.input,
        expected=test.output or "",
        stdout=record.stdout[:STDOUT_BYTES].decode("utf-8", "replace"),
        stderr=record.stderr[-4 * STDERR_BYTES :].decode("utf-8", "replace"),
        got=judgement.got,
    )
