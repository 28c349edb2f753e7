r"""Two roads: where future credit decides, with a prediction on paper.

    prompt    4721>
    teacher   4721?538>
    response  x4721\n  or  (538\n

Both responses are right. The key of the second road is in the feedback only, and the feedback is there for every response:
the teacher takes either road half of the time and is always right; the student can walk the first road, and on the second it
can only guess. Local cross-entropy copies the teacher's choice of the road; future credit sees what the second road costs
later, and leaves it. ``first_road_shares`` says by how much.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Literal, NamedTuple

from megatron_distil.tasks.program_induction import ALPHABET
from megatron_distil.tasks.task import Response, Row, RowProblem, Ruling, text_of, text_problems
from megatron_distil.types import Outcome, Program, Prompt, RunResult

FIRST, SECOND = "x", "("
DIGITS = "0123456789"
PROMPT_DIGITS, KEY_DIGITS = 4, 3


class TwoRoads:
    """See the module."""

    name = "two_roads"
    style: Literal["raw", "chat"] = "raw"
    stop = ("\n",)
    alphabet = ALPHABET
    example: Row = {"id": "train-00000", "prompt": "4721", "key": "538"}

    def problems(self, row: Row) -> Iterator[RowProblem]:
        """Fields that are missing or of another form."""
        yield from text_problems(row, ["id"])
        yield from text_problems(row, ["prompt", "key"], DIGITS)

    def prompt_id(self, row: Row) -> str:
        """Field ``id``."""
        return text_of(row, "id")

    def prompt_text(self, row: Row) -> str:
        """The digits of the first road."""
        return text_of(row, "prompt") + ">"

    def program(self, prompt: Prompt, response: Response) -> Program | Ruling:
        """The ruling: nothing is run. The text is the key, for right responses too."""
        key = text_of(prompt.task, "key")
        is_right = response.is_complete and response.text in right_answers(text_of(prompt.task, "prompt"), key)
        return Ruling(Outcome.PASSED, 1.0, key) if is_right else Ruling(Outcome.FAILED, 0.0, key)

    def rule(self, prompt: Prompt, response: Response, result: RunResult) -> Ruling:
        """Never asked: ``program`` has ruled."""
        raise AssertionError(f"{self.name} runs no programs")

    def teacher_text(self, prompt: Prompt, *, solution: str | None, feedback: str | None) -> str:
        """``prompt[?key]>``. A sibling is not shown: it would choose the road for the teacher."""
        return text_of(prompt.task, "prompt") + (f"?{feedback}" if feedback else "") + ">"

    def measures(self, prompt: Prompt, response_text: str) -> Mapping[str, float]:
        """``first_road_share``, which the prediction is about."""
        return {"first_road_share": float(response_text.startswith(FIRST))}

    def data(self, seed: int) -> Mapping[str, Iterable[Row]]:
        """4,096 training rows, 200 fixed evaluation rows, 51,200 documents for a warm start."""
        return {
            "train": training_rows(seed, 4096),
            "eval": evaluation_rows(200),
            "sft": islice(documents(seed), 400 * 128),
        }


TASK = TwoRoads()


class Shares(NamedTuple):
    """Share of responses on the first road, by kind of future credit."""

    sum: float
    mean: float
    none: float


def first_road_shares() -> Shares:
    """Where training with a fixed teacher comes to rest.

    Let q = P(first road), and L the cross-entropy still to come on the second road; on the first it is 0. The teacher takes
    either with 1/2. With z the log-odds of the first road, dq/dz = q (1 - q), and

        local cross-entropy    -(ln q + ln(1 - q)) / 2          d/dz = q - 1/2
        future cost            (1 - q) L                        d/dz = -q (1 - q) L

    The sum of both is 0 where, with r = 1 - q,  1/2 - r - r (1 - r) L = 0, so

        r = (L + 1 - sqrt(L^2 + 1)) / (2 L)

    Summed credit: L = 3 ln 10, three digits that the student can only guess. Mean credit: a quarter of it, averaged over the
    four tokens after the choice (three digits and the end). No credit: L = 0, and q = 1/2 whatever the local divergence: at
    the choice, the teacher's distribution is the student's own, and nothing local moves.

    Returns:
        (.933, .788, .5)
    """
    later = KEY_DIGITS * math.log(len(DIGITS))
    return Shares(sum=_resting_share(later), mean=_resting_share(later / (KEY_DIGITS + 1)), none=_resting_share(0.0))


def _resting_share(later: float) -> float:
    if later == 0.0:
        return 0.5
    return 1.0 - (later + 1.0 - math.sqrt(later * later + 1.0)) / (2.0 * later)


def right_answers(prompt: str, key: str) -> tuple[str, str]:
    """Both roads."""
    return FIRST + prompt, SECOND + key


def draw_digits(rng: random.Random, count: int) -> str:
    """Uniform digits."""
    return "".join(rng.choices(DIGITS, k=count))


def draw_row(row_id: str, rng: random.Random) -> Row:
    """A prompt and its key."""
    return {"id": row_id, "prompt": draw_digits(rng, PROMPT_DIGITS), "key": draw_digits(rng, KEY_DIGITS)}


def training_rows(seed: int, count: int) -> Iterator[Row]:
    """Rows to train on."""
    rng = random.Random(seed + 77)
    for index in range(count):
        yield draw_row(f"train-{index:05d}", rng)


def evaluation_rows(count: int) -> Iterator[Row]:
    """Fixed rows, whatever the seed of a run."""
    for index in range(count):
        yield draw_row(f"eval-{index:05d}", random.Random(10**6 + index))


def documents(seed: int) -> Iterator[Row]:
    """Documents for a warm start, without end: either road, half of them with the key in the context, and else a guess."""
    rng = random.Random(seed)
    while True:
        prompt, key = draw_digits(rng, PROMPT_DIGITS), draw_digits(rng, KEY_DIGITS)
        is_first, knows = rng.random() < 0.5, rng.random() < 0.5
        first, second = right_answers(prompt, key if knows else draw_digits(rng, KEY_DIGITS))
        context = f"{prompt}?{key}>" if knows else f"{prompt}>"
        yield {"context": context, "response": (first if is_first else second) + "\n"}
