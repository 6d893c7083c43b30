"""Which examples make up which step, and their shape as tensors.

The content and order of every global batch is a function of (seed, epoch, step) alone: it is computed, never
replayed, and does not know how many ranks there are.

B examples, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaptune.examples import Example


@dataclass(frozen=True)
class Batch:
    """slots [B, T] int64; attention_mask [B, T] or None; answer_positions [B]; answers [B] token ids; weights [B] fp32.

    A weight of 0 marks a stand-in: under ZeRO-3 all ranks run the same number of forwards.
    """

    slots: Tensor
    attention_mask: Tensor | None
    answer_positions: Tensor
    answers: Tensor
    weights: Tensor

    @property
    def num_tokens(self) -> int:
        return self.slots.numel()


class EpochPlan:
    """The global batches of a training set: ``global_batch`` examples in a new order each epoch."""

    def __init__(self, num_examples: int, global_batch: int, drop_last: bool, seed: int) -> None:
        self.num_examples, self.global_batch, self.seed = num_examples, global_batch, seed
        whole, rest = divmod(num_examples, global_batch)
        self.steps_per_epoch = max(1, whole + (1 if rest and not drop_last else 0))

    def indices(self, step: int) -> list[int]:
        """The examples of optimizer step ``step``, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.num_examples, generator=generator).tolist()
        return order[place * self.global_batch : (place + 1) * self.global_batch]


def micro_batches(lengths: Sequence[int], indices: Sequence[int], size: int) -> list[list[int]]:
    """Cut a batch into pieces of ``size`` examples of similar length, longest first.

    The cut knows nothing of ranks: a piece is computed the same wherever it is computed, so the sum over pieces does
    not depend on the layout. ``lengths`` belongs to the whole set, ``indices`` to the batch.
    """
    by_length = sorted(indices, key=lambda index: (-lengths[index], index))
    return [by_length[start : start + size] for start in range(0, len(by_length), size)]


def rounds(pieces: list[list[int]], rank: int, world_size: int) -> list[list[int]]:
    """This rank's pieces, equally many on every rank: where they do not divide, some ranks end with an empty one."""
    count = -(-len(pieces) // world_size)
    mine = pieces[rank::world_size]
    return mine + [[]] * (count - len(mine))


def collate(examples: Sequence[Example], pad_id: int, masked: bool, device: torch.device, stand_in: Example) -> Batch:
    """Pad on the right. A causal model needs no mask for that: no answer position sees what follows it."""
    members = list(examples) or [stand_in]
    length = max(len(example.slots) for example in members)
    slots = torch.tensor([example.slots + [pad_id] * (length - len(example.slots)) for example in members])
    mask = torch.tensor([[1] * len(e.slots) + [0] * (length - len(e.slots)) for e in members]) if masked else None
    return Batch(
        slots.to(device),
        None if mask is None else mask.to(device),
        torch.tensor([example.answer_position for example in members], device=device),
        torch.tensor([example.answer for example in members], device=device),
        torch.full((len(members),), 1.0 if examples else 0.0, device=device),
    )
