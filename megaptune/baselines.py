"""What a gain must be held against: scores that need no knowledge of a fact."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megaptune.tasks.records import Record, TaskData


@dataclass(frozen=True)
class Baselines:
    """What a gain must be held against. All are shares of the test records, between 0 and 1.

    majority: right when always answering the training split's commonest answer (the test split's, without one).
    unseen: the answer is no training record's. in_subject: the answer stands inside the subject, to be copied.
    shared_facts: the same subject and answer is a training record.
    """

    majority: float
    unseen: float
    in_subject: float
    shared_facts: float


def baselines(data: TaskData, test: Sequence[Record] | None = None) -> Baselines:
    """Of the test records, or of some of them."""
    train = data.splits["train"]
    test = data.splits["test"] if test is None else test
    total = len(test)
    common = commonest(data)
    seen = {record.answer for record in train}
    facts = {(record.subject, record.answer) for record in train}
    return Baselines(
        majority=sum(record.answer == common for record in test) / total,
        unseen=sum(record.answer not in seen for record in test) / total,
        in_subject=sum(stands_in_subject(record) for record in test) / total,
        shared_facts=sum((record.subject, record.answer) in facts for record in test) / total,
    )


def commonest(data: TaskData) -> str:
    """The training split's commonest answer; the test split's, without one."""
    return Counter(record.answer for record in data.splits["train"] or data.splits["test"]).most_common(1)[0][0]


def stands_in_subject(record: Record) -> bool:
    return record.answer.casefold() in record.subject.casefold()


def easy(data: TaskData) -> list[bool]:
    """Of each test record: can it be answered without knowing the fact, by the commonest answer or by copying from the
    subject?"""
    common = commonest(data)
    return [record.answer == common or stands_in_subject(record) for record in data.splits["test"]]
