"""Templates: ``[P*3] {subject} [P*3] [answer]`` and a record become slots.

A slot is an integer: ``slot >= 0`` is a vocabulary id, ``slot < 0`` is row ``-1 - slot`` of the prompt table.
A causal model answers with the token that follows the last slot, so a template ends for it at ``[answer]``; a masked
model has its mask token there and reads on.
"""

import re
from dataclasses import dataclass
from typing import Literal

from megaptune.errors import DataError
from megaptune.prompts.tokens import TokenForms
from megaptune.tasks.records import Record

Kind = Literal["causal", "masked"]


@dataclass(frozen=True)
class Text:
    """Words and fields between two tags, in one piece so that the tokenizer sees them together."""

    parts: tuple[tuple[Literal["words", "field"], str], ...]

    def fill(self, record: Record) -> str:
        return "".join(value if kind == "words" else _field(record, value) for kind, value in self.parts)


@dataclass(frozen=True)
class Pseudo:
    count: int


@dataclass(frozen=True)
class Answer:
    pass


Part = Text | Pseudo | Answer

_TAG = re.compile(r"\[P(?:\*(?P<count>\d+))?\]|(?P<answer>\[answer\])|\{(?P<field>[^{}]*)\}")
_LOOKS_LIKE_A_TAG = re.compile(r"\[(?:[XY]|mask|p(?:\s*\*\s*\d+)?|answer|\s*P[^\]]*)\]", re.IGNORECASE)


@dataclass(frozen=True)
class EncodedPrompt:
    """slots: the whole input; answer_position: the slot whose hidden state predicts the answer."""

    slots: list[int]
    answer_position: int


class Template:
    """:raises DataError: at construction for a text without exactly one ``[answer]``, a mistyped tag, or ``[P*0]``."""

    def __init__(self, text: str, kind: Kind) -> None:
        self.text, self.kind = text, kind
        self.parts = _parse(text)
        answers = [index for index, part in enumerate(self.parts) if isinstance(part, Answer)]
        if len(answers) != 1:
            found = "has none" if not answers else f"has {len(answers)}"
            raise DataError(f"template {text!r}: expected one [answer], it {found}")
        if kind == "causal":
            self.parts = self.parts[: answers[0] + 1]
            if len(self.parts) == 1:
                raise DataError(f"template {text!r}: a causal model needs something before [answer]")

    @property
    def num_pseudo_tokens(self) -> int:
        return sum(part.count for part in self.parts if isinstance(part, Pseudo))

    @property
    def fields(self) -> list[str]:
        texts = [part for part in self.parts if isinstance(part, Text)]
        return [value for text in texts for kind, value in text.parts if kind == "field"]

    def encode(self, record: Record, forms: TokenForms, first_row: int = 0) -> EncodedPrompt:
        """Slots of one record; its pseudo tokens are table rows ``first_row``, ``first_row + 1``, ...

        :raises DataError: when the record lacks a field of the template.
        """
        before, after = forms.specials
        slots = list(before)
        row = first_row
        answer_position = -1
        for index, part in enumerate(self.parts):
            if isinstance(part, Pseudo):
                slots.extend(-1 - (row + offset) for offset in range(part.count))
                row += part.count
            elif isinstance(part, Answer):
                answer_position = len(slots) - 1 if self.kind == "causal" else len(slots)
                slots.extend([forms.mask_id] if self.kind == "masked" else [])
            else:
                text = part.fill(record)
                follows = index > 0 and text[:1].isspace()
                words = text.strip()
                if words:
                    slots.extend(forms.after_space(words) if follows else forms.at_start(words))
        slots.extend(after if self.kind == "masked" else [])
        return EncodedPrompt(slots, answer_position)


def without_pseudo_tokens(text: str) -> str:
    """A template's text with its pseudo tokens taken out: what plain fine-tuning reads.

    "[P*3] {city} [P*3] [answer]" becomes "{city} [answer]".
    """
    return re.sub(r"\s+", " ", re.sub(r"\[P(?:\*\d+)?\]", "", text)).strip()


def _parse(text: str) -> list[Part]:
    parts: list[Part] = []
    words: list[tuple[Literal["words", "field"], str]] = []

    def close_text() -> None:
        if any(kind == "field" or value.strip() for kind, value in words):
            parts.append(Text(tuple(words)))
        words.clear()

    end = 0
    for tag in _TAG.finditer(text):
        words.extend(_words(text, text[end : tag.start()]))
        end = tag.end()
        if tag["field"] is not None:
            if not tag["field"].strip():
                raise DataError(f"template {text!r}: a field needs a name between its braces")
            words.append(("field", tag["field"].strip()))
            continue
        close_text()
        if tag["answer"]:
            parts.append(Answer())
        elif tag["count"] is not None and int(tag["count"]) == 0:
            raise DataError(f"template {text!r}: [P*0] is no pseudo token; leave it out")
        else:
            parts.append(Pseudo(int(tag["count"] or 1)))
    words.extend(_words(text, text[end:]))
    close_text()
    return parts


def _words(template: str, words: str) -> list[tuple[Literal["words", "field"], str]]:
    suspicious = _LOOKS_LIKE_A_TAG.search(words)
    if suspicious:
        raise DataError(
            f"template {template!r}: {suspicious[0]!r} is no tag; write [P] or [P*3] for pseudo tokens, [answer] for "
            "the answer, {name} for a field"
        )
    if "{" in words or "}" in words:
        raise DataError(f"template {template!r}: an unmatched brace")
    return [("words", words)] if words else []


def _field(record: Record, name: str) -> str:
    if name not in record.fields:
        has = ", ".join(record.fields) or "none"
        raise DataError(
            f"{record.source}: the template names the field {{{name}}}, which the record lacks (it has: {has})"
        )
    value = record.fields[name].strip()
    if not value:
        raise DataError(f"{record.source}: the field {name!r}, which the template names, is empty")
    return value
