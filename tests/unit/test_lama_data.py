"""The real LAMA T-REx files, counted: the table of the data's README, which published scores rest on."""

import os
from pathlib import Path

import pytest

from megaptune.config import LamaTask
from megaptune.tasks.lama import load_lama, read_word_list
from megaptune.tasks.records import SPLITS, TaskData

pytestmark = pytest.mark.data

if "MEGAPTUNE_DATA" not in os.environ:
    pytest.skip(
        "MEGAPTUNE_DATA is not set: real LAMA data was NOT tested; set it to the folder that holds LAMA/",
        allow_module_level=True,
    )

# Rows of train, dev and test; rows of them whose object is in the 29k list.
COUNTS = {
    "P17": ((800, 200, 930), (784, 195, 912)),
    "P36": ((416, 104, 703), (279, 75, 471)),
    "P47": ((800, 200, 922), (542, 139, 652)),
    "P101": ((691, 172, 696), (537, 135, 573)),
    "P108": ((300, 75, 383), (295, 73, 378)),
    "P190": ((716, 179, 995), (469, 127, 671)),
    "P264": ((800, 200, 429), (242, 71, 53)),
    "P1001": ((800, 200, 701), (728, 185, 664)),
    "P1303": ((800, 200, 949), (430, 114, 513)),
}


@pytest.fixture(scope="module")
def root() -> Path:
    """The folder LAMA below $MEGAPTUNE_DATA."""
    folder = Path(os.environ["MEGAPTUNE_DATA"]) / "LAMA"
    if not folder.is_dir():
        pytest.fail(f"MEGAPTUNE_DATA is set, but there is no folder {folder}")
    return folder


def load(root: Path, relations: list[str] | str, words: list[str] | None = None) -> dict[str, TaskData]:
    return {data.name: data for data in load_lama(LamaTask(type="lama", root=root, relations=relations), words)}


def counts(data: TaskData) -> tuple[int, ...]:
    return tuple(len(data.splits[split]) for split in SPLITS)


def test_all_35_relations_add_up(root: Path):
    everything = load(root, "all")
    assert len(everything) == 35
    assert tuple(map(sum, zip(*map(counts, everything.values()), strict=True))) == (25482, 6369, 30276)


def test_29k_list_leaves_what_published_scores_count(root: Path):
    everything = load(root, "all", read_word_list(root / "29k-vocab.json"))
    assert tuple(map(sum, zip(*map(counts, everything.values()), strict=True))) == (21063, 5292, 26058)


def test_rows_of_a_relation_before_and_after_the_29k_list(root: Path):
    words = read_word_list(root / "29k-vocab.json")
    plain, filtered = load(root, list(COUNTS)), load(root, list(COUNTS), words)
    assert {name: (counts(plain[name]), counts(filtered[name])) for name in COUNTS} == COUNTS
    for name, (before, after) in COUNTS.items():
        assert filtered[name].dropped == {"answer outside task.word_list": sum(before) - sum(after)}


def test_word_lists_have_their_published_sizes(root: Path):
    assert len(read_word_list(root / "29k-vocab.json")) == 18154
    assert len(read_word_list(root / "common_vocab_cased.txt")) == 21018


def test_29k_words_carry_no_mark_of_a_space(root: Path):
    assert not [word for word in read_word_list(root / "29k-vocab.json") if word.startswith("Ġ")]


def test_every_relation_has_an_lpaqa_and_an_autoprompt_prompt(root: Path):
    for data in load_lama(LamaTask(type="lama", root=root), None, ["lpaqa", "autoprompt"]):
        assert [len(data.prompt_sets[name]) for name in ("lpaqa", "autoprompt")] == [1, 1], data.name
        for (text,) in data.prompt_sets.values():
            assert text.index("{subject}") < text.index("[answer]"), data.name  # a causal LM reads all of them


def test_common_vocabulary_keeps_every_test_fact(root: Path):
    allowed = set(read_word_list(root / "common_vocab_cased.txt"))
    for data in load(root, "all").values():
        assert {record.answer for record in data.splits["test"]} <= allowed


def test_files_with_evidences_read_as_those_without(root: Path):
    from megaptune.tasks.lama import _record
    from megaptune.tasks.records import read_rows

    full = [_record(row, source) for source, row in read_rows(root / "full_rows" / "P108" / "test.jsonl")]
    plain = load(root, ["P108"])["P108"].splits["test"]
    assert [(r.subject, r.answer) for r in full] == [(r.subject, r.answer) for r in plain]


def test_manual_template_is_the_relations_own(root: Path):
    assert load(root, ["P36"])["P36"].manual_template == "The capital of {subject} is [answer] ."
