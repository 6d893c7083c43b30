"""Prediction files as SuperGLUE's server takes them."""

from pathlib import Path

import golden
import pytest

from megaptune.errors import DataError
from megaptune.patterns import TaskName
from megaptune.tasks.superglue.records import FALLBACK, Idx
from megaptune.tasks.superglue.submission import read_predictions, write_predictions

WRITTEN: dict[TaskName, tuple[dict[Idx, str], str]] = {
    "BoolQ": ({(1,): "false", (0,): "true"}, '{"idx": 0, "label": "true"}\n{"idx": 1, "label": "false"}\n'),
    "CB": ({(0,): "neutral"}, '{"idx": 0, "label": "neutral"}\n'),
    "COPA": ({(0,): "1"}, '{"idx": 0, "label": 1}\n'),
    "MultiRC": (
        {(1, 2, 7): "0", (0, 0, 0): "1", (0, 1, 2): "1", (0, 0, 1): "0"},
        '{"idx": 0, "passage": {"questions": [{"idx": 0, "answers": [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}]}, '
        '{"idx": 1, "answers": [{"idx": 2, "label": 1}]}]}}\n'
        '{"idx": 1, "passage": {"questions": [{"idx": 2, "answers": [{"idx": 7, "label": 0}]}]}}\n',
    ),
    "RTE": ({(3,): "not_entailment"}, '{"idx": 3, "label": "not_entailment"}\n'),
    "WiC": ({(0,): "false"}, '{"idx": 0, "label": "false"}\n'),
    "WSC": ({(0,): "true"}, '{"idx": 0, "label": "True"}\n'),
    "ReCoRD": ({(5,): "São Paulo", (6,): ""}, '{"idx": 5, "label": "São Paulo"}\n{"idx": 6, "label": ""}\n'),
}


@pytest.mark.parametrize("task", golden.TASKS)
def test_each_task_has_its_file_and_its_lines_and_reads_back(tmp_path: Path, task: TaskName):
    predictions, text = WRITTEN[task]
    path = write_predictions(tmp_path / "new", task, predictions)
    assert path == tmp_path / "new" / f"{task}.jsonl"
    assert path.read_text(encoding="utf-8") == text
    assert read_predictions(tmp_path / "new", task) == predictions


def test_what_is_predicted_for_a_skipped_example_can_be_written(tmp_path: Path):
    for task, label in FALLBACK.items():
        idx = (0, 0, 0) if task == "MultiRC" else (0,)
        write_predictions(tmp_path, task, {idx: label})
        assert read_predictions(tmp_path, task) == {idx: label}


def test_a_prediction_that_is_no_label_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"CB \(0,\): 'yes' is no label"):
        write_predictions(tmp_path, "CB", {(0,): "yes"})
    assert not (tmp_path / "CB.jsonl").exists()
