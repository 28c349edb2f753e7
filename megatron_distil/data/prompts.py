"""The prompts of a task: rows of a data set in an order that is a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable

from megatron_distil.config.schema import Config, EvalSet
from megatron_distil.data.rows import Order, Rows, Share, check_rows, load_rows, raise_if_any
from megatron_distil.data.tokenizer import Tokenizer, prompt_encoder
from megatron_distil.errors import DataError
from megatron_distil.tasks.task import Task
from megatron_distil.types import Ids, Prompt


class PromptReader:
    """Rows -> prompts, checked."""

    def __init__(self, rows: Rows, task: Task, encode: Callable[[str], Ids], *, max_tokens: int) -> None:
        """Check the first rows.

        Raises:
            DataError: names every bad row.
        """
        self._rows = rows
        self._task = task
        self._encode = encode
        self._max_tokens = max_tokens
        check_rows(rows, task.problems, task.example)

    def prompt(self, index: int) -> Prompt:
        """The prompt of a row.

        Raises:
            DataError: the row is malformed, or its prompt too long.
        """
        row, where = self._rows[index], self._rows.where(index)
        problems = [f"{where}: {field}: {reason}" for field, reason in self._task.problems(row)]
        raise_if_any(problems, self._rows.source, self._task.example)
        text = self._task.prompt_text(row)
        token_ids = self._encode(text)
        if not 0 < len(token_ids) <= self._max_tokens:
            raise DataError(
                f"{where}: the prompt has {len(token_ids)} tokens, and rollout.max_prompt_tokens is {self._max_tokens}; "
                f"raise it or leave the row out"
            )
        return Prompt(prompt_id=self._task.prompt_id(row), text=text, token_ids=token_ids, task=row)

    def all(self) -> list[Prompt]:
        """The prompts of all rows, in their order.

        Raises:
            DataError: a row is malformed, a prompt is too long, or two rows have one id.
        """
        return _distinct([self.prompt(index) for index in range(len(self._rows))], self._rows.source)


class TaskPrompts:
    """Fulfils ``protocols.Prompts``."""

    def __init__(self, reader: PromptReader, order: Order, share: Share) -> None:
        self._reader = reader
        self._order = order
        self._share = share

    def take(self, step: int) -> list[Prompt]:
        """This replica's prompts of a step.

        Raises:
            DataError: a row is malformed, or its prompt too long.
        """
        return _distinct(
            [self._reader.prompt(index) for index in self._order.indices(step, self._share)], f"step {step}"
        )


def load_prompts(config: Config, task: Task, tokenizer: Tokenizer, share: Share) -> TaskPrompts:
    """The training prompts of a run.

    Raises:
        DataError: names every bad row among the first, or what else is wrong with the data.
    """
    rows = load_rows(config.data.train, config.data.split)
    per_step, seed = config.rollout.prompts_per_step, config.data.seed
    order = Order(len(rows), per_step=per_step, seed=seed, source=rows.source)
    return TaskPrompts(_reader(rows, config, task, tokenizer), order, share)


def load_eval_prompts(config: Config, eval_set: EvalSet, task: Task, tokenizer: Tokenizer) -> list[Prompt]:
    """All prompts of an evaluation set, in the order of the rows.

    Raises:
        DataError: a row is malformed.
    """
    return _reader(load_rows(eval_set.data, eval_set.split), config, task, tokenizer).all()


def _reader(rows: Rows, config: Config, task: Task, tokenizer: Tokenizer) -> PromptReader:
    encode = prompt_encoder(tokenizer, task.style)
    return PromptReader(rows, task, encode, max_tokens=config.rollout.max_prompt_tokens)


def _distinct(prompts: list[Prompt], where: str) -> list[Prompt]:
    """An id names a prompt for ever: in requests, in logs, among siblings."""
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.prompt_id in seen:
            raise DataError(f"{where}: two rows have the id {prompt.prompt_id!r}; ids must differ")
        seen.add(prompt.prompt_id)
    return prompts
