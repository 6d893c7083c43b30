"""Facts as a task sees them, and the reading of JSONL and CSV files with errors that name file and line."""

import csv
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from megaptune.errors import DataError
from megaptune.methods import PromptSet

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One fact: the fields that a template may name, the answer word, and where it was read."""

    fields: dict[str, str]
    answer: str
    source: str
    subject: str = ""

    @property
    def told(self) -> str:
        """What is right, for the console."""
        return self.answer


@dataclass(frozen=True)
class TaskData:
    """One relation (or one custom task): its splits, its manual template, the words that answers may be.

    prompt_sets: further manual templates, by the set that they are from; a set without any has no entry. word_lists:
    further lists by name, which drop no record.
    """

    name: str
    splits: dict[Split, list[Record]]
    manual_template: str | None
    word_list: list[str] | None = None
    label: str = ""
    type: str = ""  # of a LAMA relation: 1-1, N-1 or N-M
    dropped: dict[str, int] = field(default_factory=dict)
    prompt_sets: dict[PromptSet, list[str]] = field(default_factory=dict)
    word_lists: dict[str, list[str]] = field(default_factory=dict)

    def keep_listed_answers(self) -> "TaskData":
        """A copy without the records whose answer is outside the word list, if there is one."""
        if self.word_list is None:
            return self
        allowed = set(self.word_list)
        flags = {split: [record.answer in allowed for record in records] for split, records in self.splits.items()}
        return self.keep("answer outside task.word_list", flags)

    def keep(self, reason: str, flags: dict[Split, list[bool]]) -> "TaskData":
        """A copy without the records whose flag is false; they are counted under ``reason``."""
        kept = {
            split: [record for record, wanted in zip(records, flags[split], strict=True) if wanted]
            for split, records in self.splits.items()
        }
        lost = sum(not wanted for split_flags in flags.values() for wanted in split_flags)
        return replace(self, splits=kept, dropped={**self.dropped, reason: self.dropped.get(reason, 0) + lost})


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a .jsonl or .csv file, each with its ``file:line``; numbers become text.

    :raises DataError: missing file, unknown ending, a line that is no JSON object, a value that is no text or number.
    """
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: expected a file ending in {' or '.join(readers)}")
    yield from _told(path, reader)


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a .jsonl file as they are, nested values included, each with its ``file:line``.

    :raises DataError: as :func:`read_rows`.
    """
    if path.suffix.lower() != ".jsonl":
        raise DataError(f"{path}: expected a file ending in .jsonl")
    for source, row in _told(path, _json_objects):
        _require_text(json.dumps(row, ensure_ascii=False), source)
        yield source, row


def _told(path: Path, reader: Callable[[Path], Iterator[T]]) -> Iterator[T]:
    """What ``reader`` finds in ``path``; a file that cannot be read is told as such."""
    if not path.is_file():
        raise DataError(f"data file not found: {path}")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            source = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{source}: not valid JSON: {error.msg} at character {error.pos + 1}") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{source}: not JSON that can be read: {type(error).__name__}") from None
            if not isinstance(row, dict):
                raise DataError(f"{source}: expected a JSON object, found {type(row).__name__}")
            yield source, row


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    for source, row in _json_objects(path):
        _require_text("".join(map(str, row.values())), source)
        yield source, _texts(row)


def _require_text(text: str, source: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{source}: half a surrogate pair (an unfinished \\u escape), which is no text") from None


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                source = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    names = reader.fieldnames or []
                    raise DataError(
                        f"{source}: expected {len(names)} columns ({', '.join(names)}), found another number"
                    )
                yield source, _texts(row)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _texts(row: dict[str, object]) -> dict[str, str]:
    """What can fill a template; lists and objects (LAMA's `evidences`) are no text and are left out."""
    return {name: str(value) for name, value in row.items() if isinstance(value, str | int | float)}


def take(row: dict[str, str], name: str, source: str) -> str:
    """``row[name]`` without outer white space, or the error that says what the record has."""
    if name not in row:
        raise DataError(f"{source}: the record has no text field {name!r} (it has: {', '.join(row) or 'none'})")
    value = row[name].strip()
    if not value:
        raise DataError(f"{source}: the field {name!r} is empty")
    return value


def sample(records: list[Record], limit: int | None, seed: int) -> list[Record]:
    """At most ``limit`` records, chosen by ``seed`` and in their file's order."""
    if limit is None or len(records) <= limit:
        return records
    chosen = sorted(random.Random(seed).sample(range(len(records)), limit))
    return [records[index] for index in chosen]
