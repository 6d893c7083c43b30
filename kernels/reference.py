"""The ops in plain torch: what they mean, the path taken on a CPU, and what the kernels are tested against.

B examples, T tokens, N = B * T positions, R table rows, D backbone width, V vocabulary, C candidates.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registration import Ops, register, wide_dtype

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
    return ops.prompt_splice(slots, vocab_weight, table, scale)


def verbalizer_softmax(
    features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None = None, ranges: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy over the candidate answers, and how the right one fared.

    features  [B, D] fp32, bf16 or fp16: hidden states at the answer positions
    rows      [C, D] same kinds of dtype: the candidates' rows of the output embedding, frozen; any strides
    labels    [B] int64, each in 0..C-1
    bias      [C] or None, frozen
    ranges    [B, 2] int64 or None: example b's candidates are ``rows[ranges[b, 0]:ranges[b, 1]]`` alone, and its label,
              rank and prediction count from the first of them. Ranges may overlap and come in any order, so that
              examples of many jobs, each with its own answers, are scored over one concatenation of their rows

    Returns (loss [B] fp32, rank [B] int64, prediction [B] int64). Logits are fp32. ``rank`` counts the candidates that
    beat the label: a higher logit, or an equal one at a lower index, so rank 0 is a hit at 1 and exactly then
    ``prediction``, the lowest index of the highest logit, is the label. A NaN on either side of the comparison counts
    for the other candidate: a diverged prompt scores no hits among two candidates or more. The gradient goes to
    ``features`` alone, in its dtype. It is computed with the loss, so ``rows`` need not live until backward.

    IndexError for a range outside the rows and for a label outside its candidates. No label lies in an empty range, so
    an example without candidates is such an error.
    """
    return ops.verbalizer_softmax(features, rows, labels, bias, ranges)


# -- prompt_splice -------------------------------------------------------------------------------------------------


def _splice(slots: Tensor, vocab_weight: Tensor, table: Tensor, scale: float) -> Tensor:
    flat = slots.reshape(-1)  # [N]
    places = (flat < 0).nonzero().squeeze(1)  # the few positions that read the table, in order
    embeds = F.embedding(flat.clamp(min=0), vocab_weight)
    if scale != 1.0:
        embeds.mul_(scale)
    embeds[places] = (table[-1 - flat[places]] * scale).to(embeds.dtype)
    return embeds.view(*slots.shape, vocab_weight.shape[1])


def _splice_backward(slots: Tensor, grad: Tensor, R: int, scale: float) -> Tensor:
    # embeds[n] = scale * table[rows[n]]   =>   d table[r] = scale * sum of grad[n] over rows[n] == r
    flat = slots.reshape(-1)
    places = (flat < 0).nonzero().squeeze(1)
    rows = -1 - flat[places]
    wanted = grad.reshape(-1, grad.shape[-1])[places]
    wanted = wanted.to(wide_dtype(wanted.dtype))
    total = wanted.new_zeros(R, wanted.shape[1])
    if total.is_cuda:
        total.index_put_((rows,), wanted, accumulate=True)  # sorts; index_add_ would use atomics there
    else:
        total.index_add_(0, rows, wanted)  # walks in order; index_put_ would use atomics here
    return total.mul_(scale)


# -- verbalizer_softmax --------------------------------------------------------------------------------------------

Group = tuple[Any, slice]  # examples (an index) with the same candidates, and these as a slice of the rows


