"""What every way of computing is given: the same examples in the same batches.

LAMA's relation P17 and BoolQ's passages where ``$MEGAPTUNE_DATA`` has them, else the shipped facts.

B examples, C candidates.
"""

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaptune.config import LamaTask
from megaptune.examples import Example
from megaptune.prompts.template import Template
from megaptune.prompts.tokens import TokenForms
from megaptune.prompts.verbalizer import Verbalizer
from megaptune.tasks.lama import load_lama
from megaptune.tasks.records import Record, read_rows

SHIPPED = Path(__file__).resolve().parents[2] / "configs/facts/city_continent/train.jsonl"
SHORT = "[P*3] {subject} [P*3] [answer]"
LONG = "{passage} {subject} ? [P*6] [answer]"
ROWS = 6


@dataclass(frozen=True)
class Workload:
    """``batches``: lists of B examples under ``template``; ``candidates``: token ids [C] of all the task's answers."""

    name: str
    source: str
    template: str
    batches: list[list[Example]]
    candidates: Tensor

    @property
    def examples(self) -> list[Example]:
        return list(itertools.chain.from_iterable(self.batches))

    @property
    def tokens_per_example(self) -> float:
        return sum(len(example.slots) for example in self.examples) / len(self.examples)


class Data:
    """Records of short and long inputs, from the data folder or from a file of facts.

    :param root: the folder that ``$MEGAPTUNE_DATA`` names, or None.
    :param facts: JSON lines whose first two fields are a subject and an answer of one token.
    """

    def __init__(self, root: Path | None, facts: Path | None, tokenizer: Any) -> None:
        self.root = root if facts is None else None
        self.facts = facts or SHIPPED
        self.tokenizer, self.forms = tokenizer, TokenForms(tokenizer)

    def short(self, batch: int, batches: int) -> Workload:
        """One relation's facts, the prompt on both sides of the subject."""
        records, source = list(self._facts()), self.facts.parent.name
        if self.root is not None:
            (records,), source = self._relations(["P17"]), "LAMA P17"
        return self._workload("short", source, SHORT, records, _answers(records), batch, batches)

    def passages(self, batch: int, batches: int, tokens: int) -> Workload:
        """A passage and a question, some ``tokens`` together, and the prompt after them."""
        records, source = self._boolq(tokens), f"BoolQ val, {tokens} tokens"
        answers = ["no", "yes"]
        if self.root is None:
            records, source = self._joined_facts(tokens), f"joined facts of {self.facts.parent.name}"
            answers = _answers(self._facts())
        return self._workload("passages", source, LONG, records, answers, batch, batches)

    def bank(self, relations: int, rows: int, batches: int) -> list[Workload]:
        """``relations`` tasks of ``rows`` examples a step."""
        if self.root is not None:
            found = self._relations("all")
            names = [Path(records[0].source).parent.name for records in found]
            return [
                self._workload(name, "LAMA", SHORT, records, _answers(records), rows, batches)
                for name, records in itertools.islice(zip(names, found, strict=True), relations)
            ]
        records, source = list(self._facts()), self.facts.parent.name
        parts = [records[start::relations] for start in range(relations)]
        return [
            self._workload(f"part {n}", source, SHORT, part, _answers(records), rows, batches)
            for n, part in enumerate(parts)
        ]

    # -- records -----------------------------------------------------------------------------------------------------

    def _relations(self, wanted: Any) -> list[list[Record]]:
        assert self.root is not None
        tasks = load_lama(LamaTask(type="lama", root=self.root / "LAMA", relations=wanted), None)
        return [task.splits["train"] for task in tasks]

    def _facts(self) -> Iterable[Record]:
        for source, row in read_rows(self.facts):
            subject, answer = itertools.islice(row.values(), 2)
            yield Record({"subject": subject}, answer, source, subject)

    def _boolq(self, tokens: int) -> Iterable[Record]:
        """Questions with passages of at least three quarters of ``tokens``, cut where both together reach them."""
        assert self.root is not None
        for line in (self.root / "SuperGLUE/BoolQ/val.jsonl").open(encoding="utf-8"):
            row = json.loads(line)
            room = tokens - len(self.forms.after_space(row["question"] + " ?"))
            ends = self.tokenizer(row["passage"], return_offsets_mapping=True, add_special_tokens=False)
            offsets = ends["offset_mapping"][:room]
            if len(offsets) < 3 * room // 4:
                continue
            fields = {"passage": row["passage"][: offsets[-1][1]], "subject": row["question"]}
            yield Record(fields, "yes" if row["label"] else "no", f"BoolQ {row['idx']}")

    def _joined_facts(self, tokens: int) -> Iterable[Record]:
        facts = list(self._facts())
        around = itertools.cycle(facts)
        for fact in facts:
            passage = ""
            while len(self.forms.at_start(passage)) < tokens:
                other = next(around)
                passage = f"{passage} {other.subject} in {other.answer} .".strip()
            yield Record({"passage": passage, "subject": fact.subject}, fact.answer, fact.source)

    def _workload(
        self, name: str, source: str, text: str, records: Iterable[Record], answers: list[str], batch: int, batches: int
    ) -> Workload:
        """The first ``batches`` x ``batch`` records with answers of one token; fewer records are used again."""
        template, token_of = Template(text, "causal"), Verbalizer.of(answers, self.forms).token_of
        usable = (record for record in records if record.answer in token_of)
        found = []
        for record in itertools.islice(usable, batch * batches):
            prompt = template.encode(record, self.forms)
            found.append(Example(prompt.slots, prompt.answer_position, token_of[record.answer], record))
        if not found:
            raise SystemExit(f"{source}: no answer is one token of this backbone")
        rows = list(itertools.islice(itertools.cycle(found), batch * batches))
        cut = [rows[start : start + batch] for start in range(0, len(rows), batch)]
        return Workload(name, source, text, cut, torch.tensor(sorted(set(token_of.values()))))


def _answers(records: Iterable[Record]) -> list[str]:
    return sorted({record.answer for record in records})
