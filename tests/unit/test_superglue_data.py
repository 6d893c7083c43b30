"""The real SuperGLUE and FewGLUE files, counted against the tables and the list of quirks of the data's READMEs."""

import os
from pathlib import Path

import pytest

from megaptune.errors import DataError
from megaptune.patterns import TaskName
from megaptune.tasks.superglue.loading import FileName, load_split
from megaptune.tasks.superglue.metrics import score

pytestmark = pytest.mark.data

if "MEGAPTUNE_DATA" not in os.environ:
    pytest.skip(
        "MEGAPTUNE_DATA is not set: real SuperGLUE data was NOT tested; set it to the folder that holds SuperGLUE/",
        allow_module_level=True,
    )

ROOT = Path(os.environ["MEGAPTUNE_DATA"])
FULL, FEW = ROOT / "SuperGLUE", ROOT / "FewGLUE_32dev"

# Examples and their labels; without labels where the file has none.
COUNTS: list[tuple[Path, TaskName, FileName, int, dict[str, int]]] = [
    (FULL, "BoolQ", "val", 3270, {"false": 1237, "true": 2033}),
    (FULL, "BoolQ", "test", 3245, {}),
    (FULL, "CB", "train", 250, {"contradiction": 119, "entailment": 115, "neutral": 16}),
    (FULL, "CB", "val", 56, {"contradiction": 28, "entailment": 23, "neutral": 5}),
    (FULL, "CB", "test", 250, {}),
    (FULL, "COPA", "train", 400, {"0": 195, "1": 205}),
    (FULL, "COPA", "val", 100, {"0": 55, "1": 45}),
    (FULL, "COPA", "test", 500, {}),
    (FULL, "MultiRC", "train", 27243, {"0": 15218, "1": 12025}),
    (FULL, "MultiRC", "val", 4848, {"0": 2773, "1": 2075}),
    (FULL, "MultiRC", "test", 9693, {}),
    (FULL, "WiC", "train", 5428, {"false": 2714, "true": 2714}),
    (FULL, "WiC", "val", 638, {"false": 319, "true": 319}),
    (FULL, "WiC", "test", 1400, {}),
    (FULL, "WSC", "train", 554, {"false": 295, "true": 259}),
    (FULL, "WSC", "val", 104, {"false": 66, "true": 38}),
    (FULL, "WSC", "test", 146, {}),
    (FEW, "BoolQ", "train", 32, {"false": 14, "true": 18}),
    (FEW, "BoolQ", "dev32", 32, {"false": 13, "true": 19}),
    (FEW, "CB", "train", 32, {"contradiction": 10, "entailment": 19, "neutral": 3}),
    (FEW, "CB", "dev32", 32, {"contradiction": 13, "entailment": 17, "neutral": 2}),
    (FEW, "COPA", "train", 32, {"0": 14, "1": 18}),
    (FEW, "COPA", "dev32", 32, {"0": 15, "1": 17}),
    (FEW, "MultiRC", "train", 154, {"0": 86, "1": 68}),
    (FEW, "MultiRC", "dev32", 167, {"0": 93, "1": 74}),
    (FEW, "WiC", "train", 32, {"false": 15, "true": 17}),
    (FEW, "WiC", "dev32", 32, {"false": 16, "true": 16}),
    (FEW, "WSC", "train", 32, {"true": 32}),
    (FEW, "WSC", "dev32", 32, {"false": 22, "true": 10}),
    (FEW, "ReCoRD", "train", 32, {}),
    (FEW, "ReCoRD", "dev32", 32, {}),
]

# File -> (reason, numbers of the skipped examples).
SKIPPED = {
    (FULL, "WSC", "test"): ("span outside the text", [(80,), (81,), (82,)]),
    (FULL, "MultiRC", "train"): ("empty answer", [(37, 450, 2407), (431, 4849, 25899), (431, 4850, 25905)]),
    (FULL, "MultiRC", "test"): ("empty answer", [(41, 446, 2319)]),
}


