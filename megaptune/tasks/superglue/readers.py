"""One function per task: a line of its official file becomes records and skips."""

import re
from collections import Counter
from collections.abc import Callable, Iterator

from megaptune.errors import DataError
from megaptune.patterns import TaskName
from megaptune.tasks.superglue.antecedents import other_antecedents
from megaptune.tasks.superglue.records import Row, Skip, SuperGlueRecord
from megaptune.tasks.superglue.spans import inside, marked, word_span
from megaptune.tasks.text_forms import lower, unended

Reader = Callable[[Row, bool, Counter[str]], Iterator[SuperGlueRecord | Skip]]
"""(line, whether its labels are read, remarks to count in) -> the line's examples."""

OUTSIDE = "span outside the text"
PLACEHOLDER = "@placeholder"


def _simple(task: TaskName, names: tuple[str, ...]) -> Reader:
    """A task whose fields are texts as they stand."""

    def read(row: Row, labelled: bool, remarks: Counter[str]) -> Iterator[SuperGlueRecord | Skip]:
        fields = {name: row.text(name) for name in names}
        label = row.label(task) if labelled else None
        yield SuperGlueRecord(task, (row.number("idx"),), fields, row.source, label)

    return read


def _copa(row: Row, labelled: bool, remarks: Counter[str]) -> Iterator[SuperGlueRecord | Skip]:
    """Fields besides the file's: ``connective``, "because" for a cause and "so" for an effect. The choices are written
    as they go on after it: with a small first letter, without their full stop."""
    fields = {name: row.text(name) for name in ("premise", "choice1", "choice2", "question")}
    connective = {"cause": "because", "effect": "so"}.get(fields["question"])
    if connective is None:
        raise DataError(f"{row.source}: the question is {fields['question']!r}; expected cause or effect")
    fields["connective"] = connective
    label = row.label("COPA") if labelled else None
    choices = tuple(unended(lower(fields[name])) for name in ("choice1", "choice2"))
    yield SuperGlueRecord("COPA", (row.number("idx"),), fields, row.source, label, choices)


def _multirc(row: Row, labelled: bool, remarks: Counter[str]) -> Iterator[SuperGlueRecord | Skip]:
    """One record an answer."""
    passage = row.row("passage")
    text = passage.text("text")
    for question in passage.rows("questions"):
        asked = question.text("question")
        for answer in question.rows("answers"):
            idx = row.number("idx"), question.number("idx"), answer.number("idx")
            label = answer.label("MultiRC") if labelled else None
            if not answer.raw_text("text").strip():
                yield Skip(idx, row.source, "empty answer", (label,) if label else ())
                continue
            fields = {"passage": text, "question": asked, "answer": answer.text("text")}
            yield SuperGlueRecord("MultiRC", idx, fields, row.source, label)


def _wic(row: Row, labelled: bool, remarks: Counter[str]) -> Iterator[SuperGlueRecord | Skip]:
    """Fields besides the file's: ``form1``, ``form2``, the word as each sentence inflects it, and ``marked1``,
    ``marked2``, the sentences with asterisks around it."""
    idx, label = (row.number("idx"),), row.label("WiC") if labelled else None
    fields = {"word": row.text("word")}
    for n in "12":
        sentence, start, end = row.raw_text(f"sentence{n}"), row.number(f"start{n}"), row.number(f"end{n}")
        if not inside(sentence, start, end):
            yield Skip(idx, row.source, OUTSIDE, (label,) if label else ())
            return
        fields |= {
            f"sentence{n}": sentence,
            f"form{n}": sentence[start:end],
            f"marked{n}": marked(sentence, start, end),
        }
    yield SuperGlueRecord("WiC", idx, fields, row.source, label)


def _wsc(row: Row, labelled: bool, remarks: Counter[str]) -> Iterator[SuperGlueRecord | Skip]:
    """Fields: ``text``, ``marked`` (asterisks around the pronoun), ``pronoun``, ``span`` (what it may refer to). A span
    that starts one word later than the file says is taken there, as PET does by hand for one validation row."""
    idx, label = (row.number("idx"),), row.label("WSC") if labelled else None
    text, target = row.raw_text("text"), row.row("target")
    places = []
    for n in "12":
        span, index = target.text(f"span{n}_text"), target.number(f"span{n}_index")
        place = word_span(text, span, index)
        if place is None:
            place = word_span(text, span, index + 1) if index >= 0 else None
            if place is None:
                yield Skip(idx, row.source, OUTSIDE, (label,) if label else ())
                return
            remarks["span one word later than its index says"] += 1
        places.append(place)
    (_, _), pronoun = places
    span = target.text("span1_text")
    fields = {
        "text": text,
        "marked": marked(text, *pronoun),
        "pronoun": text[slice(*pronoun)],
        "span": span,
    }
    choices = (span, *other_antecedents(text, span, pronoun))
    yield SuperGlueRecord("WSC", idx, fields, row.source, label, choices)


def _record(row: Row, labelled: bool, remarks: Counter[str]) -> Iterator[SuperGlueRecord | Skip]:
    """One record a query. Fields: ``passage`` (its highlights as a list with dashes), ``query`` (with @placeholder),
    ``before`` and ``after``, what stands around the first placeholder. The choices are the passage's entities."""
    passage = row.row("passage")
    text = passage.raw_text("text")
    entities = [(entity.number("start"), entity.number("end") + 1) for entity in passage.rows("entities")]
    choices = tuple(dict.fromkeys(text[start:end] for start, end in entities))
    for query in row.rows("qas"):
        idx, asked = (query.number("idx"),), query.text("query")
        places, gold = list(entities), []
        for answer in query.rows("answers") if labelled else []:
            places.append((answer.number("start"), answer.number("end") + 1))
            gold.append(answer.text("text"))
        answers = tuple(dict.fromkeys(gold))
        if not all(inside(text, *place) for place in places):
            yield Skip(idx, row.source, OUTSIDE, answers)
            continue
        before, placeholder, after = asked.partition(PLACEHOLDER)
        if not placeholder:
            yield Skip(idx, row.source, f"query without {PLACEHOLDER}", answers)
            continue
        if labelled and not set(answers) & set(choices):
            yield Skip(idx, row.source, "answer that is no entity of the passage", answers)
            continue
        fields = {"passage": _highlights(text), "query": asked, "before": before, "after": after}
        yield SuperGlueRecord("ReCoRD", idx, fields, row.source, None, choices, answers)


def _highlights(text: str) -> str:
    return re.sub(r"\s*@highlight\s*", "\n- ", text).strip()


READERS: dict[TaskName, Reader] = {
    "BoolQ": _simple("BoolQ", ("passage", "question")),
    "CB": _simple("CB", ("premise", "hypothesis")),
    "COPA": _copa,
    "MultiRC": _multirc,
    "RTE": _simple("RTE", ("premise", "hypothesis")),
    "WiC": _wic,
    "WSC": _wsc,
    "ReCoRD": _record,
}
