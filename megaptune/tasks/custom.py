"""A user's own facts: files whose fields fill the template."""

from pathlib import Path

from megaptune.config import CustomTask
from megaptune.tasks.records import SPLITS, Record, Split, TaskData, read_rows, take


def load_custom(config: CustomTask, word_list: list[str] | None) -> TaskData:
    """The files that are named; a split without a file is empty."""
    files: dict[Split, Path | None] = {split: getattr(config, split) for split in SPLITS}
    splits = {split: [] if file is None else _read(file, config) for split, file in files.items()}
    return TaskData(config.name, splits, None, word_list).keep_listed_answers()


def _read(path: Path, config: CustomTask) -> list[Record]:
    records = []
    for source, row in read_rows(path):
        answer = take(row, config.answer, source)
        fields = {
            name: take(row, name, source) for name, value in row.items() if name != config.answer and value.strip()
        }
        subject = take(row, config.subject, source) if config.subject else " ".join(fields.values())
        records.append(Record(fields, answer, source, subject))
    return records
