"""Contest problems of our own in the format of LiveCodeBench's data set, with programs that are right and wrong in every way.

``python -m tests.contest FILE`` writes the rows. Expected outputs come from ``answer`` of each problem, written in another way
than the solutions.
"""

from __future__ import annotations

import base64
import json
import pickle
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from math import gcd
from pathlib import Path
from typing import Any

from megatron_distil.types import Outcome

PASSED, FAILED, TIMEOUT, INVALID = Outcome.PASSED, Outcome.FAILED, Outcome.TIMEOUT, Outcome.INVALID
Answer = Callable[..., Any]


@dataclass(frozen=True)
class Attempt:
    """A program, and what must be said of it."""

    code: str
    outcome: Outcome
    says: str = ""
    """Part of the feedback."""
    fraction: float | None = None
    """Of the private tests that pass; None: not typed out here."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """One problem. ``function`` empty: a program reads its input."""

    name: str
    question: str
    answer: Answer
    arguments: Iterable[tuple[Any, ...]]
    right: str
    others: tuple[Attempt, ...]
    starter_code: str = ""
    function: str = ""
    date: str = "2025-03-01"
    spell: Callable[..., str] = field(default=lambda *values: "\n".join(_line(value) for value in values) + "\n")

    def cases(self) -> list[dict[str, str]]:
        """All tests; the first is public."""
        kind = "functional" if self.function else "stdin"
        write = (lambda *values: "\n".join(map(json.dumps, values))) if self.function else self.spell
        shown = json.dumps if self.function else _line
        return [
            {"input": write(*values), "output": shown(self.answer(*values)), "testtype": kind}
            for values in self.arguments
        ]

    def row(self, *, is_packed: bool = True) -> dict[str, str]:
        """A row as the data set has it."""
        public, *private = self.cases()
        text = json.dumps(private)
        return {
            "question_title": self.name.replace("-", " ").title(),
            "question_content": self.question,
            "platform": "leetcode" if self.function else "atcoder",
            "question_id": self.name,
            "contest_id": "ours",
            "contest_date": f"{self.date}T00:00:00",
            "starter_code": self.starter_code,
            "difficulty": "easy",
            "public_test_cases": json.dumps([public]),
            "private_test_cases": packed(text) if is_packed else text,
            "metadata": json.dumps({"func_name": self.function} if self.function else {}),
        }


def packed(value: object) -> str:
    """As the data set packs its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode("ascii")


