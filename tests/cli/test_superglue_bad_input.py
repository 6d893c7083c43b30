"""What goes wrong with SuperGLUE data, patterns and splits, from the command line: one message, exit code 2; what can
be left out is counted and told instead."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_superglue import save_backbone, settings, write_superglue
from typer.testing import CliRunner

from megaptune.cli import app


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone("llama", tmp_path_factory.mktemp("backbone") / "llama")


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)


Check = Callable[..., str]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files to damage."""
    return write_superglue(tmp_path / "data", train=6, dev=4, val=4, test=2)


@pytest.fixture
def checked(tmp_path: Path, data: Path, backbone: Path) -> Check:
    """What ``megaptune check`` says of a configuration; with ``code=0``, that it is sound."""

    def check(code: int = 2, **sections: Any) -> str:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(settings(data, backbone, tmp_path / "run", **sections)))
        done = CliRunner().invoke(app, ["check", "--config", str(file)])
        assert done.exit_code == code, done.output
        assert "Traceback" not in done.output
        assert done.stderr.count("error: ") == (code != 0)
        return done.stdout if code == 0 else done.stderr

    return check


def rewritten(file: Path, **changes: Any) -> None:
    """A file's first line with other values."""
    lines = file.read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), **changes})
    file.write_text("\n".join(lines) + "\n")


def task(*names: str, **more: Any) -> dict[str, Any]:
    return {"tasks": list(names), "splits": {"dev": "dev32"}, **more}


def test_sound_configurations_pass(checked: Check):
    """So that each refusal below is for the one thing that it changes."""
    said = checked(0)
    assert "CB train: 6 examples (2 contradiction, 2 entailment, 2 neutral)" in said
    assert "reads manual question_answer, ptuning anchored" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"entailment": "Yes"}, "RTE: verbalizer mine has no word for the label 'not_entailment'"),
        ({"entailment": "Yes", "not_entailment": "Yes"}, "the word 'Yes' stands for 'entailment' and again for"),
        ({"entailment": "Yes", "not_entailment": "No", "maybe": "Maybe"}, "names 'maybe', which is no label of it"),
        ({"entailment": "Yes", "not_entailment": "Quetzaltenango"}, "tokens of this backbone"),
        ({"entailment": True, "not_entailment": "No"}, "quote it"),
    ],
)
def test_a_verbalizer_that_does_not_fit(checked: Check, words: dict[str, Any], expected: str):
    pattern = {"text": "{premise} {hypothesis} [answer]", "verbalizer": "mine"}
    patterns = {"RTE": {"verbalizers": {"mine": words}, "manual": {"mine": pattern}}}
    assert expected in checked(task=task("RTE", manual={"RTE": ["mine"]}), methods=["manual"], patterns=patterns)


def test_training_on_one_label_is_refused_where_it_teaches_nothing(checked: Check, data: Path):
    """WSC's few-shot file: all true. The span against other phrases, and a head that scores them, can learn from it."""
    message = checked(task=task("WSC", ptuning={"WSC": ["yes_no"]}))
    assert "WSC train: all 6 examples are labelled 'true'" in message
    assert "use a pattern without a verbalizer" in message
    checked(0, task=task("WSC"), methods=["finetune", "ptuning"])
    lines = [json.loads(line) for line in (data / "BoolQ" / "train.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**line, "label": True}) + "\n" for line in lines)
    (data / "BoolQ" / "train.jsonl").write_text(text)
    assert "BoolQ train: all 6 examples are labelled 'true'" in checked(task=task("BoolQ"), methods=["finetune"])
    checked(0, task=task("BoolQ"), methods=["manual"])


def test_spans_outside_their_text_are_counted_and_still_scored(checked: Check, data: Path):
    rewritten(data / "WiC" / "val.jsonl", end1=999)
    assert "WiC val: 3 examples" in (said := checked(0, task=task("WiC")))
    assert "skipped: 1 span outside the text (first: " in said


def test_an_answer_longer_than_an_input(checked: Check, data: Path):
    rewritten(data / "COPA" / "val.jsonl", choice1="the rope " * 60)
    message = checked(task=task("COPA"))
    assert "val.jsonl:1: the answer 'the rope the rope" in message
    assert "is 120 tokens long, an input may have 96" in message


def test_an_input_that_cannot_be_cut(checked: Check, data: Path):
    rewritten(data / "RTE" / "val.jsonl", hypothesis="the rope " * 200)
    message = checked(task=task("RTE"), methods=["manual"])
    assert "val.jsonl:1" in message
    assert "it may have 160" in message


def test_patterns_that_are_not_there(checked: Check):
    message = checked(task=task("RTE", ptuning={"RTE": ["anchord"]}))
    assert "task.ptuning.RTE names the pattern 'anchord' (there: anchored, anchored_sep" in message
    message = checked(task=task("RTE", ptuning={"RTE": ["anchored_sep"]}))
    assert "the ptuning pattern 'anchored_sep' is not for causal backbones" in message
    assert "a superglue task needs `patterns`" in checked(defaults=[])


def test_splits_that_would_select_on_what_is_reported(checked: Check):
    message = checked(task=task("RTE", splits={"dev": "dev32", "test": "dev32"}))
    assert "dev32 cannot both choose the epoch and be reported on" in message


def test_files_that_are_not_there(checked: Check, data: Path):
    (data / "RTE" / "val.jsonl").unlink()
    assert "RTE has no val file" in checked(task=task("RTE"))
    for file in (data / "CB").iterdir():
        file.unlink()
    (data / "CB").rmdir()
    assert "CB: folder not found" in checked(task=task("CB"))


def test_tasks_all_takes_those_that_are_there(checked: Check, data: Path):
    for folder in data.iterdir():
        if folder.name not in ("RTE", "COPA"):
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    said = checked(0)
    assert "task.tasks: all leaves out BoolQ, CB, MultiRC, ReCoRD, WiC, WSC" in said
    assert "RTE val: 4 examples" in said


def test_a_label_that_is_none(checked: Check, data: Path):
    rewritten(data / "CB" / "train.jsonl", label="yes")
    assert "train.jsonl:1: 'yes' is no label of CB" in checked(task=task("CB"))


def test_templates_of_other_tasks_are_refused(checked: Check):
    assert "jobs.templates is for other tasks" in checked(jobs={"templates": ["[P] {premise} [answer]"]})
