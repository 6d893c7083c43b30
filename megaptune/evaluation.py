"""Figures of a split under one prompt, for several readings at once.

N evaluated examples, R table rows, D backbone width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaptune.backbone.host import BackboneHost
from megaptune.batches import collate, micro_batches, rounds
from megaptune.config import Reading
from megaptune.examples import Example
from megaptune.run.topology import all_reduce_sum
from megaptune.scoring import Figures, Scorer


@dataclass(frozen=True)
class Outcome:
    """loss [N] fp32, rank [N] and prediction [N] (token ids), in the order of the examples."""

    loss: Tensor
    rank: Tensor
    prediction: Tensor

    @property
    def figures(self) -> Figures:
        return Figures.of(self.loss, self.rank)


@torch.no_grad()
def evaluate(
    host: BackboneHost,
    examples: Sequence[Example],
    table: Tensor,
    scorers: dict[Reading, Scorer],
    batch: int,
    pad_id: int,
) -> dict[Reading, Outcome]:
    """Every example scored once under the prompt ``table`` [R, D]; the same on all ranks."""
    found = {reading: torch.zeros(3, len(examples), dtype=torch.float64) for reading in scorers}
    pieces = micro_batches([len(example.slots) for example in examples], range(len(examples)), batch)
    for mine in rounds(pieces, host.grid.replica, host.grid.replicas):
        members = [examples[index] for index in mine]
        inputs = collate(members, pad_id, host.kind == "masked", host.device, stand_in=examples[0])
        features = host.features(inputs.slots, inputs.attention_mask, inputs.answer_positions, table)
        for reading, scorer in scorers.items():
            scores = torch.stack([column.double() for column in scorer(features, inputs.answers)])
            if mine and host.grid.speaks:
                found[reading][:, mine] = scores.cpu()
    outcomes = {}
    for reading, columns in found.items():
        loss, rank, prediction = all_reduce_sum(columns.to(host.device)).cpu()
        outcomes[reading] = Outcome(loss.float(), rank.long(), prediction.long())
    return outcomes
