"""Encoded inputs of every SuperGLUE task, pattern and family as readable text, pinned in ``tests/golden``.

    python tests/helpers/golden.py        # write the files anew; look at the difference before committing it

Hand-made examples, and tokenizers that know their words as one token each. In the files [P1] is the first pseudo token,
Ġ the space before a word, and → stands behind a token whose state is read.
"""

import json
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from tiny import tiny_tokenizer  # noqa: E402

from megaptune.pattern_examples import ChoiceExample, PatternEncoder  # noqa: E402
from megaptune.patterns import LABELS, TaskName, TaskPatterns, load_patterns  # noqa: E402
from megaptune.prompts.tokens import TokenForms  # noqa: E402
from megaptune.tasks.superglue.loading import load_split  # noqa: E402
from megaptune.tasks.superglue.records import SuperGlueRecord  # noqa: E402

FOLDER = ROOT / "tests" / "golden"
TASKS: tuple[TaskName, ...] = get_args(TaskName)
TOKENIZERS = {"causal": "llama", "masked": "bert"}

STORY = "Mia and Tom built a raft on the lake. It sank at once, because the rope was old. Tom laughed."
NEWS = "Anna Berg won the race in Oslo on Sunday.\n@highlight\nBerg beat Lisa Holm\n@highlight\nIt was her third win"


def _entities(*names: str) -> list[dict[str, int]]:
    return [{"start": NEWS.index(name), "end": NEWS.index(name) + len(name) - 1} for name in names]


LINES: dict[TaskName, dict[str, Any]] = {
    "BoolQ": {"passage": "Lake Inari -- " + STORY, "question": "did the raft sink", "idx": 4, "label": True},
    "CB": {
        "premise": "A: Did you see it? B: I doubt that the old rope was strong.",
        "hypothesis": "The old rope was strong.",
        "idx": 5,
        "label": "contradiction",
    },
    "COPA": {
        "premise": "The raft sank.",
        "choice1": "The rope was old.",
        "choice2": "I laughed.",
        "question": "cause",
        "idx": 6,
        "label": 0,
    },
    "MultiRC": {
        "idx": 7,
        "version": 1.1,
        "passage": {
            "text": STORY,
            "questions": [
                {"question": "Who built it?", "idx": 70, "answers": [{"text": "Mia.", "idx": 700, "label": 1}]}
            ],
        },
    },
    "RTE": {"premise": STORY, "hypothesis": "The raft sank.", "idx": 8, "label": "entailment"},
    "WiC": {
        "word": "sink",
        "sentence1": "The raft sank at once.",
        "sentence2": "Her heart sinks.",
        "start1": 9,
        "end1": 13,
        "start2": 10,
        "end2": 15,
        "version": 1.1,
        "idx": 9,
        "label": False,
    },
    "WSC": {
        "text": "Tom held the rope while Mia built the raft, and he laughed.",
        "target": {"span1_text": "Tom", "span1_index": 0, "span2_text": "he", "span2_index": 10},
        "idx": 10,
        "label": True,
    },
    "ReCoRD": {
        "source": "hand-made",
        "idx": 11,
        "passage": {"text": NEWS, "entities": _entities("Anna Berg", "Oslo", "Lisa Holm")},
        "qas": [
            {
                "query": "On Sunday @placeholder was second.",
                "idx": 110,
                "answers": [{**_entities("Lisa Holm")[0], "text": "Lisa Holm"}],
            }
        ],
    },
}


