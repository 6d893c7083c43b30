"""Fields written otherwise, separators, inputs cut to a length, and answers of several tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megaptune.errors import BackboneError, DataError
from megaptune.prompts.template import Template
from megaptune.prompts.tokens import TokenForms
from megaptune.tasks.records import Record

CITIES = "Paris Rome Berlin Madrid Oslo Cairo Lima Lyon Milan Munich"
RECORD = Record(
    {"passage": CITIES, "other": "Porto Bergen Luxor Cusco", "question": "The river is old.", "gap": " in "},
    "France",
    "f.jsonl:3",
)
Tokenizers = Callable[[str], Any]


@pytest.fixture
def gpt2(tokenizers: Tokenizers) -> TokenForms:
    return TokenForms(tokenizers("gpt2"))


@pytest.fixture
def bert(tokenizers: Tokenizers) -> TokenForms:
    return TokenForms(tokenizers("bert"))


def spelled(forms: TokenForms, slots: list[int]) -> str:
    return " ".join(forms.pieces([slot])[0] if slot >= 0 else f"P{-slot}" for slot in slots)


# -- fields and separators -------------------------------------------------------------------------------------------


def test_a_field_says_how_it_is_written(bert: TokenForms):
    template = Template("in {question:lower,unended} , [answer]", "masked")
    assert spelled(bert, template.encode(RECORD, bert).slots) == "[CLS] in the river is old , [MASK] [SEP]"
    assert template.fields == ["question"]


def test_an_exact_field_keeps_its_white_space_and_may_be_empty(tokenizers: Tokenizers):
    roberta = TokenForms(tokenizers("roberta"))
    record = Record({"before": "", "after": " is old"}, "", "f:1")
    slots = Template("Paris {before:exact}[answer]{after:exact}", "masked").encode(record, roberta).slots
    assert spelled(roberta, slots) == "<s> Paris <mask> Ġis Ġold </s>"


@pytest.mark.parametrize(("inside", "said"), [("passage:short", "short"), ("passage:", ""), ("passage:lower,", "")])
def test_an_unknown_way_of_writing_is_told(inside: str, said: str):
    with pytest.raises(DataError) as caught:
        Template(f"{{{inside}}} [answer]", "causal")
    assert f"{{{inside}}} says '{said}'; expected unended, lower, shorten, exact" in str(caught.value)


def test_the_separator_is_the_tokenizers_own(bert: TokenForms, gpt2: TokenForms):
    template = Template("{question} [sep] {other} [answer]", "masked")
    assert spelled(bert, template.encode(RECORD, bert).slots) == (
        "[CLS] The river is old . [SEP] Porto Bergen Luxor Cusco [MASK] [SEP]"
    )
    with pytest.raises(BackboneError, match="no separator token"):
        Template("{question} [sep] {other} [answer]", "causal").encode(RECORD, gpt2)


def test_a_mistyped_separator_is_named():
    with pytest.raises(DataError, match=r"'\[SEP\]' is no tag"):
        Template("{x} [SEP] [answer]", "masked")


# -- length ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", range(10, 16))
def test_an_input_is_exactly_as_long_as_allowed_and_loses_only_the_end_of_its_passage(gpt2: TokenForms, limit: int):
    template = Template("{passage:shorten} [P*2] {question} [answer]", "causal")
    slots = template.encode(RECORD, gpt2, max_tokens=limit).slots
    assert len(slots) == limit
    kept = " Ġ".join(CITIES.split()[: limit - 7])
    assert spelled(gpt2, slots) == f"{kept} P1 P2 ĠThe Ġriver Ġis Ġold ."


def test_special_tokens_masks_and_pseudo_tokens_count(bert: TokenForms):
    template = Template("{passage:shorten} [P*2] {question} [answer] .", "masked")
    prompt = template.encode(RECORD, bert, max_tokens=13)
    assert spelled(bert, prompt.slots) == "[CLS] Paris Rome P1 P2 The river is old . [MASK] . [SEP]"
    assert prompt.answer_position == 10


def test_nothing_is_cut_where_it_fits(gpt2: TokenForms):
    template = Template("{passage:shorten} [answer]", "causal")
    assert template.encode(RECORD, gpt2, max_tokens=10) == template.encode(RECORD, gpt2)


def test_of_two_texts_the_longer_is_cut_first(gpt2: TokenForms):
    template = Template("{passage:shorten} in {other:shorten} [answer]", "causal")
    assert spelled(gpt2, template.encode(RECORD, gpt2, max_tokens=9).slots) == (
        "Paris ĠRome ĠBerlin ĠMadrid Ġin ĠPorto ĠBergen ĠLuxor ĠCusco"
    )
    assert spelled(gpt2, template.encode(RECORD, gpt2, max_tokens=5).slots) == "Paris ĠRome Ġin ĠPorto ĠBergen"


def test_words_of_several_tokens_are_cut_whole(gpt2: TokenForms):
    record = Record({"passage": "Paris Quetzaltenango Rome"}, "", "f:1")
    template = Template("{passage:shorten} is [answer]", "causal")
    whole = len(template.encode(record, gpt2).slots)
    assert spelled(gpt2, template.encode(record, gpt2, max_tokens=whole - 2).slots) == "Paris Ġis"


def test_a_text_without_white_space_is_cut_by_letters(gpt2: TokenForms):
    record = Record({"passage": "zqzqzqzq"}, "", "f:1")
    slots = Template("{passage:shorten} [answer]", "causal").encode(record, gpt2, max_tokens=3).slots
    assert len(slots) == 3


def test_what_cannot_be_cut_is_told(gpt2: TokenForms):
    with pytest.raises(DataError) as caught:
        Template("{passage:shorten} in {question} [answer]", "causal").encode(RECORD, gpt2, max_tokens=6)
    assert "f.jsonl:3: template" in str(caught.value)
    assert "7 tokens long with passage cut to a word; it may have 6" in str(caught.value)
    with pytest.raises(DataError, match=r"10 tokens long and has no :shorten field; it may have 9"):
        Template("{passage} [answer]", "causal").encode(RECORD, gpt2, max_tokens=9)


# -- choices ---------------------------------------------------------------------------------------------------------


def test_a_causal_choice_is_read_token_by_token_after_the_prompt(gpt2: TokenForms):
    template = Template("[P] {question} [answer] .", "causal")
    short, long = template.encode_choices(RECORD, ["Paris", "the old city"], gpt2)
    assert spelled(gpt2, short.slots) == "P1 ĠThe Ġriver Ġis Ġold ."
    assert (short.positions, spelled(gpt2, short.targets)) == ([5], "ĠParis")
    assert spelled(gpt2, long.slots) == "P1 ĠThe Ġriver Ġis Ġold . Ġthe Ġold"
    assert (long.positions, spelled(gpt2, long.targets)) == ([5, 6, 7], "Ġthe Ġold Ġcity")


def test_masked_choices_share_an_input_that_does_not_give_their_length_away(bert: TokenForms):
    template = Template("{question} [answer] .", "masked")
    short, long = template.encode_choices(RECORD, ["Paris", "the old city"], bert, extra_masks=1)
    assert short.slots is long.slots
    assert spelled(bert, long.slots) == "[CLS] The river is old . [MASK] [MASK] [MASK] [MASK] . [SEP]"
    assert (short.positions, long.positions) == ([6], [6, 7, 8])


@pytest.mark.parametrize(("kind", "limit", "kept"), [("causal", 9, "Paris ĠRome"), ("masked", 12, "Paris Rome")])
def test_all_choices_see_the_same_text_and_the_longest_fits(tokenizers: Tokenizers, kind: Any, limit: int, kept: str):
    forms = TokenForms(tokenizers({"causal": "gpt2", "masked": "bert"}[kind]))
    template = Template("{passage:shorten} [P] {question} [answer]", kind)
    choices = template.encode_choices(RECORD, ["Paris", "old city"], forms, max_tokens=limit)
    assert max(len(choice.slots) for choice in choices) == limit
    assert all(kept + " P1" in spelled(forms, choice.slots) for choice in choices)


def test_choices_as_inputs_that_are_read_once(gpt2: TokenForms, bert: TokenForms):
    (causal,) = Template("{question} [answer]", "causal").encode_choices(RECORD, ["old city"], gpt2)
    assert [
        (spelled(gpt2, slots), place, spelled(gpt2, [target])) for slots, place, target in causal.steps("causal")
    ] == [
        ("The Ġriver Ġis Ġold .", 4, "Ġold"),
        ("The Ġriver Ġis Ġold . Ġold", 5, "Ġcity"),
    ]
    (masked,) = Template("{question} [answer]", "masked").encode_choices(RECORD, ["old city"], bert)
    assert [(len(slots), place) for slots, place, _ in masked.steps("masked")] == [(9, 6), (9, 7)]


def test_an_answer_longer_than_the_context_is_told(gpt2: TokenForms):
    template = Template("{passage:shorten} [answer]", "causal")
    with pytest.raises(
        DataError, match=r"f.jsonl:3: the answer 'the the the the the' is 5 tokens long, an input may have 4"
    ):
        template.encode_choices(RECORD, ["Paris", "the " * 4 + "the"], gpt2, max_tokens=4)


def test_an_answer_without_tokens_is_told(gpt2: TokenForms):
    with pytest.raises(DataError, match="the answer '' has no tokens"):
        Template("{question} [answer]", "causal").encode_choices(RECORD, [""], gpt2)


def test_the_sum_over_positions_is_the_choices_log_probability(tiny: Callable[[str], Path], gpt2: TokenForms):
    """Against the chain rule written out: one pass a token, each with all tokens before it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("gpt2")).eval()

    def log_probabilities(slots: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([slots])).logits[0].log_softmax(-1)

    template = Template("{question} [answer]", "causal")
    for choice in template.encode_choices(RECORD, ["Paris", "the old Quetzaltenango"], gpt2):
        scored = log_probabilities(choice.slots)[choice.positions, choice.targets].sum()
        prompt = template.encode(RECORD, gpt2).slots
        chained = torch.zeros(())
        for token in choice.targets:
            chained = chained + log_probabilities(prompt)[-1, token]
            prompt = [*prompt, token]
        torch.testing.assert_close(scored, chained, rtol=0, atol=1e-4)