@pytest.fixture(scope="module", autouse=True)
def folders() -> None:
    for folder in (FULL, FEW):
        if not folder.is_dir():
            pytest.fail(f"MEGAPTUNE_DATA is set, but there is no folder {folder}")


@pytest.mark.parametrize(
    ("root", "task", "split", "examples", "labels"), COUNTS, ids=lambda value: getattr(value, "name", None)
)
def test_examples_labels_and_skips(root: Path, task: TaskName, split: FileName, examples: int, labels: dict[str, int]):
    data = load_split(root, task, split)
    reason, numbers = SKIPPED.get((root, task, split), ("", []))
    assert len(data.records) + len(data.skipped) == examples
    assert sorted((skip.reason, skip.idx) for skip in data.skipped) == [(reason, idx) for idx in numbers]
    counted = data.labels()
    counted.update(skip.gold[0] for skip in data.skipped if skip.gold)
    assert counted == labels
    assert len(data.gold) == (examples if labels or task == "ReCoRD" else 0)
    assert len(data.complete({record.idx: "" for record in data.records})) == examples


def test_multirc_counts_passages_and_questions():
    for split, passages, questions in (("train", 456, 5131), ("val", 83, 953), ("test", 166, 1820)):
        data = load_split(FULL, "MultiRC", split)
        idx = [example.idx for example in data.records] + [skip.idx for skip in data.skipped]
        assert len({number[0] for number in idx}) == passages
        assert len({number[:2] for number in idx}) == questions


def test_one_wsc_span_stands_one_word_later_than_it_says():
    data = load_split(FULL, "WSC", "val")
    assert data.remarks == {"span one word later than its index says": 1}
    (record,) = [record for record in data.records if record.idx == (42,)]
    assert "want to use *it* ," in record.fields["marked"]


def test_fewglues_wsc_training_file_is_all_true_and_its_files_share_no_example():
    train, dev = load_split(FEW, "WSC", "train"), load_split(FEW, "WSC", "dev32")
    with pytest.raises(DataError, match="all 32 examples are labelled 'true'"):
        train.require_two_labels()
    dev.require_two_labels()
    for task in ("BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "WiC", "WSC"):
        one, other = (load_split(FEW, task, split) for split in ("train", "dev32"))
        assert not {record.idx for record in one.records} & {record.idx for record in other.records}


def test_every_record_query_has_its_answers_among_the_entities():
    records = [record for split in ("train", "dev32") for record in load_split(FEW, "ReCoRD", split).records]
    assert len(records) == 64
    assert all(record.right for record in records)
    assert sum(len(record.right) for record in records) == sum(len(record.answers) for record in records)


def test_wsc_phrases_hold_the_true_antecedent_where_another_row_names_it():
    """On the training file, where the rules were chosen, and on validation, where they were not."""
    for split, hits, of in (("train", 226, 245), ("val", 41, 48)):
        rows: dict[str, list] = {}
        for record in load_split(FULL, "WSC", split).records:
            rows.setdefault(record.fields["marked"], []).append(record)
        found = total = 0
        for group in rows.values():
            true = [words(record.fields["span"]) for record in group if record.label == "true"]
            for record in group:
                if true and record.label == "false":
                    total += 1
                    found += any(one & words(other) for one in true for other in record.choices[1:])
        assert (found, total) == (hits, of)


def words(phrase: str) -> set[str]:
    return set(phrase.casefold().split()) - {"the", "a", "an", "his", "her", "their"}


def test_always_saying_the_commonest_label_scores_what_it_should():
    cb = load_split(FULL, "CB", "val").gold
    assert score("CB", cb, dict.fromkeys(cb, "contradiction")) == {
        "accuracy": 28 / 56,
        "f1": pytest.approx(2 * 28 / (28 + 56) / 3),
    }
    multirc = load_split(FULL, "MultiRC", "val").gold
    assert score("MultiRC", multirc, dict.fromkeys(multirc, "1"))["f1a"] == pytest.approx(2 * 2075 / (2075 + 4848))
