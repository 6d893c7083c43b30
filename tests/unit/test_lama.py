"""LAMA's layout in small, with the quirks of the real files; and a user's own files beside it."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import write_jsonl

from megaptune.config import CustomTask, LamaTask
from megaptune.errors import DataError
from megaptune.tasks.custom import load_custom
from megaptune.tasks.lama import load_lama, read_prompt_set, read_word_list
from megaptune.tasks.records import TaskData

TEMPLATES = [
    {"relation": "P17", "template": "[X] is located in [Y] .", "label": "country", "type": "N-1"},
    {"relation": "P103", "template": "The native language of [X] is [Y] .", "label": "native language"},
    {"relation": "P9", "template": "[Y]whose[X]", "label": "no data for this one"},
]
ROWS = [
    {"sub_label": "Paris", "obj_label": "France", "predicate_id": "P17", "uuid": "1", "sub_uri": "Q90"},
    {"sub_label": "Lyon", "obj_label": "France", "evidences": [{"masked_sentence": "Lyon, [MASK]."}]},
    {"sub_label": "Lyon", "obj_label": "France"},
    {"sub_label": 'Málaga ("city", port)', "obj_label": "Spain"},
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "relations.jsonl", TEMPLATES)
    for relation in ("P103", "P17"):
        for split in ("train", "dev", "test"):
            write_jsonl(tmp_path / "fact-retrieval" / "original" / relation / f"{split}.jsonl", ROWS)
    return tmp_path


def load(root: Path, words: list[str] | None = None, relations: Any = "all") -> list[TaskData]:
    return load_lama(LamaTask(type="lama", root=root, relations=relations), words)


def refusal(root: Path, relations: Any = "all") -> str:
    with pytest.raises(DataError) as caught:
        load(root, relations=relations)
    return str(caught.value)


# -- relations -------------------------------------------------------------------------------------------------------


def test_all_relations_that_are_there_come_in_the_order_of_their_numbers(root: Path):
    assert [data.name for data in load(root)] == ["P17", "P103"]


def test_relations_asked_for_come_in_the_order_asked_for(root: Path):
    assert [data.name for data in load(root, relations=["P103", "P17"])] == ["P103", "P17"]


def test_template_becomes_megaptunes_notation(root: Path):
    data = load(root, relations=["P17"])[0]
    assert data.manual_template == "{subject} is located in [answer] ."
    assert data.label == "country"


def test_unknown_relation_is_told_what_is_there(root: Path):
    assert "no data for P9, P1 (there: P17, P103)" in refusal(root, ["P9", "P17", "P1"])


def test_relation_without_a_template_is_named(root: Path):
    write_jsonl(root / "relations.jsonl", TEMPLATES[:1])
    assert refusal(root) == "relations.jsonl has no template for P103"


def test_template_without_a_placeholder_is_told_with_its_line(root: Path):
    write_jsonl(root / "relations.jsonl", [TEMPLATES[0], {"relation": "P103", "template": "[X] speaks"}])
    assert "relations.jsonl:2: the template '[X] speaks' lacks [Y]" in refusal(root)


def test_folder_that_is_not_there_is_named(tmp_path: Path):
    assert refusal(tmp_path / "LAMA") == f"task.root: folder not found: {tmp_path / 'LAMA'}"


def test_split_that_is_not_there_is_named(root: Path):
    missing = root / "fact-retrieval" / "original" / "P17" / "dev.jsonl"
    missing.unlink()
    assert refusal(root) == f"data file not found: {missing}"


# -- rows ------------------------------------------------------------------------------------------------------------


def test_rows_need_two_fields_and_keep_the_others_that_are_text(root: Path):
    records = load(root)[0].splits["test"]
    assert [(r.subject, r.answer) for r in records[:2]] == [("Paris", "France"), ("Lyon", "France")]
    assert records[0].fields["sub_uri"] == "Q90"
    assert set(records[1].fields) == {"sub_label", "obj_label", "subject"}


def test_duplicate_rows_stay(root: Path):
    assert [r.subject for r in load(root)[0].splits["train"]].count("Lyon") == 2


def test_subject_fills_the_template_and_keeps_its_letters(root: Path):
    assert load(root)[0].splits["dev"][3].fields["subject"] == 'Málaga ("city", port)'


def test_records_know_their_file_and_line(root: Path):
    record = load(root)[0].splits["dev"][2]
    assert record.source == f"{root / 'fact-retrieval' / 'original' / 'P17' / 'dev.jsonl'}:3"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"sub_label": "Paris"}, "no text field 'obj_label' (it has: sub_label)"),
        ({"sub_label": " ", "obj_label": "France"}, "the field 'sub_label' is empty"),
        ({"sub_label": ["Paris"], "obj_label": "France"}, "no text field 'sub_label'"),
    ],
)
def test_row_without_a_needed_field_is_told_with_its_line(root: Path, row: dict[str, Any], told: str):
    path = write_jsonl(root / "fact-retrieval" / "original" / "P17" / "test.jsonl", [ROWS[0], row])
    assert refusal(root).startswith(f"{path}:2: ")
    assert told in refusal(root)


def test_word_list_keeps_records_whose_answer_is_on_it_and_counts_the_others(root: Path):
    data = load(root, words=["Spain", "Norway"])[0]
    assert [[r.answer for r in members] for members in data.splits.values()] == [["Spain"]] * 3
    assert data.dropped == {"answer outside task.word_list": 9}
    assert data.word_list == ["Spain", "Norway"]


# -- prompts that others searched ------------------------------------------------------------------------------------


def prompt_file(path: Path, *templates: tuple[str, str]) -> Path:
    return write_jsonl(path, [{"relation": relation, "template": text} for relation, text in templates])


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("The native language of [X] is [Y] .", "The native language of {subject} is [answer] ."),  # LAMA
        ("[X] is located in [Y]..", "{subject} is located in [answer].."),  # LPAQA
        ("[X] and [Y] are twinned towns.", "{subject} and [answer] are twinned towns."),
        ("[X]vik nationwide disabilities within [Y].", "{subject}vik nationwide disabilities within [answer]."),
        ("[X] ##PA commune ##rug speaks [Y] .", "{subject}PA communerug speaks [answer] ."),  # AutoPrompt, marked
        ("[X] vol \u300elson gallery in [Y].", "{subject} vol \u300elson gallery in [answer]."),
    ],
)
def test_prompts_of_all_three_notations(tmp_path: Path, written: str, read: str):
    assert read_prompt_set(prompt_file(tmp_path / "p.jsonl", ("P17", written))) == {"P17": [read]}


def test_prompts_come_from_the_data_folder_or_a_file_that_is_named(root: Path):
    prompt_file(
        root / "prompts" / "LPAQA_relations.jsonl", ("P17", "[X] in [Y]"), ("P17", "[X] of [Y]"), ("P1", "[X][Y]")
    )
    other = prompt_file(root / "mine.jsonl", ("P103", "[X]ed speaks [Y]."))
    task = LamaTask(type="lama", root=root, autoprompt_prompts=other)
    first, second = load_lama(task, None, ["lpaqa", "autoprompt"])
    assert first.prompt_sets == {"lpaqa": ["{subject} in [answer]", "{subject} of [answer]"]}
    assert second.prompt_sets == {"autoprompt": ["{subject}ed speaks [answer]."]}


def test_a_set_without_a_file_is_told_with_the_key_to_name_it(root: Path):
    with pytest.raises(DataError, match=r"manual_lpaqa: file not found: .*LPAQA_rel.*; name it in task\.lpaqa_prompts"):
        load_lama(LamaTask(type="lama", root=root), None, ["lpaqa"])


@pytest.mark.parametrize(("written", "told"), [("[X] and [X] in [Y]", "has 2 times [X]"), ("{ [X] in [Y]", "a brace")])
def test_prompts_that_mean_nothing_are_told_with_their_line(tmp_path: Path, written: str, told: str):
    path = prompt_file(tmp_path / "p.jsonl", ("P17", "[X] in [Y]"), ("P17", written))
    with pytest.raises(DataError) as caught:
        read_prompt_set(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert told in str(caught.value)


# -- word lists ------------------------------------------------------------------------------------------------------


def test_text_word_list_has_one_word_a_line_without_repeats(tmp_path: Path):
    path = tmp_path / "words.txt"
    path.write_text("Spain\nMálaga\n\n Peru \nSpain\n", encoding="utf-8")
    assert read_word_list(path) == ["Spain", "Málaga", "Peru"]


def test_json_word_list_of_several_models_is_the_first_without_marks(tmp_path: Path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps({"gpt2-xl": ["ĠSpain", "ĠPeru"], "bert": ["Spain", "Peru"]}), encoding="utf-8")
    assert read_word_list(path) == ["Spain", "Peru"]


def test_json_word_list_may_be_one_list(tmp_path: Path):
    path = tmp_path / "words.json"
    path.write_text('["Spain", "Peru"]', encoding="utf-8")
    assert read_word_list(path) == ["Spain", "Peru"]


@pytest.mark.parametrize("text", ["{", "3", "{}", "[1, 2]", '{"a": 3}'])
def test_json_that_is_no_word_list_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "words.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"words\.json: expected a JSON list of words"):
        read_word_list(path)


def test_empty_word_list_is_refused(tmp_path: Path):
    path = tmp_path / "words.txt"
    path.write_text("\n\n", encoding="utf-8")
    with pytest.raises(DataError, match="the word list is empty"):
        read_word_list(path)


def test_missing_word_list_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"task\.word_list: file not found: .*words\.txt"):
        read_word_list(tmp_path / "words.txt")


def test_word_list_that_is_not_utf8_is_refused(tmp_path: Path):
    path = tmp_path / "words.txt"
    path.write_bytes("Málaga\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read_word_list(path)


# -- custom ----------------------------------------------------------------------------------------------------------


def custom(folder: Path, rows: list[dict[str, Any]], words: list[str] | None = None, **keys: Any) -> TaskData:
    path = write_jsonl(folder / "facts.jsonl", rows)
    task = CustomTask(**{"type": "custom", "test": path, "answer": "country", **keys})
    return load_custom(task, words)


def test_custom_answer_is_no_field_of_the_template(tmp_path: Path):
    record = custom(tmp_path, [{"city": "Paris", "country": "France"}]).splits["test"][0]
    assert (record.answer, record.fields) == ("France", {"city": "Paris"})


def test_custom_subject_is_the_field_that_is_named(tmp_path: Path):
    rows = [{"city": "Paris", "river": "Seine", "country": "France"}]
    assert custom(tmp_path, rows, subject="river").splits["test"][0].subject == "Seine"


def test_custom_subject_is_all_other_fields_by_default(tmp_path: Path):
    rows = [{"city": "Paris", "country": "France", "river": "Seine"}]
    assert custom(tmp_path, rows).splits["test"][0].subject == "Paris Seine"


def test_custom_splits_without_a_file_are_empty(tmp_path: Path):
    data = custom(tmp_path, [{"city": "Paris", "country": "France"}], name="cities")
    assert (data.name, data.splits["train"], data.splits["dev"]) == ("cities", [], [])


def test_custom_files_may_be_csv(tmp_path: Path):
    path = tmp_path / "facts.csv"
    path.write_text("city,country\nMálaga,Spain\n", encoding="utf-8")
    record = load_custom(CustomTask(type="custom", test=path, answer="country"), None).splits["test"][0]
    assert (record.fields["city"], record.answer, record.source) == ("Málaga", "Spain", f"{path}:2")


@pytest.mark.parametrize("row", [{"city": "Paris"}, {"city": "Paris", "country": ""}])
def test_custom_record_without_an_answer_is_told_with_its_line(tmp_path: Path, row: dict[str, Any]):
    with pytest.raises(DataError, match=r"facts\.jsonl:2: .*'country'"):
        custom(tmp_path, [{"city": "Rome", "country": "Italy"}, row])


def test_custom_word_list_filters_answers_as_lamas_does(tmp_path: Path):
    rows = [{"city": "Rome", "country": "Italy"}, {"city": "Paris", "country": "France"}]
    data = custom(tmp_path, rows, words=["France"])
    assert [record.answer for record in data.splits["test"]] == ["France"]
