"""Templates: ``[P*3] {subject} [P*3] [answer]`` and a record become slots.

A slot is an integer: ``slot >= 0`` is a vocabulary id, ``slot < 0`` is row ``-1 - slot`` of the prompt table.
A causal model answers with the token that follows the last slot, so a template ends for it at ``[answer]``; a masked
model has its mask token there and reads on.

A field may say how its text is to be written, ``{choice1:lower,unended}``: one of ``tasks.text_forms``; ``exact`` (its
outer white space stays, and it may be empty); ``shorten`` (its last words are left out where the input would be too
long; nothing else ever is). ``[sep]`` is the tokenizer's separator.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megaptune.errors import DataError, InputTooLong
from megaptune.patterns import Kind
from megaptune.prompts.shortening import shorten
from megaptune.prompts.tokens import TokenForms
from megaptune.tasks.text_forms import TEXT_FORMS


class HasFields(Protocol):
    """A record of any task, as far as a template sees it."""

    @property
    def fields(self) -> dict[str, str]: ...

    @property
    def source(self) -> str: ...


@dataclass(frozen=True)
class Field:
    """A record's field, and how its text is written here."""

    name: str
    forms: tuple[str, ...] = ()
    shortens: bool = False
    exact: bool = False

    def text(self, record: HasFields) -> str:
        if self.name not in record.fields:
            has = ", ".join(record.fields) or "none"
            raise DataError(
                f"{record.source}: the template names the field {{{self.name}}}, which the record lacks (it has: {has})"
            )
        value = record.fields[self.name]
        value = value if self.exact else value.strip()
        if not value and not self.exact:
            raise DataError(f"{record.source}: the field {self.name!r}, which the template names, is empty")
        for form in self.forms:
            value = TEXT_FORMS[form](value)
        return value


@dataclass(frozen=True)
class Text:
    """Words and fields between two tags, in one piece so that the tokenizer sees them together."""

    parts: tuple[str | Field, ...]

    @property
    def fields(self) -> list[Field]:
        return [part for part in self.parts if isinstance(part, Field)]

    def fill(self, record: HasFields) -> str:
        return self.joined({part: part.text(record) for part in self.fields})

    def joined(self, texts: Mapping[Field, str]) -> str:
        return "".join(texts[part] if isinstance(part, Field) else part for part in self.parts)


@dataclass(frozen=True)
class Pseudo:
    count: int


@dataclass(frozen=True)
class Separator:
    pass


@dataclass(frozen=True)
class Answer:
    pass


Part = Text | Pseudo | Separator | Answer

_TAG = re.compile(r"\[P(?:\*(?P<count>\d+))?\]|(?P<answer>\[answer\])|(?P<separator>\[sep\])|\{(?P<field>[^{}]*)\}")
_LOOKS_LIKE_A_TAG = re.compile(r"\[(?:[XY]|mask|sep|p(?:\s*\*\s*\d+)?|answer|\s*P[^\]]*)\]", re.IGNORECASE)


@dataclass(frozen=True)
class EncodedPrompt:
    """slots: the whole input; answer_position: the slot whose hidden state predicts the answer."""

    slots: list[int]
    answer_position: int


