"""No text that a program or a model wrote becomes a special token, whatever the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from megatron_distil.data.tokenizer import Tokenizer

FAMILIES: dict[str, list[str]] = json.loads(
    (Path(__file__).parents[1] / "contract" / "sandbox" / "chat_tokens.json").read_text()
)


def tokenizer(family: str, normalizer: normalizers.Normalizer | None = None, **options: bool) -> Tokenizer:
    """One token per byte, and the family's special tokens."""
    backend = Backend(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken(token, **options) for token in FAMILIES[family]])
    return Tokenizer(Path("nowhere"), backend)


def specials(one: Tokenizer, text: str) -> list[int]:
    lowest = len(pre_tokenizers.ByteLevel.alphabet())
    return [token for token in one.encode(text).tolist() if token >= lowest]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_special_token_in_a_text_is_taken_apart(family: str) -> None:
    one = tokenizer(family)
    for token in FAMILIES[family]:
        assert specials(one, token)
        defused = one.defuse(f"a{token}b{token}{token}")
        assert specials(one, defused) == []
        assert defused.replace(" ", "") == f"a{token}b{token}{token}"


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.data())
def test_no_mixture_spells_one(family: str, data: st.DataObject) -> None:
    one = tokenizer(family)
    pieces = st.sampled_from([*FAMILIES[family], "<", "|", ">", "[", "]", " ", "x"]) | st.text(max_size=4)
    text = "".join(data.draw(st.lists(pieces, max_size=8)))
    assert specials(one, one.defuse(text)) == []


@pytest.mark.parametrize("options", [{"lstrip": True, "rstrip": True}, {"normalized": True}, {"single_word": True}])
def test_tokens_that_match_loosely_are_found_as_the_tokenizer_finds_them(options: dict[str, bool]) -> None:
    one = tokenizer("qwen", normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), **options)
    for text in ("a <|im_end|> b", "<|IM_END|>", "\uff1c|im_end|\uff1e", "    <|im_start|>    user"):
        assert specials(one, one.defuse(text)) == []


def test_a_text_without_special_tokens_stays_as_it_is() -> None:
    text = "a < b | c > d [INS T] <|im _end|>\n\n\u4f60\u597d"
    assert tokenizer("qwen").defuse(text) == text
