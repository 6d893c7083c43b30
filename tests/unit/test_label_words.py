"""Verbalizers against a tokenizer: one token a word, none of them twice."""

from collections.abc import Callable
from typing import Any

import pytest
from tiny import UNKNOWN_WORD

from megaptune.errors import DataError
from megaptune.prompts.label_words import LabelWords
from megaptune.prompts.tokens import TokenForms

Tokenizers = Callable[[str], Any]


@pytest.fixture
def gpt2(tokenizers: Tokenizers) -> TokenForms:
    return TokenForms(tokenizers("gpt2"))


def test_labels_keep_their_order_and_words_their_form_after_a_space(gpt2: TokenForms):
    found = LabelWords.of(("no", "yes"), {"yes": ["Paris", "Rome"], "no": ["Oslo"]}, gpt2, "CB: verbalizer a")
    assert found.labels == ("no", "yes")
    assert [gpt2.pieces(list(tokens)) for tokens in found.tokens] == [["ĠOslo"], ["ĠParis", "ĠRome"]]


def test_every_mistake_is_told_at_once(gpt2: TokenForms):
    with pytest.raises(DataError) as caught:
        LabelWords.of(("no", "yes"), {"yes": [UNKNOWN_WORD], "perhaps": ["Oslo"]}, gpt2, "CB: verbalizer a")
    message = str(caught.value)
    assert message.startswith("CB: verbalizer a: it has no word for the label 'no'; 'perhaps' is no label")
    assert f"{UNKNOWN_WORD!r} is " in message
    assert "tokens of this backbone" in message


def test_words_that_are_one_token_for_this_tokenizer_are_told(gpt2: TokenForms):
    class Uncased:
        """A tokenizer to which capitals do not count."""

        unk_token_id = None

        def __call__(self, text: Any, add_special_tokens: bool = True) -> dict[str, Any]:
            lowered = [t.lower().replace("the", "a") for t in text] if isinstance(text, list) else text.lower()
            return gpt2.tokenizer(lowered, add_special_tokens=False)

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return gpt2.tokenizer.convert_ids_to_tokens(ids)

    with pytest.raises(DataError, match=r"'a' \(no\) and 'The' \(yes\) are the same token"):
        LabelWords.of(("no", "yes"), {"yes": ["The"], "no": ["a"]}, TokenForms(Uncased()), "v")


def test_a_word_unknown_to_the_tokenizer_is_told(tokenizers: Tokenizers):
    with pytest.raises(DataError, match="'☃' is unknown to this backbone's tokenizer"):
        LabelWords.of(("x",), {"x": ["☃"]}, TokenForms(tokenizers("bert")), "v")