def record_of(task: TaskName) -> SuperGlueRecord:
    """The task's example, read from a file as any other."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / task
        folder.mkdir()
        (folder / "val.jsonl").write_text(json.dumps(LINES[task]) + "\n", encoding="utf-8")
        (record,) = load_split(Path(place), task, "val").records
    return record


def golden_forms(book: dict[TaskName, TaskPatterns], family: str) -> TokenForms:
    """A tokenizer that knows every word of the examples and the patterns."""
    texts = [*_strings(LINES), *(text for patterns in book.values() for text in _strings(patterns.model_dump()))]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)} | {"because", "so"})
    return TokenForms(tiny_tokenizer(TOKENIZERS[family], words))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for member in value.values() if isinstance(value, dict) else value:
            yield from _strings(member)


def render(task: TaskName, book: dict[TaskName, TaskPatterns], forms: dict[str, TokenForms]) -> str:
    """The text of one task's golden file."""
    record = record_of(task)
    lines = [f"{task}: encoded inputs; written by tests/helpers/golden.py", "", "fields"]
    lines += [line for name, value in record.fields.items() for line in _wrapped(f"  {name}: ", repr(value)[1:-1])]
    lines += [f"idx {record.idx}  gold {record.gold}" + (f"  choices {record.choices}" if record.choices else "")]
    for use in ("manual", "ptuning"):
        for name, pattern in getattr(book[task], use).items():
            for family in pattern.families:
                plain = PatternEncoder(task, pattern, book[task], forms[family], family, 512)
                lines += ["", f"{use}.{name}  {family}", *_shown(plain, record)]
                if ":shorten" in pattern.text:
                    allowed = _length(plain, record)
                    shorter = book[task].model_copy(update={"max_tokens": allowed - 4})
                    lines += [f"  cut to {allowed - 4}"]
                    lines += _shown(PatternEncoder(task, pattern, shorter, forms[family], family, 512), record)
    return "\n".join(lines) + "\n"


def _length(encoder: PatternEncoder, record: SuperGlueRecord) -> int:
    example = encoder.encode(record)
    return len(example.choices[0].slots if isinstance(example, ChoiceExample) else example.slots)


def _shown(encoder: PatternEncoder, record: SuperGlueRecord) -> list[str]:
    example = encoder.encode(record)
    pieces = encoder.forms.pieces
    if isinstance(example, ChoiceExample):
        told = ["right" if index in example.right else "wrong" for index in range(len(example.choices))]
        said = [
            f"{word} ({' '.join(pieces(choice.targets))})" for word, choice in zip(told, example.choices, strict=True)
        ]
        inputs = [_tokens(pieces, choice.slots, choice.positions) for choice in example.choices]
        if encoder.template.kind == "causal":
            return [line for each, text in zip(said, inputs, strict=True) for line in _wrapped(f"  {each}: ", text)]
        first = {choice.positions[0] for choice in example.choices}
        assert len(first) == len({tuple(choice.slots) for choice in example.choices}) == 1
        longest = max(range(len(said)), key=lambda index: len(example.choices[index].positions))
        return [*_wrapped("  ", f"{', '.join(said)}; one input for all:"), *_wrapped("  ", inputs[longest])]
    assert encoder.label_words is not None
    words = [
        f"{label} = {' '.join(pieces(list(tokens)))}" + (" (right)" if index == example.label else "")
        for index, (label, tokens) in enumerate(zip(LABELS[record.task], encoder.label_words.tokens, strict=True))
    ]
    shown = _wrapped("  ", _tokens(pieces, example.slots, [example.answer_position]))
    return [f"  {', '.join(words)}; {len(example.slots)} slots", *shown]


def _tokens(pieces: Any, slots: list[int], positions: list[int]) -> str:
    spelled = [pieces([slot])[0] if slot >= 0 else f"[P{-slot}]" for slot in slots]
    return " ".join(piece + ("→" if place in positions else "") for place, piece in enumerate(spelled))


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(start + text, 118, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def render_all() -> dict[str, str]:
    """File name -> text, for every task."""
    book = load_patterns(ROOT / "configs" / "patterns" / "all.yaml")
    forms = {family: golden_forms(book, family) for family in TOKENIZERS}
    return {f"{task}.txt": render(task, book, forms) for task in TASKS}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in render_all().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
        print(f"{FOLDER / file}: {len(text.splitlines())} lines")
