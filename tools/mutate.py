"""Would the tests notice? Breaks the loss code in one place at a time and runs the tests that belong to the file.

    tools/run python tools/mutate.py --files 'megatron_distil/algo/*' --out tools/benchmarks/results/mutants.json
    tools/run python tools/mutate.py --files '*/head/chunk.py' --sample 10 --seed 1
    tools/run python tools/mutate.py --files '*/ratios.py' --resume mutants.json --out mutants.json

A campaign of hours, not a test. Every mutant lives in a copy of the sources; a failure, a crash and a hang all count as killed.
One process imports torch and Megatron and forks a child for each mutant. Prints a table and the changed line of each survivor;
``--out`` gets everything, as it comes. ``--resume`` takes over what is known of any file: no mutant runs again that was killed, or
that survived the tests as they are now; a survivor meets tests that have changed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import io
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("megatron_distil", "launchers", "sandbox", "tests", "tools")
MEMORY_BYTES = 8 * 2**30
"""Address space of a child: a mutant whose buffer doubles for ever ends here."""
PATIENCE, LEAST_DEADLINE_S = 5, 60
"""A mutant hangs when it takes longer than this many times the unchanged code."""

_PURE = tuple(
    f"tests/pure/test_{name}.py"
    for name in ("divergences", "algo_golden", "enumeration", "objectives", "npg", "closed_forms", "ema")
)
_HEADS = ("tests/distributed/test_fused_head.py", "tests/distributed/test_head.py")
TESTS = {
    "megatron_distil/algo/*.py": _PURE,
    **{
        f"megatron_distil/trainer/head/{name}.py": _HEADS
        for name in ("chunk", "passes", "topk_ce", "onepass", "columns")
    },
    **{f"megatron_distil/trainer/head/{name}.py": ("tests/pure/test_stages.py",) for name in ("stages", "scan")},
    "megatron_distil/trainer/head/topk.py": ("tests/distributed/test_topk.py",),
    "megatron_distil/trainer/head/kernels.py": ("tests/pure/test_kernels.py", *_HEADS[:1]),
}
"""The tests that own a file."""

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "megatron_distil/algo/divergence.py",
        "probs=torch.cat([teacher.exp(), rest.masked_fill(~is_outside, 0.0)], dim=-1),",
        "probs=torch.cat([teacher.exp(), rest], dim=-1),",
    ): "where nothing is outside both logarithms are 0, and so is their difference, whatever it is weighed with",
    (
        "megatron_distil/algo/divergence.py",
        "probs=torch.cat([teacher.exp(), rest.masked_fill(~is_outside, 0.0)], dim=-1),",
        "probs=torch.cat([teacher.exp(), rest.masked_fill(~is_outside, 1.0)], dim=-1),",
    ): "likewise",
    (
        "megatron_distil/algo/divergence.py",
        "return (kept - kept.logsumexp(dim=-1, keepdim=True)).masked_fill(~used, 0.0)",
        "return (kept - kept.logsumexp(dim=-1, keepdim=True)).masked_fill(~used, 1.0)",
    ): "both sides get it, and only their difference counts",
    (
        "megatron_distil/algo/loss.py",
        "is_bounded = (advantages < 0) & (bound < loss)",
        "is_bounded = (advantages <= 0) & (bound < loss)",
    ): "with an advantage of 0 bound and loss are 0",
    (
        "megatron_distil/algo/objectives/distil.py",
        'counts["train/token_clipped_frac"] = ((costs.full_ce.detach() > self.token_clip) & is_in_loss).sum()',
        'counts["train/token_clipped_frac"] = ((costs.full_ce > self.token_clip) & is_in_loss).sum()',
    ): "a comparison has no gradient",
    (
        "megatron_distil/algo/objectives/opsd.py",
        "imitation = (weights.detach() * value).sum()",
        "imitation = (weights * value).sum()",
    ): "weights of tokens and importance weights carry no gradient",
    (
        "megatron_distil/algo/scan.py",
        "while reach < length:",
        "while reach <= length:",
    ): "a round that reaches over everything adds nothing",
    (
        "megatron_distil/algo/topk.py",
        "ids = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]",
        "ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]",
    ): "indices have no gradient",
    **{
        (
            "megatron_distil/algo/topk.py",
            "return inside - torch.where(is_outside, rest * student.tail.masked_fill(~is_outside, 0.0), 0.0)",
            changed,
        ): "either of the two guards is enough"
        for changed in (
            "return inside - (rest * student.tail.masked_fill(~is_outside, 0.0))",
            "return inside - torch.where(is_outside, rest * student.tail, 0.0)",
            "return inside - torch.where(is_outside, rest * student.tail.masked_fill(~is_outside, 1.0), 0.0)",
        )
    },
    (
        "megatron_distil/algo/topk.py",
        "kept = student.support.masked_fill(~used, -torch.inf).masked_fill(empty[:, None], 0.0)",
        "kept = student.support.masked_fill(~used, -torch.inf).masked_fill(empty[:, None], 1.0)",
    ): "any number does: the row is replaced",
    (
        "megatron_distil/algo/topk.py",
        "support=torch.where(used, teacher_logprobs, 0.0),",
        "support=torch.where(used, teacher_logprobs, 1.0),",
    ): "any number does: the teacher gives it no weight",
    (
        "megatron_distil/trainer/head/stages.py",
        "pieces, ends = _by_stage(pieces, len(bounds) - 1)",
        "pieces, ends = _by_stage(pieces, len(bounds) + 1)",
    ): "the empty stages behind the last one are not zipped",
    (
        "megatron_distil/trainer/head/stages.py",
        "pieces, ends = _by_stage(pieces, len(bounds) - 1)",
        "pieces, ends = _by_stage(pieces, len(bounds) - 0)",
    ): "the empty stages behind the last one are not zipped",
    (
        "megatron_distil/trainer/head/stages.py",
        "if num_ranks > 1:",
        "if num_ranks >= 1:",
    ): "one rank shares no item, and its counts fall",
    (
        "megatron_distil/trainer/head/stages.py",
        "level = _suffix_max(sequence, _counts_behind(sequence * num_ranks + rows.rank[first]))",
        "level = _suffix_max(sequence, _counts_behind(sequence * num_ranks - rows.rank[first]))",
    ): "a key of sequence and rank as well",
    (
        "megatron_distil/trainer/head/stages.py",
        "slot=_counts_before(stages * num_ranks + rank),",
        "slot=_counts_before(stages * num_ranks - rank),",
    ): "a key of stage and rank as well",
    (
        "megatron_distil/trainer/head/stages.py",
        "excess[head] = np.where(has_earlier & (longest > 0), np.maximum(size[head] - longest, 0), 0)",
        "excess[head] = np.where(has_earlier & (longest >= 0), np.maximum(size[head] - longest, 0), 0)",
    ): "an item with an earlier one has a second run: neighbours lie on different ranks",
    (
        "megatron_distil/trainer/head/stages.py",
        "return level[run] + (within < excess[run])",
        "return -(level[run] + (within < excess[run]))",
    ): "levels are only told apart",
    (
        "megatron_distil/trainer/head/stages.py",
        "narrow = keys.max(initial=0) <= np.iinfo(np.uint16).max",
        "narrow = keys.max(initial=0) < np.iinfo(np.uint16).max",
    ): "both sorts give one order",
    (
        "megatron_distil/trainer/head/stages.py",
        "backwards = group.max(initial=0) - group[::-1]",
        "backwards = group.min(initial=0) - group[::-1]",
    ): "a constant less, which is added again",
    (
        "megatron_distil/trainer/head/stages.py",
        "excess[head] = np.where(has_earlier & (longest > 0), np.maximum(size[head] - longest, 0), 0)",
        "excess[head] = np.where(has_earlier , np.maximum(size[head] - longest, 0), 0)",
    ): "an item with an earlier one has a second run: neighbours lie on different ranks",
    **{
        ("megatron_distil/trainer/head/chunk.py", line, line.replace(".detach()", "")): "no product has gradients"
        for line in ("real = weight.detach()[: shard.size]", "rows = rows.detach().to(self.weight.dtype)")
    },
    (
        "megatron_distil/trainer/head/chunk.py",
        "is_live = ~(scale <= torch.finfo(layer.dtype).tiny) # a NaN is live: it has to reach the norm of the gradient",
        "is_live = ~(scale < torch.finfo(layer.dtype).tiny) # a NaN is live: it has to reach the norm of the gradient",
    ): "the smallest normal number may be either",
    (
        "megatron_distil/trainer/head/chunk.py",
        "unit = torch.where(is_live, 1.0 / scale, 0.0) # everything relative to it: no entry leaves the range of the product",
        "unit = torch.where(is_live, 1.0 / scale, 1.0) # everything relative to it: no entry leaves the range of the product",
    ): "the factor of such a row is 0",
    (
        "megatron_distil/trainer/head/chunk.py",
        "factor = torch.where(is_live, beta * scale, 0.0).to(layer.dtype)[:, None]",
        "factor = (beta * scale).to(layer.dtype)[:, None]",
    ): "the least beta times such a scale is 0",
    (
        "megatron_distil/trainer/head/chunk.py",
        "beta = total * (peak - whole).exp() + torch.where(has_tail, outside * (peak - tail).exp(), 0.0)",
        "beta = total * (peak - whole).exp() + torch.where(has_tail, outside * (peak - tail).exp(), 1.0)",
    ): "where nothing is outside, any beta divides the entries and multiplies them",
    **{
        (
            "megatron_distil/trainer/head/chunk.py",
            "to_tail = torch.where(has_tail, outside * (log_a - stats.columns.tail.double()).exp(), 0.0)",
            changed,
        ): "where nothing is outside, the sampled id is in the support, and this is not read"
        for changed in (
            "to_tail = (outside * (log_a - stats.columns.tail.double()).exp())",
            "to_tail = torch.where(has_tail, outside * (log_a - stats.columns.tail.double()).exp(), 1.0)",
        )
    },
    (
        "megatron_distil/trainer/head/chunk.py",
        "is_sampled = (chunk.support_ids == chunk.sampled_ids[:, None]) & (chunk.support_ids >= 0)",
        "is_sampled = (chunk.support_ids == chunk.sampled_ids[:, None])",
    ): "a sampled id is never -1",
    (
        "megatron_distil/trainer/head/chunk.py",
        "beta = torch.where(beta.abs() < least, least, beta)",
        "beta = torch.where(beta.abs() <= least, least, beta)",
    ): "it is below the range of the gradient on either side",
    (
        "megatron_distil/trainer/head/topk_ce.py",
        "buffers = make_buffers(layer, min(step, len(rows)), len(chunks), keep_bytes)",
        "buffers = make_buffers(layer, max(step, len(rows)), len(chunks), keep_bytes)",
    ): "only more memory",
    (
        "megatron_distil/trainer/head/onepass.py",
        "leaves = Columns(*(column.detach().requires_grad_() for column in columns))",
        "leaves = Columns(*(column.requires_grad_() for column in columns))",
    ): "columns were computed without gradients",
    (
        "megatron_distil/trainer/head/onepass.py",
        "return loss.detach(), Columns(*zeros)",
        "return loss, Columns(*zeros)",
    ): "it is added up without gradients",
    (
        "megatron_distil/trainer/head/stages.py",
        "stride = total | 1",
        "stride = total",
    ): "only faster",
    (
        "megatron_distil/trainer/head/stages.py",
        "bound = int(values.max(initial=0)) + 1",
        "bound = int(values.max(initial=0)) + 0",
    ): "the largest value of a group is then the zero of the next one, and no more than that",
}
"""(file, line, changed line) of mutants that compute the same, and why no test can tell."""


class Mutant(NamedTuple):
    """One change of one file."""

    file: str
    """Below the repository."""
    line: int
    start: int
    """In bytes, like ``end``."""
    end: int
    text: str
    """What stands there instead."""
    kind: str
    old: str
    """The lines that change, in one."""
    new: str

    def apply(self, source: bytes) -> bytes:
        """The changed file."""
        return source[: self.start] + self.text.encode() + source[self.end :]


class Edit(NamedTuple):
    """Bytes ``start`` to ``end`` become ``text``."""

    start: int
    end: int
    text: str
    kind: str


def mutants_of(file: str, source: bytes) -> list[Mutant]:
    """All mutants of a file, in its order."""
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    found = []
    for edit in sorted(set(finder.edits)):
        first = source.rfind(b"\n", 0, edit.start) + 1
        last = source.find(b"\n", edit.end)
        last = len(source) if last < 0 else last
        mutant = Mutant(file, source.count(b"\n", 0, edit.start) + 1, *edit, "", "")
        changed = mutant.apply(source)
        old, new = source[first:last], changed[first : last + len(changed) - len(source)]
        found.append(mutant._replace(old=_in_one_line(old), new=_in_one_line(new)))
    return found


def _in_one_line(text: bytes) -> str:
    return " ".join(text.decode().split())


_SIGN = {ast.Add: ("+", "-"), ast.Sub: ("-", "+")}
_COMPARISON = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
}
_EXTREMA = {"maximum": "minimum", "minimum": "maximum", "amax": "amin", "amin": "amax", "max": "min", "min": "max"}
_FILLS = ("masked_fill", "masked_fill_", "where", "clamp", "clamp_")


class _Finder(ast.NodeVisitor):
    """Collects edits. Texts of errors, annotations and docstrings are not looked at."""

    def __init__(self, source: bytes) -> None:
        self.edits: list[Edit] = []
        self._source = source
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self._tokens = [
            (self._lines[token.start[0] - 1] + len(token.line[: token.start[1]].encode()), token.string)
            for token in tokenize.tokenize(io.BytesIO(source).readline)
            if token.type == tokenize.OP
        ]

    def _start(self, node: Any) -> int:
        return self._lines[node.lineno - 1] + node.col_offset

    def _end(self, node: Any) -> int:
        return self._lines[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.AST) -> str:
        return self._source[self._start(node) : self._end(node)].decode()

    def _operator(self, text: str, start: int, end: int) -> int:
        """Where the operator stands between two operands, comments aside."""
        return next(at for at, found in self._tokens if start <= at < end and found == text)

    def _edit(self, start: int, end: int, text: str, kind: str) -> None:
        self.edits.append(Edit(start, end, text, kind))

    def _replace(self, node: ast.AST, text: str, kind: str) -> None:
        self._edit(self._start(node), self._end(node), text, kind)

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._negate(node.value)
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for decorator in node.decorator_list:
            if self._text(decorator) == "torch.no_grad()":
                self._edit(self._start(decorator) - 1, self._end(decorator), "", "detach")
        defaults = [default for default in node.args.kw_defaults if default is not None]
        for child in (*node.args.defaults, *defaults, *node.body):
            self.visit(child)

    def visit_Assign(self, node: ast.Assign) -> None:
        if "Annotated[" in self._text(node.value):  # a type
            return
        self._negate(node.value)
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None:
            self._negate(node.value)
        self.generic_visit(node)

    def _negate(self, value: ast.expr) -> None:
        """Puts a minus before a number that is computed here."""
        is_number = isinstance(value, ast.BinOp) and not isinstance(value.op, ast.BitAnd | ast.BitOr)
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
            is_number = not any(word in value.func.attr for word in ("zeros", "empty", "buffer"))
        if is_number:
            self._replace(value, f"-({self._text(value)})", "sign")

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        at = self._start(node)
        if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self._edit(at, at + 1, "", "sign")
        if isinstance(node.op, ast.Invert):
            self._edit(at, at + 1, "", "mask")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in _SIGN:
            old, new = _SIGN[type(node.op)]
            at = self._operator(f"{old}=", self._end(node.target), self._start(node.value))
            self._edit(at, at + 2, f"{new}=", "sign")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        left, right = self._end(node.left), self._start(node.right)
        if type(node.op) in _SIGN:
            old, new = _SIGN[type(node.op)]
            at = self._operator(old, left, right)
            self._edit(at, at + 1, new, "sign")
            if isinstance(node.right, ast.Constant) and node.right.value in (1, 1.0):
                self._replace(node.right, "0", "off by one")
        if isinstance(node.op, ast.BitAnd | ast.BitOr):
            at = self._operator("&" if isinstance(node.op, ast.BitAnd) else "|", left, right)
            self._edit(at, self._end(node), "", "mask")
            self._edit(self._start(node), at + 1, "", "mask")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
            if type(op) in _COMPARISON:
                old, new = _COMPARISON[type(op)]
                at = self._operator(old, self._end(left), self._start(right))
                self._edit(at, at + len(old), new, "mask")
        self.generic_visit(node)

    def visit_Slice(self, node: ast.Slice) -> None:
        bounds = [None if bound is None else self._text(bound) for bound in (node.lower, node.upper)]
        if bounds == ["1", None]:
            self._replace(node, ":-1", "off by one")
        if bounds == [None, "-1"]:
            self._replace(node, "1:", "off by one")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in ("maximum", "minimum"):  # also as in numpy.maximum.accumulate
            self._rename(node, _EXTREMA[node.attr], "extremum")
        self.generic_visit(node)

    def _rename(self, called: ast.expr, name: str, kind: str) -> None:
        old = called.attr if isinstance(called, ast.Attribute) else self._text(called)
        self._edit(self._end(called) - len(old), self._end(called), name, kind)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if isinstance(node.func, ast.Attribute):
            end = self._end(node)
            if name == "detach":
                self._edit(self._operator(".", self._end(node.func.value), end), end, "", "detach")
            if name in ("masked_fill", "masked_fill_"):
                self._edit(self._operator(".", self._end(node.func.value), end), end, "", "mask")
            if name == "sum":
                self._rename(node.func, "mean", "reduction")
        if name == "where" and len(node.args) == 3:
            for kept in node.args[1:]:
                self._replace(node, f"({self._text(kept)})", "mask")
        if name == "range":
            self._range(node.args)
        if name in ("amax", "amin", "max", "min"):
            self._rename(node.func, _EXTREMA[name], "extremum")
        if name in _FILLS:
            self._fill(node)
        self.generic_visit(node)

    def _range(self, bounds: list[ast.expr]) -> None:
        stop = bounds[0] if len(bounds) == 1 else bounds[1]
        self._replace(stop, f"({self._text(stop)}) - 1", "off by one")
        if len(bounds) > 1:
            self._replace(bounds[0], f"({self._text(bounds[0])}) + 1", "off by one")

    def _fill(self, node: ast.Call) -> None:
        for value in (*node.args, *(keyword.value for keyword in node.keywords)):
            if isinstance(value, ast.Constant) and value.value in (0, 1) and not isinstance(value.value, bool):
                self._replace(value, str(type(value.value)(1 - value.value)), "constant")
        for keyword in node.keywords:
            if keyword.arg in ("min", "max"):
                at = self._start(keyword)
                self._edit(at, at + 3, _EXTREMA[keyword.arg], "extremum")


class Verdict(NamedTuple):
    """What became of a mutant."""

    status: str
    """killed, survived or equivalent."""
    by: str
    """The test that failed, the end of the process, or the reason."""
    seconds: float


class Suite(NamedTuple):
    """Tests that belong together, as they behave without a mutant."""

    paths: tuple[str, ...]
    digest: str
    """Of the test files."""
    seconds: dict[str, float]
    """Of each test."""
    deadline_s: float


class _Watch:
    """Runs the tests that killed others first, then the quick ones; says what failed."""

    def __init__(self, report: Path, kills: Counter[str], seconds: dict[str, float]) -> None:
        self._report, self._kills, self._seconds = report, kills, seconds
        self._said: dict[str, Any] = {"failed": None, "seconds": {}}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: (-self._kills[item.nodeid], self._seconds.get(item.nodeid, 0.0)))

    def pytest_runtest_logreport(self, report: Any) -> None:
        seconds = self._said["seconds"]
        seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed and self._said["failed"] is None:
            self._said["failed"] = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self._said["failed"] is None:
            self._said["failed"] = f"{report.nodeid}: not collected"

    def pytest_sessionfinish(self) -> None:
        self._report.write_text(json.dumps(self._said))


class Child(NamedTuple):
    """A run of the tests in one copy."""

    pid: int
    folder: Path
    began: float
    deadline: float

    def poll(self) -> tuple[int | None, dict[str, Any]] | None:
        """Exit status (None: it hung) and report, once it has ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid and time.monotonic() < self.deadline:
            return None
        _end_session(self.pid)
        if not pid:
            os.waitpid(self.pid, 0)
        report = self.folder.with_suffix(".report")
        said = json.loads(report.read_text()) if report.exists() else {}
        return (os.waitstatus_to_exitcode(status) if pid else None), said


