"""From features at the answers to losses, ranks and figures.

B examples, N evaluated examples, C candidates, D backbone width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaptune.backbone.host import BackboneHost
from megaptune.backbone.inputs import Padded
from megaptune.backbone.output_rows import OutputRows
from megaptune.backbone.tensor_parallel import parallel_softmax
from megaptune.backbone.tuned_host import TunedHost
from megaptune.batches import Batch
from megaptune.config import Reading
from megaptune.kernels import dispatch


class Scorer:
    """Scores answers within one reading's candidates, whose rows of the output embedding may lie on several ranks."""

    def __init__(self, host: BackboneHost, candidates: Tensor | None) -> None:
        self.host, self.grid = host, host.grid
        self.rows: OutputRows = host.output_rows(candidates)
        self.place: Tensor | None = None
        if self.rows.ids is not None:
            self.place = torch.full((host.vocabulary_size,), -1, dtype=torch.int64, device=host.device)
            self.place[self.rows.ids] = torch.arange(len(self.rows.ids), device=host.device)

    def __call__(self, features: Tensor, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """features [B, D], answers [B] ids -> loss [B] fp32, rank [B] (0: a hit at 1), prediction [B] ids."""
        labels = self._labels(answers)
        wanted = features.requires_grad and torch.is_grad_enabled()
        loss, rank, prediction, gradient = self._softmax(features.detach(), labels, wanted)
        if wanted:
            loss = _LossWithGradient.apply(features, loss, gradient)
        return loss, rank, prediction if self.rows.ids is None else self.rows.ids[prediction]

    def losses(self, batch: Batch, table: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [B] fp32 and ranks [B] of a batch, differentiable in all that is trained."""
        host, inputs = self.host, batch.inputs
        if isinstance(host, TunedHost):
            return host.losses(inputs, table, self._labels(batch.answers), self.rows)
        if host.speed.answers_only:
            loss, rank, _ = self(host.features(inputs, table), batch.answers)
            return loss, rank
        assert isinstance(inputs, Padded)
        features = host.features(inputs, table, everywhere=True)  # [B, T, D]
        loss, rank, _ = self(features.flatten(0, 1), batch.answers.repeat_interleave(features.shape[1]))
        places = torch.arange(len(features), device=features.device) * features.shape[1] + inputs.answer_positions
        return loss[places], rank[places]

    def _labels(self, answers: Tensor) -> Tensor:
        """Token ids as places among the candidates."""
        return answers if self.place is None else self.place[answers]

    def _softmax(self, features: Tensor, labels: Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The gradient d loss / d features [B, D] is computed at once: ZeRO 3 may let go of the rows right after."""
        rows = self.rows
        if self.grid.shards > 1:
            return parallel_softmax(features, rows.weight, rows.index, labels, rows.bias, self.grid.tensor_group)
        with torch.set_grad_enabled(wanted):
            leaf = features.requires_grad_(wanted)
            loss, rank, prediction = dispatch.verbalizer_softmax(leaf, rows.weight, labels, rows.bias)
            gradient = torch.autograd.grad(loss.sum(), leaf)[0] if wanted else None
        return loss.detach(), rank, prediction, gradient


class _LossWithGradient(torch.autograd.Function):
    """loss [B], whose gradient with respect to features [B, D] is known already."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (upstream[:, None] * gradient.float()).to(gradient.dtype), None, None


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
