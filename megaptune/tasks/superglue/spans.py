"""Where a span stands in a text, by white-space words (WSC) or by characters (WiC, ReCoRD)."""

import re
import string

_OUTER = string.punctuation + "“”‘’"


def word_span(text: str, span: str, index: int) -> tuple[int, int] | None:
    """Characters [start, end) of ``span``, whose first word is white-space word ``index`` of ``text``, or None.

    Compared without case, outer punctuation and a possessive 's ("Emma" is found in "Emma's"); the punctuation around
    the span is left outside.
    """
    words = list(re.finditer(r"\S+", text))
    wanted = span.split()
    found = words[index : index + len(wanted)] if index >= 0 else []
    if not wanted or [_plain(word[0]) for word in found] != [_plain(word) for word in wanted]:
        return None
    first, last = found[0], found[-1]
    start = first.start() + len(first[0]) - len(first[0].lstrip(_OUTER))
    return start, last.start() + len(_unowned(last[0].rstrip(_OUTER)))


def _plain(word: str) -> str:
    return _unowned(word.strip(_OUTER)).casefold()


def _unowned(word: str) -> str:
    return word[:-2] if word.endswith(("'s", "’s")) else word


def marked(text: str, start: int, end: int) -> str:
    """The text with asterisks around characters [start, end), as PET and P-tuning mark a word."""
    return f"{text[:start]}*{text[start:end]}*{text[end:]}"


def inside(text: str, start: int, end: int) -> bool:
    """Whether [start, end) is a stretch of the text with something in it."""
    return 0 <= start < end <= len(text) and bool(text[start:end].strip())