def _softmax(
    features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None, ranges: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    start, places = check_labels(labels, ranges, len(rows))
    best, total, at_label, place, scores = _partials(features, rows, places, bias, ranges)
    lse = best + total.log()
    rank, slope = _finish(features, rows, places, lse, at_label, scores, bias, ranges, wanted)
    return lse - at_label, rank, place - start, slope


def _partials(
    features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None, ranges: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, wide = len(features), wide_dtype(features.dtype, rows.dtype)
    best = features.new_full((B,), float("-inf"), dtype=wide)
    total, at_label = torch.zeros_like(best), torch.zeros_like(best)
    place = torch.full_like(labels, -1)
    kept = []
    for examples, candidates in _groups(len(rows), ranges):
        scores = _scores(features[examples], rows[candidates], None if bias is None else bias[candidates], wide)
        kept.append(scores.view(-1))
        if scores.numel():
            top, where = scores.max(dim=1)
            shift = torch.where(top == float("-inf"), 0.0, top)
            best[examples], place[examples] = top, where + candidates.start
            total[examples] = torch.sub(scores, shift[:, None]).exp_().sum(dim=1)
            label = labels[examples] - candidates.start
            found = scores.gather(1, label.clamp(min=0)[:, None]).squeeze(1)
            at_label[examples] = torch.where(labels[examples] >= 0, found, 0.0)
    return best, total, at_label, place, kept[0] if len(kept) == 1 else torch.cat(kept)


def _finish(
    features: Tensor,
    rows: Tensor,
    labels: Tensor,
    lse: Tensor,
    at_label: Tensor,
    scores: Tensor,
    bias: Tensor | None,
    ranges: Tensor | None,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    better = torch.zeros_like(labels)
    slope = torch.zeros_like(features, dtype=lse.dtype) if wanted else lse.new_empty(0)
    done = 0
    for examples, candidates in _groups(len(rows), ranges):
        label, C = labels[examples], candidates.stop - candidates.start
        mine = scores[done : done + len(label) * C].view(len(label), C)
        done += mine.numel()
        here = label >= 0
        after = torch.where(here, label + 1, -1 - label) - candidates.start  # the first candidate behind the label
        scratch = torch.empty_like(mine)
        better[examples] = _count_better(mine, at_label[examples], here, after, scratch)
        if wanted:
            weight = torch.sub(mine, lse[examples, None], out=scratch).exp_()
            of_label = here.nonzero().squeeze(1)
            weight[of_label, label[of_label] - candidates.start] -= 1
            slope[examples] = _product(weight, rows[candidates])
    return better, slope


def _count_better(scores: Tensor, at_label: Tensor, here: Tensor, after: Tensor, scratch: Tensor) -> Tensor:
    """How many of scores [b, C] beat the label; all that it does not beat do, a NaN included.

    Counts are sums of fp32, exact up to 16 million candidates: torch sums booleans several times slower.
    """
    at_label = at_label[:, None]
    beaten = torch.lt(scores, at_label, out=scratch).sum(dim=1)
    tie = torch.eq(scores, at_label, out=scratch)
    if bool((tie.sum(dim=1) > here).any()):  # with other candidates than the label itself
        behind = torch.arange(scores.shape[1], device=scores.device) >= after[:, None]
        beaten += tie.masked_fill_(~behind, 0).sum(dim=1)
    return scores.shape[1] - beaten.long() - here.long()


def _groups(C: int, ranges: Tensor | None) -> list[Group]:
    """Examples with the same candidates share one product."""
    if ranges is None:
        return [(slice(None), slice(0, C))]
    distinct, member = torch.unique(ranges, dim=0, return_inverse=True)
    if len(distinct) == 1:
        return [(slice(None), slice(*distinct[0].tolist()))]
    return [((member == g).nonzero().squeeze(1), slice(*pair)) for g, pair in enumerate(distinct.tolist())]


def check_labels(labels: Tensor, ranges: Tensor | None, C: int) -> tuple[Tensor | int, Tensor]:
    """First candidate of each example, and the labels as places among all rows; IndexError where they cannot be."""
    if ranges is None:
        start, count = 0, torch.full_like(labels, C)
    else:
        start, stop = ranges.unbind(dim=1)
        count = stop - start
        wrong = (start < 0) | (stop > C) | (count < 0)
        if bool(wrong.any()):
            raise IndexError(f"range {ranges[wrong][0].tolist()} lies outside the {C} candidate rows")
    wrong = (labels < 0) | (labels >= count)
    if bool(wrong.any()):
        raise IndexError(f"label {int(labels[wrong][0])} is none of its example's {int(count[wrong][0])} candidates")
    return start, labels + start


def _scores(features: Tensor, rows: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    """``features @ rows.T + bias`` in fp32 (fp64 for fp64 inputs) without ever holding a wider copy of all the rows."""
    x = features.to(wide)
    blocks = [F.linear(x, block.to(wide)) for block in _blocks(rows, wide)]
    scores = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
    return scores if bias is None else scores.add_(bias.to(wide))


def _product(weight: Tensor, rows: Tensor) -> Tensor:
    blocks = _blocks(rows, weight.dtype)
    parts = weight.split([len(block) for block in blocks], dim=1)
    total = parts[0] @ blocks[0].to(weight.dtype)
    for part, block in zip(parts[1:], blocks[1:], strict=True):
        total.addmm_(part, block.to(weight.dtype))
    return total


def _blocks(rows: Tensor, wide: torch.dtype) -> tuple[Tensor, ...]:
    return (rows,) if rows.dtype == wide else rows.split(UPCAST_ROWS)


ops: Ops = register("reference", _splice, _splice_backward, _softmax, _partials, _finish, keeps_scores=True)
