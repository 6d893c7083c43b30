"""Which examples make up which step, and their shape as tensors.

The content and order of every global batch is a function of (seed, epoch, step) alone: it is computed, never
replayed, and does not know how many ranks there are.

B examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megaptune.backbone.host import BackboneHost
from megaptune.backbone.inputs import Inputs
from megaptune.examples import Example
from megaptune.option_examples import OptionExample


class Member(NamedTuple):
    """An example as one job's: ``first_row`` is where the job's rows begin in the table, ``job`` its number there;
    ``virtual_tokens``: of the job's deep prompt, 0 for none."""

    example: Example | OptionExample
    first_row: int = 0
    job: int = 0
    virtual_tokens: int = 0

    @property
    def inputs(self) -> list[list[int]]:
        """The slots of its sequences; an example without options has one."""
        return [self.shifted(slots) for slots in self.example.inputs]

    @property
    def slots(self) -> list[int]:
        (slots,) = self.inputs
        return slots

    def shifted(self, slots: list[int]) -> list[int]:
        """Rows of the job as rows of the table."""
        first = self.first_row
        return [slot - first if slot < 0 else slot for slot in slots] if first else slots


@dataclass(frozen=True)
class Batch:
    """inputs: B examples as the backbone reads them; answers [B] token ids; jobs [B]; weights [B] fp32.

    A weight of 0 marks a stand-in: under ZeRO-3 all ranks run the same number of forwards.
    """

    inputs: Inputs
    answers: Tensor
    jobs: Tensor
    weights: Tensor


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


def micro_batches(
    lengths: Sequence[int],
    indices: Sequence[int],
    size: int,
    by_length: bool = True,
    tokens: int | None = None,
) -> list[list[int]]:
    """Cut a batch into pieces of ``size`` examples, of similar length and longest first unless told otherwise.

    The cut knows nothing of ranks: a piece is computed the same wherever it is computed, so the sum over pieces does
    not depend on the layout. ``lengths`` belongs to the whole set, ``indices`` to the batch.

    :param tokens: of a piece, padding counted, at most; an example that is longer is a piece of its own.
    """
    ordered = sorted(indices, key=lambda index: (-lengths[index], index)) if by_length else list(indices)
    pieces: list[list[int]] = []
    longest = 0
    for index in ordered:
        longest = max(longest, lengths[index])
        full = not pieces or len(pieces[-1]) == size
        if full or (tokens is not None and longest * (len(pieces[-1]) + 1) > tokens):
            pieces.append([])
            longest = lengths[index]
        pieces[-1].append(index)
    return pieces


def rounds(pieces: list[list[int]], rank: int, world_size: int) -> list[list[int]]:
    """This rank's pieces, equally many on every rank: where they do not divide, some ranks end with an empty one."""
    count = -(-len(pieces) // world_size)
    mine = pieces[rank::world_size]
    return mine + [[]] * (count - len(mine))


def collate(members: Sequence[Member], host: BackboneHost, pad_id: int, stand_in: Member) -> Batch:
    """The members as tensors; without any, a batch of the stand-in that counts nothing.

    All of them have deep prompts, or none has.
    """
    present = list(members) or [stand_in]
    examples = [member.example for member in present if isinstance(member.example, Example)]
    assert len(examples) == len(present), "examples with options are collated by option_scoring"
    answers = [example.answer_position for example in examples]
    slots, jobs, rows = ([getattr(m, name) for m in present] for name in ("slots", "job", "first_row"))
    virtual_tokens = present[0].virtual_tokens
    return Batch(
        host.lay_out(slots, answers, jobs, pad_id, first_rows=rows, virtual_tokens=virtual_tokens),
        torch.tensor([example.answer for example in examples], device=host.device),
        torch.tensor(jobs, device=host.device),
        torch.full((len(present),), 1.0 if members else 0.0, device=host.device),
    )
