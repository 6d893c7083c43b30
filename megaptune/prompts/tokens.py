"""How a tokenizer writes text in the middle of a sentence, and what it puts around one."""

from functools import cached_property
from typing import Any

from megaptune.errors import BackboneError

_ANCHOR = "a"


class TokenForms:
    """A tokenizer asked only what a template needs.

    A word after a space has other tokens than the same word at the start of a text (byte-level BPE: ``ĠParis`` against
    ``Paris``). Instead of knowing each tokenizer's rule, the text is encoded behind an anchor word and the anchor's
    tokens are taken off; this holds for byte-level BPE, WordPiece and SentencePiece alike.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._anchor = self.at_start(_ANCHOR)

    def at_start(self, text: str) -> list[int]:
        """Token ids of ``text`` as the first words of an input."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def after_space(self, text: str) -> list[int]:
        """Token ids of ``text`` when a space and other words stand before it."""
        return self._without_anchor(self.at_start(f"{_ANCHOR} {text}"))

    def words_after_space(self, words: list[str]) -> list[list[int]]:
        """:meth:`after_space` of many words, in one call of the tokenizer."""
        if not words:
            return []
        encoded = self.tokenizer([f"{_ANCHOR} {word}" for word in words], add_special_tokens=False)["input_ids"]
        return [self._without_anchor(list(ids)) for ids in encoded]

    def _without_anchor(self, ids: list[int]) -> list[int]:
        if ids[: len(self._anchor)] != self._anchor:
            raise BackboneError(
                f"this tokenizer joins words across spaces ({self.pieces(ids)}), which is not supported"
            )
        return ids[len(self._anchor) :]

    def pieces(self, ids: list[int]) -> list[str]:
        """The tokens as their vocabulary spells them, for messages."""
        return list(self.tokenizer.convert_ids_to_tokens(ids))

    @cached_property
    def specials(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer itself puts before and after a text: ([CLS], [SEP]), (<s>, []), ([], []) ..."""
        ids = list(self.tokenizer(_ANCHOR)["input_ids"])
        for start in range(len(ids) - len(self._anchor) + 1):
            if ids[start : start + len(self._anchor)] == self._anchor:
                return ids[:start], ids[start + len(self._anchor) :]
        raise BackboneError("this tokenizer changes a word when it adds its special tokens, which is not supported")

    @property
    def mask_id(self) -> int:
        """:raises BackboneError: when the tokenizer of a masked language model has no mask token."""
        if self.tokenizer.mask_token_id is None:
            raise BackboneError("the backbone is a masked language model but its tokenizer has no mask token")
        return int(self.tokenizer.mask_token_id)

    @property
    def separator_id(self) -> int:
        """:raises BackboneError: when the tokenizer has no separator token."""
        if self.tokenizer.sep_token_id is None:
            raise BackboneError("the template has a [sep], but this backbone's tokenizer has no separator token")
        return int(self.tokenizer.sep_token_id)

    @property
    def unknown_id(self) -> int | None:
        return self.tokenizer.unk_token_id
