"""The arithmetic of PET and iPET (Schick and Schütze 2021): what models think together, and which labels to trust.

K models, N examples, O options, which are the labels.
"""

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

Model = TypeVar("Model")


def combined(scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean of the models' scores, K of [N, O] -> [N, O] fp64; equal weights where all are 0.

    Scores are logarithms: those of one example may differ from logits by what its options have in common.
    """
    mass = torch.tensor(weights, dtype=torch.float64)
    mass = mass / mass.sum() if mass.sum() > 0 else torch.full_like(mass, 1.0 / len(mass))
    return (torch.stack(list(scores)).double() * mass[:, None, None]).sum(dim=0)


def softened(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Probabilities [N, O] fp64 of scores [N, O]; a temperature above 1 makes them more alike."""
    return torch.softmax(scores.double() / temperature, dim=1)


def drawn(others: Sequence[Model], share: float, key: str) -> list[Model]:
    """A share of the models, one at least, in their order; the same for the same ``key``."""
    count = max(1, round(share * len(others)))
    places = random.Random(key).sample(range(len(others)), count)
    return [others[place] for place in sorted(places)]


def apportioned(total: int, counts: Sequence[int]) -> list[int]:
    """``total`` divided as ``counts`` are, in whole numbers: the largest remainders are rounded up."""
    parts = [total * count / sum(counts) for count in counts]
    whole = [int(part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda place: (whole[place] - parts[place], place))
    for place in by_remainder[: total - sum(whole)]:
        whole[place] += 1
    return whole


def most_confident(probabilities: Tensor, counts: Sequence[int], total: int) -> list[tuple[int, int]]:
    """At most ``total`` examples to train on with the label that is predicted: (example, label), by example.

    Of each label the likeliest are taken, as many as keep the labels' shares in the training set. Where a label is
    predicted too seldom for that, all labels get fewer.

    :param probabilities: [N, O], of the models together. :param counts: [O], of the labels in the training set.
    """
    best, predicted = probabilities.max(dim=1)
    of_label = [(predicted == label).nonzero().flatten().tolist() for label in range(len(counts))]
    wanted = apportioned(total, counts)
    scale = min([Fraction(1), *(Fraction(len(there), n) for there, n in zip(of_label, wanted, strict=True) if n)])
    chosen = []
    for label, (there, count) in enumerate(zip(of_label, wanted, strict=True)):
        there.sort(key=lambda example: (-float(best[example]), example))
        chosen += [(example, label) for example in there[: int(scale * count)]]
    return sorted(chosen)
