"""SuperGLUE's official files, in small: what each task's line becomes, what is skipped, and how mistakes are told."""

import copy
import json
from pathlib import Path
from typing import Any

import golden
import pytest

from megaptune.errors import DataError
from megaptune.patterns import TaskName
from megaptune.tasks.superglue.antecedents import other_antecedents
from megaptune.tasks.superglue.loading import FileName, load_split
from megaptune.tasks.superglue.records import SplitData
from megaptune.tasks.superglue.spans import word_span


def load(root: Path, task: TaskName, lines: list[Any], split: FileName = "val") -> SplitData:
    folder = root / task
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return load_split(root, task, split)


def line_of(task: TaskName, **changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(golden.LINES[task]), **changes}


# -- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "spellings", "expected"),
    [
        ("BoolQ", [True, False, "true", "False"], ["true", "false", "true", "false"]),
        ("CB", ["contradiction", "entailment", "neutral"], ["contradiction", "entailment", "neutral"]),
        ("COPA", [0, 1, "1"], ["0", "1", "1"]),
        ("RTE", ["entailment", "not_entailment"], ["entailment", "not_entailment"]),
        ("WiC", [True, False], ["true", "false"]),
        ("WSC", [True, "False"], ["true", "false"]),
    ],
)
def test_labels_are_booleans_texts_or_numbers(
    tmp_path: Path, task: TaskName, spellings: list[Any], expected: list[str]
):
    data = load(tmp_path, task, [line_of(task, label=label, idx=n) for n, label in enumerate(spellings)])
    assert [record.label for record in data.records] == expected
    assert data.gold == {(n,): (label,) for n, label in enumerate(expected)}


@pytest.mark.parametrize(
    ("task", "label"), [("BoolQ", 1), ("CB", "Neutral"), ("COPA", 2), ("COPA", True), ("RTE", 0), ("WiC", None)]
)
def test_a_label_of_another_kind_is_told_with_its_line(tmp_path: Path, task: TaskName, label: Any):
    with pytest.raises(DataError) as caught:
        load(tmp_path, task, [line_of(task), line_of(task, idx=99, label=label)])
    assert f"{task}/val.jsonl:2: {label!r} is no label of {task}; expected one of " in str(caught.value)


@pytest.mark.parametrize("split", ["test", "unlabeled"])
def test_labels_of_test_and_unlabelled_files_are_not_read(tmp_path: Path, split: FileName):
    for task in golden.TASKS:
        data = load(tmp_path, task, [golden.LINES[task]], split)
        assert [(record.label, record.answers) for record in data.records] == [(None, ())]
        assert data.gold == {}


def test_a_labelled_file_needs_its_labels(tmp_path: Path):
    line = line_of("CB")
    del line["label"]
    with pytest.raises(
        DataError, match=r"val.jsonl:1: the record has no field 'label' \(it has: premise, hypothesis, idx\)"
    ):
        load(tmp_path, "CB", [line])
    assert load(tmp_path, "CB", [line], "test").records[0].label is None


# -- tasks -----------------------------------------------------------------------------------------------------------


def test_copa_goes_on_after_its_connective(tmp_path: Path):
    effect = line_of("COPA", question="effect", choice1="I laughed!", choice2="Tom's rope tore.", idx=1, label=1)
    cause, effect_record = load(tmp_path, "COPA", [golden.LINES["COPA"], effect]).records
    assert (cause.fields["connective"], cause.choices, cause.right) == (
        "because",
        ("the rope was old", "I laughed"),
        (0,),
    )
    assert (effect_record.fields["connective"], effect_record.right) == ("so", (1,))
    assert effect_record.choices == ("I laughed", "tom's rope tore")
    mirrored = effect_record.mirrored()
    assert (mirrored.choices, mirrored.label, mirrored.right) == (("tom's rope tore", "I laughed"), "0", (0,))
    assert mirrored.fields["choice1"] == "Tom's rope tore."


def test_copa_asks_for_a_cause_or_an_effect(tmp_path: Path):
    with pytest.raises(DataError, match="the question is 'reason'; expected cause or effect"):
        load(tmp_path, "COPA", [line_of("COPA", question="reason")])


