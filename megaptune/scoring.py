"""From features at the answers to losses, ranks and figures.

B examples, N evaluated examples, C candidates, D backbone width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megaptune.backbone.host import BackboneHost, OutputRows
from megaptune.config import Reading
from megaptune.kernels import dispatch


class Scorer:
    """Scores answers within one reading's candidates; holds their rows of the output embedding."""

    def __init__(self, host: BackboneHost, candidates: Tensor | None) -> None:
        self.rows: OutputRows = host.output_rows(candidates)
        self.place: Tensor | None = None
        if self.rows.ids is not None:
            self.place = torch.full((host.vocabulary_size,), -1, dtype=torch.int64, device=host.device)
            self.place[self.rows.ids] = torch.arange(len(self.rows.ids), device=host.device)

    def __call__(self, features: Tensor, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """features [B, D], answers [B] ids -> loss [B] fp32, rank [B] (0: a hit at 1), prediction [B] ids."""
        labels = answers if self.place is None else self.place[answers]
        loss, rank, prediction = dispatch.verbalizer_softmax(features, self.rows.weight, labels, self.rows.bias)
        return loss, rank, prediction if self.rows.ids is None else self.rows.ids[prediction]


@dataclass(frozen=True)
class Figures:
    """Means over a split: P@k = share of answers among the k best candidates; MRR = mean of 1 / (rank + 1)."""

    loss: float
    p_at_1: float
    p_at_5: float
    p_at_10: float
    mrr: float
    count: int

    @classmethod
    def of(cls, loss: Tensor, rank: Tensor) -> "Figures":
        """loss [N] and rank [N], rank 0 being the best."""
        loss, rank = loss.double().cpu(), rank.cpu()
        p1, p5, p10 = (float((rank < k).double().mean()) for k in (1, 5, 10))
        return cls(float(loss.mean()), p1, p5, p10, float((1.0 / (rank.double() + 1)).mean()), len(rank))


Report = dict[Reading, Figures]
