"""Small changes that a text needs to stand inside a sentence; templates name them: ``{choice1:lower}``."""

import string
from collections.abc import Callable


def unended(text: str) -> str:
    """Without the punctuation at its end, so that a pattern can put its own; a text of nothing else stays."""
    return text.rstrip(string.punctuation + string.whitespace) or text


def lower(text: str) -> str:
    """With a small first letter, as inside a sentence; "I", "I'm" keep theirs."""
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    return text if first.split("'")[0] == "I" else text[:1].lower() + text[1:]


TEXT_FORMS: dict[str, Callable[[str], str]] = {"unended": unended, "lower": lower}
