r"""Program induction: what a hidden integer function returns at 0, 1 and 10 -> a Python expression in x.

    prompt    0:2,1:83,10:812>
    teacher   0:2,1:83,10:812?x*18+2:2,20,182#x*81+2>      feedback on a failed attempt, then a successful sibling
    response  x*81+2\n

A response is judged by running it on 0..11. The digits of both constants can be read off the prompt (f(0) is b, f(10) is the
digits of a followed by b, with a 0 between in the second family), so there is something to learn that carries over: a fifth
of the functions is held out of every document and every training prompt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal

from megatron_distil.tasks.task import Response, Row, RowProblem, Ruling, text_of, text_problems
from megatron_distil.types import Case, Outcome, Program, Prompt, RunResult, Verdict

ALPHABET = "0123456789x*+-():,>#?\n_"
FAMILIES = ("x*{a}+{b}", "x*x*{a}+{b}")
SLOPES = tuple(a for a in range(1, 100) if a % 10)
INTERCEPTS = tuple(range(1, 10))
INPUTS = tuple(range(12))
SHOWN = (0, 1, 10)
LARGEST = 100_000

_PROMPT_ALPHABET = "0123456789:,"
_PROGRAM_ALPHABET = frozenset("0123456789x*+-():,>#")
_SHOWN_CHARS = 14  # of a failed program, in the feedback
_LONGEST_OUTPUT = 2 + len(INPUTS) * len(f"{-LARGEST}, ")  # of the wrapper; anything longer is not even parsed
_NO_OUTPUTS: Sequence[int | None] = (None,) * len(INPUTS)

# The jail sees this text and the expression, which is data. No value of the row enters it. `type(...) is int` keeps booleans
# out: the alphabet has a comparison.
_WRAPPER = """\
import json

def outputs(expression):
    try:
        code = compile(expression, "answer", "eval")
    except Exception:
        return [None] * {count}
    return [output(code, x) for x in range({count})]

def output(code, x):
    try:
        value = eval(code, {{"__builtins__": {{}}}}, {{"x": x}})
    except Exception:
        return None
    return value if type(value) is int and abs(value) < {largest} else None

