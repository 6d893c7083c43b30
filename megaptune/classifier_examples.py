"""SuperGLUE examples for a classification head: the texts side by side, without a pattern, read at one position.

A causal model is read at the last token, a masked one at a mask behind the text. Tasks with choices of their own have
an input and one score for each choice, so that they can be trained on examples whose choice is known to be right.
"""

from collections.abc import Sequence
from dataclasses import replace

from megaptune.option_examples import OptionExample, from_classes, from_scored
from megaptune.patterns import CHOICE_TASKS, LABELS, Kind, TaskName
from megaptune.prompts.template import EncodedPrompt, Template
from megaptune.prompts.tokens import TokenForms
from megaptune.tasks.superglue.records import SplitData, SuperGlueRecord

TEXTS: dict[TaskName, str] = {
    "BoolQ": "{passage:shorten} [sep] {question} [answer]",
    "CB": "{premise:shorten} [sep] {hypothesis} [answer]",
    "COPA": "{premise} [sep] {connective} {choice} [answer]",
    "MultiRC": "{passage:shorten} [sep] {question} {answer} [answer]",
    "RTE": "{premise:shorten} [sep] {hypothesis} [answer]",
    "WiC": "{marked1:shorten} [sep] {marked2:shorten} [sep] {word} [answer]",
    "WSC": "{marked} [sep] {choice} [answer]",
    "ReCoRD": "{passage:shorten} [sep] {before:exact}{choice}{after:exact} [answer]",
}
"""``{choice}`` is one of the example's choices; a causal model has line ends for separators."""


class ClassifierEncoder:
    """One task's examples for a head, for one backbone; ``rows``: of its weights."""

    def __init__(self, task: TaskName, forms: TokenForms, kind: Kind, max_tokens: int) -> None:
        text = TEXTS[task] if kind == "masked" else TEXTS[task].replace(" [sep] ", "\n")
        self.task, self.forms, self.max_tokens = task, forms, max_tokens
        self.template = Template(text, kind)
        self.labels = () if task in CHOICE_TASKS else LABELS[task]
        self.rows = len(self.labels) or 1

    def encode(self, record: SuperGlueRecord) -> OptionExample:
        """:raises DataError: for an example that cannot be cut to the length."""
        if self.labels:
            prompt = self._fitted(record)
            right = () if record.label is None else (self.labels.index(record.label),)
            return from_classes(prompt.slots, prompt.answer_position, len(self.labels), right, record)
        filled = [replace(record, fields={**record.fields, "choice": choice}) for choice in record.choices]
        inputs = [self._fitted(one) for one in filled]
        return from_scored([(one.slots, one.answer_position) for one in inputs], record.right, record)

    def _fitted(self, record: SuperGlueRecord) -> EncodedPrompt:
        return self.template.encode(record, self.forms, max_tokens=self.max_tokens)

    def training_records(self, data: SplitData) -> Sequence[SuperGlueRecord]:
        """:raises DataError: when a head would see one label only."""
        if self.labels:
            data.require_two_labels()
            return data.records
        return [record for record in data.records if record.right]
