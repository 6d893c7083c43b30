"""A SuperGLUE example, and the reading of its JSON with errors that name file, line and field."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from megaptune.errors import DataError
from megaptune.patterns import CHOICE_TASKS, LABELS, TaskName

Idx = tuple[int, ...]
"""An example's number in the official files; MultiRC's is (passage, question, answer)."""

FALLBACK: dict[TaskName, str] = {
    "BoolQ": "false",
    "CB": "contradiction",
    "COPA": "0",
    "MultiRC": "0",
    "RTE": "not_entailment",
    "WiC": "false",
    "WSC": "false",
    "ReCoRD": "",
}
"""What is predicted for an example that had to be skipped."""


@dataclass(frozen=True)
class SuperGlueRecord:
    """One example.

    fields: the texts that a template may name; label: as ``LABELS`` spells it, None where the file has none (test,
    unlabeled, ReCoRD); choices: the answers to choose from (COPA: the two alternatives, WSC: the first span and other
    phrases of the text, ReCoRD: the passage's entities); answers: ReCoRD's right ones, empty where the file has none.
    """

    task: TaskName
    idx: Idx
    fields: dict[str, str]
    source: str
    label: str | None = None
    choices: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def gold(self) -> tuple[str, ...]:
        """What a prediction is compared with; empty where the file does not say."""
        return self.answers if self.label is None else (self.label,)

    @property
    def told(self) -> str:
        """What is right, for the console."""
        return " or ".join(self.gold) or "(no label)"

    @property
    def right(self) -> tuple[int, ...]:
        """Which of ``choices`` are right; none where that is not known, as for a WSC span that is not meant."""
        if self.task == "ReCoRD":
            return tuple(index for index, choice in enumerate(self.choices) if choice in self.answers)
        if self.task == "WSC":
            return (0,) if self.label == "true" else ()
        return () if self.label is None or self.task not in CHOICE_TASKS else (int(self.label),)

    def mirrored(self) -> "SuperGlueRecord":
        """A COPA example with its two choices changed over: P-tuning's released code trains on both."""
        assert self.task == "COPA", "only COPA has two choices whose order means nothing"
        fields = {**self.fields, "choice1": self.fields["choice2"], "choice2": self.fields["choice1"]}
        label = None if self.label is None else str(1 - int(self.label))
        return replace(self, fields=fields, label=label, choices=self.choices[::-1])

    def prediction(self, chosen: int) -> str:
        """What choosing ``choices[chosen]`` predicts, in the words of ``gold``."""
        if self.task == "ReCoRD":
            return self.choices[chosen]
        if self.task == "WSC":
            return "true" if chosen == 0 else "false"
        return str(chosen)


@dataclass(frozen=True)
class Skip:
    """An example that a task cannot use, and why; ``gold`` as a record's."""

    idx: Idx
    source: str
    reason: str
    gold: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitData:
    """One file of a task. remarks: what was read otherwise than it is written, counted."""

    task: TaskName
    split: str
    records: list[SuperGlueRecord]
    skipped: list[Skip] = field(default_factory=list)
    remarks: Counter[str] = field(default_factory=Counter)

    @property
    def gold(self) -> dict[Idx, tuple[str, ...]]:
        """Every labelled example's right answers, those of skipped examples too: a score counts them all."""
        found = {record.idx: record.gold for record in self.records} | {skip.idx: skip.gold for skip in self.skipped}
        return {idx: gold for idx, gold in found.items() if gold}

    def complete(self, predictions: dict[Idx, str]) -> dict[Idx, str]:
        """``predictions`` with the fallback for each skipped example."""
        return {**{skip.idx: FALLBACK[self.task] for skip in self.skipped}, **predictions}

    def labels(self) -> Counter[str]:
        return Counter(record.label for record in self.records if record.label is not None)

    def summary(self) -> str:
        """One line for the console: counts, labels, what was skipped and where first, what was read otherwise."""
        counts = ", ".join(f"{count} {label}" for label, count in sorted(self.labels().items()))
        line = f"{self.task} {self.split}: {len(self.records)} examples" + (f" ({counts})" if counts else "")
        for reason, count in Counter(skip.reason for skip in self.skipped).items():
            first = next(skip.source for skip in self.skipped if skip.reason == reason)
            line += f"; skipped: {count} {reason} (first: {first})"
        return line + "".join(f"; {count} {remark}" for remark, count in self.remarks.items())

    def require_two_labels(self) -> None:
        """:raises DataError: where a classifier would see one class only, as with FewGLUE's WSC training file."""
        found = self.labels()
        if len(found) == 1 and LABELS[self.task]:
            (label,) = found
            raise DataError(
                f"{self.task} {self.split}: all {len(self.records)} examples are labelled {label!r}, so that a "
                "classifier would learn nothing else; train on a file with several labels"
                + (", or use a pattern without a verbalizer" if self.task in CHOICE_TASKS else "")
            )


class Row:
    """A JSON object whose values are asked for with the kind that they must have."""

    def __init__(self, values: Any, source: str, place: str = "") -> None:
        if not isinstance(values, dict):
            raise DataError(f"{source}: expected {place or 'a line'} to be a JSON object, found {_told(values)}")
        self.values, self.source, self.place = values, source, place

    def _take(self, name: str) -> Any:
        if name not in self.values:
            has = ", ".join(self.values) or "none"
            inside = f"{self.place} has" if self.place else "the record has"
            raise DataError(f"{self.source}: {inside} no field {name!r} (it has: {has})")
        return self.values[name]

    def _wrong(self, name: str, expected: str) -> DataError:
        return DataError(
            f"{self.source}: expected {expected} in the field {self.path(name)!r}, found {_told(self.values[name])}"
        )

    def path(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name

    def text(self, name: str) -> str:
        """A text with something in it; outer white space is taken off."""
        value = self.raw_text(name).strip()
        if not value:
            raise DataError(f"{self.source}: the field {self.path(name)!r} is empty")
        return value

    def raw_text(self, name: str) -> str:
        """A text exactly as it stands, for offsets into it."""
        value = self._take(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a text")
        return value

    def number(self, name: str) -> int:
        value = self._take(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "a whole number")
        return value

    def row(self, name: str) -> "Row":
        return Row(self._take(name), self.source, self.path(name))

    def rows(self, name: str) -> list["Row"]:
        value = self._take(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list")
        return [Row(member, self.source, f"{self.path(name)}[{index}]") for index, member in enumerate(value)]

    def label(self, task: TaskName) -> str:
        """The field ``label`` as ``LABELS`` spells it; a JSON boolean or number may also be written as a text."""
        value = self._take("label")
        spelled = str(value).lower() if isinstance(value, bool) else str(value)
        if task in ("BoolQ", "WiC", "WSC"):
            spelled = spelled.lower()  # predictions write "True"
        if spelled not in LABELS[task] or isinstance(value, float):
            expected = ", ".join(LABELS[task])
            raise DataError(f"{self.source}: {value!r} is no label of {task}; expected one of {expected}")
        return spelled


def _told(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    text = repr(value)
    return f"{kinds.get(type(value), 'a number')} ({text[:40]}{'...' if len(text) > 40 else ''})"
