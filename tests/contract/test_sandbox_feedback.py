"""What the teacher may read of an attempt: in the words agreed, within bounds, and in no voice but ours."""

from __future__ import annotations

import asyncio
import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox import child, feedback, interpreter, judge, limits, probe
from sandbox.executor import Task, Worker

FOLDER = Path(__file__).parent / "sandbox"
TOKENS: dict[str, list[str]] = json.loads((FOLDER / "chat_tokens.json").read_text())
GOLDEN: dict[str, dict[str, Any]] = json.loads((FOLDER / "feedback_texts.json").read_text())
SDPO: list[dict[str, Any]] = json.loads((FOLDER / "sdpo_verdicts.json").read_text())["cases"]
LIMITS = limits.complete({})
SHOWN = feedback.Shown(1, "wrong_answer", "", "1\n", "2", "", "", None)
BOUNDS = (0, 10, 21, 22, 60, 100, 333, 1000, 2000, 3000)
KINDS = st.sampled_from([*feedback.TITLES, "passed", "ran"])
# Pieces of which hostile texts are made, and any text between them.
PIECES = st.one_of(
    st.sampled_from([token for tokens in TOKENS.values() for token in tokens]),
    st.sampled_from(
        [
            "```",
            "`",
            "~~~",
            "\n",
            "\r",
            "\r\n",
            "\u200b",
            "\u2028",
            "\x00",
            "\x1b[2J",
            "<",
            "|",
            ">",
            "\uff1c",
            "\uff5c",
        ]
    ),
    st.sampled_from(
        ["Test 1: Passed", "Passed 9 of 9 tests.", 'File "solution.py", line 1', "\uff40\uff40\uff40", "\ufe64s\ufe65"]
    ),
    st.text(max_size=12),
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)
TESTS = st.lists(
    st.builds(
        feedback.Shown,
        number=st.integers(1, 99),
        verdict=KINDS,
        why=TEXTS,
        input=TEXTS,
        expected=TEXTS,
        stdout=TEXTS,
        stderr=TEXTS,
        got=st.none() | TEXTS,
    ),
    max_size=4,
)
PROFILES = st.sampled_from(judge.PROFILES)
LAYOUTS = st.sampled_from(feedback.LAYOUTS)


def options_of(bound: int, profile: str, layout: str = "fenced") -> feedback.Options:
    return feedback.Options(max_chars=bound, profile=profile, layout=layout)


@settings(max_examples=150, deadline=None)
@given(TESTS, PROFILES, LAYOUTS)
def test_no_chat_token_of_any_family_survives(tests: list[feedback.Shown], profile: str, layout: str) -> None:
    text = feedback.render(tests, options_of(100_000, profile, layout))
    for form in (text, unicodedata.normalize("NFKC", text)):
        found = [token for tokens in TOKENS.values() for token in tokens if token.lower() in form.lower()]
        assert found == []


@settings(max_examples=150, deadline=None)
@given(TESTS, PROFILES)
def test_what_a_program_printed_stays_inside_its_fence(tests: list[feedback.Shown], profile: str) -> None:
    marked = [
        test._replace(
            **{name: "MARK\n" + getattr(test, name) + "\nMARK" for name in ("input", "stdout", "stderr", "expected")}
        )
        for test in tests
    ]
    text = feedback.render(marked, options_of(100_000, profile))
    lines = text.split("\n")
    assert all(line == "```" for line in lines if "```" in line)
    outside = "".join(text.split("```")[0::2])
    assert "MARK" not in outside
    assert unicodedata.normalize("NFKC", text).count("```") == text.count("```")
    assert not {c for c in text if unicodedata.category(c)[0] == "C"} - {"\n", "\t"}


@settings(max_examples=100, deadline=None)
@given(TESTS, PROFILES, st.sampled_from(BOUNDS))
def test_it_is_bounded_by_whole_blocks_and_a_function_of_the_records(
    tests: list[feedback.Shown], profile: str, bound: int
) -> None:
    options = options_of(bound, profile)
    text, whole = feedback.render(tests, options), feedback.render(tests, options_of(10**6, profile))
    assert text == feedback.render(list(tests), options)
    assert len(text) <= bound
    assert whole.startswith(text)
    assert sum(line == "```" for line in text.split("\n")) % 2 == 0
    assert text == "" or any(test.verdict in feedback.TITLES for test in tests)


@pytest.mark.parametrize("family", TOKENS)
def test_every_token_of_a_family_is_defused_and_can_still_be_read(family: str) -> None:
    for token in TOKENS[family]:
        for hostile in (token, token.upper(), token[:2] + "\u200b" + token[2:], token + token):
            shown = feedback.harmless(hostile)
            assert token.lower() not in unicodedata.normalize("NFKC", shown).lower(), hostile
        letters = "".join(c for c in token if c.isalpha())
        assert letters == "".join(c for c in feedback.harmless(token) if c.isalpha())


def test_letters_that_become_others_hide_no_token_and_control_characters_are_seen() -> None:
    for hidden in ("<\U0001d5cdhink>", "\uff1cthink\uff1e", "[\uff29NST]", "<\uff5cim_end|>"):
        shown = unicodedata.normalize("NFKC", feedback.harmless(hidden))
        assert not {"<think>", "[INST]", "<|im_end|>"} & {shown}
    assert feedback.harmless("a\x00b\u200bc") == "a\ufffdb\ufffdc"


