"""A task as the backbone sees it: encoded records, candidate sets, limits, losses and baselines."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tiny import COUNTRIES, UNKNOWN_WORD

from megaptune.baselines import baselines
from megaptune.config import Config, validate
from megaptune.errors import DataError
from megaptune.examples import PreparedTask, prepare_task
from megaptune.methods import METHODS
from megaptune.prompts.tokens import TokenForms
from megaptune.tasks.records import Record, Split, TaskData

Tokenizers = Callable[[str], Any]


@pytest.fixture
def gpt2(tokenizers: Tokenizers) -> TokenForms:
    return TokenForms(tokenizers("gpt2"))


def config(**sections: Any) -> Config:
    raw = {
        "backbone": {"path": "backbone"},
        "task": {"type": "custom", "train": "a.jsonl", "dev": "b.jsonl", "test": "c.jsonl", "answer": "country"},
        "prompt": {"template": "[P*2] {city} [P] [answer]", "manual": "{city} is in [answer]"},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return validate(raw, "config.yaml")


def records(*facts: tuple[str, str], split: str = "facts") -> list[Record]:
    return [Record({"city": city}, answer, f"{split}.jsonl:{n}", city) for n, (city, answer) in enumerate(facts, 1)]


def data(train: Any = None, dev: Any = None, test: Any = None, words: list[str] | None = None) -> TaskData:
    """Each split as given, or a few facts of its own."""
    splits: dict[Split, list[Record]] = {
        "train": records(("Paris", "France"), ("Lyon", "France"), ("Rome", "Italy")) if train is None else train,
        "dev": records(("Milan", "Italy")) if dev is None else dev,
        "test": records(("Oslo", "Norway"), ("Nice", "France")) if test is None else test,
    }
    return TaskData("cities", splits, None, words)


def prepare(task: TaskData, forms: TokenForms, /, max_tokens: int = 64, **sections: Any) -> PreparedTask:
    return prepare_task(task, config(**sections), forms, "causal", max_tokens)


def refusal(task: TaskData, forms: TokenForms, /, max_tokens: int = 64, **sections: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepare(task, forms, max_tokens, **sections)
    return str(caught.value)


def spelled(forms: TokenForms, ids: Any) -> set[str]:
    return set(forms.pieces(ids.tolist()))


# -- encoding --------------------------------------------------------------------------------------------------------


def test_each_method_has_its_own_encoding_of_the_records(gpt2: TokenForms):
    task = prepare(data(), gpt2)
    assert task.manual is not None
    assert task.tuned is not None
    assert gpt2.tokenizer.decode(task.manual.test[0].slots) == "Oslo is in"
    assert [slot for slot in task.tuned.test[0].slots if slot < 0] == [-1, -2, -3]
    assert gpt2.pieces([task.tuned.test[0].answer]) == ["ĠNorway"]


def test_manual_prompt_is_only_encoded_for_test(gpt2: TokenForms):
    task = prepare(data(), gpt2)
    assert task.manual is not None
    assert (len(task.manual.train), len(task.manual.dev), len(task.manual.test)) == (0, 0, 2)


def test_methods_that_tune_the_lm_read_all_splits_of_their_prompts(gpt2: TokenForms):
    """Plain fine-tuning reads the P-tuning template without its pseudo tokens."""
    task = prepare(data(), gpt2, methods=["manual+finetune", "finetune"])
    assert task.manual is not None
    assert task.bare is not None
    assert task.tuned is None
    assert (len(task.manual.train), len(task.manual.dev), len(task.manual.test)) == (3, 1, 2)
    assert gpt2.tokenizer.decode(task.bare.train[0].slots) == "Paris"
    assert task.encoded(METHODS["manual+finetune"]) is task.manual
    assert task.encoded(METHODS["finetune"]) is task.bare


@pytest.mark.parametrize(("methods", "manual", "tuned"), [(["manual"], True, False), (["ptuning"], False, True)])
def test_only_methods_asked_for_are_encoded(gpt2: TokenForms, methods: list[str], manual: bool, tuned: bool):
    task = prepare(data(), gpt2, methods=methods)
    assert (task.manual is not None, task.tuned is not None) == (manual, tuned)


def test_manual_prompt_with_pseudo_tokens_is_refused(gpt2: TokenForms):
    assert "has pseudo tokens" in refusal(data(), gpt2, prompt={"manual": "[P] {city} [answer]"})


@pytest.mark.parametrize("template", ["{city} is in [answer]", "{city} is in [answer] [P*3]"])
def test_template_with_nothing_to_train_is_refused(gpt2: TokenForms, template: str):
    assert "has no pseudo token" in refusal(data(), gpt2, prompt={"template": template})


def test_prompt_longer_than_the_context_is_told_with_both_lengths(gpt2: TokenForms):
    long = records(("Paris", "France"), (" ".join(["Paris"] * 10), "France"))
    message = refusal(data(train=long), gpt2, max_tokens=12)
    assert message.startswith("facts.jsonl:2: the prompt is 13 tokens long, the backbone's context holds 12")


def test_shortenable_field_is_cut_to_the_context(gpt2: TokenForms):
    long = records((" ".join(["Paris"] * 20), "France"))
    task = prepare(data(train=long), gpt2, max_tokens=12, prompt={"template": "[P*2] {city:shorten} [P] [answer]"})
    assert task.tuned is not None
    assert len(task.tuned.train[0].slots) == 12


def test_prompt_as_long_as_the_context_is_taken(gpt2: TokenForms):
    long = records((" ".join(["Paris"] * 10), "France"))
    task = prepare(data(train=long), gpt2, max_tokens=13)
    assert task.tuned is not None
    assert len(task.tuned.train[0].slots) == 13


def test_empty_field_that_leaves_nothing_before_the_answer_is_refused(gpt2: TokenForms):
    empty = [Record({"city": " "}, "France", "facts.jsonl:1", "")]
    assert "facts.jsonl:1" in refusal(data(test=empty), gpt2, methods=["manual"], prompt={"manual": "{city} [answer]"})


# -- prompts that others searched ------------------------------------------------------------------------------------


def searched(forms: TokenForms, kind: Any, *lpaqa: str) -> PreparedTask:
    raw = {"backbone": {"path": "b"}, "task": {"type": "lama", "root": "LAMA"}, "methods": ["manual_lpaqa"]}
    facts = [replace(record, fields={"subject": record.subject}) for record in data().splits["test"]]
    task = TaskData("P17", {"train": [], "dev": facts, "test": facts}, None, prompt_sets={"lpaqa": list(lpaqa)})
    return prepare_task(task, validate(raw, "config.yaml"), forms, kind, 64)


@pytest.mark.parametrize(
    ("kind", "tokenizer", "read"),
    [
        ("causal", "gpt2", ["Oslovik lies near", "Oslo and"]),
        ("masked", "bert", ["[CLS] Oslovik lies near [MASK]. [SEP]", "[CLS] Oslo and [MASK] are twinned towns. [SEP]"]),
    ],
)
def test_inputs_of_searched_prompts(tokenizers: Tokenizers, kind: str, tokenizer: str, read: list[str]):
    forms = TokenForms(tokenizers(tokenizer))
    templates = "{subject}vik lies near [answer].", "{subject} and [answer] are twinned towns."
    task = searched(forms, kind, *templates)
    assert [forms.tokenizer.decode(found.test[0].slots) for found in task.searched["lpaqa"]] == read
    assert [len(found.dev) for found in task.searched["lpaqa"]] == [2, 2]  # dev chooses


def test_a_causal_lm_is_left_out_where_the_answer_comes_first(gpt2: TokenForms, tokenizers: Tokenizers):
    templates = "[answer] has {subject}", "in [answer] lies {subject}"
    assert searched(gpt2, "causal", *templates).left_out == {
        "manual_lpaqa": "its prompt has the answer before the subject, which a causal LM cannot read"
    }
    assert searched(gpt2, "causal", *templates, "{subject} in [answer]").left_out == {}
    assert searched(TokenForms(tokenizers("bert")), "masked", *templates).left_out == {}


def test_a_relation_without_a_prompt_is_left_out(gpt2: TokenForms):
    task = searched(gpt2, "causal")
    assert task.left_out == {"manual_lpaqa": "no prompt for this relation"}
    assert "left out   manual_lpaqa: no prompt for this relation" in task.summary(100)


# -- answers of several tokens ---------------------------------------------------------------------------------------


def test_answer_of_several_tokens_is_an_error_that_names_it(gpt2: TokenForms):
    message = refusal(data(dev=records(("Paris", UNKNOWN_WORD), split="dev")), gpt2)
    assert f"'{UNKNOWN_WORD}' = " in message
    assert "(dev.jsonl:1)" in message


def test_error_names_the_first_place_of_a_repeated_answer(gpt2: TokenForms):
    twice = records(("Paris", UNKNOWN_WORD), ("Lyon", UNKNOWN_WORD))
    assert "(facts.jsonl:1)" in refusal(data(train=twice), gpt2)


def test_dropped_answers_are_counted(gpt2: TokenForms):
    train = records(("Paris", UNKNOWN_WORD), ("Lyon", "France"), ("Nice", UNKNOWN_WORD))
    task = prepare(data(train=train), gpt2, task={"multi_token_answers": "drop"})
    assert [record.subject for record in task.data.splits["train"]] == ["Lyon"]
    assert task.data.dropped == {"answer of several tokens": 2}
    assert "dropped: 2 answer of several tokens" in task.summary(100)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_split_left_empty_is_told_with_what_was_dropped(gpt2: TokenForms, split: str):
    task = data(**{split: records(("Paris", UNKNOWN_WORD))})
    message = refusal(task, gpt2, task={"multi_token_answers": "drop"})
    assert message == f"cities: no {split} records are left (dropped: 1 answer of several tokens)"


def test_empty_file_is_told_as_such(gpt2: TokenForms):
    assert refusal(data(dev=[]), gpt2) == "cities: no dev records are left (dropped: its file is empty)"


def test_manual_method_alone_needs_test_records_only(gpt2: TokenForms):
    assert prepare(data(train=[], dev=[]), gpt2, methods=["manual"]).manual is not None


# -- limits ----------------------------------------------------------------------------------------------------------


def test_limits_choose_records_by_their_seed(gpt2: TokenForms):
    many = records(*[(f"Paris {n}", "France") for n in range(30)])
    limited = {"limit_train": 5, "limit_test": 3, "limit_seed": 1}
    once, again = (prepare(data(train=many, test=many), gpt2, task=limited) for _ in range(2))
    assert once.data.splits == again.data.splits
    assert {split: len(members) for split, members in once.data.splits.items()} == {"train": 5, "dev": 1, "test": 3}
    other = prepare(data(train=many, test=many), gpt2, task={**limited, "limit_seed": 2})
    assert other.data.splits["train"] != once.data.splits["train"]


def test_limits_leave_the_candidates_as_they_are(gpt2: TokenForms):
    many = records(*[("Paris", country) for country in COUNTRIES])
    task = prepare(data(train=many), gpt2, task={"limit_train": 1, "limit_test": 1})
    assert spelled(gpt2, task.candidates["answers"]) == {f"Ġ{country}" for country in COUNTRIES}


# -- candidates ------------------------------------------------------------------------------------------------------


def test_answers_of_all_splits_compete_each_once(gpt2: TokenForms):
    task = prepare(data(), gpt2)
    assert spelled(gpt2, task.candidates["answers"]) == {"ĠFrance", "ĠItaly", "ĠNorway"}
    assert task.num_candidates("answers", 999) == 3


def test_vocabulary_is_every_token(gpt2: TokenForms):
    task = prepare(data(), gpt2)
    assert task.candidates["vocabulary"] is None
    assert task.num_candidates("vocabulary", 999) == 999


def test_word_list_competes_with_its_words_of_one_token_and_the_answers(gpt2: TokenForms):
    task = prepare(data(words=["Peru", "Egypt", UNKNOWN_WORD]), gpt2)
    assert spelled(gpt2, task.candidates["word_list"]) == {"ĠPeru", "ĠEgypt", "ĠFrance", "ĠItaly", "ĠNorway"}


def test_without_a_word_list_there_is_no_such_reading(gpt2: TokenForms):
    assert "word_list" not in prepare(data(), gpt2).candidates


# -- baselines -------------------------------------------------------------------------------------------------------


def test_baselines_by_hand():
    train = records(("Paris", "France"), ("Lyon", "France"), ("Rome", "Italy"))
    test = records(("Nice", "France"), ("Paris", "France"), ("Oslo", "Norway"), ("Bank of norway", "Norway"))
    found = baselines(data(train=train, test=test))
    assert found.majority == 0.5  # France, twice of four
    assert found.unseen == 0.5  # Norway is no training answer
    assert found.in_subject == 0.25  # "norway", whatever its case
    assert found.shared_facts == 0.25  # Paris, France


def test_majority_without_training_records_is_the_test_splits():
    test = records(("Oslo", "Norway"), ("Bergen", "Norway"), ("Paris", "France"))
    assert baselines(data(train=[], test=test)).majority == pytest.approx(2 / 3)
