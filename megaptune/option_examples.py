"""Examples that are answered by one of several options: label words, choices of any number of tokens, classes.

An option's score is a sum of *terms*, each asked of the feature at one position that is read. A term is a token's
log-probability there, or the product of the feature and a row of the prompt table, which is then the weight of a linear
head. The options' scores are the logits of a softmax: what all options have in common, such as the normaliser of a
token's log-probability at a place that they share, cancels.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megaptune.tasks.records import Record
from megaptune.tasks.superglue.records import SuperGlueRecord

Term = tuple[int, int]
"""(read, target): ``read`` counts the positions of all inputs in their order; a target >= 0 is a token, a target < 0 is
row ``-1 - target`` of the table."""


@dataclass(frozen=True)
class OptionExample:
    """inputs: the slots of every sequence that is read; reads: of each, the positions wanted of it, ascending; options:
    the terms of each; right: the options that are right, none where that is not known.

    soft: a probability for every option, to be learned instead of ``right``; temperature: what the scores are divided
    by for the loss. mean: a score is the mean of its terms, not their sum.
    """

    inputs: list[list[int]]
    reads: list[list[int]]
    options: list[list[Term]]
    right: tuple[int, ...]
    record: SuperGlueRecord | Record
    soft: tuple[float, ...] | None = None
    temperature: float = 1.0
    mean: bool = False

    @cached_property
    def length(self) -> int:
        """Tokens of its inputs; those that all begin with count once, as they are computed once."""
        columns = zip(*self.inputs, strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
        return sum(map(len, self.inputs)) - shared * (len(self.inputs) - 1)

    @property
    def key(self) -> str:
        """What tells it apart as the backbone sees it."""
        return f"{self.inputs}{self.reads}{self.options}{self.right}{self.soft or ''}"


def from_labels(
    slots: list[int],
    position: int,
    words: Sequence[Sequence[int]],
    right: tuple[int, ...],
    record: SuperGlueRecord,
) -> OptionExample:
    """One input, one position; an option for each label, whose words' logits are averaged."""
    options = [[(0, token) for token in members] for members in words]
    return OptionExample([slots], [[position]], options, right, record, mean=True)


def from_choices(
    choices: Sequence[tuple[list[int], list[int], list[int]]],
    right: tuple[int, ...],
    record: SuperGlueRecord,
    mean: bool = False,
) -> OptionExample:
    """An option for each choice, given as slots, positions and the tokens that they predict.

    Choices of the same slots (a masked model's) are one input, read at all their positions.
    """
    inputs: list[list[int]] = []
    wanted: list[set[int]] = []
    place_of: dict[tuple[int, ...], int] = {}
    for slots, positions, _ in choices:
        place = place_of.setdefault(tuple(slots), len(inputs))
        if place == len(inputs):
            inputs.append(slots)
            wanted.append(set())
        wanted[place].update(positions)
    reads = [sorted(positions) for positions in wanted]
    first = [sum(map(len, reads[:place])) for place in range(len(reads))]
    options = []
    for slots, positions, targets in choices:
        place = place_of[tuple(slots)]
        number = {position: first[place] + index for index, position in enumerate(reads[place])}
        options.append([(number[p], target) for p, target in zip(positions, targets, strict=True)])
    return OptionExample(inputs, reads, options, right, record, mean=mean)


def from_classes(
    slots: list[int], position: int, count: int, right: tuple[int, ...], record: SuperGlueRecord
) -> OptionExample:
    """One input; an option for each of ``count`` classes, whose weights are rows 0, 1, ... of the table."""
    options = [[(0, -1 - row)] for row in range(count)]
    return OptionExample([slots], [[position]], options, right, record)


def from_scored(
    choices: Sequence[tuple[list[int], int]], right: tuple[int, ...], record: SuperGlueRecord
) -> OptionExample:
    """An input for each choice, given as slots and position; row 0 of the table gives each its score."""
    inputs, positions = [slots for slots, _ in choices], [[position] for _, position in choices]
    return OptionExample(inputs, positions, [[(place, -1)] for place in range(len(choices))], right, record)
