"""Templates: what may be written, and which slots a record becomes.

The tiny tokenizers know every word used here as one token; ``ids`` looks a token up by its spelling.
"""

from collections.abc import Callable
from typing import Any

import pytest

from megaptune.errors import DataError
from megaptune.prompts.template import EncodedPrompt, Template, without_pseudo_tokens
from megaptune.prompts.tokens import TokenForms
from megaptune.tasks.records import Record

RECORD = Record({"city": "Paris", "river": "north river"}, "France", "facts.jsonl:3", "Paris")

Tokenizers = Callable[[str], Any]
Ids = Callable[..., list[int]]


@pytest.fixture
def gpt2(tokenizers: Tokenizers) -> TokenForms:
    return TokenForms(tokenizers("gpt2"))


@pytest.fixture
def bert(tokenizers: Tokenizers) -> TokenForms:
    return TokenForms(tokenizers("bert"))


def ids(forms: TokenForms, spelling: str) -> list[int]:
    """Ids of tokens spelled as in the vocabulary, apart by spaces; a number is a slot as it is."""
    found = []
    for token in spelling.split():
        is_slot = token.lstrip("-").isdigit()
        found.append(int(token) if is_slot else forms.tokenizer.convert_tokens_to_ids(token))
    assert None not in found
    return found


# -- what may be written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [("[P] {x} [answer]", 1), ("[P*3] {x} [P*2] [answer] [P*4]", 9), ("{x} [answer]", 0), ("[P][P*12][answer]", 13)],
)
def test_pseudo_tokens_are_counted(text: str, count: int):
    assert Template(text, "masked").num_pseudo_tokens == count


def test_pseudo_tokens_after_the_answer_do_not_count_for_a_causal_model():
    assert Template("[P*3] {x} [P*2] [answer] [P*4]", "causal").num_pseudo_tokens == 5


def test_fields_are_listed_in_order():
    assert Template("{city} on the { river } in [answer], {city}", "masked").fields == ["city", "river", "city"]


def test_fields_after_the_answer_are_not_needed_by_a_causal_model():
    assert Template("{city} in [answer], {river}", "causal").fields == ["city"]


@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize(("text", "found"), [("{x} is in", "has none"), ("[answer] {x} [answer]", "has 2")])
def test_exactly_one_answer_is_expected(text: str, found: str, kind: Any):
    with pytest.raises(DataError, match=rf"expected one \[answer\], it {found}"):
        Template(text, kind)


@pytest.mark.parametrize("mistyped", ["[X]", "[Y]", "[MASK]", "[Answer]", "[p*3]", "[P * 3]", "[P*-1]", "[P3]"])
def test_mistyped_tag_is_named(mistyped: str):
    with pytest.raises(DataError) as caught:
        Template(f"{{x}} {mistyped} [answer]", "causal")
    assert f"'{mistyped}' is no tag" in str(caught.value)


def test_zero_pseudo_tokens_are_refused():
    with pytest.raises(DataError, match=r"\[P\*0\] is no pseudo token"):
        Template("[P*0] {x} [answer]", "causal")


@pytest.mark.parametrize("text", ["{x [answer]", "x} [answer]", "{{x}} [answer]"])
def test_unmatched_brace_is_refused(text: str):
    with pytest.raises(DataError, match="an unmatched brace"):
        Template(text, "causal")


@pytest.mark.parametrize("text", ["{} [answer]", "{ } [answer]"])
def test_field_without_a_name_is_refused(text: str):
    with pytest.raises(DataError, match="a field needs a name"):
        Template(text, "causal")


def test_causal_model_needs_something_before_the_answer():
    with pytest.raises(DataError, match=r"needs something before \[answer\]"):
        Template("  [answer] is where {x} is", "causal")


def test_masked_model_may_begin_with_the_answer():
    assert Template("[answer] is where {x} is", "masked").fields == ["x"]


# -- causal ----------------------------------------------------------------------------------------------------------


def test_causal_prompt_ends_before_the_answer(gpt2: TokenForms):
    prompt = Template("{city} is in [answer] .", "causal").encode(RECORD, gpt2)
    assert prompt == EncodedPrompt(ids(gpt2, "Paris Ġis Ġin"), answer_position=2)


def test_words_take_their_form_after_a_space_only_when_one_stands_before_them(gpt2: TokenForms):
    assert Template("{city} [answer]", "causal").encode(RECORD, gpt2).slots == ids(gpt2, "Paris")
    assert Template("[P] {city} [answer]", "causal").encode(RECORD, gpt2).slots == ids(gpt2, "-1 ĠParis")
    assert Template("[P]{city} [answer]", "causal").encode(RECORD, gpt2).slots == ids(gpt2, "-1 Paris")