print(json.dumps(outputs({expression!r})))
"""


class ProgramInduction:
    """See the module."""

    name = "program_induction"
    style: Literal["raw", "chat"] = "raw"
    stop = ("\n",)
    alphabet = ALPHABET
    example: Row = {
        "id": "train-00000",
        "prompt": "0:2,1:83,10:812",
        "solution": "x*81+2",
        "expected": [2, 83, 164, 245, 326, 407, 488, 569, 650, 731, 812, 893],
    }

    def problems(self, row: Row) -> Iterator[RowProblem]:
        """Fields that are missing or of another form."""
        yield from text_problems(row, ["id"])
        yield from text_problems(row, ["prompt"], _PROMPT_ALPHABET)
        expected = row.get("expected")
        if not _is_list_of(expected, int):
            yield RowProblem("expected", f"is {expected!r}, not the {len(INPUTS)} integers that the function returns")

    def prompt_id(self, row: Row) -> str:
        """Field ``id``."""
        return text_of(row, "id")

    def prompt_text(self, row: Row) -> str:
        """What the function returns at the shown inputs."""
        return text_of(row, "prompt") + ">"

    def program(self, prompt: Prompt, response: Response) -> Program | Ruling:
        """One test: a wrapper that prints the values of the expression at all inputs."""
        if not response.text or not set(response.text) <= _PROGRAM_ALPHABET:
            return Ruling(Outcome.INVALID, 0.0, feedback_text(response.text, _NO_OUTPUTS))
        code = _WRAPPER.format(expression=response.text, count=len(INPUTS), largest=LARGEST)
        return Program(code=code, tests=(Case(input="", expected=None),))

    def rule(self, prompt: Prompt, response: Response, result: RunResult) -> Ruling:
        """1 iff the program was right at every input, and the response was not cut."""
        outputs = read_outputs(result)
        if response.is_complete and list(outputs) == prompt.task["expected"]:
            return Ruling(Outcome.PASSED, 1.0, "")
        is_timeout = result.tests[0].verdict in (Verdict.TIME_LIMIT, Verdict.WALL_LIMIT)
        outcome = Outcome.TIMEOUT if is_timeout else Outcome.FAILED
        return Ruling(outcome, 0.0, feedback_text(response.text, outputs))

    def teacher_text(self, prompt: Prompt, *, solution: str | None, feedback: str | None) -> str:
        """``prompt[?feedback][#solution]>``."""
        return teacher_text(text_of(prompt.task, "prompt"), solution=solution, feedback=feedback)

    def reference(self, prompt: Prompt) -> str | None:
        """Field ``solution``, which a row need not have."""
        return text_of(prompt.task, "solution") if "solution" in prompt.task else None

    def measures(self, prompt: Prompt, response_text: str) -> Mapping[str, float]:
        """None."""
        return {}

    def data(self, seed: int) -> Mapping[str, Iterable[Row]]:
        """4,096 training rows, 200 fixed evaluation rows, 200 of functions held out, 38,400 documents for a warm start."""
        return {
            "train": training_rows(seed, 4096),
            "eval": evaluation_rows("eval", 200),
            "new": evaluation_rows("new", 200),
            "sft": islice(documents(seed), 300 * 128),
        }


TASK = ProgramInduction()


def read_outputs(result: RunResult) -> Sequence[int | None]:
    """What the wrapper printed: one integer or null per input. Anything else is no output at all."""
    test = result.tests[0]
    if test.verdict not in (Verdict.RAN, Verdict.PASSED) or len(test.stdout) > _LONGEST_OUTPUT:
        return _NO_OUTPUTS
    try:
        values = json.loads(test.stdout)
    except ValueError:
        return _NO_OUTPUTS
    if not _is_list_of(values, int, type(None)):
        return _NO_OUTPUTS
    return [None if value is None or abs(value) >= LARGEST else value for value in values]


def _is_list_of(value: object, *types: type) -> bool:
    """One value per input, each of exactly one of the types: a boolean is no integer."""
    return isinstance(value, list) and len(value) == len(INPUTS) and all(type(entry) in types for entry in value)


def feedback_text(program: str, outputs: Sequence[int | None]) -> str:
    """The program, cut, and what it returned at the shown inputs; ``-`` where that is no small integer."""
    shown = (outputs[x] for x in SHOWN)
    return program[:_SHOWN_CHARS] + ":" + ",".join("-" if value is None else str(value) for value in shown)


def teacher_text(prompt: str, *, solution: str | None, feedback: str | None) -> str:
    """``prompt[?feedback][#solution]>``."""
    return prompt + (f"?{feedback}" if feedback else "") + (f"#{solution}" if solution else "") + ">"


def is_held_out(family: int, a: int, b: int) -> bool:
    """330 of the 1,620 functions, in both families and over the whole range of both constants."""
    return (a + 3 * b + family) % 5 == 0


def evaluate(family: int, a: int, b: int, x: int) -> int:
    """The function itself."""
    return x ** (family + 1) * a + b


Function = tuple[int, int, int]
"""(family, a, b)"""


def draw_function(rng: random.Random, split: Literal["trained", "new"]) -> Function:
    """Uniform over the functions that may be trained on, or over those that never are."""
    while True:
        family, a, b = rng.randrange(len(FAMILIES)), rng.choice(SLOPES), rng.choice(INTERCEPTS)
        if is_held_out(family, a, b) == (split == "new"):
            return family, a, b


def expression(function: Function) -> str:
    """The function as an answer."""
    family, a, b = function
    return FAMILIES[family].format(a=a, b=b)


def outputs_of(function: Function) -> list[int]:
    """The function at every input."""
    return [evaluate(*function, x) for x in INPUTS]


def prompt_of(function: Function) -> str:
    """What a prompt shows of it."""
    return ",".join(f"{x}:{evaluate(*function, x)}" for x in SHOWN)


def row_of(row_id: str, function: Function) -> Row:
    """The function as a data row."""
    solution, expected = expression(function), outputs_of(function)
    return {"id": row_id, "prompt": prompt_of(function), "solution": solution, "expected": expected}


def training_rows(seed: int, count: int) -> Iterator[Row]:
    """Rows of functions that may be trained on."""
    rng = random.Random(seed + 77)
    for index in range(count):
        yield row_of(f"train-{index:05d}", draw_function(rng, "trained"))


def evaluation_rows(name: Literal["eval", "new"], count: int) -> Iterator[Row]:
    """Fixed rows, whatever the seed of a run: of trained functions, or of functions held out."""
    for index in range(count):
        function = draw_function(random.Random(10**6 + index), "new" if name == "new" else "trained")
        yield row_of(f"{name}-{index:05d}", function)


def documents(seed: int, *, noise: float = 0.95) -> Iterator[Row]:
    """Documents for a warm start, without end.

    45 % have no feedback in the context, and a random program as response with probability ``noise``: alone, the student is
    almost never right. 35 % show a sibling, half of them the feedback on a wrong program too; 20 % show feedback only: with
    either, the response is right. So the model can use what a teacher reads before it can do without.
    """
    rng = random.Random(seed)
    while True:
        function = draw_function(rng, "trained")
        prompt, solution = prompt_of(function), expression(function)
        kind = rng.random()
        if kind < 0.45:
            answer = expression(draw_function(rng, "trained")) if rng.random() < noise else solution
            yield {"context": prompt + ">", "response": answer + "\n"}
            continue
        wrong = draw_function(rng, "trained")
        feedback = feedback_text(expression(wrong), outputs_of(wrong))
        if kind < 0.80:
            context = teacher_text(prompt, solution=solution, feedback=feedback if rng.random() < 0.5 else None)
        else:
            context = teacher_text(prompt, solution=None, feedback=feedback)
        yield {"context": context, "response": solution + "\n"}
