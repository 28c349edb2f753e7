"""Text for the teacher's context. A function of the records: same records, same text.

Everything a program printed is untrusted: bounded, control characters and chat-template tokens defused, and fenced, so
that a program cannot speak as the judge, close its section, or write chat turns into the teacher's prompt.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

TITLES = {  # the first kind that is present is the one shown
    "compile_error": "Compile Error",
    "runtime_error": "Runtime Error",
    "memory_limit": "Memory Limit Exceeded",
    "output_limit": "Output Limit Exceeded",
    "time_limit": "Time Limit Exceeded",
    "wall_limit": "Time Limit Exceeded (the program was waiting, not computing)",
    "wrong_answer": "Wrong Answer",
}
MAX_CHARS = 3000
MAX_WRONG_ANSWERS = 2
_ORDER = list(TITLES)
_CHAT_TOKENS = re.compile(
    r"<[|\uff5c][^|\uff5c>]{1,40}[|\uff5c]>|</?(?:think|tool_call|tool_response|s|bos|eos)>|\[/?INST\]|<<?/?SYS>>?",
    re.I,
)
_DEFUSED = str.maketrans({"<": "\u2039", ">": "\u203a", "[": "("})
_ADDRESS = re.compile(r"(thread) 0x[0-9a-f]+", re.I)  # differs from run to run


class Shown(NamedTuple):
    """One test, as the text needs it."""

    number: int
    """From 1."""
    verdict: str
    why: str
    input: str
    expected: str
    stdout: str
    stderr: str
    got: str | None


def render(tests: Sequence[Shown], max_chars: int = MAX_CHARS) -> str:
    """The worst failure, or the two shortest wrong answers. Empty if nothing failed."""
    bad = [test for test in tests if test.verdict in TITLES]
    if not bad:
        return ""
    worst = min(bad, key=lambda test: _ORDER.index(test.verdict))
    shown = [worst]
    if worst.verdict == "wrong_answer":
        shown = sorted(bad, key=lambda test: len(test.input) + len(_output(test)))[:MAX_WRONG_ANSWERS]
    passed = sum(test.verdict == "passed" for test in tests)
    text = f"Passed {passed} of {len(tests)} tests."
    for test in shown:
        for block in _blocks(test):
            if len(text) + len(block) + 1 > max_chars:  # whole blocks only: a fence is never left open
                return text
            text += "\n" + block
    return text


def _blocks(test: Shown) -> Iterator[str]:
    kind = test.verdict
    detail = f" ({clean(test.why, 100, 1)})" if kind in ("time_limit", "wall_limit") and test.why else ""
    yield f"\nTest {test.number}: {TITLES[kind]}{detail}"
    if kind in ("compile_error", "runtime_error", "time_limit") and test.stderr.strip():
        yield fence("", own_frames(test.stderr))
    elif kind == "runtime_error" and test.why:
        yield fence("", clean(test.why, 200, 1))
    yield fence("Input", clean(test.input, 300, 8))
    if kind == "wrong_answer":
        yield fence("Output", clean(_output(test)))
        yield fence("Expected", clean(test.expected))
        if test.got is not None and test.stdout:
            yield fence("Printed", clean(test.stdout, 300, 10))


def _output(test: Shown) -> str:
    return test.stdout if test.got is None else test.got


def fence(title: str, text: str) -> str:
    """A titled block."""
    body = text.rstrip("\n")
    return (f"{title}:\n" if title else "") + f"```\n{body}\n```"


def clean(text: str, chars: int = 400, lines: int = 10) -> str:
    """At most ``chars`` characters and ``lines`` lines of harmless text, from the start."""
    rows = _harmless(text[: chars * 4]).split("\n")
    hidden = len(rows) - lines
    text = "\n".join(rows[:lines])
    if len(text) > chars:
        text = text[:chars] + "\u2026"
    return text + (f"\n({hidden} more lines)" if hidden > 0 else "")


def clean_end(text: str, chars: int, lines: int) -> str:
    """The same, from the end."""
    text = "\n".join(_harmless(text[-chars * 4 :]).split("\n")[-lines:])
    return "\u2026" + text[-chars:] if len(text) > chars else text


def _harmless(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # zero-width characters first: they could split a token from the filter
    text = "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else "\ufffd" for c in text)
    return _CHAT_TOKENS.sub(lambda match: match.group(0).translate(_DEFUSED), text).replace("```", "'''")


def own_frames(stderr: str) -> str:
    """A traceback with the program's frames only: the harness's are noise and differ between machines."""
    kept: list[str] = []
    is_own = True
    for line in stderr.split("\n"):
        frame = re.match(r'\s*File "([^"]+)"', line)
        if frame:
            is_own = frame.group(1) == "solution.py"
        elif line[:1] not in (" ", "\t"):
            is_own = True
        if is_own and line.strip():
            kept.append(_ADDRESS.sub(r"\1", line))
    return clean_end("\n".join(kept), 1200, 16)
