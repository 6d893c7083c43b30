"""From features to the scores of an example's options, to losses and to what is predicted.

N examples, O options of the one with most, M terms of all, K of the longest option, R table rows, D backbone width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megaptune.backbone.host import BackboneHost
from megaptune.backbone.inputs import Inputs
from megaptune.backbone.tuned_host import TunedHost, head_scores
from megaptune.batches import Member, micro_batches, rounds
from megaptune.option_examples import OptionExample
from megaptune.run.topology import all_reduce_sum
from megaptune.scoring import Scorer


@dataclass(frozen=True)
class OptionBatch:
    """inputs: all sequences of N examples; for each of M terms: reads [M], which feature, targets [M], the token or the
    table's row, jobs [M].

    places [N, O, K]: an option's terms, M where there is none; there [N, O] bool: which options exist; scale [N, O]:
    what the sum of an option's terms is multiplied by; goal [N, O]: the probabilities to learn where ``soft`` [N],
    else 1 for each right option; weights [N] fp32, 0 for a stand-in. heads: whether targets are rows of the table.
    """

    inputs: Inputs
    reads: Tensor
    targets: Tensor
    jobs: Tensor
    places: Tensor
    there: Tensor
    scale: Tensor
    goal: Tensor
    soft: Tensor
    temperature: Tensor
    weights: Tensor
    heads: bool


def collate_options(members: Sequence[Member], host: BackboneHost, pad_id: int, stand_in: Member) -> OptionBatch:
    """The members as tensors; without any, a batch of the stand-in that counts nothing.

    All of them have deep prompts, or none has.
    """
    present = list(members) or [stand_in]
    examples = [member.example for member in present]
    slots: list[list[int]] = []
    positions: list[list[int]] = []
    groups: list[int] = []
    rows: list[int] = []
    reads: list[int] = []
    targets: list[int] = []
    jobs: list[int] = []
    num_reads = 0
    found: list[list[list[int]]] = []  # [N][O][K]
    for number, member in enumerate(present):
        example = member.example
        assert isinstance(example, OptionExample), "examples without options are collated by batches"
        slots += member.inputs
        positions += example.reads
        # Inputs of one example begin alike, which is worth more than what the examples of a job have in common.
        groups += [member.job if len(example.inputs) == 1 else -1 - number] * len(example.inputs)
        rows += [member.first_row] * len(example.inputs)
        found.append([])
        for terms in example.options:
            found[-1].append(list(range(len(reads), len(reads) + len(terms))))
            reads += [num_reads + read for read, _ in terms]
            targets += [target if target >= 0 else -1 - target + member.first_row for _, target in terms]
            jobs += [member.job] * len(terms)
        num_reads += sum(map(len, example.reads))
    options = [example for example in examples if isinstance(example, OptionExample)]
    kinds = {target < 0 for example in options for terms in example.options for _, target in terms}
    assert len(kinds) == 1, "a batch scores tokens, or classes of a head"
    width = max(len(example.options) for example in options)
    longest = max(len(terms) for example in options for terms in example.options)
    places = torch.full((len(options), width, longest), len(reads))
    there = torch.zeros(len(options), width, dtype=torch.bool)
    scale, goal = torch.ones(len(options), width), torch.zeros(len(options), width)
    for n, example in enumerate(options):
        for o, numbers in enumerate(found[n]):
            places[n, o, : len(numbers)] = torch.tensor(numbers)
            there[n, o] = True
            scale[n, o] = 1.0 / len(numbers) if example.mean else 1.0
        if example.soft is not None:
            goal[n, : len(example.soft)] = torch.tensor(example.soft)
        else:
            goal[n, list(example.right)] = 1.0
    device = host.device
    keeps = all(len(example.inputs) == 1 for example in options)
    return OptionBatch(
        inputs=host.lay_out(slots, positions, groups, pad_id, keeps, rows, present[0].virtual_tokens),
        reads=torch.tensor(reads, device=device),
        targets=torch.tensor(targets, device=device),
        jobs=torch.tensor(jobs, device=device),
        places=places.to(device),
        there=there.to(device),
        scale=scale.to(device),
        goal=goal.to(device),
        soft=torch.tensor([example.soft is not None for example in options], device=device),
        temperature=torch.tensor([example.temperature for example in options], device=device),
        weights=torch.full((len(options),), 1.0 if members else 0.0, device=device),
        heads=kinds.pop(),
    )


class OptionScorer:
    """Scores options. ``scorer``: of the tokens' log-probabilities; its candidates hold every token that is asked for,
    all words of a verbalizer for instance, or the whole vocabulary."""

    def __init__(self, host: BackboneHost, scorer: Scorer) -> None:
        self.host, self.scorer = host, scorer

    def scores(self, batch: OptionBatch, table: Tensor, trains: bool = False) -> Tensor:
        """Scores [N, O] fp32, minus infinity where there is no option; differentiable in all that is trained.

        :param trains: whether a tuned LM's gradient is wanted; prompts' always is, where gradients are on.
        """
        host, scorer = self.host, self.scorer
        if trains and isinstance(host, TunedHost):
            if batch.heads:
                terms = host.head_scores(batch.inputs, table, batch.reads, batch.targets)
            else:
                labels = scorer.labels(batch.targets, batch.jobs)
                terms = -host.losses(batch.inputs, table, labels, scorer.rows, batch.reads)[0]
        else:
            features = host.features(batch.inputs, table)[batch.reads]
            if batch.heads:
                terms = head_scores(features, table, batch.targets)
            else:
                terms = -scorer(features, batch.targets, batch.jobs)[0]
        padded = F.pad(terms.float(), (0, 1))
        return (padded[batch.places].sum(dim=2) * batch.scale).masked_fill(~batch.there, float("-inf"))

    def losses(self, batch: OptionBatch, table: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [N] fp32, for training, and ranks [N] of the best right option."""
        scores = self.scores(batch, table, trains=True)
        return option_losses(scores, batch), ranks(scores.detach(), batch.goal)


