"""Prompts of several relations on one backbone: in one step together, or one relation after the other.

R table rows of all prompts that step together, D backbone width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megaptune.backbone.host import BackboneHost
from megaptune.batches import Member, collate, micro_batches
from megaptune.config import PromptConfig
from megaptune.prompts.bank import Prompt, PromptBank
from megaptune.run.exact_sum import sum_exactly
from megaptune.run.topology import read_environment
from megaptune.scoring import Scorer

from .ways import TRAIN, Unprepared, block_matrices
from .workloads import ROWS


class Jobs(Unprepared):
    """``jobs`` prompts, each with its own encoder and optimizer; ``at_once`` of them share a step and its batch."""

    def __init__(self, name: str, host: BackboneHost, jobs: int, at_once: int, pad_id: int, micro_tokens: int) -> None:
        self.name, self.host, self.pad_id, self.micro_tokens = name, host, pad_id, micro_tokens
        self.scorer = Scorer(host, [None])
        self.banks: list[tuple[list[int], PromptBank]] = []
        for first in range(0, jobs, at_once):
            numbers = list(range(first, min(first + at_once, jobs)))
            sizes = {ROWS: len(numbers)}
            bank = PromptBank(host.width, PromptConfig(), TRAIN, sizes, host.device, read_environment({}), False)
            for number in numbers:
                bank.add(Prompt(f"job {number}", ROWS, number, TRAIN.learning_rate, 100))
            self.banks.append((numbers, bank))

    def step(self, members: Sequence[Member]) -> None:
        for numbers, bank in self.banks:
            bank.step(self.gradient(self._of(members, numbers), bank.table()))

    def gradients(self, members: Sequence[Member]) -> Tensor:
        """d (sum of the jobs' mean losses) / d rows of all jobs, in their order."""
        parts = [self.gradient(self._of(members, numbers), bank.vectors()) for numbers, bank in self.banks]
        return torch.cat(parts)

    def gradient(self, members: list[Member], table: Tensor) -> Tensor:
        """d (sum of the jobs' mean losses) / d ``table`` [R, D], as ``Trainer.gradient`` does it."""
        leaf, gradients = table.clone().requires_grad_(), []
        lengths = [len(member.example.slots) for member in members]
        share = len({member.job for member in members}) / len(members)  # all jobs have equally many rows
        by_length = self.host.speed.length_buckets
        for piece in micro_batches(lengths, range(len(members)), len(members), by_length, self.micro_tokens):
            batch = collate([members[index] for index in piece], self.host, self.pad_id, members[0])
            leaf.grad = None
            (self.scorer.losses(batch, leaf)[0].sum() * share).backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad)
        return sum_exactly(gradients, len(gradients), torch.zeros(1, dtype=torch.float64), True, 0.0)[0]

    def weights(self) -> dict[str, list[Tensor]]:
        return {"blocks": block_matrices(self.host.module.body), "head": [self.scorer.rows.weight]}

    def _of(self, members: Sequence[Member], numbers: list[int]) -> list[Member]:
        """The members of these jobs, whose rows begin where their bank has them."""
        return [m._replace(first_row=ROWS * (m.job - numbers[0])) for m in members if m.job in numbers]