def test_multirc_has_one_record_an_answer_and_skips_empty_ones(tmp_path: Path):
    who = [{"text": "Mia", "idx": 10, "label": 0}, {"text": "Tom", "idx": 11, "label": 1}]
    what = [{"text": " ", "idx": 12, "label": 0}, {"text": "a raft", "idx": 13, "label": 1}]
    questions = [{"question": "Who?", "idx": 4, "answers": who}, {"question": "What?", "idx": 5, "answers": what}]
    passage = {"text": "Tom built a raft.", "questions": questions}
    data = load(tmp_path, "MultiRC", [line_of("MultiRC", passage=passage)])
    assert [record.idx for record in data.records] == [(7, 4, 10), (7, 4, 11), (7, 5, 13)]
    assert data.records[2].fields == {"passage": "Tom built a raft.", "question": "What?", "answer": "a raft"}
    assert data.gold == {(7, 4, 10): ("0",), (7, 4, 11): ("1",), (7, 5, 13): ("1",), (7, 5, 12): ("0",)}
    assert "skipped: 1 empty answer (first: " in data.summary()
    assert data.complete({(7, 4, 10): "1"}) == {(7, 4, 10): "1", (7, 5, 12): "0"}


def test_a_mistake_deep_inside_names_its_place(tmp_path: Path):
    line = line_of("MultiRC")
    del line["passage"]["questions"][0]["answers"][0]["idx"]
    with pytest.raises(DataError, match=r"val.jsonl:1: passage.questions\[0\].answers\[0\] has no field 'idx'"):
        load(tmp_path, "MultiRC", [line])
    line["passage"]["questions"] = {}
    with pytest.raises(DataError, match=r"expected a list in the field 'passage.questions', found an object"):
        load(tmp_path, "MultiRC", [line])


def test_wic_gives_the_word_as_each_sentence_has_it(tmp_path: Path):
    (record,) = load(tmp_path, "WiC", [golden.LINES["WiC"]]).records
    assert (record.fields["form1"], record.fields["form2"]) == ("sank", "sinks")
    assert record.fields["marked2"] == "Her heart *sinks*."


@pytest.mark.parametrize("offsets", [{"start1": -1}, {"end1": 99}, {"start2": 15}, {"start1": 8, "end1": 9}])
def test_a_wic_span_outside_its_sentence_is_skipped_and_counted(tmp_path: Path, offsets: dict[str, int]):
    data = load(tmp_path, "WiC", [golden.LINES["WiC"], line_of("WiC", idx=50, label=True, **offsets)])
    assert [(skip.idx, skip.reason, skip.gold) for skip in data.skipped] == [
        ((50,), "span outside the text", ("true",))
    ]
    assert data.gold == {(9,): ("false",), (50,): ("true",)}


def test_wsc_marks_the_pronoun_and_compares_the_span_with_other_phrases(tmp_path: Path):
    (record,) = load(tmp_path, "WSC", [golden.LINES["WSC"]]).records
    assert record.fields["marked"] == "Tom held the rope while Mia built the raft, and *he* laughed."
    assert record.choices == ("Tom", "the rope", "Mia", "the raft")
    assert [record.prediction(n) for n in range(3)] == ["true", "false", "false"]


def wsc(text: str, span1: tuple[str, int], span2: tuple[str, int], **changes: Any) -> dict[str, Any]:
    names = ("span1_text", "span1_index", "span2_text", "span2_index")
    return line_of("WSC", text=text, target=dict(zip(names, (*span1, *span2), strict=True)), **changes)


def test_a_wsc_span_one_word_later_is_taken_there_and_counted(tmp_path: Path):
    data = load(tmp_path, "WSC", [wsc("Mia might use it , but Tom won't.", ("Mia", 0), ("it", 2))])
    assert data.records[0].fields["marked"] == "Mia might use *it* , but Tom won't."
    assert data.summary().endswith("; 1 span one word later than its index says")


@pytest.mark.parametrize(
    ("span1", "span2"),
    [(("Mia and Tom", 0), ("it", 3)), (("Mia", 40), ("it", 3)), (("Mia", 0), ("it", 1)), (("Mia", -1), ("it", 3))],
)
def test_a_wsc_span_outside_the_text_is_skipped_with_the_fallback_predicted(tmp_path: Path, span1: Any, span2: Any):
    text = "Mia might use it , but Tom won't."
    data = load(tmp_path, "WSC", [golden.LINES["WSC"], wsc(text, span1, span2, idx=80)], "test")
    assert [(skip.idx, skip.reason, skip.gold) for skip in data.skipped] == [((80,), "span outside the text", ())]
    assert f"skipped: 1 span outside the text (first: {tmp_path}/WSC/test.jsonl:2)" in data.summary()
    assert data.complete({(10,): "true"}) == {(10,): "true", (80,): "false"}


