"""Both ops in plain torch: what they mean, the path taken on a CPU, and what the Triton kernels are tested against.

B examples, T tokens, N = B * T positions, R table rows, D backbone width, V vocabulary, C candidates.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

UPCAST_ROWS = 4096  # candidate rows held in a wider dtype at a time


def prompt_splice(slots: Tensor, vocab_weight: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """What the backbone reads: vocabulary rows, with rows of the prompt table spliced in.

    slots         [B, T] int64: ``slot >= 0`` is a vocabulary id, ``slot < 0`` is table row ``-1 - slot``
    vocab_weight  [V, D] fp32, bf16 or fp16, frozen: it gets no gradient, even where it asks for one
    table         [R, D] fp32; R may be 0
    scale         factor of some families' embeddings (XGLM: sqrt(D)); rounds as ``vocab_weight[ids] * scale`` does

    Returns [B, T, D] in vocab_weight's dtype. The gradient goes to ``table`` alone, fp32, summed in position order, so
    equal inputs give equal bits. IndexError for a slot outside the vocabulary or the table (on CUDA: a device assert).
    """
    return _PromptSplice.apply(slots, vocab_weight.detach(), table, float(scale))


class _PromptSplice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slots: Tensor, vocab_weight: Tensor, table: Tensor, scale: float) -> Tensor:
        flat = slots.reshape(-1)  # [N]
        places = (flat < 0).nonzero().squeeze(1)  # the few positions that read the table, in order
        rows = -1 - flat[places]
        embeds = F.embedding(flat.clamp(min=0), vocab_weight)
        if scale != 1.0:
            embeds.mul_(scale)
        embeds[places] = (table[rows] * scale).to(embeds.dtype)
        ctx.save_for_backward(places, rows)
        ctx.num_rows, ctx.dtype, ctx.scale = table.shape[0], table.dtype, scale
        return embeds.view(*slots.shape, vocab_weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None]:
        places, rows = ctx.saved_tensors
        # embeds[n] = scale * table[rows[n]]   =>   d table[r] = scale * sum of grad[n] over rows[n] == r
        wanted = grad.reshape(-1, grad.shape[-1])[places].to(ctx.dtype)
        total = wanted.new_zeros(ctx.num_rows, wanted.shape[1])
        if total.is_cuda:
            total.index_put_((rows,), wanted, accumulate=True)  # sorts; index_add_ would use atomics there
        else:
            total.index_add_(0, rows, wanted)  # walks in order; index_put_ would use atomics here
        return None, None, total.mul_(ctx.scale), None


def verbalizer_softmax(
    features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy over the candidate answers, and how the right one fared.

    features  [B, D] fp32, bf16 or fp16: hidden states at the answer positions
    rows      [C, D] same kinds of dtype: the candidates' rows of the output embedding, frozen; any strides
    labels    [B] int64, each in 0..C-1
    bias      [C] or None, frozen

    Returns (loss [B] fp32, rank [B] int64, prediction [B] int64). Logits are fp32. ``rank`` counts the candidates that
    beat the label: a higher logit, or an equal one at a lower index, so rank 0 is a hit at 1 and exactly then
    ``prediction``, the lowest index of the highest logit, is the label. A NaN on either side of the comparison counts
    for the other candidate: a diverged prompt scores no hits among two candidates or more. The gradient goes to
    ``features`` alone, in its dtype. IndexError for a label outside 0..C-1 (on CUDA: a device assert).
    """
    logits = _CandidateLogits.apply(features, rows.detach())
    if bias is not None:
        logits = logits + bias.detach().to(logits.dtype)
    loss = F.cross_entropy(logits, labels, reduction="none")

    with torch.no_grad():
        at_label = logits.gather(1, labels[:, None])
        index, label = torch.arange(rows.shape[0], device=logits.device), labels[:, None]
        not_better = (index == label) | (logits < at_label) | ((logits == at_label) & (index > label))
        rank = rows.shape[0] - not_better.sum(dim=1)
        return loss, rank, logits.argmax(dim=1)


class _CandidateLogits(torch.autograd.Function):
    """``features @ rows.T`` in fp32 (fp64 for fp64 inputs) without ever holding a wider copy of all the rows."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.dtype = features.dtype
        wide = _wide(features.dtype, rows.dtype)
        return torch.cat([F.linear(features.to(wide), block.to(wide)) for block in _blocks(rows, wide)], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        blocks = _blocks(rows, grad.dtype)
        parts = grad.split([block.shape[0] for block in blocks], dim=1)
        total = parts[0] @ blocks[0].to(grad.dtype)
        for part, block in zip(parts[1:], blocks[1:], strict=True):
            total.addmm_(part, block.to(grad.dtype))
        return total.to(ctx.dtype), None


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _blocks(rows: Tensor, wide: torch.dtype) -> tuple[Tensor, ...]:
    return (rows,) if rows.dtype == wide else rows.split(UPCAST_ROWS)
