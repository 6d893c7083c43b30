"""SuperGLUE examples as the backbone sees them, under one pattern.

With a verbalizer an example is one input whose answer position is compared with the label words; without one it is an
input for each of its choices, scored by the likelihood of the choice's tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megaptune.errors import DataError, InputTooLong
from megaptune.patterns import LABELS, Kind, Pattern, TaskName, TaskPatterns
from megaptune.prompts.label_words import LabelWords
from megaptune.prompts.template import EncodedChoice, Template
from megaptune.prompts.tokens import TokenForms
from megaptune.tasks.superglue.records import SplitData, SuperGlueRecord


@dataclass(frozen=True)
class LabelExample:
    """slots: the input; answer_position: the slot whose state is read; label: index in the label words, or None."""

    slots: list[int]
    answer_position: int
    label: int | None
    record: SuperGlueRecord


@dataclass(frozen=True)
class ChoiceExample:
    """choices: each with its input, positions and targets; right: the indices of the right ones, where known."""

    choices: list[EncodedChoice]
    right: tuple[int, ...]
    record: SuperGlueRecord


class PatternEncoder:
    """One task's examples under one pattern, for one backbone.

    label_words: the verbalizer's tokens; None for a pattern that the examples' own choices answer.
    max_tokens: the task's length, at most ``context_tokens``, which the backbone holds, less the ``virtual_tokens`` of
    a deep prompt.

    :raises DataError: for a pattern or verbalizer that does not fit the task or the backbone.
    """

    def __init__(
        self,
        task: TaskName,
        pattern: Pattern,
        patterns: TaskPatterns,
        forms: TokenForms,
        kind: Kind,
        context_tokens: int,
        virtual_tokens: int = 0,
    ) -> None:
        if kind not in pattern.families:
            raise DataError(f"{task}: the pattern {pattern.text!r} is not meant for {kind} backbones")
        self.task, self.forms, self.extra_masks = task, forms, patterns.extra_masks
        self.max_tokens = min(patterns.max_tokens, context_tokens - virtual_tokens)
        self.why_short = ""
        if virtual_tokens and self.max_tokens < patterns.max_tokens:
            holds = f"; the backbone's context holds {context_tokens}"
            self.why_short = f"{holds}, and a deep prompt takes {virtual_tokens} of them"
        self.template = Template(pattern.text, kind)
        self.label_words: LabelWords | None = None
        if pattern.verbalizer is not None:
            words = patterns.verbalizers[pattern.verbalizer]
            where = f"{task}: verbalizer {pattern.verbalizer}"
            self.label_words = LabelWords.of(LABELS[task], words, forms, where)

    def encode(self, record: SuperGlueRecord, first_row: int = 0) -> LabelExample | ChoiceExample:
        """One example, of at most ``max_tokens`` slots.

        :raises DataError: for an example that cannot be cut to that, or without choices where they are needed.
        """
        try:
            return self._encoded(record, first_row)
        except InputTooLong as error:
            raise InputTooLong(f"{error}{self.why_short}") from None

    def _encoded(self, record: SuperGlueRecord, first_row: int) -> LabelExample | ChoiceExample:
        if self.label_words is not None:
            prompt = self.template.encode(record, self.forms, first_row, self.max_tokens)
            label = None if record.label is None else self.label_words.labels.index(record.label)
            return LabelExample(prompt.slots, prompt.answer_position, label, record)
        if not record.choices:
            raise DataError(f"{record.source}: the example has no choices; its pattern needs a verbalizer")
        choices = self.template.encode_choices(
            record, record.choices, self.forms, first_row, self.max_tokens, self.extra_masks
        )
        return ChoiceExample(choices, record.right, record)

    def encode_all(self, records: Iterable[SuperGlueRecord]) -> list[LabelExample | ChoiceExample]:
        return [self.encode(record) for record in records]

    def training_records(self, data: SplitData) -> tuple[list[SuperGlueRecord], int]:
        """The records that training can use, and how many it cannot: with choices, those without a right one (a WSC
        span that is not meant) teach nothing.

        :raises DataError: when nothing is left, or a verbalizer would see one label only.
        """
        if self.label_words is not None:
            data.require_two_labels()
            return data.records, 0
        kept = [record for record in data.records if record.right]
        if not kept:
            raise DataError(f"{self.task} {data.split}: no example has a right choice; nothing can be trained on it")
        return kept, len(data.records) - len(kept)

    def prediction(self, record: SuperGlueRecord, best: int) -> str:
        """What the highest-scored label word or choice predicts, as the metrics and submission files spell it."""
        return self.label_words.labels[best] if self.label_words is not None else record.prediction(best)