@pytest.mark.parametrize(
    ("text", "span", "index", "found"),
    [
        ("Emma's mother left.", "Emma", 0, "Emma"),
        ('He said "Mr. Bond, come".', "Mr. Bond", 2, "Mr. Bond"),
        ("The  pony\tthrew him.", "him", 3, "him"),
        ("The pony threw him.", "The Pony", 0, "The pony"),
        ("The pony threw him.", "pony", 0, None),
    ],
)
def test_spans_are_compared_without_case_and_outer_signs(text: str, span: str, index: int, found: str | None):
    place = word_span(text, span, index)
    assert (text[slice(*place)] if place else None) == found


def test_other_antecedents_are_names_and_determined_phrases():
    text = "The city council refused Mrs. Hill a permit because they feared Anna's dogs. I saw his red car slowly turn."
    start = text.index("they")
    assert other_antecedents(text, "The city council", (start, start + 4)) == (
        "Mrs. Hill",
        "a permit",
        "Anna",
        "his red car",
    )


def test_record_has_one_record_a_query_and_its_entities_as_choices(tmp_path: Path):
    (record,) = load(tmp_path, "ReCoRD", [golden.LINES["ReCoRD"]]).records
    assert record.idx == (110,)
    assert (record.choices, record.answers, record.right) == (("Anna Berg", "Oslo", "Lisa Holm"), ("Lisa Holm",), (2,))
    assert (record.fields["before"], record.fields["after"]) == ("On Sunday ", " was second.")
    assert record.fields["passage"].endswith("on Sunday.\n- Berg beat Lisa Holm\n- It was her third win")
    assert record.prediction(1) == "Oslo"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": "Who was second?"}, "query without @placeholder"),
        ({"answers": [{"start": 0, "end": 2, "text": "Ann"}]}, "answer that is no entity of the passage"),
        ({"answers": [{"start": 0, "end": 2000, "text": "Oslo"}]}, "span outside the text"),
    ],
)
def test_record_queries_that_cannot_be_asked_are_skipped(tmp_path: Path, change: dict[str, Any], reason: str):
    line = line_of("ReCoRD", idx=12)
    line["qas"].append({**copy.deepcopy(line["qas"][0]), "idx": 111, **change})
    assert [skip.reason for skip in load(tmp_path, "ReCoRD", [line]).skipped] == [reason]


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_training_file_with_one_label_is_told(tmp_path: Path):
    data = load(tmp_path, "WSC", [line_of("WSC", idx=n) for n in range(3)], "train")
    with pytest.raises(DataError, match=r"all 3 examples are labelled 'true', .* a pattern without a verbalizer"):
        data.require_two_labels()
    load(tmp_path, "WSC", [line_of("WSC"), line_of("WSC", idx=1, label=False)]).require_two_labels()


def test_an_example_number_that_repeats_is_told(tmp_path: Path):
    with pytest.raises(DataError, match=r"val.jsonl:2: the example number 5 stands already at .*val.jsonl:1"):
        load(tmp_path, "CB", [line_of("CB"), line_of("CB")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"premise": 3}, "expected a text in the field 'premise', found a number (3)"),
        ({"premise": " "}, "the field 'premise' is empty"),
        ({"idx": "5"}, "expected a whole number in the field 'idx', found a text ('5')"),
        ({"idx": True}, "expected a whole number in the field 'idx', found a boolean (True)"),
    ],
)
def test_a_field_of_another_kind_is_told(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(DataError) as caught:
        load(tmp_path, "CB", [line_of("CB", **change)])
    assert f"CB/val.jsonl:1: {message}" in str(caught.value)


def test_missing_folders_and_files_are_told_with_those_there(tmp_path: Path):
    load(tmp_path, "CB", [golden.LINES["CB"]])
    with pytest.raises(DataError, match=r"RTE: folder not found: .*RTE \(there: CB\)"):
        load_split(tmp_path, "RTE", "train")
    with pytest.raises(DataError, match=r"CB has no train file: .*train.jsonl \(there: val\)"):
        load_split(tmp_path, "CB", "train")
    with pytest.raises(DataError, match="nothing is left to use"):
        load(tmp_path, "CB", [])
