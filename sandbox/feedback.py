"""Text for the teacher's context. A function of the records: same records, same text.

Everything a program printed is untrusted: bounded, control characters and chat-template tokens defused, and fenced, so
that a program cannot speak as the judge, close its section, or write chat turns into the teacher's prompt.
"""

from __future__ import annotations

import ast
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from sandbox import judge

TITLES = {  # the first kind that is present is the one shown
    "compile_error": "Compile Error",
    "runtime_error": "Runtime Error",
    "memory_limit": "Memory Limit Exceeded",
    "output_limit": "Output Limit Exceeded",
    "time_limit": "Time Limit Exceeded",
    "wall_limit": "Time Limit Exceeded (the program was waiting, not computing)",
    "wrong_answer": "Wrong Answer",
}
_ORDER = list(TITLES)
PASSED = "Passed {passed} of {total} tests."
TITLE = "\nTest {number}: {title}{detail}"
MORE_LINES = "({number} more lines)"

# SDPO tells three kinds apart, in this order (arXiv:2601.20802, format_test_feedback).
SDPO_KINDS = (
    ("compile_error", "runtime_error", "memory_limit", "output_limit"),
    ("time_limit", "wall_limit"),
    ("wrong_answer",),
)
SDPO_TITLES = ("Runtime Error", "Time Limit Exceeded", "Test Case {number}: Wrong Answer")
SDPO_MORE_LINES = "... ({number} more lines)"
SDPO_WRONG = 2
SDPO_MAX_CHARS = 2000
SDPO_VALUE_CHARS, SDPO_INPUT_LINES, SDPO_DEBUG_LINES, SDPO_FRAMES = 250, 8, 10, 3
SDPO_MESSAGE_CHARS = 300
LAYOUTS = ("fenced", "literal")

# Of Llama 2 and Mistral, Gemma, GLM, BERT's heirs; those of Qwen, Llama 3 and 4, DeepSeek, GPT-OSS and Phi hold <| or |>.
_ANGLED = """think tool_call tool_response tools s bos eos pad unk mask start_of_turn end_of_turn start_of_image
end_of_image image_soft_token sop eop BOS_TOKEN EOS_TOKEN PAD_TOKEN SYS""".split()  # noqa: SIM905 - a list of words
_SQUARE = """INST SYSTEM_PROMPT AVAILABLE_TOOLS TOOL_RESULTS TOOL_CALLS TOOL_CONTENT CALL_ID ARGS THINK PREFIX MIDDLE SUFFIX
IMG IMG_BREAK IMG_END AUDIO BEGIN_AUDIO MODEL_SETTINGS gMASK sMASK BOS EOS EOT PAD UNK CLS SEP
MASK multimodal""".split()  # noqa: SIM905 - a list of words
_CHAT_TOKENS = re.compile(
    rf"<\||\|>|</?(?:{'|'.join(_ANGLED)}|unused\d+|SPECIAL_\d+)>|<</?SYS>>|\[/?(?:{'|'.join(_SQUARE)}|control_\d+)\]",
    re.I,
)
# Characters that become backticks in a tokenizer that normalises (NFKC).
_QUOTES = str.maketrans({"\uff40": "'", "\u1fef": "'"})
_LOOKALIKES: Mapping[str, str] = {"<": "\u2039", ">": "\u203a", "[": "("}
_DEFUSED = str.maketrans(dict(_LOOKALIKES))
_ADDRESS = re.compile(r"(thread) 0x[0-9a-f]+", re.I)  # differs from run to run
_FRAME = re.compile(r'\s*File "([^"]+)", line (\d+), in (.*)')

_LAST_WORDS = re.compile(r"^(?:Traceback \(most recent|Fatal Python error:|(?:Current thread|Thread) 0x)", re.M)


