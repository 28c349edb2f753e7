"""The prompts of a task: rows of a data set in an order that is a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable

from megatron_distil.data.rows import Order, Rows, Share, check_rows, raise_if_any
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


def _distinct(prompts: list[Prompt], where: str) -> list[Prompt]:
    """An id names a prompt for ever: in requests, in logs, among siblings."""
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.prompt_id in seen:
            raise DataError(f"{where}: two rows have the id {prompt.prompt_id!r}; ids must differ")
        seen.add(prompt.prompt_id)
    return prompts
