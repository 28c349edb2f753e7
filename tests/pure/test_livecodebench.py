"""The task: prompts, programs out of responses, rulings, what the teacher reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_distil.config.schema import TaskConfig
from megatron_distil.errors import DataError
from megatron_distil.tasks import livecodebench
from megatron_distil.tasks.livecodebench import LiveCodeBench, extract_code, fenced_blocks, signature_of
from megatron_distil.tasks.task import Response, Ruling
from megatron_distil.types import CaseFile, CaseResult, FeedbackOptions, Outcome, Program, RunResult, Verdict
from tests.task_records import prompt_from

TASK = livecodebench.TASK
ROW = dict(TASK.example) | {"num_tests": 4}
PROMPT = prompt_from(TASK, ROW)
ANSWER = Response("Add them.\n```python\nprint(1)\n```\nDone.", is_complete=True)
CUT = ANSWER._replace(is_complete=False)
PASSED, WRONG, TIME = Verdict.PASSED, Verdict.WRONG_ANSWER, Verdict.TIME_LIMIT


def task(**settings: object) -> LiveCodeBench:
    return LiveCodeBench(TaskConfig.model_validate({"name": "livecodebench", **settings}))


def result(verdicts: Sequence[Verdict], feedback: str = "what was wrong", digest: str = "d1") -> RunResult:
    tests = tuple(CaseResult(verdict, "", 0) for verdict in verdicts)
    return RunResult(tests=tests, feedback=feedback, duration_s=0.5, outputs_digest=digest)


# ------------------------------------------------------------------------------------------- prompts
def test_the_student_reads_instruction_and_statement() -> None:
    assert PROMPT.text == f"{livecodebench.INSTRUCTION}\n\nRead two integers and print their sum."
    assert livecodebench.INSTRUCTION.endswith("please provide the complete code in a code block enclosed with ``` ```.")


def test_a_function_is_asked_for_by_its_signature_without_self() -> None:
    starter = "class Solution:\n    def joinAll(self, words: List[str], glue: str) -> str:\n        "
    text = TASK.prompt_text({**ROW, "starter_code": starter, "function": "joinAll"})
    assert text.endswith(
        "print their sum.\n\nYour solution should have the following signature: ```python\n"
        "def joinAll(words: List[str], glue: str) -> str:\n```"
    )


@pytest.mark.parametrize(
    ("starter", "signature"),
    [
        ("def f(x):\n    pass\ndef g(y): pass", "def f(x):\n    pass"),
        ("def f(x)\nInput\nan int", "def f(x)"),
        ("class Solution:", "class Solution:"),
    ],
)
def test_the_signature_is_the_first_function(starter: str, signature: str) -> None:
    assert signature_of(starter) == signature


def test_the_teacher_reads_a_solution_or_feedback_and_the_student_neither() -> None:
    read = TASK.teacher_text
    closing = "\n\nCorrectly solve the original question."
    solved, failed = (
        "\nCorrect solution:\n\nS",
        "\nThe following is feedback from your unsuccessful earlier attempt:\n\nF",
    )
    assert read(PROMPT, solution=None, feedback=None) == PROMPT.text
    assert read(PROMPT, solution="S", feedback=None) == PROMPT.text + solved + closing
    assert read(PROMPT, solution=None, feedback="F") == PROMPT.text + failed + closing
    assert read(PROMPT, solution="S", feedback="F") == PROMPT.text + solved + failed + closing


# ------------------------------------------------------------------------------- programs in responses
BLOCKS = [
    ("```python\na\n```", "a", "a", "a"),
    ("```\na\n```", "a", "a", "a"),
    ("```py\nlonger\n```\nor\n```python\nb\n```", "b", "b", "longer\n"),
    ("```python\na\n\nb\n```  \nend", "a\n\nb", "a\n\nb", "a\n\nb\n"),
    ("no code", None, None, None),
    ("```python\nunfinished", None, None, None),
    ("```python\na\n```\n```python\nunfinished", "a", "", "a\n"),
    ("```python\n   \n```", None, None, None),
    ("use `x` and ```y``` here", None, None, None),
    ("1. So:\n   ```python\n   a\n   ```", "   a", "   a", "   a\n   "),
    ('```python\ns = "```"\n```', 's = "```"', "", 's = "'),
    ("```python\nfirst\n```python\nsecond\n```", "second", "second", "first\n"),
]


@pytest.mark.parametrize(("text", "native", "lcb", "sdpo"), BLOCKS, ids=[str(index) for index in range(len(BLOCKS))])
def test_the_program_is_found_by_the_rule_of_the_profile(
    text: str, native: str | None, lcb: str | None, sdpo: str | None
) -> None:
    assert extract_code(text, "native") == native
    assert extract_code(text, "lcb") == (lcb or None)
    found = extract_code(text, "sdpo")
    assert (found or "").rstrip("\n") == (sdpo or "").rstrip("\n")


def test_blocks_are_listed_in_their_order() -> None:
    assert fenced_blocks("```\n1\n```\n```\n2\n```\n```\n3") == ["1", "2"]


def test_the_program_names_its_tests_and_carries_the_settings() -> None:
    asked = task(
        tests="/data/tests", profile="sdpo", stop_after=3, max_failing=1, max_feedback_chars=500, show_expected=False
    ).program(PROMPT, ANSWER)
    sha256 = str(ROW["tests"])
    assert asked == Program(
        code="print(1)\n",
        case_file=CaseFile(f"/data/tests/{sha256}.json", sha256, 4),
        has_prelude=True,
        memory_bytes=2**30,
        stop_after=3,
        stop_after_timeouts=3,
        profile="sdpo",
        feedback=FeedbackOptions(1, 500, False),
    )


def test_a_row_with_a_function_is_called() -> None:
    asked = TASK.program(prompt_from(TASK, {**ROW, "function": "f"}), ANSWER)
    assert isinstance(asked, Program)
    assert (asked.mode, asked.function, asked.num_tests) == ("functional", "f", 4)


def test_without_a_program_there_is_nothing_to_run_and_the_teacher_hears_why() -> None:
    told = TASK.program(PROMPT, Response("I do not know.", is_complete=True))
    cut = TASK.program(PROMPT, Response("```python\nfor", is_complete=False))
    assert isinstance(told, Ruling)
    assert isinstance(cut, Ruling)
    assert (told.outcome, told.reward, told.pass_fraction, told.vote) == (Outcome.INVALID, 0.0, 0.0, "no program")
    assert told.text.startswith("Incorrect Format")
    assert (cut.outcome, cut.reward) == (Outcome.INVALID, 0.0)
    assert cut.text.startswith("Truncated Attempt")


# ------------------------------------------------------------------------------------------- rulings
def test_every_test_must_pass() -> None:
    assert TASK.rule(PROMPT, ANSWER, result([PASSED] * 4, "")) == Ruling(Outcome.PASSED, 1.0, "", 1.0, "d1")
    failed = Ruling(Outcome.FAILED, 0.0, "what was wrong", 0.75, "d1")
    assert TASK.rule(PROMPT, ANSWER, result([PASSED, WRONG, PASSED, PASSED])) == failed


def test_tests_that_were_not_run_have_not_passed() -> None:
    ruling = TASK.rule(PROMPT, ANSWER, result([PASSED, PASSED, WRONG]))
    assert (ruling.outcome, ruling.reward, ruling.pass_fraction) == (Outcome.FAILED, 0.0, 0.5)
    assert TASK.rule(PROMPT, ANSWER, result([PASSED] * 3)).outcome is Outcome.FAILED


def test_a_share_of_the_tests_earns_that_share_where_it_is_asked_for() -> None:
    partial = task(reward="pass_fraction")
    assert partial.rule(PROMPT, ANSWER, result([PASSED, WRONG, PASSED, PASSED])).reward == 0.75
    assert partial.rule(PROMPT, CUT, result([PASSED, WRONG, PASSED, PASSED])).reward == 0.0
    assert partial.rule(PROMPT, ANSWER, result([PASSED] * 4)).reward == 1.0


def test_a_right_program_in_a_response_that_was_cut_earns_nothing_and_the_teacher_hears_why() -> None:
    ruling = TASK.rule(PROMPT, CUT, result([PASSED] * 4, ""))
    assert (ruling.outcome, ruling.reward) == (Outcome.FAILED, 0.0)
    assert ruling.text.startswith("Truncated Attempt")


OUTCOMES = [
    ([Verdict.COMPILE_ERROR] * 4, Outcome.INVALID),
    ([PASSED, TIME, PASSED, PASSED], Outcome.TIMEOUT),
    ([PASSED, Verdict.WALL_LIMIT, WRONG, WRONG], Outcome.TIMEOUT),
    ([TIME, Verdict.RUNTIME_ERROR, WRONG, PASSED], Outcome.FAILED),
    ([TIME, Verdict.MEMORY_LIMIT, PASSED, PASSED], Outcome.FAILED),
    ([TIME, Verdict.OUTPUT_LIMIT, PASSED, PASSED], Outcome.FAILED),
    ([WRONG, TIME, PASSED, PASSED], Outcome.TIMEOUT),
    ([WRONG] * 4, Outcome.FAILED),
]


@pytest.mark.parametrize(("verdicts", "outcome"), OUTCOMES)
def test_the_worst_test_decides(verdicts: list[Verdict], outcome: Outcome) -> None:
    assert TASK.rule(PROMPT, ANSWER, result(verdicts)).outcome is outcome


# ---------------------------------------------------------------------------------------------- rows
BAD_ROWS = [
    ({"id": ""}, {"id"}),
    ({"question": 5}, {"question"}),
    ({"starter_code": None}, {"starter_code"}),
    ({"function": 1}, {"function"}),
    ({"num_tests": 0}, {"num_tests"}),
    ({"num_tests": True}, {"num_tests"}),
    ({"tests": "abc"}, {"tests"}),
    ({"tests": None, "num_tests": None}, {"tests", "num_tests"}),
]


@pytest.mark.parametrize(("change", "fields"), BAD_ROWS)
def test_every_bad_field_of_a_row_is_named(change: dict[str, object], fields: set[str]) -> None:
    assert {problem.field for problem in TASK.problems({**ROW, **change})} == fields


def test_tests_that_are_not_in_the_folder_are_found_before_anything_is_sampled(tmp_path: Path) -> None:
    (problem,) = task(tests=str(tmp_path)).problems(ROW)
    assert problem.field == "tests"
    assert str(tmp_path) in problem.reason
    (tmp_path / f"{ROW['tests']}.json").write_text("[]")
    assert list(task(tests=str(tmp_path)).problems(ROW)) == []


def test_a_row_without_a_count_is_no_row_of_nothing() -> None:
    with pytest.raises(DataError, match="num_tests = None"):
        TASK.rule(prompt_from(TASK, {**ROW, "num_tests": None}), ANSWER, result([PASSED]))
