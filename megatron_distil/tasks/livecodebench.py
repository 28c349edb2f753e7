"""LiveCodeBench: contest problems, answered by a Python program in a fenced block, judged on the tests of the problem.

    prompt    an instruction, the statement, the signature if a function is wanted
    teacher   the prompt, a sibling that passed or what was wrong with the attempt, "Correctly solve the original question."

Rows and files of tests are written by ``livecodebench_data``: a row names its tests by their hash, because those of one problem
take megabytes. Prompt and templates: SDPO's release (lasgroup/SDPO, data/format/prompts.py, actor.yaml), which DistIL uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from megatron_distil.config.schema import TaskConfig
from megatron_distil.errors import DataError
from megatron_distil.tasks.task import Response, Row, RowProblem, Ruling, Task, text_of, text_problems
from megatron_distil.types import CaseFile, FeedbackOptions, Outcome, Profile, Program, Prompt, RunResult, Verdict

INSTRUCTION = (
    "You are a coding expert. You will be given a coding problem, and you need to write a correct Python program that matches "
    "the specification and passes all tests. The time limit is 1 second. You may start by outlining your thought process. In "
    "the end, please provide the complete code in a code block enclosed with ``` ```."
)
SIGNATURE = "Your solution should have the following signature: ```python\n{signature}\n```"
SOLUTION = "\nCorrect solution:\n\n{solution}"
FEEDBACK = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback}"
CLOSING = "\n\nCorrectly solve the original question."
NO_PROGRAM = "Incorrect Format: Put your code inside a ```python ... ``` block."
CUT = (
    "Truncated Attempt: Your previous response was too long and truncated because it reached the maximum response length. Try "
    "again with a shorter response."
)
MEMORY_BYTES = 1 << 30
"""LiveCodeBench sets no limit, SDPO 1 GiB."""
NO_PROGRAM_VOTE = "no program"

_WORST_FIRST = (
    Verdict.COMPILE_ERROR,
    Verdict.RUNTIME_ERROR,
    Verdict.MEMORY_LIMIT,
    Verdict.OUTPUT_LIMIT,
    Verdict.TIME_LIMIT,
    Verdict.WALL_LIMIT,
    Verdict.WRONG_ANSWER,
)
_OUTCOME_BY_VERDICT: Mapping[Verdict, Outcome] = {
    Verdict.COMPILE_ERROR: Outcome.INVALID,
    Verdict.TIME_LIMIT: Outcome.TIMEOUT,
    Verdict.WALL_LIMIT: Outcome.TIMEOUT,
}
"""All others are failures of the program."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FENCE = re.compile(r"^ {0,3}```(?P<info>[^`]*)$")
_ANY_BLOCK = re.compile(r"```\w*\n(.*?)```", re.DOTALL)


