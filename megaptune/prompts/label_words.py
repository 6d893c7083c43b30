"""The words that stand for a task's labels, as tokens of a backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megaptune.errors import DataError
from megaptune.prompts.tokens import TokenForms
from megaptune.prompts.verbalizer import Verbalizer


@dataclass(frozen=True)
class LabelWords:
    """labels: in the task's order; tokens: each label's words, one token each; a label's logit is their mean."""

    labels: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, labels: Sequence[str], words: Mapping[str, Sequence[str]], forms: TokenForms, where: str
    ) -> "LabelWords":
        """Look the words up in their form after a space.

        :param where: names the verbalizer in an error.
        :raises DataError: a label without a word, a word of an unknown label, one that is not one token of this
            backbone, two words that are the same token (as "No" and "no" are where capitals do not count).
        """
        problems = [f"it has no word for the label {label!r}" for label in labels if not words.get(label)]
        problems += [f"{label!r} is no label (expected {', '.join(labels)})" for label in words if label not in labels]
        looked_up = Verbalizer.of([word for members in words.values() for word in members], forms)
        problems += [
            f"{word!r} is {len(pieces)} tokens of this backbone ({' '.join(pieces)}); choose a word of one token"
            if len(pieces) != 1
            else f"{word!r} is unknown to this backbone's tokenizer; choose another word"
            for word, pieces in looked_up.pieces_of.items()
        ]
        seen: dict[int, tuple[str, str]] = {}
        for label, members in words.items():
            for word in members:
                token = looked_up.token_of.get(word)
                if token is None:
                    continue
                if token in seen:
                    other, of = seen[token]
                    problems.append(f"{word!r} ({label}) and {other!r} ({of}) are the same token")
                seen[token] = word, label
        if problems:
            raise DataError(f"{where}: " + "; ".join(problems))
        return cls(tuple(labels), tuple(tuple(looked_up.token_of[word] for word in words[label]) for label in labels))