def option_losses(scores: Tensor, batch: OptionBatch) -> Tensor:
    """[N] fp32: minus the log of the right options' probability together, cross-entropy with ``soft`` probabilities; 0
    where nothing is known to be right."""
    likelihood = torch.log_softmax(scores / batch.temperature[:, None], dim=1)
    known = batch.goal.sum(dim=1) > 0
    right = torch.where(known[:, None], batch.goal > 0, batch.there)  # never empty: its sum has a gradient
    hard = torch.logsumexp(likelihood.masked_fill(~right, float("-inf")), dim=1)
    # What is not there has a goal of 0 and must not meet its minus infinity.
    soft = (batch.goal * likelihood.masked_fill(~batch.there, 0.0)).sum(dim=1)
    return torch.where(known, -torch.where(batch.soft, soft, hard), 0.0)


def ranks(scores: Tensor, goal: Tensor) -> Tensor:
    """How many other options score above the best right one [N] (with probabilities to learn: the likeliest); 0 is a
    hit."""
    right = goal == goal.amax(dim=1, keepdim=True)
    best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
    return ((scores > best) & ~right).sum(dim=1)


@dataclass(frozen=True)
class OptionOutcome:
    """scores [N, O] fp32, minus infinity where there is no option; loss [N], NaN where nothing is known to be right."""

    scores: Tensor
    loss: Tensor

    def of(self, members: slice) -> "OptionOutcome":
        return OptionOutcome(self.scores[members], self.loss[members])

    @property
    def best(self) -> list[int]:
        """The highest-scored option of each example, the first of equals."""
        return [int(row.argmax()) for row in self.scores]

    @property
    def mean_loss(self) -> float:
        """Over the examples of which something is known to be right; 0 without any."""
        known = self.loss[~self.loss.isnan()]
        return float(known.mean()) if len(known) else 0.0

    @property
    def log_probabilities(self) -> Tensor:
        """[N, O] of the options among themselves."""
        return torch.log_softmax(self.scores, dim=1)


@torch.no_grad()
def evaluate_options(
    host: BackboneHost, members: Sequence[Member], table: Tensor, scorer: OptionScorer, batch: int, pad_id: int
) -> OptionOutcome:
    """Every member scored once under the prompts of ``table`` [R, D]; the same on all ranks."""
    examples = [member.example for member in members if isinstance(member.example, OptionExample)]
    width = max(len(example.options) for example in examples)
    found = torch.zeros(len(members), width + 1, dtype=torch.float64)
    lengths = [example.length for example in examples]
    pieces = micro_batches(lengths, range(len(members)), batch, host.speed.length_buckets)
    for mine in rounds(pieces, host.grid.replica, host.grid.replicas):
        piece = collate_options([members[index] for index in mine], host, pad_id, stand_in=members[0])
        scores = scorer.scores(piece, table)
        if mine and host.grid.speaks:
            found[mine, : scores.shape[1]] = scores.masked_fill(~piece.there, 0.0).double().cpu()
            found[mine, width] = option_losses(scores, piece).double().cpu()
    found = all_reduce_sum(found.to(host.device)).cpu().float()
    counts = torch.tensor([len(example.options) for example in examples])
    absent = torch.arange(width) >= counts[:, None]
    unknown = torch.tensor([not example.right and example.soft is None for example in examples])
    losses = found[:, width].masked_fill(unknown, float("nan"))
    return OptionOutcome(found[:, :width].masked_fill(absent, float("-inf")), losses)
