"""Supervised documents: rows of ``context`` and ``response`` in an order that is a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from megatron_distil.config.schema import Config
from megatron_distil.data.rows import Order, Row, Rows, Share, check_rows, load_rows, raise_if_any
from megatron_distil.data.tokenizer import Tokenizer, prompt_encoder
from megatron_distil.errors import DataError
from megatron_distil.tasks.task import Task
from megatron_distil.types import Document, Ids

EXAMPLE: Row = {"context": "4721>", "response": "x4721\n"}


class RowDocuments:
    """Fulfils ``protocols.Documents``. A response that does not end with the stop token gets it."""

    def __init__(
        self,
        rows: Rows,
        order: Order,
        share: Share,
        *,
        encode_context: Callable[[str], Ids],
        encode_response: Callable[[str], Ids],
        stop_id: int,
        max_tokens: int,
    ) -> None:
        """Check the first rows.

        Raises:
            DataError: names every bad row.
        """
        check_rows(rows, document_problems, EXAMPLE)
        self._rows = rows
        self._order = order
        self._share = share
        self._encode_context = encode_context
        self._encode_response = encode_response
        self._stop_id = stop_id
        self._max_tokens = max_tokens

    def take(self, step: int) -> list[Document]:
        """This replica's documents of a step.

        Raises:
            DataError: a row is malformed or too long.
        """
        return [self._document(index) for index in self._order.indices(step, self._share)]

    def _document(self, index: int) -> Document:
        row, where = self._rows[index], self._rows.where(index)
        raise_if_any([f"{where}: {field}: {reason}" for field, reason in document_problems(row)], where, EXAMPLE)
        context_ids = self._encode_context(str(row["context"]))
        response_ids = self._encode_response(str(row["response"]))
        if not len(response_ids) or response_ids[-1] != self._stop_id:
            response_ids = np.append(response_ids, np.int32(self._stop_id))
        num_tokens = len(context_ids) + len(response_ids)
        if num_tokens > self._max_tokens or not len(context_ids):
            raise DataError(
                f"{where}: {num_tokens} tokens, {len(context_ids)} of context; 1 to {self._max_tokens} work"
            )
        return Document(context_ids=context_ids, response_ids=response_ids)


def load_documents(config: Config, task: Task, tokenizer: Tokenizer, share: Share) -> RowDocuments:
    """The documents of a supervised run.

    Raises:
        DataError: names every bad row among the first, or what else is wrong with the data.
    """
    rows = load_rows(config.data.train, config.data.split)
    per_step, seed = config.sft.documents_per_step, config.data.seed
    return RowDocuments(
        rows,
        Order(len(rows), per_step=per_step, seed=seed, source=rows.source),
        share,
        encode_context=prompt_encoder(tokenizer, task.style),
        encode_response=tokenizer.encode,
        stop_id=tokenizer.stop_ids(task.stop)[0],
        max_tokens=config.train.max_microbatch_tokens,
    )


def document_problems(row: Row) -> Iterator[tuple[str, str]]:
    """Fields that are missing or no text."""
    for field in ("context", "response"):
        value = row.get(field)
        if not isinstance(value, str) or not value:
            yield field, "is missing" if value is None else f"is {value!r}, not a text"
