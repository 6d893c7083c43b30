"""From features at the answers to losses, ranks and figures.

B examples, N evaluated examples, C candidates, D backbone width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaptune.backbone.host import BackboneHost
from megaptune.backbone.inputs import Padded
from megaptune.backbone.output_rows import NEVER, OutputRows
from megaptune.backbone.tensor_parallel import parallel_softmax
from megaptune.backbone.tuned_host import TunedHost
from megaptune.batches import Batch
from megaptune.config import Reading
from megaptune.kernels import dispatch


class Scorer:
    """Scores answers within one reading's candidates, whose rows of the output embedding may lie on several ranks.

    :param sets: candidate ids [C], ascending, of every task; None for the whole vocabulary, then of all tasks.
    :param set_of: which of the sets each job reads, by its number; without it every job reads the first.
    """

    def __init__(self, host: BackboneHost, sets: Sequence[Tensor | None], set_of: Sequence[int] | None = None) -> None:
        self.host, self.grid = host, host.grid
        distinct, index = _distinct(sets)
        places = [index[s] for s in (set_of if set_of is not None else [0])]
        self.set_of = torch.tensor(places, device=host.device)
        self.several = len(distinct) > 1
        self.sets = [None if ids is None else ids.to(host.device) for ids in distinct]
        given = [ids for ids in self.sets if ids is not None]
        assert not given or len(given) == len(self.sets), "either every set is listed or none is"
        self.only_candidates = not given or host.speed.candidates_only or host.trained
        self.rows: OutputRows = host.output_rows(torch.cat(given) if given and self.only_candidates else None)
        ends = torch.tensor([0, *(len(ids) for ids in given)]).cumsum(0)
        self.ranges = torch.stack([ends[:-1], ends[1:]], dim=1).to(host.device)  # [S, 2]
        # Ascending over all sets, so that one search finds an answer in the set of its job.
        keys = [number * host.vocabulary_size + ids for number, ids in enumerate(given)]
        self.keys = torch.cat(keys) if keys else None

    def __call__(self, features: Tensor, answers: Tensor, jobs: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """features [B, D], answers [B] ids, jobs [B] -> loss [B] fp32, rank [B] (0: a hit at 1), prediction [B] ids.

        The rank of an answer that is no candidate is -1, and its loss means nothing.
        """
        sets = self._sets(answers, jobs)
        wanted = features.requires_grad and torch.is_grad_enabled()
        if self.only_candidates:
            ranges = self.ranges[sets] if self.several else None
            labels = self._labels(answers, sets)
            loss, rank, prediction, gradient = self._softmax(features.detach(), labels, wanted, self.rows.bias, ranges)
            if self.rows.ids is not None:
                prediction = self.rows.ids[prediction if ranges is None else prediction + ranges[:, 0]]
        else:
            loss, rank, prediction, gradient = self._over_all_rows(features.detach(), answers, sets, wanted)
        if wanted:
            loss = _LossWithGradient.apply(features, loss, gradient)
        if self.keys is not None:
            rank = torch.where(self._listed(answers, sets), rank, -1)
        return loss, rank, prediction

    def losses(self, batch: Batch, table: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [B] fp32 and ranks [B] of a batch, differentiable in all that is trained."""
        host, inputs = self.host, batch.inputs
        if isinstance(host, TunedHost):  # which trains one job at a time
            labels = self.labels(batch.answers, batch.jobs)
            return host.losses(inputs, table, labels, self.rows)
        if host.speed.answers_only:
            loss, rank, _ = self(host.features(inputs, table), batch.answers, batch.jobs)
            return loss, rank
        assert isinstance(inputs, Padded)
        features = host.features(inputs, table, everywhere=True)  # [B, T, D]
        answers, jobs = (column.repeat_interleave(features.shape[1]) for column in (batch.answers, batch.jobs))
        loss, rank, _ = self(features.flatten(0, 1), answers, jobs)
        places = torch.arange(len(features), device=features.device) * features.shape[1] + inputs.answer_positions
        return loss[places], rank[places]

    def labels(self, answers: Tensor, jobs: Tensor | None) -> Tensor:
        """Token ids [B] as places among the candidates of their jobs."""
        return self._labels(answers, self._sets(answers, jobs))

    def _sets(self, answers: Tensor, jobs: Tensor | None) -> Tensor:
        """The candidate set of each example [B]."""
        if jobs is None or not self.several:
            return torch.zeros_like(answers)
        return self.set_of[jobs]

    def _labels(self, answers: Tensor, sets: Tensor) -> Tensor:
        """Token ids as places among the candidates of their sets; any place for an id that is none of them."""
        if self.keys is None:
            return answers
        first, end = self.ranges[sets].unbind(dim=1)
        return self._places(answers, sets).clamp(first, end - 1) - first

    def _listed(self, answers: Tensor, sets: Tensor) -> Tensor:
        """Whether ids are candidates of their sets [B]."""
        assert self.keys is not None
        places = self._places(answers, sets).clamp(max=len(self.keys) - 1)
        return self.keys[places] == sets * self.host.vocabulary_size + answers

    def _places(self, answers: Tensor, sets: Tensor) -> Tensor:
        assert self.keys is not None
        return torch.searchsorted(self.keys, sets * self.host.vocabulary_size + answers)

    def _over_all_rows(
        self, features: Tensor, answers: Tensor, sets: Tensor, wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Every row of the vocabulary is scored, and those of no candidate are out of the running."""
        loss, rank = features.new_zeros(len(answers), dtype=torch.float32), torch.zeros_like(answers)
        prediction, gradient = torch.zeros_like(answers), torch.zeros_like(features) if wanted else None
        for number in sets.unique().tolist():
            ids = self.sets[number]
            assert ids is not None
            penalty = torch.full((self.host.vocabulary_size,), NEVER, device=features.device)
            penalty[ids] = 0.0
            bias = penalty[self.rows.index]
            if self.rows.bias is not None:
                bias = bias + self.rows.bias.float()
            mine = (sets == number).nonzero().squeeze(1)
            found = self._softmax(features[mine], answers[mine], wanted, bias, None)
            loss[mine], rank[mine], prediction[mine] = found[:3]
            if gradient is not None and found[3] is not None:
                gradient[mine] = found[3]
        return loss, rank, prediction, gradient

    def _softmax(
        self, features: Tensor, labels: Tensor, wanted: bool, bias: Tensor | None, ranges: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The gradient d loss / d features [B, D] is computed at once: ZeRO 3 may let go of the rows right after."""
        rows = self.rows
        if self.grid.shards > 1:
            group = self.grid.tensor_group
            return parallel_softmax(features, rows.weight, rows.index, labels, bias, group, ranges, wanted)
        with torch.set_grad_enabled(wanted):
            leaf = features.requires_grad_(wanted)
            loss, rank, prediction = dispatch.verbalizer_softmax(leaf, rows.weight, labels, bias, ranges)
            gradient = torch.autograd.grad(loss.sum(), leaf)[0] if wanted else None
        return loss.detach(), rank, prediction, gradient


def _distinct(sets: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[int]]:
    """Equal sets once, and where each of the given ones went."""
    distinct: list[Tensor | None] = []
    index = []
    for ids in sets:
        same = (
            place
            for place, other in enumerate(distinct)
            if other is ids or (other is not None and ids is not None and torch.equal(other, ids))
        )
        place = next(same, len(distinct))
        distinct += [ids] if place == len(distinct) else []
        index.append(place)
    return distinct, index


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
    """Means over a split's ``count`` examples whose answer is a candidate: P@k = share of answers among the k best; MRR
    = mean of 1 / (rank + 1)."""

    loss: float
    p_at_1: float
    p_at_5: float
    p_at_10: float
    mrr: float
    count: int

    @classmethod
    def of(cls, loss: Tensor, rank: Tensor) -> "Figures":
        """loss [N] and rank [N], rank 0 being the best; examples of rank -1 do not count."""
        counted = rank.cpu() >= 0
        loss, rank = loss.double().cpu()[counted], rank.cpu()[counted]
        p1, p5, p10 = (float((rank < k).double().mean()) for k in (1, 5, 10))
        return cls(float(loss.mean()), p1, p5, p10, float((1.0 / (rank.double() + 1)).mean()), len(rank))


Report = dict[Reading, Figures]
