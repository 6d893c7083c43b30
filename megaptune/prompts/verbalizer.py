"""From answer words to vocabulary tokens, in the form they have after a space."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megaptune.errors import DataError
from megaptune.prompts.tokens import TokenForms


@dataclass(frozen=True)
class Verbalizer:
    """``token_of``: words that are one token. ``pieces_of``: the tokens of those that are not."""

    token_of: dict[str, int]
    pieces_of: dict[str, list[str]]

    @classmethod
    def of(cls, words: list[str], forms: TokenForms) -> "Verbalizer":
        """Look all ``words`` up; the unknown token counts as no token."""
        token_of, pieces_of = {}, {}
        unique = list(dict.fromkeys(words))
        for word, ids in zip(unique, forms.words_after_space(unique), strict=True):
            if len(ids) == 1 and ids[0] != forms.unknown_id:
                token_of[word] = ids[0]
            else:
                pieces_of[word] = forms.pieces(ids)
        return cls(token_of, pieces_of)

    def require_all(self, sources: dict[str, str]) -> None:
        """:raises DataError: naming the words that are not one token, their pieces, and where each was read."""
        bad = [word for word in self.pieces_of if word in sources]
        if not bad:
            return
        shown = [f"{word!r} = {' '.join(self.pieces_of[word]) or '(nothing)'} ({sources[word]})" for word in bad[:5]]
        more = f", and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(
            f"answers that are not one token of this backbone: {'; '.join(shown)}{more}. "
            "Use answers of one token, or set task.multi_token_answers: drop to leave these records out and count them"
        )


Tokens = tuple[int, ...]


@dataclass(frozen=True)
class AnswerTokens:
    """Answers of any number of tokens: the words that each token sequence spells."""

    words: dict[Tokens, list[str]]

    @classmethod
    def of(cls, words: Sequence[str], forms: TokenForms) -> "AnswerTokens":
        """Words that the tokenizer does not know are left out."""
        found: dict[Tokens, list[str]] = defaultdict(list)
        unique = list(dict.fromkeys(words))
        for word, ids in zip(unique, forms.words_after_space(unique), strict=True):
            if ids and forms.unknown_id not in ids:
                found[tuple(ids)].append(word)
        return cls(dict(found))

    @cached_property
    def tokens_of(self) -> dict[str, Tokens]:
        return {word: tokens for tokens, members in self.words.items() for word in members}

    @cached_property
    def children(self) -> dict[Tokens, list[int]]:
        """The trie: what may follow the first tokens of an answer, ascending; the root is ``()``."""
        found: dict[Tokens, set[int]] = defaultdict(set)
        for tokens in self.words:
            for place, token in enumerate(tokens):
                found[tokens[:place]].add(token)
        return {prefix: sorted(following) for prefix, following in found.items()}

    @property
    def lengths(self) -> list[int]:
        return sorted(self.at_masks)

    @cached_property
    def at_masks(self) -> dict[int, list[list[int]]]:
        """By the number of tokens: those that answers of that length have at each place, ascending."""
        places: dict[int, list[set[int]]] = {}
        for tokens in self.words:
            for place, token in enumerate(tokens):
                places.setdefault(len(tokens), [set() for _ in tokens])[place].add(token)
        return {count: [sorted(tokens) for tokens in found] for count, found in places.items()}
