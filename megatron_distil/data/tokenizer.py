"""The tokenizer of a model's folder: texts that the model reads -> token ids, and back."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_distil.errors import DataError
from megatron_distil.types import Ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_DEFUSE_ROUNDS = 4


class Tokenizer:
    """A fast tokenizer, with what the model's files say of its ends and of its chat template."""

    def __init__(self, folder: Path, backend: Backend) -> None:
        self._folder = folder
        self._backend = backend
        self._render: Callable[[str], str] | None = None

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read ``tokenizer.json``, or whatever transformers can make one of (slower to start).

        Raises:
            DataError: there is no tokenizer that we can read.
        """
        path = Path(folder)
        if (path / "tokenizer.json").is_file():
            from tokenizers import Tokenizer as Backend

            return cls(path, Backend.from_file(str(path / "tokenizer.json")))
        if not path.is_dir():
            raise DataError(f"{path}: no such folder; a folder in Hugging Face's format with tokenizer.json works")
        return cls(path, _transformers_tokenizer(path).backend_tokenizer)

    def encode(self, text: str) -> Ids:
        """Token ids of a text as it is: nothing is put before or after it."""
        return np.asarray(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_chat(self, message: str) -> Ids:
        """Token ids of a user's message in the model's chat template, up to where the answer starts; thinking is off.

        Raises:
            DataError: the model has no chat template.
        """
        if self._render is None:
            self._render = _chat_renderer(self._folder)
        return self.encode(self._render(message))

    def defuse(self, text: str) -> str:
        """The text with every special token that it spells taken apart, so that it is read as characters.

        For what a program or a model wrote: ``<|im_end|>`` in it must end no turn. Tokens of one character stay.
        """
        for _ in range(_DEFUSE_ROUNDS):
            spans = self._special_spans(text)
            if not spans:
                return text
            for start, end in reversed(spans):
                middle = (start + end) // 2
                text = f"{text[:middle]} {text[middle:]}"
        while spans := self._special_spans(text):  # one that matches with any space in it
            for start, end in reversed(spans):
                text = text[:start] + text[end:]
        return text

    def _special_spans(self, text: str) -> list[tuple[int, int]]:
        specials = {i: token.content for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        encoding = self._backend.encode(text, add_special_tokens=False)
        return [
            (start, end)
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            # the id of unknown text is special too, and spells nothing
            if end - start > 1 and token in specials and _folded(specials[token]) in _folded(text[start:end])
        ]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text of token ids; special tokens have none."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def vocabulary(self) -> dict[str, int]:
        """Ids by token, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def token_id(self, token: str) -> int:
        """The id of one token.

        Raises:
            DataError: the vocabulary has no such token.
        """
        index = self._backend.token_to_id(token)
        if index is None:
            raise DataError(f"{self._folder}: the vocabulary has no token {token!r}")
        return index

    def stop_ids(self, stop: Sequence[str] = ()) -> tuple[int, ...]:
        """Ids that end a response: of the given tokens, or, without any, those that the model's files name.

        Raises:
            DataError: a token is unknown, or the files name none.
        """
        if stop:
            return tuple(self.token_id(token) for token in stop)
        for name in ("generation_config.json", "config.json"):
            ids = _read_json(self._folder / name).get("eos_token_id")
            if isinstance(ids, int):
                return (ids,)
            if isinstance(ids, list) and ids:
                return tuple(ids)
        raise DataError(f"{self._folder}: neither generation_config.json nor config.json names an eos_token_id")

    @property
    def eos_id(self) -> int:
        """The first token that ends a response."""
        return self.stop_ids()[0]


def _folded(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_encoder(tokenizer: Tokenizer, style: str) -> Callable[[str], Ids]:
    """How the texts of a task become tokens; ``style`` is the task's."""
    return tokenizer.encode_chat if style == "chat" else tokenizer.encode


def _chat_renderer(folder: Path) -> Callable[[str], str]:
    tokenizer = _transformers_tokenizer(folder)
    if not tokenizer.chat_template:
        raise DataError(
            f"{folder}: the tokenizer has no chat_template, and this task speaks as a user; take a chat model"
        )

    def render(message: str) -> str:
        turns = [{"role": "user", "content": message}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, enable_thinking=False)

    return render


def _transformers_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer  # seconds to import; most folders never need it

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no tokenizer that transformers can read: {error}") from error
    if not tokenizer.is_fast:
        raise DataError(
            f"{folder}: only a tokenizer with a tokenizer.json works; transformers can convert and save one"
        )
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