def _line(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def method(signature: str) -> str:
    """Starter code as LeetCode writes it."""
    return f"class Solution:\n    def {signature}:\n        "


SPIN = "while True:\n    pass\n"
LISTS: Iterable[tuple[list[int]]] = (([3, 1, 2],), ([5],), ([2, 2, 2, 1],), ([-4, 7, 0, 7],), ([9, 8, 1, 3, 5],))
NUMBERS = ((1,), (2,), (7,), (12,), (30,))
WORDS = (("level",), ("ab",), ("noon",), ("x",), ("abca",))


def listed(values: list[int]) -> str:
    """Its length, then its numbers."""
    return f"{len(values)}\n{_line(values)}\n"


CONTESTS: tuple[Contest, ...] = (
    Contest(
        name="two-apples",
        question="Two baskets hold a and b apples. Read both numbers from one line and print how many apples there are.",
        answer=lambda a, b: a + b,
        arguments=((1, 2), (0, 0), (10, -3), (999, 1), (7, 7)),
        spell=lambda a, b: f"{a} {b}\n",
        right="print(sum(map(int, input().split())))",
        others=(
            Attempt("a, b = map(int, input().split())\nprint(a - b)", FAILED, "Wrong Answer", 0.25),
            Attempt("print(input())", FAILED, "Wrong Answer", 0.0),
            Attempt("a, b = input().split()\nprint(a + int(b))", FAILED, "TypeError", 0.0),
            Attempt("print(sum(map(int, input().split()))", INVALID, "SyntaxError", 0.0),
        ),
    ),
    Contest(
        name="longest-shelf",
        question="Read n, then n integers. Print the largest.",
        answer=lambda values: sorted(values)[-1],
        arguments=LISTS,
        spell=listed,
        right="input()\nprint(max(map(int, input().split())))",
        others=(
            Attempt("input()\nprint(input().split()[0])", FAILED, "Wrong Answer"),
            Attempt("input()\nprint(max(input().split()))", PASSED),  # digits compare like numbers here, but for one
        ),
    ),
    Contest(
        name="mirror-word",
        question="Read a word. Print YES if it reads the same backwards, and NO otherwise.",
        answer=lambda word: "YES" if all(a == b for a, b in zip(word, reversed(word), strict=True)) else "NO",
        arguments=WORDS,
        right="w = input().strip()\nprint('YES' if w == w[::-1] else 'NO')",
        others=(
            Attempt("print('YES')", FAILED, "Wrong Answer", 0.5),
            Attempt("w = input()\nprint('yes' if w == w[::-1] else 'no')", FAILED, "Wrong Answer", 0.0),
            Attempt(SPIN, TIMEOUT, "Time Limit Exceeded", 0.0),
        ),
    ),
    Contest(
        name="counting-down",
        question="Read n. Print the numbers from n down to 1, one in each line.",
        answer=lambda n: "\n".join(str(n - i) for i in range(n)),
        arguments=NUMBERS,
        right="n = int(input())\nfor i in range(n, 0, -1):\n    print(i)",
        others=(
            Attempt("n = int(input())\nfor i in range(1, n + 1):\n    print(i)", FAILED, "Wrong Answer", 0.0),
            Attempt("n = int(input())\nfor i in range(n, 1, -1):\n    print(i)", FAILED, "Wrong Answer", 0.0),
        ),
    ),
    Contest(
        name="common-step",
        question="Read n, then n positive integers. Print the largest step that divides all of them.",
        answer=lambda values: reduce(gcd, values),
        arguments=(([4, 6],), ([9],), ([12, 18, 30],), ([7, 13],), ([100, 75, 50],)),
        spell=listed,
        right="import sys\nfrom math import gcd\nv = list(map(int, sys.stdin.read().split()))[1:]\n"
        "g = 0\nfor x in v:\n    g = gcd(g, x)\nprint(g)",
        others=(
            Attempt("input()\nprint(min(map(int, input().split())))", FAILED, "Wrong Answer"),
            Attempt("input()\nprint(math.gcd(*map(int, input().split())))", PASSED),  # names without an import
        ),
    ),
    Contest(
        name="stairs",
        question="A stair has n steps; one or two are taken at a time. Read n and print in how many ways it can be climbed.",
        answer=lambda n: reduce(lambda pair, _: (pair[1], sum(pair)), range(n), (1, 1))[0],
        arguments=NUMBERS,
        right="a, b = 1, 1\nfor _ in range(int(input())):\n    a, b = b, a + b\nprint(a)",
        others=(
            Attempt("def f(n):\n    return n\nprint(f(int(input())))", FAILED, "Wrong Answer"),
            Attempt("def f(n):\n    return f(n - 1) + f(n - 2)\nprint(f(int(input())))", FAILED, "RecursionError", 0.0),
        ),
    ),
    Contest(
        name="half-of-it",
        question="Read n and print half of it as a decimal number.",
        answer=lambda n: n / 2,
        arguments=NUMBERS,
        right="print(int(input()) / 2)",
        others=(
            Attempt("print(f'{int(input()) / 2:.2f}')", PASSED),  # 0.5 and 0.50 are one number
            Attempt("print(int(input()) // 2)", FAILED, "Wrong Answer", 0.75),
        ),
    ),
    Contest(
        name="vowels",
        question="Read a word of lower-case letters. Print how many of them are vowels.",
        answer=lambda word: len([c for c in word if c in "aeiou"]),
        arguments=WORDS,
        right="print(sum(map(input().count, 'aeiou')))",
        others=(
            Attempt("import sys\nsys.exit(3)", FAILED, "Runtime Error", 0.0),
            Attempt("print(len(input()))", FAILED, "Wrong Answer", 0.0),
            Attempt("import ctypes\nctypes.string_at(0)", FAILED, "Runtime Error", 0.0),
        ),
    ),
    Contest(
        name="sorted-row",
        question="Read n, then n integers. Print them from small to large in one line.",
        answer=lambda values: [values[i] for i in sorted(range(len(values)), key=lambda i: values[i])],
        arguments=LISTS,
        spell=listed,
        right="input()\nprint(*sorted(map(int, input().split())))",
        others=(
            Attempt("input()\nprint(sorted(map(int, input().split())))", FAILED, "Wrong Answer", 0.0),
            Attempt("input()\nprint(*sorted(map(int, input().split())), sep='\\n')", FAILED, "Wrong Answer", 0.25),
            Attempt("x = [0] * 10**10", FAILED, "Memory Limit Exceeded", 0.0),
        ),
    ),
    Contest(
        name="echo-lines",
        question="Read n and then n lines. Print the lines in reverse order.",
        answer=lambda lines: "\n".join(lines[::-1]),
        arguments=((["a", "b"],), (["one"],), (["x y", "z", "x y"],), (["1", "2", "3", "4"],)),
        spell=lambda lines: "\n".join([str(len(lines)), *lines]) + "\n",
        right="n = int(input())\nprint(*[input() for _ in range(n)][::-1], sep='\\n')",
        others=(
            Attempt(
                "n = int(input())\nprint(*[input() for _ in range(n + 1)][::-1], sep='\\n')", FAILED, "EOFError", 0.0
            ),
            Attempt("while True:\n    print('x' * 10**6)", FAILED, "Output Limit Exceeded", 0.0),
        ),
    ),
    Contest(
        name="digit-sum",
        question="Read a number of up to a thousand digits and print the sum of its digits.",
        answer=lambda text: sum(map(int, text)),
        arguments=(("1",), ("99",), ("1234567890" * 50,), ("0",), ("7" * 1000,)),
        right="n = input().strip()\nprint(sum(int(c) for c in n))",
        others=(
            Attempt("n = int(input())\nprint(n % 9 or 9)", FAILED, "Wrong Answer", 0.0),
            Attempt("import time\ntime.sleep(60)\nprint(1)", TIMEOUT, "Time Limit Exceeded", 0.0),
        ),
    ),
    Contest(
        name="leap",
        question="Read a year. Print LEAP if it has 366 days in the Gregorian calendar, and COMMON otherwise.",
        answer=lambda year: "LEAP" if (year % 100 and year % 4 == 0) or year % 400 == 0 else "COMMON",
        arguments=((2024,), (2023,), (1900,), (2000,), (1996,)),
        right="import calendar\nprint('LEAP' if calendar.isleap(int(input())) else 'COMMON')",
        others=(Attempt("print('LEAP' if int(input()) % 4 == 0 else 'COMMON')", FAILED, "Wrong Answer", 0.75),),
    ),
    Contest(
        name="sum-of-squares",
        question="Return the sum of the squares of all numbers in `nums`.",
        function="sumSquares",
        starter_code=method("sumSquares(self, nums: List[int]) -> int"),
        answer=lambda nums: sum(x * x for x in nums),
        arguments=LISTS,
        right="class Solution:\n    def sumSquares(self, nums: List[int]) -> int:\n        return sum(x ** 2 for x in nums)",
        others=(
            Attempt("def sumSquares(nums):\n    return sum(map(lambda x: x * x, nums))", PASSED),
            Attempt("def sumSquares(nums):\n    return sum(nums) ** 2", FAILED, "Wrong Answer", 0.25),
            Attempt("def squares(nums):\n    return 1", FAILED, "Runtime Error", 0.0),
            Attempt("def sumSquares(nums):\n    return print(sum(x * x for x in nums))", FAILED, "Wrong Answer", 0.0),
        ),
    ),
    Contest(
        name="join-words",
        question="Return the strings of `words` joined by `glue`.",
        function="joinWords",
        starter_code=method("joinWords(self, words: List[str], glue: str) -> str"),
        answer=lambda words, glue: glue.join(words),
        arguments=((["a", "b"], "-"), ([], "x"), (["one"], ", "), (["x", "", "y"], ""), (["\u00e4", "\u00df"], " ")),
        right="class Solution:\n    def joinWords(self, words, glue):\n        return glue.join(words)",
        others=(Attempt("def joinWords(words, glue):\n    return ''.join(words)", FAILED, "Wrong Answer", 0.75),),
    ),
    Contest(
        name="pairs",
        question="Return every pair of neighbours of `nums` as a list of lists.",
        function="pairs",
        starter_code=method("pairs(self, nums: List[int]) -> List[List[int]]"),
        answer=lambda nums: [[nums[i], nums[i + 1]] for i in range(len(nums) - 1)],
        arguments=LISTS,
        right="def pairs(nums):\n    return [list(p) for p in zip(nums, nums[1:])]",
        others=(
            Attempt("def pairs(nums):\n    return list(zip(nums, nums[1:]))", FAILED, "Wrong Answer", 0.25),
            Attempt("def pairs(nums):\n    return {1, 2}", FAILED, "Wrong Answer", 0.0),
        ),
    ),
    Contest(
        name="climb",
        question="Return the longest run of strictly growing neighbours in `nums`.",
        function="climb",
        starter_code=method("climb(self, nums: List[int]) -> int"),
        answer=lambda nums: max(
            (
                j - i
                for i in range(len(nums))
                for j in range(i + 1, len(nums) + 1)
                if nums[i:j] == sorted(set(nums[i:j]))
            ),
            default=0,
        ),
        arguments=LISTS,
        right="class Solution:\n    def climb(self, nums):\n        best = run = 0\n        last = None\n        for x in nums:\n"
        "            run = run + 1 if last is not None and x > last else 1\n            last = x\n"
        "            best = max(best, run)\n        return best",
        others=(
            Attempt("def climb(nums):\n    return len(nums)", FAILED, "Wrong Answer", 0.25),
            Attempt("def climb(nums):\n    while True: pass", TIMEOUT, "Time Limit Exceeded", 0.0),
            Attempt("def climb(nums):\n    exit()", FAILED, "", 0.0),
        ),
    ),
    Contest(
        name="is-even",
        question="Return whether `n` is even.",
        function="isEven",
        starter_code=method("isEven(self, n: int) -> bool"),
        answer=lambda n: not n & 1,
        arguments=((0,), (1,), (2,), (10**20,), (-3,)),
        right="def isEven(n):\n    return n % 2 == 0",
        others=(
            Attempt("def isEven(n):\n    return 1 - n % 2", PASSED),  # 1 is True
            Attempt("def isEven(n):\n    return 'true' if n % 2 == 0 else 'false'", FAILED, "Wrong Answer", 0.0),
            Attempt("class T:\n    def __eq__(self, o): return True\ndef isEven(n):\n    return T()", FAILED, "", 0.0),
        ),
    ),
    Contest(
        name="average",
        question="Return the mean of `nums`.",
        function="average",
        starter_code=method("average(self, nums: List[int]) -> float"),
        answer=lambda nums: sum(nums) / len(nums),
        arguments=(([1, 2],), ([4],), ([1, 1, 2],), ([-1, 1],), ([0, 10, 20],)),
        right="from statistics import mean\ndef average(nums):\n    return float(mean(nums))",
        others=(
            Attempt("def average(nums):\n    return sum(nums) // len(nums)", FAILED, "Wrong Answer", 0.75),
            Attempt("import numpy\ndef average(nums):\n    raise ValueError(nums)", FAILED, "Runtime Error", 0.0),
        ),
    ),
    Contest(
        name="nested-depth",
        question="Return how deep the brackets of `text` are nested. They match.",
        function="depth",
        starter_code=method("depth(self, text: str) -> int"),
        answer=lambda text: max([text[:i].count("(") - text[:i].count(")") for i in range(len(text) + 1)]),
        arguments=(("()",), ("",), ("(()())",), ("((()))()",), ("(" * 500 + ")" * 500,)),
        right="class Solution:\n    def depth(self, text: str) -> int:\n        d = m = 0\n        for c in text:\n"
        "            d += 1 if c == '(' else -1\n            m = max(m, d)\n        return m",
        others=(Attempt("def depth(text):\n    return text.count('(')", FAILED, "Wrong Answer", 0.5),),
    ),
    Contest(
        name="letter-count",
        question="Return how often each letter is in `word`, as an object.",
        function="letters",
        starter_code=method("letters(self, word: str) -> Dict[str, int]"),
        answer=lambda word: {c: word.count(c) for c in word},
        arguments=WORDS,
        right="def letters(word):\n    return Counter(word)",
        others=(
            Attempt("def letters(word):\n    return {c: 1 for c in word}", FAILED, "Wrong Answer", 0.5),
            Attempt("def letters(word):\n    return letters(word)", FAILED, "RecursionError", 0.0),
        ),
    ),
    Contest(
        name="flood",
        question="Count the regions of `#` in `grid`; neighbours touch along an edge.",
        function="regions",
        starter_code=method("regions(self, grid: List[str]) -> int"),
        answer=lambda grid: len(set(_roots(grid).values())),
        arguments=((["#.", ".#"],), (["."],), (["###", "..#", "###"],), (["#.#", "...", "#.#"],), (["##", "##"],)),
        right="def regions(grid):\n    left = {(r, c) for r, row in enumerate(grid) for c, x in enumerate(row) if x == '#'}\n"
        "    n = 0\n    while left:\n        n += 1\n        todo = [left.pop()]\n        while todo:\n"
        "            r, c = todo.pop()\n            for p in ((r+1, c), (r-1, c), (r, c+1), (r, c-1)):\n"
        "                if p in left:\n                    left.remove(p)\n                    todo.append(p)\n    return n",
        others=(
            Attempt("def regions(grid):\n    return sum(row.count('#') for row in grid)", FAILED, "Wrong Answer", 0.5),
        ),
    ),
    Contest(
        name="old-problem",
        question="Print the number that is read. (Of a contest before the window.)",
        date="2024-12-31",
        answer=lambda n: n,
        arguments=NUMBERS,
        right="print(input())",
        others=(),
    ),
)
IN_WINDOW = tuple(contest for contest in CONTESTS if contest.date >= "2025-02-01")


def _roots(grid: list[str]) -> Mapping[tuple[int, int], tuple[int, int]]:
    """Every cell's smallest cell that it is connected with, by letting labels sink until nothing moves."""
    label = {(r, c): (r, c) for r, row in enumerate(grid) for c, x in enumerate(row) if x == "#"}
    for _ in label:
        for r, c in label:
            near = [p for p in ((r, c), (r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)) if p in label]
            label[r, c] = min(label[p] for p in near)
    return label


def write_upstream(path: Path) -> None:
    """Rows as the data set's own files hold them; every fifth has its private tests unpacked."""
    rows = [contest.row(is_packed=index % 5 != 0) for index, contest in enumerate(CONTESTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write_upstream(Path(sys.argv[1]))