class Options(NamedTuple):
    """What a request may choose."""

    max_failing: int = 2
    """Wrong answers that are shown; of every other kind it is one."""
    max_chars: int = 3000
    """Of the whole text. The profile ``sdpo`` never takes more than 2,000."""
    show_expected: bool = True
    profile: str = "native"
    """``sdpo`` is SDPO's wording; every other is ours."""
    layout: str = "fenced"
    """``literal``: SDPO's own, without fences. What a program printed can then look like a title."""


DEFAULTS = Options()


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


def render(tests: Sequence[Shown], options: Options = DEFAULTS) -> str:
    """The worst failure, or the shortest wrong answers. Empty if nothing failed."""
    bad = [test for test in tests if test.verdict in TITLES]
    if not bad:
        return ""
    if options.profile == "sdpo":
        blocks = _sdpo(bad, options)
        return _fill("", blocks, min(options.max_chars, SDPO_MAX_CHARS)).lstrip("\n")
    passed = sum(test.verdict == "passed" for test in tests)
    head = PASSED.format(passed=passed, total=len(tests))
    blocks = (block for test in _worst(bad, options.max_failing) for block in _blocks(test, options))
    return _fill(head, blocks, options.max_chars) if len(head) <= options.max_chars else ""


def _fill(text: str, blocks: Iterable[str], max_chars: int) -> str:
    for block in blocks:
        if len(text) + len(block) + 1 > max_chars:  # whole blocks only: a fence is never left open
            return text
        text += "\n" + block
    return text


def _worst(bad: Sequence[Shown], max_failing: int) -> list[Shown]:
    worst = min(bad, key=lambda test: _ORDER.index(test.verdict))
    return _shortest(bad, max_failing) if worst.verdict == "wrong_answer" else [worst]


def _shortest(bad: Sequence[Shown], max_failing: int) -> list[Shown]:
    return sorted(bad, key=lambda test: len(test.input) + len(_output(test)))[:max_failing]


def _blocks(test: Shown, options: Options) -> Iterator[str]:
    kind = test.verdict
    detail = f" ({clean(test.why, 100, 1)})" if kind in ("time_limit", "wall_limit") and test.why else ""
    yield TITLE.format(number=test.number, title=TITLES[kind], detail=detail)
    if kind in ("compile_error", "runtime_error", "time_limit") and test.stderr.strip():
        text, bound = own_frames(test.stderr), clean if kind == "compile_error" else clean_end  # the first error counts
        yield fence("", bound(text, 1200, 16))
    elif kind in ("compile_error", "runtime_error") and test.why:
        yield fence("", clean(test.why, 200, 1))
    yield fence("Input", clean(test.input, 300, 8))
    if kind == "wrong_answer":
        yield fence("Output", clean(_output(test)))
        if options.show_expected:
            yield fence("Expected", clean(test.expected))
        if test.got is not None and test.stdout:
            yield fence("Printed", clean(test.stdout, 300, 10))


def _sdpo(bad: Sequence[Shown], options: Options) -> Iterator[str]:
    """SDPO's words and bounds."""
    section = _section if options.layout == "literal" else fence
    kind = next(number for number, kinds in enumerate(SDPO_KINDS) if any(test.verdict in kinds for test in bad))
    chosen = [test for test in bad if test.verdict in SDPO_KINDS[kind]]
    for test in _shortest(chosen, options.max_failing) if kind == SDPO_WRONG else chosen[:1]:
        yield "\n" + SDPO_TITLES[kind].format(number=test.number)
        debug, trace = _split_trace(test)
        if kind == 0:
            why = clean(test.why, SDPO_MESSAGE_CHARS, 1).replace("(solution.py, line", "(Solution.py, line")
            yield section("", "\n".join([why, *_short_frames(trace)]))
        yield section(
            "Input" if kind == SDPO_WRONG else "Last Executed Input", _rows(test.input, SDPO_INPUT_LINES, 250)
        )
        if kind == SDPO_WRONG:
            yield section("Output", _cut(harmless(_sdpo_output(test)[: 2 * SDPO_VALUE_CHARS])))
            if options.show_expected:
                expected = judge.without_dash(test.expected) if test.got is None else test.expected
                yield section("Expected", _cut(harmless(expected[: 2 * SDPO_VALUE_CHARS])))
        if debug.strip():
            yield section("Debug Output", _rows(debug.strip(), SDPO_DEBUG_LINES, 300))


