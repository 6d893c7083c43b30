"""Tensor parallelism with plain local tensors: two collectives, a row-parallel layer, the vocabulary by rows.

transformers' modules stay; their column layers merely get fewer outputs. A block costs two all-reduces forward and two
backward, as in Megatron-LM (Shoeybi et al. 2019, section 3). What enters and leaves a block is the same on every rank
of a group, and so is the gradient of the prompt table.

B examples, T tokens, R table rows, D backbone width, V vocabulary, C candidates.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from megaptune.backbone.architectures import FAMILIES, Shard, blocks_of
from megaptune.backbone.frozen_linear import frozen_linear
from megaptune.kernels import dispatch
from megaptune.run.grid import ProcessGrid

UPCAST_ROWS = 4096  # candidate rows held in fp32 at a time


class _SumGradients(torch.autograd.Function):
    """Identity; backward sums over the group: before column layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradient, ctx.group), None


class _SumOutputs(torch.autograd.Function):
    """Sums over the group; backward is the identity: after row layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _all_reduce(x: Tensor, group: Any, op: Any = torch.distributed.ReduceOp.SUM) -> Tensor:
    if group is None:  # nobody to talk to
        return x
    total = x.clone(memory_format=torch.contiguous_format)
    if not total.is_meta:  # shapes alone, when memory is planned
        torch.distributed.all_reduce(total, op=op, group=group)
    return total


def sum_gradients(x: Tensor, group: Any) -> Tensor:
    return _SumGradients.apply(x, group)


def sum_outputs(x: Tensor, group: Any) -> Tensor:
    return _SumOutputs.apply(x, group)


class RowParallel(nn.Module):
    """A linear layer (or GPT-2's Conv1D) that holds the inputs of its rank; the bias is added once, after the sum."""

    def __init__(self, layer: Any, group: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = layer.weight
        self.bias: nn.Parameter | None = layer.bias
        self.transposed = isinstance(layer, Conv1D)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        linear = F.linear if self.weight.requires_grad else frozen_linear
        partial = x @ self.weight if self.transposed else linear(x, self.weight)
        total = sum_outputs(partial, self.group)
        return total if self.bias is None else total + self.bias


def divide(model: nn.Module, config: Any, plan: dict[str, Shard], grid: ProcessGrid) -> None:
    """Shrink a model on meta, in place, to what ``plan`` says that this rank holds, and put the collectives in."""
    if grid.shards == 1:
        return
    family = FAMILIES[config.model_type]
    for name, shard in plan.items():
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.new_empty(shard.shape(tuple(parameter.shape)))
    for _, block in blocks_of(model, family):
        for name in family.columns:
            layer: Any = block.get_submodule(name)
            if isinstance(layer, Conv1D):
                layer.nf = layer.weight.shape[1]
            else:
                layer.out_features = layer.weight.shape[0]
        for name in family.rows:
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, RowParallel(block.get_submodule(name), grid.tensor_group))
        for name, counts in family.divided.items():
            for count in counts:
                module = block.get_submodule(name)
                setattr(module, count, getattr(module, count) // grid.shards)
        _regroup_queries(block, config, grid.shards)
        for name in family.enters:
            _enter(block.get_submodule(name), grid.tensor_group)


def _regroup_queries(block: nn.Module, config: Any, shards: int) -> None:
    """Where several ranks hold the same key-value head, fewer queries share it on each."""
    kv_heads = getattr(config, "num_key_value_heads", None)
    if kv_heads and shards > kv_heads:
        for module in block.modules():
            if hasattr(module, "num_key_value_groups"):
                module.num_key_value_groups = config.num_attention_heads // shards


def _enter(module: nn.Module, group: Any) -> None:
    """Sum the gradient of what comes into ``module``: its hidden states, first or by name."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs:
            return (sum_gradients(inputs[0], group), *inputs[1:]), named
        return inputs, {**named, "hidden_states": sum_gradients(named["hidden_states"], group)}

    module.register_forward_pre_hook(hook, with_kwargs=True)


# -- the vocabulary ----------------------------------------------------------------------------------------------


class _LookUp(torch.autograd.Function):
    """Rows of a vocabulary that ranks hold in turn; the gradient, if wanted, goes to the rows of this rank."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, rows: Tensor, first: int, group: Any) -> Tensor:
        mine = (slots >= first) & (slots < first + len(rows))
        index = torch.where(mine, slots - first, 0)
        ctx.save_for_backward(index, mine)
        ctx.shape = rows.shape
        found = (
            rows[index] * mine[..., None].to(rows.dtype) if len(rows) else rows.new_zeros(*slots.shape, rows.shape[1])
        )
        return _all_reduce(found, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, None, None]:
        if not ctx.needs_input_grad[1]:
            return None, None, None, None
        index, mine = ctx.saved_tensors
        rows = gradient.new_zeros(ctx.shape)
        rows.index_add_(0, index[mine], gradient[mine])
        return None, rows, None, None


def look_up(slots: Tensor, rows: Tensor, first: int, group: Any) -> Tensor:
    """The rows of ids >= 0 [B, T, D], zeros elsewhere; differentiable in ``rows``, of which a rank may hold a part."""
    return _LookUp.apply(slots, rows, first, group)


def splice(slots: Tensor, rows: Tensor, first: int, table: Tensor, scale: float, group: Any) -> Tensor:
    """As ``dispatch.prompt_splice``, over a vocabulary of which this rank holds ``rows`` [.., D] from id ``first`` on.

    slots [B, T], table [R, D] fp32 -> embeds [B, T, D], the same on every rank of the group.
    """
    words = look_up(slots, rows, first, group).flatten(0, 1)
    places = torch.arange(slots.numel(), device=slots.device).view_as(slots)
    return dispatch.prompt_splice(torch.where(slots < 0, slots, places), words, table, scale)


def parallel_softmax(
    features: Tensor,
    rows: Tensor,
    index: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    group: Any,
    ranges: Tensor | None = None,
    wanted: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Cross-entropy over candidates whose rows the ranks of a group hold in parts; no rank sees all logits.

    features  [B, D], the same on every rank
    rows      [c, D], this rank's candidates, perhaps none; bias [c] or None
    index     [c] int64, ascending: their places among all candidates
    labels    [B] int64, places among all candidates
    ranges    [B, 2] int64 or None: example b's candidates are those at the places ranges[b, 0] to ranges[b, 1] - 1, and
              its label and prediction count from ranges[b, 0]

    Returns loss [B] fp32, rank [B] and prediction [B] as ``dispatch.verbalizer_softmax`` does, and d loss / d features
    [B, D], the same on every rank of the group, or None unless ``wanted``. IndexError for a label that is none of its
    candidates (on CUDA: a loss of NaN).
    """
    ops = torch.distributed.ReduceOp
    first: Any = 0
    local, asked_for = None, labels
    if ranges is not None:
        first, stop = ranges.unbind(dim=1)
        asked_for = torch.where((labels >= 0) & (labels < stop - first), labels + first, -1)
        local = torch.searchsorted(index, ranges.contiguous())
    position = torch.searchsorted(index, asked_for)
    beyond = torch.cat([index, index.new_full((1,), -2)])  # so that every position, and -1, names something
    here = beyond[position] == asked_for
    mine = torch.where(here, position, -1 - position)

    best, total, at_label, place, kept = dispatch.softmax_partials(features, rows, mine, bias, local)
    top = _all_reduce(best, group, ops.MAX)
    total = torch.where(total == 0, 0.0, total * torch.exp(best - top))  # a rank may hold none of the candidates
    total, at_label, holders = _all_reduce(torch.stack([total, at_label, here.to(total.dtype)]), group)
    if holders.is_cpu and bool((holders == 0).any()):
        raise IndexError(f"label {int(labels[holders == 0][0])} is none of its example's candidates")
    at_label = torch.where(holders == 0, float("nan"), at_label)
    lse = total.log() + top
    better, slope = dispatch.softmax_finish(features, rows, mine, lse, at_label, kept, bias, local, wanted)
    leads = (place >= 0) & ((best == top) | best.isnan())
    prediction = _all_reduce(torch.where(leads, beyond[place], torch.iinfo(torch.int64).max), group, ops.MIN) - first
    gradient = _all_reduce(slope, group).to(features.dtype) if wanted else None
    return lse - at_label, _all_reduce(better, group), prediction, gradient


def divided_softmax(logits: Tensor, index: Tensor, labels: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy from logits [B, c] fp32 of this rank's candidates, which stand at the places ``index`` [c].

    Returns loss [B], rank [B], prediction [B] (a place), and this rank's part of d loss / d logits [B, c].
    """
    ops = torch.distributed.ReduceOp
    floor = torch.finfo(torch.float32).min
    padded = torch.cat([logits, logits.new_full((len(logits), 1), floor)], dim=1)  # a rank may hold no candidate
    top = padded.amax(dim=1)
    best = _all_reduce(top, group, ops.MAX)
    is_label = index == labels[:, None]
    exponentials = torch.exp(logits - best[:, None])
    sums = torch.stack([exponentials.sum(dim=1), torch.where(is_label, logits, 0.0).sum(dim=1)])
    total, at_label = _all_reduce(sums, group)
    loss = total.log() + best - at_label
    # A NaN counts for the other candidate, as in the plain statement.
    not_better = is_label | (logits < at_label[:, None]) | ((logits == at_label[:, None]) & (index > labels[:, None]))
    beaten_by = (~not_better).sum(dim=1)
    nowhere = torch.iinfo(torch.int64).max
    place = torch.where((logits == best[:, None]) | logits.isnan(), index, nowhere)
    place = torch.cat([place, place.new_full((len(place), 1), nowhere)], dim=1).amin(dim=1)
    prediction = _all_reduce(place, group, ops.MIN)
    slope = exponentials / total[:, None] - is_label.float()
    return loss, _all_reduce(beaten_by, group), prediction, slope
