"""From answer words to tokens: which are one, and how those that are not are told."""

from collections.abc import Callable
from typing import Any

import pytest
from tiny import COUNTRIES, KINDS, UNKNOWN_WORD

from megaptune.errors import DataError
from megaptune.prompts.tokens import TokenForms
from megaptune.prompts.verbalizer import Verbalizer

Tokenizers = Callable[[str], Any]


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_one_token_have_the_token_they_are_after_a_space(tokenizers: Tokenizers, kind: str):
    forms = TokenForms(tokenizers(kind))
    found = Verbalizer.of(COUNTRIES, forms)
    mark = "" if kind == "bert" else "Ġ"
    assert {word: forms.pieces([token])[0] for word, token in found.token_of.items()} == {
        word: mark + word for word in COUNTRIES
    }
    assert found.pieces_of == {}


def test_words_of_several_tokens_are_kept_apart_with_their_pieces(tokenizers: Tokenizers):
    found = Verbalizer.of(["Paris", "Parisis"], TokenForms(tokenizers("gpt2")))
    assert list(found.token_of) == ["Paris"]
    assert found.pieces_of == {"Parisis": ["ĠParis", "is"]}


def test_unknown_token_is_no_answer(tokenizers: Tokenizers):
    found = Verbalizer.of(["Ωmega"], TokenForms(tokenizers("bert")))
    assert found.token_of == {}
    assert found.pieces_of == {"Ωmega": ["[UNK]"]}


def test_repeated_words_are_looked_up_once(tokenizers: Tokenizers):
    assert list(Verbalizer.of(["Peru", "Italy", "Peru"], TokenForms(tokenizers("gpt2"))).token_of) == ["Peru", "Italy"]


def test_error_names_the_word_its_pieces_and_where_it_was_read(tokenizers: Tokenizers):
    forms = TokenForms(tokenizers("bert"))
    verbalizer = Verbalizer.of(["Paris", "Parisis"], forms)
    with pytest.raises(DataError) as caught:
        verbalizer.require_all({"Paris": "facts.jsonl:1", "Parisis": "facts.jsonl:7"})
    assert "'Parisis' = Paris ##i ##s (facts.jsonl:7)" in str(caught.value)
    assert "task.multi_token_answers: drop" in str(caught.value)
    assert "facts.jsonl:1" not in str(caught.value)


def test_error_shows_five_words_and_counts_the_rest(tokenizers: Tokenizers):
    words = [f"{UNKNOWN_WORD}{letter}" for letter in "abcdefgh"]
    verbalizer = Verbalizer.of(words, TokenForms(tokenizers("gpt2")))
    with pytest.raises(DataError, match="and 3 more") as caught:
        verbalizer.require_all(dict.fromkeys(words, "facts.jsonl:1"))
    assert str(caught.value).count(UNKNOWN_WORD) == 5


def test_nothing_is_raised_when_all_are_one_token(tokenizers: Tokenizers):
    verbalizer = Verbalizer.of(COUNTRIES, TokenForms(tokenizers("gpt2")))
    verbalizer.require_all(dict.fromkeys(COUNTRIES, "facts.jsonl:1"))
