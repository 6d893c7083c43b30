"""Splits, limits and what each method reads, on made-up files."""

from pathlib import Path

import pytest
from tiny_superglue import PATTERNS, settings, write_superglue

from megaptune.config import load_config, validate
from megaptune.errors import DataError
from megaptune.patterns import load_patterns
from megaptune.prompts.tokens import TokenForms
from megaptune.superglue_data import hold_out, limited, load_superglue
from megaptune.superglue_examples import prepare_superglue
from megaptune.tasks.superglue.loading import load_split

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_superglue(tmp_path_factory.mktemp("superglue"))


def prepared(root: Path, tokenizer, task: str, kind: str = "causal", methods=("ptuning",), deep=None, **more):
    book = {name: patterns.model_dump() for name, patterns in load_patterns(PATTERNS).items()}
    sections = {"task": {"tasks": [task], **more}, "methods": list(methods), "patterns": book}
    sections |= {"prompt": {"deep": deep}} if deep else {}
    raw = settings(root, Path("nowhere"), Path("run"), **sections)
    del raw["defaults"]
    config = validate(raw, "test")
    (data,) = load_superglue(config)
    return prepare_superglue(data, config, TokenForms(tokenizer), kind, 400)


def test_whole_passages_are_held_out(root: Path):
    data = load_split(root, "MultiRC", "train")
    kept, out = hold_out(data, 0.25, seed=3)
    passages = {record.idx[0] for record in out.records}
    assert len(passages) == 3  # of twelve
    assert not passages & {record.idx[0] for record in kept.records}
    assert len(kept.records) + len(out.records) == len(data.records)
    assert hold_out(data, 0.25, seed=3)[1].records == out.records
    assert hold_out(data, 0.25, seed=4)[1].records != out.records


def test_too_few_examples_to_hold_any_out(root: Path):
    one = limited(load_split(root, "RTE", "train"), 1, 0)
    with pytest.raises(DataError, match="1 examples are too few to hold out 1"):
        hold_out(one, 0.5, 0)


def test_a_limit_takes_whole_questions_in_the_files_order(root: Path):
    data = load_split(root, "MultiRC", "val")
    few = limited(data, 5, seed=0)
    assert len(few.records) == 4  # two questions of two answers; a third would be one too many
    places = [data.records.index(record) for record in few.records]
    assert places == sorted(places)
    assert {record.idx[:2] for record in few.records} == {
        data.records[places[0]].idx[:2],
        data.records[places[2]].idx[:2],
    }


def test_copa_in_both_orders(root: Path, tokenizers):
    plain, both = (prepared(root, tokenizers("llama"), "COPA", mirror_copa=on) for on in (False, True))
    encoded, doubled = plain.swept["anchored"], both.swept["anchored"]
    assert len(doubled.train) == 2 * len(encoded.train)
    first, mirrored = doubled.train[:2]
    assert first.right != mirrored.right
    targets = [[[token for _, token in terms] for terms in example.options] for example in (first, mirrored)]
    assert targets[0] == targets[1][::-1]
    assert doubled.dev == encoded.dev


def test_wsc_learns_from_what_is_meant_and_is_judged_on_all(root: Path, tokenizers):
    task = prepared(root, tokenizers("bert"), "WSC", "masked", splits={"dev": "held_out"}, held_out=0.5)
    encoded = task.swept["anchored"]
    assert all(example.right == (0,) for example in encoded.train)
    best = [0 if example.record.label == "true" else 1 for example in encoded.test]
    assert task.figures(encoded, "test", best) == {"accuracy": 1.0, "score": 1.0}
    assert task.figures(encoded, "test", [0] * len(best))["accuracy"] == 0.5