def start(folder: Path, suite: Suite, kills: Counter[str]) -> Child:
    """A child that runs the tests of ``suite`` on the sources in ``folder``."""
    report = folder.with_suffix(".report")
    report.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    now = time.monotonic()
    if pid:
        return Child(pid, folder, now, now + suite.deadline_s)
    code = 99
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()  # ranks are process groups of their own: only the session holds all of them
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        output = os.open(folder.with_suffix(".output"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(folder)
        sys.path[:] = [str(folder), *(entry for entry in sys.path if entry not in ("", str(ROOT), str(ROOT / "tools")))]
        os.environ["PYTHONPATH"] = str(folder)
        code = _run_tests(suite, _Watch(report, kills, suite.seconds))
    except BaseException:  # noqa: BLE001 - a child never returns to the caller
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_tests(suite: Suite, watch: _Watch) -> int:
    import pytest

    unmarked = "ignore::pytest.PytestAssertRewriteWarning"  # Hypothesis was imported before pytest could rewrite it
    return int(
        pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-W", unmarked, *suite.paths], plugins=[watch])
    )


def _end_session(leader: int) -> None:
    """Kills what a child of ours has left of its session."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            session = entry.read_text().rpartition(")")[2].split()[3]
            if int(session) == leader:
                os.kill(int(entry.parent.name), signal.SIGKILL)


def preload() -> None:
    """Imports what is slow and not ours; of ours, only what has patched it is kept."""
    import hypothesis

    import megatron_distil.trainer.head.onepass
    import megatron_distil.trainer.head.topk  # noqa: F401

    for name in list(sys.modules):
        if name.split(".")[0] == "megatron_distil" and name != "megatron_distil.trainer.cpu":
            del sys.modules[name]
    # a failure is enough: it need not be made small, nor be remembered
    hypothesis.settings.register_profile("mutants", phases=[hypothesis.Phase.generate], database=None)
    hypothesis.settings.load_profile("mutants")


def measured(folder: Path, paths: tuple[str, ...]) -> Suite:
    """The tests without a mutant.

    Raises:
        SystemExit: one fails: what a mutant does would say nothing.
    """
    digest = hashlib.sha256(b"".join((folder / path).read_bytes() for path in paths)).hexdigest()[:12]
    suite = Suite(paths, digest, {}, 1800.0)
    child = start(folder, suite, Counter())
    while (ended := child.poll()) is None:
        time.sleep(0.05)
    status, said = ended
    if status != 0:
        print(folder.with_suffix(".output").read_text()[-3000:])
        cause = said.get("failed") or f"the tests end with {status}"
        raise SystemExit(f"without a mutant: {cause}; repair that first")
    took = time.monotonic() - child.began
    return suite._replace(seconds=said["seconds"], deadline_s=max(LEAST_DEADLINE_S, PATIENCE * took))


def _install(folder: Path, file: str, source: bytes) -> None:
    """Puts a source into a copy; bytecode is known by second and size only, so that of the file before goes."""
    path = folder / file
    path.write_bytes(source)
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def verdicts(
    folders: list[Path], suite: Suite, todo: list[Mutant], kills: Counter[str]
) -> Iterator[tuple[Mutant, Verdict]]:
    """Runs mutants, as many at a time as there are copies."""
    waiting, free, running = list(reversed(todo)), list(folders), dict[int, tuple[Mutant, bytes, Child]]()
    try:
        while waiting or running:
            while waiting and free:
                mutant, folder = waiting.pop(), free.pop()
                source = (folder / mutant.file).read_bytes()
                _install(folder, mutant.file, mutant.apply(source))
                child = start(folder, suite, kills)
                running[child.pid] = mutant, source, child
            for pid, (mutant, source, child) in list(running.items()):
                if (ended := child.poll()) is None:
                    continue
                del running[pid]
                _install(child.folder, mutant.file, source)
                free.append(child.folder)
                verdict = _verdict(*ended, round(time.monotonic() - child.began, 1))
                kills.update([verdict.by] if verdict.status == "killed" else [])
                yield mutant, verdict
            time.sleep(0.02)
    finally:
        for pid in running:
            _end_session(pid)
            os.waitpid(pid, 0)


def _verdict(status: int | None, said: dict[str, Any], seconds: float) -> Verdict:
    if status == 0:
        return Verdict("survived", "", seconds)
    if status is None:
        return Verdict("killed", "hung", seconds)
    return Verdict("killed", said.get("failed") or f"ended with {status}", seconds)


Key = tuple[str, str, str, int]
"""File, line, changed line, and the how many-th of these."""


def keyed(mutants: list[Mutant]) -> dict[Key, Mutant]:
    """Mutants by what they are, wherever their line has moved."""
    seen: Counter[tuple[str, str, str]] = Counter()
    found = {}
    for mutant in mutants:
        name = mutant.file, mutant.old, mutant.new
        found[*name, seen[name]] = mutant
        seen[name] += 1
    return found


class Record(NamedTuple):
    """A mutant and its end, as in the result file."""

    key: Key
    mutant: Mutant
    verdict: Verdict
    tests: str
    """Digest of the tests that it met."""

    def as_json(self) -> str:
        mutant, verdict = self.mutant, self.verdict
        entry = {"file": mutant.file, "line": mutant.line, "kind": mutant.kind, "old": mutant.old, "new": mutant.new}
        return json.dumps({**entry, "nth": self.key[3], **verdict._asdict(), "tests": self.tests})


def known_of(*paths: Path) -> dict[Key, dict[str, Any]]:
    """The entries of result files; of a mutant in several, that of the last one."""
    entries = [entry for path in paths for entry in json.loads(path.read_text())["mutants"]]
    return {(e["file"], e["old"], e["new"], e["nth"]): e for e in entries}


def table(records: list[Record]) -> list[dict[str, Any]]:
    """What became of the mutants of each file."""
    counts: dict[str, Counter[str]] = {}
    for record in records:
        counts.setdefault(record.mutant.file, Counter())[record.verdict.status] += 1
    return [
        {"file": file, "mutants": count.total(), **{name: count[name] for name in ("killed", "survived", "equivalent")}}
        for file, count in sorted(counts.items())
    ]


def save(path: Path, head: dict[str, Any], records: list[Record]) -> None:
    """The result file: a line for each mutant."""
    entries = ",\n  ".join(record.as_json() for record in records)
    rows = ",\n  ".join(json.dumps(row) for row in table(records))
    text = (
        json.dumps(head, indent=1).rstrip("}\n")
        + f',\n "files": [\n  {rows}\n ],\n "mutants": [\n  {entries}\n ]\n}}\n'
    )
    scratch = path.with_suffix(".part")
    scratch.write_text(text)
    scratch.replace(path)


def report(records: list[Record]) -> None:
    """The table and the survivors."""
    print(f"\n{'file':45} {'mutants':>8} {'killed':>8} {'survived':>8} {'equivalent':>10}")
    for row in table(records):
        print(f"{row['file']:45} {row['mutants']:8} {row['killed']:8} {row['survived']:8} {row['equivalent']:10}")
    for record in sorted((r for r in records if r.verdict.status == "survived"), key=lambda r: r.mutant):
        _show(record.mutant)


def _show(mutant: Mutant) -> None:
    print(f"\nsurvived: {mutant.file}:{mutant.line} ({mutant.kind})\n  - {mutant.old}\n  + {mutant.new}")


def tests_of(file: str) -> tuple[str, ...]:
    """The tests that own a file."""
    return next(tests for pattern, tests in TESTS.items() if fnmatch(file, pattern))


def targets(folder: Path, pattern: str) -> list[str]:
    """The files of the campaign that match.

    Raises:
        SystemExit: there is none.
    """
    every = [str(path.relative_to(folder)) for glob in TESTS for path in folder.glob(glob.replace("/*.", "/**/*."))]
    found = sorted(file for file in every if fnmatch(file, pattern))
    if not found:
        raise SystemExit(f"--files {pattern!r} matches none of the files with tests here: {', '.join(sorted(every))}")
    return found


def copies(folder: Path, number: int) -> list[Path]:
    """Copies of the sources, as they are now."""
    found = [folder / f"copy{index}" for index in range(number)]
    for copy in found:
        for name in COPIED:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
    return found


def chosen(folder: Path, files: list[str], sample: int | None, seed: int) -> dict[Key, Mutant]:
    """The mutants of the files, or ``sample`` of each."""
    found: dict[Key, Mutant] = {}
    for file in files:
        mutants = keyed(mutants_of(file, (folder / file).read_bytes()))
        keys = list(mutants) if sample is None else random.Random(seed).sample(list(mutants), min(sample, len(mutants)))
        found |= {key: mutants[key] for key in keys}
    return found


def still_there(folder: Path, known: dict[Key, dict[str, Any]]) -> dict[Key, Mutant]:
    """The known mutants that the sources still have."""
    files = sorted({file for file, *_ in known if (folder / file).exists()})
    return {key: mutant for key, mutant in chosen(folder, files, None, 0).items() if key in known}


class Campaign:
    """The mutants of one call, and what is known of them."""

    def __init__(self, known: dict[Key, dict[str, Any]], out: Path | None) -> None:
        self.records: list[Record] = []
        self._known, self._out = known, out
        self._head = {
            "tool": "mutate",
            "versions": {"python": platform.python_version(), "torch": version("torch"), "pytest": version("pytest")},
            "load": round(os.getloadavg()[0], 1),
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
            ).stdout.strip(),
        }

    def run(self, folders: list[Path], mutants: dict[Key, Mutant]) -> None:
        """All of them, the files of the same tests together."""
        for paths in dict.fromkeys(tests_of(mutant.file) for mutant in mutants.values()):
            group = {key: mutant for key, mutant in mutants.items() if tests_of(mutant.file) == paths}
            todo = self._without_known(group, folders[0], paths)
            if not todo:
                continue
            suite = measured(folders[0], paths)
            print(f"{len(todo)} mutants for {', '.join(paths)}: {len(suite.seconds)} tests", flush=True)
            keys = {mutant: key for key, mutant in group.items()}
            for mutant, verdict in verdicts(folders, suite, todo, Counter()):
                self._add(Record(keys[mutant], mutant, verdict, suite.digest))
                if verdict.status == "survived":
                    _show(mutant)
        self._save()

    def _without_known(self, group: dict[Key, Mutant], folder: Path, paths: tuple[str, ...]) -> list[Mutant]:
        digest = hashlib.sha256(b"".join((folder / path).read_bytes() for path in paths)).hexdigest()[:12]
        todo = []
        for key, mutant in group.items():
            entry = self._known.get(key)
            if reason := EQUIVALENT.get((mutant.file, mutant.old, mutant.new)):
                self.records.append(Record(key, mutant, Verdict("equivalent", reason, 0.0), digest))
            elif entry and (entry["status"] == "killed" or (entry["status"], entry["tests"]) == ("survived", digest)):
                verdict = Verdict(entry["status"], entry["by"], entry["seconds"])
                self.records.append(Record(key, mutant, verdict, entry["tests"]))
            else:
                todo.append(mutant)
        return todo

    def _add(self, record: Record) -> None:
        self.records.append(record)
        print(f"{len(self.records):5} {record.verdict.status:9} {record.verdict.seconds:6.1f} s  ", end="")
        print(f"{record.mutant.file}:{record.mutant.line}  {record.mutant.kind}  {record.verdict.by}", flush=True)
        self._save()

    def _save(self) -> None:
        if self._out is not None:
            save(self._out, self._head, sorted(self.records, key=lambda record: record.mutant))


def main() -> None:
    """Parses arguments and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", metavar="GLOB", default="*", help="files below the repository")
    parser.add_argument("--sample", metavar="N", type=int, help="so many mutants of each file")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="mutants at a time")
    parser.add_argument("--resume", metavar="FILE", type=Path, nargs="+", default=[], help="results to take over")
    parser.add_argument("--out", metavar="FILE", type=Path, help="result file")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    wanted = parser.parse_args()
    files = targets(ROOT, wanted.files)
    if wanted.list:
        for mutant in chosen(ROOT, files, wanted.sample, wanted.seed).values():
            print(f"{mutant.file}:{mutant.line} ({mutant.kind})\n  - {mutant.old}\n  + {mutant.new}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the children end, and the copies go
    preload()
    with tempfile.TemporaryDirectory() as scratch:
        folders = copies(Path(scratch), wanted.jobs)
        known = known_of(*wanted.resume)
        campaign = Campaign(known, wanted.out)
        selected = chosen(folders[0], files, wanted.sample, wanted.seed)
        campaign.run(folders, still_there(folders[0], known) | selected)
    report(campaign.records)


if __name__ == "__main__":
    main()
