"""Cutting the shortenable fields of an input to the length that it may have."""

import re
from collections.abc import Callable, Hashable
from typing import TypeVar

from megaptune.errors import InputTooLong
from megaptune.prompts.tokens import TokenForms

Name = TypeVar("Name", bound=Hashable)


def shorten(
    texts: dict[Name, str],
    names: list[Name],
    max_tokens: int,
    num_tokens: Callable[[dict[Name, str]], int],
    forms: TokenForms,
    where: str,
) -> dict[Name, str]:
    """``texts`` without the last words of ``names``, as many as make the whole input at most ``max_tokens`` long.

    The field with the most tokens left loses its last word first, so that of two long texts equal parts remain; a
    field keeps one word at least. Whether the input fits is always measured on the whole input as it will be read.

    :param num_tokens: the whole input's length with the texts given.
    :raises InputTooLong: when it does not fit with one word of each field either.
    """
    words = {name: _words(texts[name]) for name in names}
    # What each word adds, as it stands behind a space: an estimate that chooses what to cut, not whether it fits.
    sizes = {
        name: [len(ids) for ids in forms.words_after_space([word.strip() for word in members])]
        for name, members in words.items()
    }
    kept = {name: len(members) for name, members in words.items()}
    lengths = {name: sum(members) for name, members in sizes.items()}
    excess = num_tokens(texts) - max_tokens
    while excess > 0:
        cuttable = [name for name in names if kept[name] > 1]
        if not cuttable:
            cut = f"with {', '.join(map(_told, names))} cut to a word" if names else "and has no :shorten field"
            raise InputTooLong(
                f"{where}: the input is {excess + max_tokens} tokens long {cut}; it may have {max_tokens}. Allow "
                "longer inputs, mark another field with :shorten, or leave the record out"
            )
        while excess > 0 and cuttable:
            longest = max(cuttable, key=lengths.__getitem__)
            kept[longest] -= 1
            excess -= sizes[longest][kept[longest]]
            lengths[longest] -= sizes[longest][kept[longest]]
            cuttable = [name for name in cuttable if kept[name] > 1]
        texts = {**texts, **{name: "".join(words[name][: kept[name]]) for name in names}}
        excess = num_tokens(texts) - max_tokens
    return texts


def _words(text: str) -> list[str]:
    """Words with the white space before them; the letters of a text that has no white space."""
    found = re.findall(r"\s*\S+", text)
    return found if len(found) > 1 else list(text)


def _told(name: object) -> str:
    return str(getattr(name, "name", name))