def test_behind_a_deep_prompt_patterns_have_no_pseudo_tokens_and_stand_once(root: Path, tokenizers):
    """Patterns that differ in their pseudo tokens alone are one."""
    tokenizer, methods = tokenizers("llama"), ("ptuning", "deep_ptuning")
    task = prepared(root, tokenizer, "COPA", methods=methods, deep={"length": 3}, ptuning={"COPA": "all"})
    behind = {name: encoded for (use, name), encoded in task.found.items() if use == "deep"}
    assert list(behind) == ["anchored", "plain"]
    assert list(task.swept) == ["anchored", "plain", "anchored_wide", "plain_wide"]
    assert behind["plain"].template.text == "{premise:unended} {connective} [answer]."
    for encoded in behind.values():
        assert encoded.rows == 0
        assert not any(slot < 0 for example in encoded.train for slots in example.inputs for slot in slots)
        assert encoded.deep_words == encoded.train[0].inputs[0][:3]
    manual = {"length": 3, "input": "manual", "init": "random"}
    (encoded,) = prepared(root, tokenizer, "COPA", methods=["deep_ptuning"], deep=manual).prompts
    assert (encoded.name, encoded.deep_words) == ("plain", None)


def test_a_deep_prompt_takes_its_length_from_the_context(root: Path, tokenizers):
    """Of 400 tokens; ReCoRD's inputs may have 512."""

    def longest(length: int) -> int:
        deep = {"length": length, "input": "manual"}
        (encoded,) = prepared(root, tokenizers("llama"), "ReCoRD", methods=["deep_ptuning"], deep=deep).prompts
        return max(len(slots) for example in encoded.test for slots in example.inputs)

    whole = longest(1)
    assert whole - 10 < longest(400 - whole + 5) <= whole - 5
    with pytest.raises(DataError, match=r"it may have 3\..*context holds 400, and a deep prompt takes 397 of them"):
        longest(397)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_head_reads_the_texts_without_a_pattern(kind: str, root: Path, tokenizers):
    tokenizer = tokenizers("llama" if kind == "causal" else "bert")
    task = prepared(root, tokenizer, "RTE", kind, methods=("finetune",))
    (encoded,) = task.prompts
    assert (encoded.rows, encoded.encoder, encoded.labels) == (2, "head", ("entailment", "not_entailment"))
    example = encoded.train[0]
    ((position,),) = example.reads
    assert position == len(example.inputs[0]) - (1 if kind == "causal" else 2)
    if kind == "masked":
        assert example.inputs[0][position] == tokenizer.mask_token_id
    assert not any(slot < 0 for slot in example.inputs[0])


def test_a_head_gives_each_choice_a_score(root: Path, tokenizers):
    task = prepared(root, tokenizers("llama"), "ReCoRD", methods=("finetune",))
    (encoded,) = task.prompts
    assert (encoded.rows, encoded.labels) == (1, ())
    example = encoded.dev[0]
    assert len(example.inputs) == len(example.record.choices)
    assert list(example.options) == [[(place, -1)] for place in range(len(example.inputs))]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("fewshot/*.yaml")), ids=lambda file: file.stem)
def test_shipped_few_shot_configurations_load(file: Path, monkeypatch):
    monkeypatch.setenv("MEGAPTUNE_DATA", "/data")
    config = load_config(file, is_embedded=lambda value: value == "smollm2-135m")
    assert config.task.type == "superglue"
    assert config.task.splits_for("RTE").dev == "dev32"


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("superglue/*.yaml")), ids=lambda file: file.stem)
def test_shipped_full_configurations_hold_dev_out(file: Path, monkeypatch):
    monkeypatch.setenv("MEGAPTUNE_DATA", "/data")
    config = load_config(file, is_embedded=lambda value: value == "smollm2-135m")
    splits = [config.task.splits_for(name) for name in config.tasks]
    assert {(split.dev, split.test) for split in splits} == {("held_out", "val")}


def test_the_released_settings_are_a_layer(monkeypatch):
    monkeypatch.setenv("MEGAPTUNE_DATA", "/data")
    file = ROOT / "configs" / "fewshot" / "paper.yaml"
    config = load_config(file, is_embedded=lambda value: value == "smollm2-135m")
    assert (config.train.epochs, config.train.global_batch, config.train.lm_learning_rate) == (125, 16, 1e-5)
    assert (config.task.limit_train, config.task.limit_test, config.task.mirror_copa) == (None, None, True)
    assert config.task.patterns_of("ptuning", "WSC") == ["front"]
    assert len(config.run.seeds) == 3