def _section(title: str, text: str) -> str:
    return f"\n{title}\n{text}" if title else text


def _split_trace(test: Shown) -> tuple[str, str]:
    """What the program wrote, and what was written of its end."""
    if test.verdict == "compile_error":
        return "", test.stderr
    ends = list(_LAST_WORDS.finditer(test.stderr))
    if ends:
        return test.stderr[: ends[-1].start()], test.stderr[ends[-1].start() :]
    text = test.stderr.rstrip()
    if test.why and text.endswith(test.why):  # an exception that no line of the program raised
        return text[: text.rfind("\n", 0, len(text) - len(test.why)) + 1], ""
    return text, ""


def _short_frames(trace: str) -> list[str]:
    frames = [frame for frame in map(_FRAME.match, trace.split("\n")) if frame and frame[1] == "solution.py"]
    return [f"Line {frame[2]} in {clean(frame[3], 100, 1)} (Solution.py)" for frame in frames[-SDPO_FRAMES:]]


def _rows(text: str, most: int, chars: int) -> str:
    rows = harmless(text[: 2 * most * chars]).rstrip("\n").split("\n")
    hidden = _num_lines(text) - most
    more = [SDPO_MORE_LINES.format(number=hidden)] if hidden > 0 else []
    return "\n".join([*(_cut(row, chars) for row in rows[:most]), *more])


def _cut(text: str, chars: int = SDPO_VALUE_CHARS) -> str:
    return text if len(text) <= chars else text[:chars] + "..."


def _sdpo_output(test: Shown) -> str:
    if test.got is None:
        return test.stdout.strip()
    try:  # SDPO shows a text as it is
        value = ast.literal_eval(test.got) if test.got[:1] in "'\"" else test.got
    except (ValueError, SyntaxError):  # it was cut
        value = test.got
    return str(value)


def _output(test: Shown) -> str:
    return test.stdout if test.got is None else test.got


def fence(title: str, text: str) -> str:
    """A titled block."""
    body = text.rstrip("\n")
    return (f"{title}:\n" if title else "") + f"```\n{body}\n```"


def clean(text: str, chars: int = 400, lines: int = 10) -> str:
    """At most ``chars`` characters and ``lines`` lines of harmless text, from the start."""
    kept = "\n".join(harmless(text[: chars * 4]).split("\n")[:lines])
    if len(kept) > chars:
        kept = kept[:chars] + "\u2026"
    hidden = _num_lines(text) - lines
    return kept + ("\n" + MORE_LINES.format(number=hidden) if hidden > 0 else "")


def _num_lines(text: str) -> int:
    return text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").count("\n") + 1


def clean_end(text: str, chars: int, lines: int) -> str:
    """The same, from the end."""
    text = "\n".join(harmless(text[-chars * 4 :]).split("\n")[-lines:])
    return "\u2026" + text[-chars:] if len(text) > chars else text


def harmless(text: str) -> str:
    """Text without control characters, chat-template tokens and fences, in tokenizers that normalise too."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # zero-width characters first: they could split a token from the filter
    text = "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else "\ufffd" for c in text)
    text = _CHAT_TOKENS.sub(lambda match: match[0].translate(_DEFUSED), text.translate(_QUOTES))
    if _CHAT_TOKENS.search(unicodedata.normalize("NFKC", text)):
        text = "".join(_LOOKALIKES.get(unicodedata.normalize("NFKC", c), c) for c in text)
    return text.replace("```", "'''")


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
    return "\n".join(kept)