class LiveCodeBench:
    """See the module."""

    name = "livecodebench"
    style: Literal["raw", "chat"] = "chat"
    stop = ()
    example: Row = {
        "id": "sum-of-two",
        "question": "Read two integers and print their sum.",
        "starter_code": "",
        "function": "",
        "tests": "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef",
        "num_tests": 2,
    }

    def __init__(self, settings: TaskConfig) -> None:
        self.settings = settings

    def configured(self, settings: TaskConfig) -> Task:
        """The task under ``[task]`` of a recipe."""
        return LiveCodeBench(settings)

    def problems(self, row: Row) -> Iterator[RowProblem]:
        """Fields that are missing or of another form, and tests that are not in ``task.tests``."""
        yield from text_problems(row, ["id", "question"])
        for field in ("starter_code", "function"):
            if not isinstance(row.get(field), str):
                yield RowProblem(field, f"is {row.get(field)!r}, not a text; empty where a program reads its input")
        count = row.get("num_tests")
        if type(count) is not int or count < 1:
            yield RowProblem("num_tests", f"is {count!r}, not the number of tests in the file")
        tests = row.get("tests")
        if not isinstance(tests, str) or not _SHA256.fullmatch(tests):
            yield RowProblem("tests", f"is {tests!r}, not the SHA-256 of a file of tests")
        elif self.settings.tests and not Path(self._path(tests)).is_file():
            yield RowProblem("tests", f"there is no {self._path(tests)}; task.tests names the folder")

    def prompt_id(self, row: Row) -> str:
        """Field ``id``: LiveCodeBench's ``question_id``."""
        return text_of(row, "id")

    def prompt_text(self, row: Row) -> str:
        """Instruction, statement and signature."""
        parts = [INSTRUCTION, text_of(row, "question")]
        if starter_code := text_of(row, "starter_code").strip():
            parts.append(SIGNATURE.format(signature=signature_of(starter_code)))
        return "\n\n".join(parts)

    def program(self, prompt: Prompt, response: Response) -> Program | Ruling:
        """The program in the response on the tests of the row; without one there is nothing to run."""
        settings, row = self.settings, prompt.task
        code = extract_code(response.text, settings.profile)
        if code is None:
            text = NO_PROGRAM if response.is_complete else CUT
            return Ruling(Outcome.INVALID, 0.0, text, pass_fraction=0.0, vote=NO_PROGRAM_VOTE)
        tests, function = text_of(row, "tests"), text_of(row, "function")
        return Program(
            code=code,
            case_file=CaseFile(self._path(tests), tests, _num_tests(row)),
            mode="functional" if function else "stdin",
            function=function,
            has_prelude=True,
            memory_bytes=MEMORY_BYTES,
            stop_after=settings.stop_after,
            stop_after_timeouts=settings.stop_after_timeouts,
            profile=settings.profile,
            feedback=FeedbackOptions(
                max_failing=settings.max_failing,
                max_chars=settings.max_feedback_chars,
                show_expected=settings.show_expected,
            ),
        )

    def rule(self, prompt: Prompt, response: Response, result: RunResult) -> Ruling:
        """``task.reward`` of what passed; nothing for a response that was cut."""
        verdicts = [test.verdict for test in result.tests]
        passed, total = verdicts.count(Verdict.PASSED), _num_tests(prompt.task)
        fraction, vote = passed / total, result.outputs_digest
        if passed == total:
            if response.is_complete:
                return Ruling(Outcome.PASSED, 1.0, "", pass_fraction=1.0, vote=vote)
            return Ruling(Outcome.FAILED, 0.0, CUT, pass_fraction=1.0, vote=vote)
        is_partial = self.settings.reward == "pass_fraction" and response.is_complete
        reward = fraction if is_partial else 0.0
        return Ruling(outcome_of(verdicts), reward, result.feedback, pass_fraction=fraction, vote=vote)

    def teacher_text(self, prompt: Prompt, *, solution: str | None, feedback: str | None) -> str:
        """The prompt with what the teacher knows; the prompt itself if that is nothing."""
        text = self.prompt_text(prompt.task)
        if not solution and not feedback:
            return text
        text += SOLUTION.format(solution=solution) if solution else ""
        text += FEEDBACK.format(feedback=feedback) if feedback else ""
        return text + CLOSING

    def measures(self, prompt: Prompt, response_text: str) -> Mapping[str, float]:
        """None: what is measured comes with the verdicts."""
        return {}

    def _path(self, sha256: str) -> str:
        return str(Path(self.settings.tests, f"{sha256}.json"))


TASK = LiveCodeBench(TaskConfig(name="livecodebench"))


def signature_of(starter_code: str) -> str:
    """The function that is wanted, without ``self``: the first ``def`` of the starter code, up to where text begins."""
    _, define, rest = starter_code.partition("def ")
    signature = define + rest.partition("def ")[0].partition("Input\n")[0]
    return (signature or starter_code).strip().replace("(self, ", "(")


def extract_code(text: str, profile: Profile) -> str | None:
    """The program in a response; None: there is none.

    ``native``: the last fenced block that is closed. ``lcb``: what stands between the last two lines with a fence, as in
    LiveCodeBench's extraction_utils.py (28fef95). ``sdpo``: the longest block, as in SDPO's feedback/code.py.
    """
    match profile:
        case "native":
            blocks = fenced_blocks(text)
            code = blocks[-1] if blocks else ""
        case "lcb":
            lines = text.split("\n")
            fences = [index for index, line in enumerate(lines) if "```" in line]
            code = "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else ""
        case "sdpo":
            code = max(_ANY_BLOCK.findall(text), key=len, default="")
    return code if code.strip() else None


def fenced_blocks(text: str) -> list[str]:
    """The contents of fenced blocks that are closed, in their order; a fence has its line to itself."""
    blocks: list[str] = []
    opened: int | None = None
    lines = text.split("\n")
    for index, line in enumerate(lines):
        fence = _FENCE.match(line.rstrip())
        if fence is None:
            continue
        if opened is None or fence["info"].strip():  # a block that nobody closed ends where the next one begins
            opened = index
        else:
            blocks.append("\n".join(lines[opened + 1 : index]))
            opened = None
    return blocks


def outcome_of(verdicts: Sequence[Verdict]) -> Outcome:
    """The outcome of a program that did not pass every test: its worst test decides."""
    worst = next((verdict for verdict in _WORST_FIRST if verdict in verdicts), Verdict.WRONG_ANSWER)
    return _OUTCOME_BY_VERDICT.get(worst, Outcome.FAILED)


def _num_tests(row: Row) -> int:
    count = row.get("num_tests")
    if type(count) is not int or count < 1:
        raise DataError(f"a row has num_tests = {count!r}, not the number of its tests")
    return count
