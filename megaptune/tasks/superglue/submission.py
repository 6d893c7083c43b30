"""Predictions as SuperGLUE's server takes them: ``<task>.jsonl``, one line an example, by number.

BoolQ, CB, RTE, WiC    {"idx": 0, "label": "true"}
WSC                    {"idx": 0, "label": "True"}
COPA                   {"idx": 0, "label": 1}
MultiRC                {"idx": 0, "passage": {"questions": [{"idx": 0, "answers": [{"idx": 0, "label": 1}, ...]}, ...]}}
ReCoRD                 {"idx": 0, "label": "the entity's text"}; idx is the query's
"""

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from megaptune.errors import DataError
from megaptune.patterns import LABELS, TaskName
from megaptune.tasks.records import read_objects
from megaptune.tasks.superglue.records import Idx, Row


def prediction_file(folder: Path, task: TaskName) -> Path:
    return folder / f"{task}.jsonl"


def write_predictions(folder: Path, task: TaskName, predictions: Mapping[Idx, str]) -> Path:
    """Write the task's file and return its path; ``predictions`` are labels, of ReCoRD entities.

    :raises DataError: for a prediction that is no label of the task.
    """
    for idx, label in predictions.items():
        if LABELS[task] and label not in LABELS[task]:
            raise DataError(f"{task} {idx}: {label!r} is no label (expected one of {', '.join(LABELS[task])})")
    ordered = sorted(predictions.items())
    lines: list[dict[str, Any]]
    if task == "MultiRC":
        lines = [
            {"idx": passage, "passage": {"questions": [_question(*question) for question in groupby(members, _second)]}}
            for passage, members in groupby(ordered, lambda item: item[0][0])
        ]
    else:
        lines = [{"idx": idx[0], "label": _written(task, label)} for idx, label in ordered]
    folder.mkdir(parents=True, exist_ok=True)
    path = prediction_file(folder, task)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def read_predictions(folder: Path, task: TaskName) -> dict[Idx, str]:
    """What :func:`write_predictions` wrote.

    :raises DataError: for a file that is not the task's.
    """
    found: dict[Idx, str] = {}
    for source, values in read_objects(prediction_file(folder, task)):
        row = Row(values, source)
        number = row.number("idx")
        if task == "MultiRC":
            for question in row.row("passage").rows("questions"):
                for answer in question.rows("answers"):
                    found[number, question.number("idx"), answer.number("idx")] = answer.label(task)
        else:
            found[(number,)] = row.raw_text("label") if task == "ReCoRD" else row.label(task)
    return found


def _second(item: tuple[Idx, str]) -> int:
    return item[0][1]


def _question(number: int, members: Any) -> dict[str, Any]:
    return {"idx": number, "answers": [{"idx": idx[2], "label": int(label)} for idx, label in members]}


def _written(task: TaskName, label: str) -> str | int:
    if task == "COPA":
        return int(label)
    return label.capitalize() if task == "WSC" else label