def test_space_at_the_very_start_of_a_template_makes_no_word_follow_one(gpt2: TokenForms):
    assert Template("  {city} [answer]", "causal").encode(RECORD, gpt2).slots == ids(gpt2, "Paris")


def test_words_and_fields_are_tokenized_as_one_text(gpt2: TokenForms):
    slots = Template("[P] the{city} [answer]", "causal").encode(RECORD, gpt2).slots
    assert slots == [-1, *gpt2.after_space("theParis")]


def test_special_token_that_the_tokenizer_puts_first_stands_first(tokenizers: Tokenizers):
    llama = TokenForms(tokenizers("llama"))
    prompt = Template("[P] {city} is [P] [answer]", "causal").encode(RECORD, llama)
    assert prompt == EncodedPrompt(ids(llama, "<s> -1 ĠParis Ġis -2"), answer_position=4)


def test_causal_answer_is_read_at_the_last_slot(gpt2: TokenForms):
    prompt = Template("[P*2] {city} [P*3] [answer] [P*2]", "causal").encode(RECORD, gpt2)
    assert prompt == EncodedPrompt(ids(gpt2, "-1 -2 ĠParis -3 -4 -5"), answer_position=5)


# -- masked ----------------------------------------------------------------------------------------------------------


def test_masked_prompt_has_the_mask_at_the_answer_and_reads_on(bert: TokenForms):
    prompt = Template("{city} is in [answer] .", "masked").encode(RECORD, bert)
    assert prompt == EncodedPrompt(ids(bert, "[CLS] Paris is in [MASK] . [SEP]"), answer_position=4)


def test_masked_pseudo_tokens_are_numbered_from_left_to_right_across_the_answer(bert: TokenForms):
    prompt = Template("[P*3] {city} [P*2] [answer] [P]", "masked").encode(RECORD, bert)
    assert prompt == EncodedPrompt(ids(bert, "[CLS] -1 -2 -3 Paris -4 -5 [MASK] -6 [SEP]"), answer_position=7)


def test_text_glued_to_the_answer_keeps_its_form(tokenizers: Tokenizers):
    roberta = TokenForms(tokenizers("roberta"))
    assert Template("{city} in [answer].", "masked").encode(RECORD, roberta).slots == ids(
        roberta, "<s> Paris Ġin <mask> . </s>"
    )
    assert Template("{city} in [answer] .", "masked").encode(RECORD, roberta).slots == ids(
        roberta, "<s> Paris Ġin <mask> Ġ. </s>"
    )


# -- rows and records ------------------------------------------------------------------------------------------------


def test_rows_are_numbered_from_the_first_row_given(gpt2: TokenForms):
    slots = Template("[P*2] {city} [P] [answer]", "causal").encode(RECORD, gpt2, first_row=10).slots
    assert slots == ids(gpt2, "-11 -12 ĠParis -13")


def test_field_of_several_words_is_filled_in_whole(gpt2: TokenForms):
    slots = Template("{city} near {river} [answer]", "causal").encode(RECORD, gpt2).slots
    assert slots == ids(gpt2, "Paris Ġnear Ġnorth Ġriver")


def test_field_that_the_record_lacks_is_told_with_what_it_has(gpt2: TokenForms):
    with pytest.raises(DataError) as caught:
        Template("{town} [answer]", "causal").encode(RECORD, gpt2)
    assert "facts.jsonl:3: the template names the field {town}, which the record lacks (it has: city, river)" in str(
        caught.value
    )


def test_braces_and_tags_inside_a_field_are_plain_text(gpt2: TokenForms):
    record = Record({"city": "[P] {x} [answer]"}, "France", "facts.jsonl:1")
    slots = Template("{city} [answer]", "causal").encode(record, gpt2).slots
    assert gpt2.tokenizer.decode(slots) == "[P] {x} [answer]"
    assert min(slots) >= 0


def test_every_occurrence_of_a_field_is_filled(bert: TokenForms):
    slots = Template("{city} , {city} [answer]", "masked").encode(RECORD, bert).slots
    assert slots == ids(bert, "[CLS] Paris , Paris [MASK] [SEP]")


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("[P*3] {city} [P*3] [answer]", "{city} [answer]"),
        ("[P]{city}[P] lies in[P*12] [answer] .", "{city} lies in [answer] ."),
        ("{city} is in [answer]", "{city} is in [answer]"),
    ],
)
def test_template_without_its_pseudo_tokens(text: str, bare: str):
    assert without_pseudo_tokens(text) == bare
