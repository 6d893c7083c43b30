"""What a backbone reads: examples side by side with padding, or their tokens one after the other without any.

A packed batch is a row of N tokens, cut into S *sequences*. A sequence may have a *prefix*, keys and values that its
tokens see before their own: either another sequence of the batch (the leading tokens that several examples share, the
prompt's among them, computed once) or a *context* (tokens before an example's first pseudo token, whose keys and
values never change; they are kept). Only for causal models, where what comes first sees nothing of what follows.
A third kind of prefix is for both: a *deep prompt*, virtual tokens whose keys and values are trained; every sequence of
the batch has one. It stands before leading tokens that are shared; no context is kept then.

An example is read at one position or at several; features come out in the order of the examples and their positions.

B examples, T tokens of the longest, N packed tokens, S sequences, Q tokens of the longest, P of the longest prefix, R
positions that are read (B, where each example has one).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padded:
    """slots [B, T] int64; attention_mask [B, T] or None; answer_positions [R]; rows [R]: the example of each, or None
    where every example has one."""

    slots: Tensor
    attention_mask: Tensor | None
    answer_positions: Tensor
    rows: Tensor | None = None


@dataclass(frozen=True)
class Packed:
    """slots, positions [1, N] int64; answers [R]: packed places of the answer positions.

    places [S * Q]: the packed token of every place of the sequences laid side by side (padding reads any token);
    order [N]: the reverse; visible [S, Q, P + Q] bool: what a query sees of prefix and own tokens; leads [S] int64: the
    sequence that is each one's prefix, or None without shared leads; contexts: each sequence's context, or None;
    prompts [S] int64: each sequence's deep prompt of ``virtual_tokens``, counted in the table, or None.
    """

    slots: Tensor
    positions: Tensor
    answers: Tensor
    places: Tensor
    order: Tensor
    visible: Tensor
    leads: Tensor | None
    contexts: list[tuple[int, ...]] | None
    prompts: Tensor | None = None
    virtual_tokens: int = 0
    masks: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    @property
    def prefix_length(self) -> int:
        return self.visible.shape[2] - self.visible.shape[1]

    @property
    def lead_length(self) -> int:
        """Of the longest prefix behind deep prompts."""
        return self.prefix_length - self.virtual_tokens

    def additive_mask(self, repeats: int, dtype: torch.dtype) -> Tensor:
        """[S, 1, repeats * Q, P + Q]: 0 where a query sees, minus infinity where not; made once a batch."""
        key = (repeats, dtype)
        if key not in self.masks:
            mask = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device)
            mask.masked_fill_(~self.visible, float("-inf"))
            self.masks[key] = mask.repeat(1, repeats, 1)[:, None]
        return self.masks[key]


Inputs = Padded | Packed

Positions = Sequence[int] | Sequence[Sequence[int]]
"""Of every example the position that is read, or several of them, ascending."""


def pad(slots: Sequence[list[int]], answers: Positions, pad_id: int, masked: bool, device: torch.device) -> Padded:
    """Pad on the right. A causal model needs no mask for that: no answer position sees what follows it."""
    length = max(len(tokens) for tokens in slots)
    reads = _in_lists(answers)
    several = any(len(positions) != 1 for positions in reads)
    owners = torch.tensor([b for b, positions in enumerate(reads) for _ in positions], device=device)
    rows = torch.tensor([tokens + [pad_id] * (length - len(tokens)) for tokens in slots])
    mask = torch.tensor([[1] * len(tokens) + [0] * (length - len(tokens)) for tokens in slots]) if masked else None
    places = torch.tensor(list(itertools.chain(*reads)), device=device)
    return Padded(rows.to(device), None if mask is None else mask.to(device), places, owners if several else None)


def _in_lists(answers: Positions) -> list[list[int]]:
    return [[position] if isinstance(position, int) else list(position) for position in answers]


def pack(
    slots: Sequence[list[int]],
    answers: Positions,
    groups: Sequence[int],
    *,
    masked: bool,
    device: torch.device,
    contexts: Sequence[int] | None = None,
    share_leads: bool = False,
    pad_id: int | None = None,
    prompts: Sequence[int] | None = None,
    virtual_tokens: int = 0,
) -> Packed:
    """Lay the examples' tokens one after the other; sequences that are shared prefixes come first.

    :param groups: examples of the same group may share leading tokens, where no contexts are kept.
    :param contexts: how many of each example's first tokens are kept and not computed; 0 for none.
    :param pad_id: fill every example up to the longest with this id: packed in form only.
    :param prompts: each example's deep prompt of ``virtual_tokens``; a group has one.
    """
    reads = _in_lists(answers)
    kept = list(contexts) if contexts is not None else [0] * len(slots)
    share_leads = share_leads and not any(kept)  # one kind of prefix in a batch, behind deep prompts
    assert prompts is None or not any(kept)
    leads, lead_of = _shared_leads(slots, reads, groups) if share_leads else ([], [-1] * len(slots))
    begins = [len(leads[lead]) if lead >= 0 else kept[b] for b, lead in enumerate(lead_of)]
    own = [*leads, *(tokens[begin:] for tokens, begin in zip(slots, begins, strict=True))]
    behind = [0] * len(leads) + begins
    starts = [virtual_tokens + begin for begin in behind]
    lengths = [len(tokens) for tokens in own]
    first = len(leads)
    if pad_id is not None:
        longest = max(lengths[first:])
        own[first:] = [tokens + [pad_id] * (longest - len(tokens)) for tokens in own[first:]]
    held = [len(tokens) for tokens in own]
    offsets = list(itertools.accumulate(held, initial=0))
    queries = max(held)

    def tensor(values: Any) -> Tensor:
        return torch.tensor(values, device=device)

    return Packed(
        slots=tensor([[slot for tokens in own for slot in tokens]]),
        positions=tensor([[starts[s] + min(t, lengths[s] - 1) for s, count in enumerate(held) for t in range(count)]]),
        answers=tensor([offsets[first + b] + place - begins[b] for b, found in enumerate(reads) for place in found]),
        places=tensor([offsets[s] + min(t, count - 1) for s, count in enumerate(held) for t in range(queries)]),
        order=tensor([s * queries + t for s, count in enumerate(held) for t in range(count)]),
        visible=_visible(lengths, behind, queries, masked, virtual_tokens).to(device),
        leads=tensor([0] * first + [max(lead, 0) for lead in lead_of]) if leads else None,
        contexts=[()] * first + [tuple(t[:c]) for t, c in zip(slots, kept, strict=True)] if any(kept) else None,
        prompts=None if prompts is None else tensor([*(prompts[lead_of.index(i)] for i in range(first)), *prompts]),
        virtual_tokens=virtual_tokens,
    )


def _shared_leads(
    slots: Sequence[list[int]], reads: Sequence[list[int]], groups: Sequence[int]
) -> tuple[list[list[int]], list[int]]:
    """What all examples of a group begin with, where there are several; and which of these is each example's, or -1.

    An example's answer positions stay its own.
    """
    members: dict[int, list[int]] = {}
    for b, group in enumerate(groups):
        members.setdefault(group, []).append(b)
    leads: list[list[int]] = []
    lead_of = [-1] * len(slots)
    for alike in members.values():
        limit = min(position for b in alike for position in reads[b])
        columns = zip(*(slots[b][:limit] for b in alike), strict=True)
        lead = [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]
        if lead and len(alike) > 1:
            for b in alike:
                lead_of[b] = len(leads)
            leads.append(lead)
    return leads, lead_of


def _visible(lengths: list[int], behind: list[int], queries: int, masked: bool, virtual_tokens: int) -> Tensor:
    """[S, Q, P + Q]: deep prompts, whom all see, other prefixes of the lengths ``behind``, own tokens."""
    prefix = torch.arange(max(behind)) < torch.tensor(behind)[:, None]
    prefix = torch.cat([torch.ones(len(behind), virtual_tokens, dtype=torch.bool), prefix], dim=1)  # [S, P]
    own = torch.arange(queries) < torch.tensor(lengths)[:, None]  # [S, Q]
    seen = own[:, None].expand(-1, queries, -1)
    if not masked:
        seen = seen & torch.ones(queries, queries, dtype=torch.bool).tril()  # padding queries see the first token
    return torch.cat([prefix[:, None].expand(-1, queries, -1), seen], dim=2)