@dataclass(frozen=True)
class EncodedChoice:
    """One possible answer: slots: the whole input; positions: the slots whose hidden states predict the answer's
    tokens, in order; targets: those tokens. Its score is the sum of their log-probabilities, or the mean."""

    slots: list[int]
    positions: list[int]
    targets: list[int]

    def steps(self, kind: Kind) -> list[tuple[list[int], int, int]]:
        """The same as inputs that are read at one position each: (slots, position, target) of every token.

        A causal model's stop at the position, so that the inputs of all choices begin alike.
        """
        return [
            (self.slots[: position + 1] if kind == "causal" else self.slots, position, target)
            for position, target in zip(self.positions, self.targets, strict=True)
        ]


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
        return [field.name for field in self._fields]

    @property
    def shortens(self) -> bool:
        """Whether a field may be cut to make an input fit."""
        return any(field.shortens for field in self._fields)

    @property
    def _fields(self) -> list[Field]:
        return [field for part in self.parts if isinstance(part, Text) for field in part.fields]

    def encode(
        self,
        record: HasFields,
        forms: TokenForms,
        first_row: int = 0,
        max_tokens: int | None = None,
        answer_tokens: int = 1,
    ) -> EncodedPrompt:
        """Slots of one record; its pseudo tokens are table rows ``first_row``, ``first_row + 1``, ...

        :param max_tokens: the length that shortenable fields are cut to, special tokens included; None: no limit.
        :param answer_tokens: how many the answer has: a masked model's input has a mask for each.
        :raises DataError: when the record lacks a field of the template, or cannot be cut to ``max_tokens``.
        """
        return self._fitted(record, forms, first_row, max_tokens, answer_tokens)

    def encode_choices(
        self,
        record: HasFields,
        choices: Sequence[str],
        forms: TokenForms,
        first_row: int = 0,
        max_tokens: int | None = None,
        extra_masks: int = 0,
    ) -> list[EncodedChoice]:
        """The record with each of ``choices``, of any number of tokens, at ``[answer]``.

        A causal model reads the choice's tokens after the prompt, all but the last. A masked model has one input for
        all choices, with as many masks as the longest choice has tokens and ``extra_masks`` more, so that their number
        gives no choice away; a choice's tokens are read at the first of them (as PET and P-tuning do for COPA). All
        choices see the same text, cut so that the longest fits.

        :raises DataError: as :meth:`encode`; or for a choice without tokens, or longer than ``max_tokens``.
        """
        tokens = forms.words_after_space(list(choices))
        for choice, ids in zip(choices, tokens, strict=True):
            if not choice.strip() or not ids:
                raise DataError(f"{record.source}: the answer {choice!r} has no tokens")
            if max_tokens is not None and len(ids) > max_tokens:
                raise InputTooLong(
                    f"{record.source}: the answer {choice[:60]!r} is {len(ids)} tokens long, an input may have "
                    f"{max_tokens}; leave the record out or allow longer inputs"
                )
        longest = max(map(len, tokens), default=1) + (extra_masks if self.kind == "masked" else 0)
        prompt = self._fitted(record, forms, first_row, max_tokens, answer_tokens=longest)
        first = prompt.answer_position
        return [
            EncodedChoice(
                prompt.slots + ids[:-1] if self.kind == "causal" else prompt.slots,
                list(range(first, first + len(ids))),
                ids,
            )
            for ids in tokens
        ]

    def _fitted(
        self, record: HasFields, forms: TokenForms, first_row: int, max_tokens: int | None, answer_tokens: int
    ) -> EncodedPrompt:
        """The input with its shortenable fields cut to what ``max_tokens`` leaves beside the answer."""
        texts = {field: field.text(record) for field in self._fields}
        # A causal model reads all of an answer's tokens but the last; a masked one's masks stand in the input.
        behind = answer_tokens - 1 if self.kind == "causal" else 0

        def num_tokens(tried: Mapping[Field, str]) -> int:
            return len(self._assemble(tried, forms, first_row, answer_tokens).slots) + behind

        prompt = self._assemble(texts, forms, first_row, answer_tokens)
        if max_tokens is None or len(prompt.slots) + behind <= max_tokens:
            return prompt
        where = f"{record.source}: template {self.text!r}"
        cuttable = [field for field in texts if field.shortens]
        texts = shorten(texts, cuttable, max_tokens, num_tokens, forms, where)
        return self._assemble(texts, forms, first_row, answer_tokens)

    def _assemble(self, texts: Mapping[Field, str], forms: TokenForms, first_row: int, masks: int) -> EncodedPrompt:
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
                slots.extend([forms.mask_id] * masks if self.kind == "masked" else [])
            elif isinstance(part, Separator):
                slots.append(forms.separator_id)
            else:
                text = part.joined(texts)
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
    words: list[str | Field] = []

    def close_text() -> None:
        if any(isinstance(value, Field) or value.strip() for value in words):
            parts.append(Text(tuple(words)))
        words.clear()

    end = 0
    for tag in _TAG.finditer(text):
        words.extend(_words(text, text[end : tag.start()]))
        end = tag.end()
        if tag["field"] is not None:
            words.append(_field(text, tag["field"]))
            continue
        close_text()
        if tag["answer"]:
            parts.append(Answer())
        elif tag["separator"]:
            parts.append(Separator())
        elif tag["count"] is not None and int(tag["count"]) == 0:
            raise DataError(f"template {text!r}: [P*0] is no pseudo token; leave it out")
        else:
            parts.append(Pseudo(int(tag["count"] or 1)))
    words.extend(_words(text, text[end:]))
    close_text()
    return parts


def _field(template: str, inside: str) -> Field:
    """``choice1:lower,unended`` as it stands between two braces."""
    name, colon, listed = inside.partition(":")
    if not name.strip():
        raise DataError(f"template {template!r}: a field needs a name between its braces")
    ways = [way.strip() for way in listed.split(",")] if colon else []
    known = (*TEXT_FORMS, "shorten", "exact")
    unknown = [way for way in ways if way not in known]
    if unknown:
        raise DataError(f"template {template!r}: {{{inside}}} says {unknown[0]!r}; expected {', '.join(known)}")
    forms = tuple(way for way in ways if way in TEXT_FORMS)
    return Field(name.strip(), forms, "shorten" in ways, "exact" in ways)


def _words(template: str, words: str) -> list[str]:
    suspicious = _LOOKS_LIKE_A_TAG.search(words)
    if suspicious:
        raise DataError(
            f"template {template!r}: {suspicious[0]!r} is no tag; write [P] or [P*3] for pseudo tokens, [answer] for "
            "the answer, [sep] for a separator, {name} for a field"
        )
    if "{" in words or "}" in words:
        raise DataError(f"template {template!r}: an unmatched brace")
    return [words] if words else []
