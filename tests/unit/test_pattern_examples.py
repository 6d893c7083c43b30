"""Examples under a pattern: label words or choices, what training can use, and what an answer predicts."""

from dataclasses import replace
from typing import Any

import golden
import pytest

from megaptune.errors import DataError
from megaptune.pattern_examples import ChoiceExample, LabelExample, PatternEncoder
from megaptune.patterns import Pattern, TaskName, TaskPatterns, load_patterns
from megaptune.prompts.tokens import TokenForms
from megaptune.tasks.superglue.records import SplitData

BOOK = load_patterns(golden.ROOT / "configs" / "patterns" / "all.yaml")


@pytest.fixture(scope="module")
def forms() -> TokenForms:
    return golden.golden_forms(BOOK, "causal")


def encoder(forms: TokenForms, task: TaskName, name: str, **changes: Any) -> PatternEncoder:
    patterns = BOOK[task].model_copy(update=changes)
    return PatternEncoder(task, patterns.manual[name], patterns, forms, "causal", 512)


def test_a_label_is_an_index_in_the_label_words(forms: TokenForms):
    wic = encoder(forms, "WiC", "same_meaning")
    example = wic.encode(golden.record_of("WiC"))
    assert isinstance(example, LabelExample)
    assert wic.label_words is not None
    assert (wic.label_words.labels[0], example.label) == ("false", 0)
    assert [forms.pieces(list(tokens)) for tokens in wic.label_words.tokens] == [["ĠNo"], ["ĠYes"]]
    assert [wic.prediction(example.record, best) for best in (0, 1)] == ["false", "true"]
    unlabelled = wic.encode(replace(golden.record_of("WiC"), label=None))
    assert isinstance(unlabelled, LabelExample)
    assert unlabelled.label is None


def test_choices_know_the_right_ones_and_what_they_predict(forms: TokenForms):
    wsc = encoder(forms, "WSC", "refers_to")
    record = golden.record_of("WSC")
    example = wsc.encode(record)
    assert isinstance(example, ChoiceExample)
    assert (len(example.choices), example.right) == (4, (0,))
    assert [wsc.prediction(record, best) for best in (0, 2)] == ["true", "false"]
    assert encoder(forms, "ReCoRD", "stands_for").prediction(golden.record_of("ReCoRD"), 2) == "Lisa Holm"
    assert encoder(forms, "COPA", "plain").prediction(golden.record_of("COPA"), 1) == "1"


def test_training_on_choices_leaves_out_what_has_no_right_one(forms: TokenForms):
    record = golden.record_of("WSC")
    data = SplitData("WSC", "train", [record, replace(record, idx=(11,), label="false")])
    assert encoder(forms, "WSC", "refers_to").training_records(data) == ([record], 1)
    assert encoder(forms, "WSC", "yes_no").training_records(data) == (data.records, 0)


def test_training_on_one_label_is_refused_for_a_verbalizer_only(forms: TokenForms):
    record = golden.record_of("WSC")
    data = SplitData("WSC", "train", [record, replace(record, idx=(11,))])
    assert encoder(forms, "WSC", "refers_to").training_records(data) == (data.records, 0)
    with pytest.raises(DataError, match="all 2 examples are labelled 'true'"):
        encoder(forms, "WSC", "yes_no").training_records(data)


def test_an_input_is_as_long_as_the_task_and_the_backbone_allow(forms: TokenForms):
    record = golden.record_of("BoolQ")
    whole = encoder(forms, "BoolQ", "question_answer").encode(record)
    assert isinstance(whole, LabelExample)
    patterns = BOOK["BoolQ"]
    for task_length, context in ((30, 512), (512, 30)):
        limited = patterns.model_copy(update={"max_tokens": task_length})
        short = PatternEncoder("BoolQ", limited.manual["question_answer"], limited, forms, "causal", context)
        example = short.encode(record)
        assert isinstance(example, LabelExample)
        assert len(example.slots) == 30 < len(whole.slots)
        assert example.slots[-9:] == whole.slots[-9:]  # the question and the anchor


def test_a_pattern_of_another_family_or_without_choices_is_told(forms: TokenForms):
    patterns = BOOK["WiC"]
    with pytest.raises(DataError, match="is not meant for causal backbones"):
        PatternEncoder("WiC", patterns.manual["dictionary"], patterns, forms, "causal", 512)
    bare = TaskPatterns(manual={"bare": Pattern(text="{word} [answer]")})
    with pytest.raises(DataError, match="the example has no choices; its pattern needs a verbalizer"):
        PatternEncoder("WiC", bare.manual["bare"], bare, forms, "causal", 512).encode(golden.record_of("WiC"))


def test_pseudo_tokens_start_at_the_row_given(forms: TokenForms):
    patterns = BOOK["COPA"]
    plain = PatternEncoder("COPA", patterns.ptuning["plain_wide"], patterns, forms, "causal", 512)
    example = plain.encode(golden.record_of("COPA"), first_row=4)
    assert isinstance(example, ChoiceExample)
    for choice in example.choices:
        assert [-1 - slot for slot in choice.slots if slot < 0] == [4, 5, 6, 7, 8, 9]