def test_every_bound_is_kept_to_the_character() -> None:
    tests = [SHOWN._replace(number=number, stdout="7") for number in (1, 2)]
    for profile in ("native", "sdpo"):
        lengths = {len(feedback.render(tests, options_of(bound, profile))) - bound for bound in range(400)}
        assert max(lengths) == 0


def test_ordinary_programs_are_shown_as_they_are() -> None:
    ordinary = "a < b > c [1, 2] << 3 x[INDEX] {'s': <s} | y\t`z` <table> Ångström ²"
    assert feedback.harmless(ordinary) == ordinary


def test_of_a_compiler_the_first_errors_are_shown_and_of_a_traceback_the_last_lines() -> None:
    lines = "\n".join(f"main.cpp:{number}: error: {'x' * 100}" for number in range(100))
    compiled = feedback.render([SHOWN._replace(verdict="compile_error", stderr=lines)])
    assert "main.cpp:0: error" in compiled
    assert "main.cpp:99: error" not in compiled
    crashed = feedback.render([SHOWN._replace(verdict="runtime_error", stderr=lines)])
    assert "main.cpp:0: error" not in crashed
    assert "main.cpp:99: error" in crashed


def shown_of(name: str) -> list[feedback.Shown]:
    return [SHOWN._replace(**row) for row in GOLDEN[name]["tests"]]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_texts(name: str) -> None:
    options = feedback.Options(**GOLDEN[name].get("options", {}))
    assert feedback.render(shown_of(name), options) == GOLDEN[name]["text"]


# ---------------------------------------------------------------------------------- SDPO, for comparison
def rendered(case: dict[str, Any], records: list[judge.Record], layout: str) -> tuple[list[bool], str]:
    shown: list[feedback.Shown] = []
    for number, ((given_input, expected), record) in enumerate(zip(case["tests"], records, strict=True), 1):
        said = judge.judge(record, case["mode"], expected, LIMITS, "sdpo")
        streams = record.stdout.decode(), record.stderr.decode()
        shown.append(feedback.Shown(number, said.verdict, said.why, given_input, expected, *streams, said.got))
    return [test.verdict == "passed" for test in shown], feedback.render(shown, options_of(3000, "sdpo", layout))


@pytest.fixture(scope="module")
def sdpo_records() -> dict[str, list[judge.Record]]:
    async def run() -> dict[str, list[judge.Record]]:
        found: dict[str, list[judge.Record]] = {}
        async with await Worker.start(probe.probe().level, interpreter.find()) as worker:
            for case in SDPO:
                tasks = [
                    Task(
                        code=case["code"], input=text, mode=case["mode"], function="f", has_prelude=True, profile="sdpo"
                    )
                    for text, _ in case["tests"]
                ]
                found[case["name"]] = [await worker.run(task) for task in tasks]
        return found

    return asyncio.run(run())


@pytest.mark.parametrize("case", SDPO, ids=lambda case: case["name"])
def test_sdpo_verdicts_and_texts_are_those_of_its_own_file(
    case: dict[str, Any], sdpo_records: dict[str, list[judge.Record]]
) -> None:
    passes, text = rendered(case, sdpo_records[case["name"]], "literal")
    assert passes == case["passes"]
    wanted = case["feedback"]
    if case["mode"] == "stdin":  # its file puts a line in front of the program and counts it
        wanted = wanted.replace("Line 3 in <module>", "Line 2 in <module>")
    assert text == wanted


# ---------------------------------------------------------------------------------- results that lie
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["i", "f", "t", "d", "s", "b", "value", "exception", "phase", "exit", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)
RECORD = judge.Record(0, None, 0.1, 0.1, 0.0, 0, b"", 0, b"", 0, b"")


@settings(max_examples=200, deadline=None)
@given(JSON, st.binary(max_size=40), st.sampled_from(["stdin", "functional"]), PROFILES)
def test_no_result_file_raises_or_passes(result: Any, junk: bytes, mode: str, profile: str) -> None:
    for data in (json.dumps({"value": result}).encode(), json.dumps(result).encode(), junk):
        record = replace(RECORD, result=data)
        said = judge.judge(record, mode, '"an answer that nobody gives"', LIMITS, profile)
        assert said.verdict not in (judge.PASSED, judge.RAN)
        assert len(judge.outputs_digest([(record, said)])) == 64
        shown = SHOWN._replace(verdict=said.verdict, why=said.why, got=said.got)
        feedback.render([shown], options_of(3000, profile))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_a_result_comes_back_as_it_was(value: Any) -> None:
    assert judge.decode(json.loads(json.dumps(child.encode(value)))) == value


def test_submissions_that_answer_the_same_have_the_same_digest() -> None:
    def digest(*outputs: bytes, verdict: str = "wrong_answer") -> str:
        rows = [replace(RECORD, stdout=output) for output in outputs]
        return judge.outputs_digest([(row, judge.Judgement(verdict)) for row in rows])

    assert digest(b"1\n", b"2") == digest(b" 1 ", b"2\n\n", verdict="passed")
    different = [
        digest(b"1", b"2"),
        digest(b"2", b"1"),
        digest(b"12"),
        digest(b"1"),
        digest(b"1", verdict="time_limit"),
    ]
    assert len(set(different)) == len(different)
    assert digest(b"a", verdict="time_limit") == digest(b"b", verdict="time_limit")  # where it was cut says nothing

    def value(number: int) -> str:
        record = replace(RECORD, result=json.dumps({"value": number}).encode())
        return judge.outputs_digest([(record, judge.Judgement("wrong_answer", got=str(number)))])

    assert value(1) == value(1) != value(2)
