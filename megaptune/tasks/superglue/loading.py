"""The official folders: ``<root>/<task>/{train,val,test}.jsonl``, and FewGLUE's with dev32 and unlabeled."""

from collections import Counter
from pathlib import Path
from typing import Literal, get_args

from megaptune.errors import DataError
from megaptune.patterns import TaskName
from megaptune.tasks.records import read_objects
from megaptune.tasks.superglue.readers import READERS
from megaptune.tasks.superglue.records import Row, Skip, SplitData, SuperGlueRecord

FileName = Literal["train", "dev32", "val", "test", "unlabeled"]
UNLABELLED: tuple[FileName, ...] = ("test", "unlabeled")
"""Their labels are not read, should there be any."""


def load_split(root: Path, task: TaskName, split: FileName) -> SplitData:
    """One file of a task, every example read or skipped with a reason.

    :raises DataError: no such folder or file, a malformed line, a missing field, a label that is none of the task's,
        an example number that repeats, no example at all.
    """
    folder = root / task
    if not folder.is_dir():
        there = ", ".join(sorted(name for name in get_args(TaskName) if (root / name).is_dir()))
        raise DataError(f"{task}: folder not found: {folder} (there: {there or 'no SuperGLUE task'})")
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in folder.glob("*.jsonl")))
        raise DataError(f"{task} has no {split} file: {path} (there: {there or 'none'})")
    records: list[SuperGlueRecord] = []
    skipped: list[Skip] = []
    remarks: Counter[str] = Counter()
    seen: dict[tuple[int, ...], str] = {}
    for source, values in read_objects(path):
        for example in READERS[task](Row(values, source), split not in UNLABELLED, remarks):
            if example.idx in seen:
                number = ", ".join(map(str, example.idx))
                raise DataError(f"{source}: the example number {number} stands already at {seen[example.idx]}")
            seen[example.idx] = source
            if isinstance(example, Skip):
                skipped.append(example)
            else:
                records.append(example)
    data = SplitData(task, split, records, skipped, remarks)
    if not records:
        raise DataError(f"{data.summary()}; nothing is left to use in {path}")
    return data
