"""From answer words to single vocabulary tokens, in the form they have after a space."""

from dataclasses import dataclass

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
