"""What one job's model says of records in memory, and jobs that learn from what models say: the parts of ensembles and
distillation.

Inside a trainer's ``finish`` the host and the table are those of the best epoch; that is where a model is asked.

N records, O options of the one with most, R table rows, D backbone width.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from megaptune.batches import Member
from megaptune.jobs import Job
from megaptune.option_scoring import OptionOutcome
from megaptune.superglue_examples import EncodedOptions
from megaptune.tasks.superglue.records import SuperGlueRecord
from megaptune.trainer import Stage


def ask(stage: Stage, job: Job, records: Sequence[SuperGlueRecord], table: Tensor, first_row: int = 0) -> OptionOutcome:
    """Scores and log-probabilities [N, O] of the options of records, under the job's pattern or its head.

    Collective: every rank calls this with the same records. The job's rows of ``table`` [R, D] begin at ``first_row``.
    """
    encoded = job.encoded
    assert isinstance(encoded, EncodedOptions)
    members = [Member(encoded.encode(record), first_row, job.number) for record in records]
    found = stage.evaluate(members, table, [])["options"]
    assert isinstance(found, OptionOutcome)
    return found


def with_soft_labels(
    encoded: EncodedOptions,
    records: Sequence[SuperGlueRecord],
    probabilities: Tensor,
    temperature: float = 1.0,
    keeps_train: bool = False,
) -> EncodedOptions:
    """The same task with ``records`` to train on, whose options have the ``probabilities`` [N, O] to learn.

    :param temperature: what scores are divided by in the loss; the probabilities should have been made with the same.
    :param keeps_train: whether the labelled training examples stay beside them.
    """
    soft = []
    for record, row in zip(records, probabilities.tolist(), strict=True):
        example = encoded.encode(record)
        soft.append(replace(example, soft=tuple(row[: len(example.options)]), temperature=temperature))
    return replace(encoded, train=[*(encoded.train if keeps_train else []), *soft])
