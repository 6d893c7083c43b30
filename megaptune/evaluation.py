"""Figures of a split under one prompt, for several readings at once.

N evaluated examples, R table rows, D backbone width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megaptune.backbone.host import BackboneHost
from megaptune.batches import Member, collate, micro_batches, rounds
from megaptune.config import Reading
from megaptune.option_scoring import OptionOutcome
from megaptune.run.topology import all_reduce_sum
from megaptune.scoring import Figures, Scorer


@dataclass(frozen=True)
class Outcome:
    """loss [N] fp32, rank [N] and prediction [N] (token ids), in the order of the examples.

    The rank is -1 where the answer is no candidate: the example does not count under this reading.
    """

    loss: Tensor
    rank: Tensor
    prediction: Tensor

    def of(self, members: slice | Tensor) -> "Outcome":
        """That of some of the examples."""
        return Outcome(self.loss[members], self.rank[members], self.prediction[members])

    @property
    def figures(self) -> Figures:
        return Figures.of(self.loss, self.rank)


Outcomes = dict[Reading | Literal["options"], Outcome | OptionOutcome]
"""By reading; of examples with options there is one outcome, called so."""


@torch.no_grad()
def evaluate(
    host: BackboneHost,
    members: Sequence[Member],
    table: Tensor,
    scorers: dict[Reading, Scorer],
    batch: int,
    pad_id: int,
) -> dict[Reading, Outcome]:
    """Every member scored once under the prompts of ``table`` [R, D]; the same on all ranks."""
    found = {reading: torch.zeros(3, len(members), dtype=torch.float64) for reading in scorers}
    lengths = [member.example.length for member in members]
    pieces = micro_batches(lengths, range(len(members)), batch, host.speed.length_buckets)
    for mine in rounds(pieces, host.grid.replica, host.grid.replicas):
        piece = collate([members[index] for index in mine], host, pad_id, stand_in=members[0])
        features = host.features(piece.inputs, table)
        for reading, scorer in scorers.items():
            scores = torch.stack([column.double() for column in scorer(features, piece.answers, piece.jobs)])
            if mine and host.grid.speaks:
                found[reading][:, mine] = scores.cpu()
    outcomes = {}
    for reading, columns in found.items():
        loss, rank, prediction = all_reduce_sum(columns.to(host.device)).cpu()
        outcomes[reading] = Outcome(loss.float(), rank.long(), prediction.long())
    return outcomes
