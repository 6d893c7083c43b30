"""verbalizer_softmax in Triton: the candidates' rows are streamed, their scores never reach memory.

What launches it and puts results together, and why it is cut up like this: streaming.py.

B examples, C candidates, D backbone width, S splits of the candidates, W candidates whose weights are held.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .streaming import BLOCK_B, BLOCK_C, PRODUCT_C, SPLIT_C

BLOCK_D = {"ieee": 16, "tf32": 64}  # as much of a row at a time as registers hold; more of fp32 rows spills
PRODUCT_BLOCK_C, PRODUCT_BLOCK_D = 32, 64


@triton.jit
def scores_tile(
    features_ptr,
    features_stride_b,
    features_stride_d,
    rows_ptr,
    rows_stride_c,
    rows_stride_d,
    bias_ptr,
    b,  # [BLOCK_B] int64
    b_inside,
    c,  # [BLOCK_C] int64, in any order
    c_inside,
    D,  # 0: nothing is read, and scores are the bias
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """features[b] @ rows[c].T + bias[c] as [BLOCK_B, BLOCK_C] fp32.

    Indices are int64, since C * D passes 2**31 for the vocabularies of large models. Operands are widened to fp32
    before tl.dot: "ieee" keeps fp32 inputs whole, and for bf16 and fp16 inputs "tf32" runs on tensor cores and loses
    nothing, because it holds every value of both dtypes; products are exact and sums are fp32.
    """
    scores = tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        d_inside = d < D
        x = tl.load(
            features_ptr + b[:, None] * features_stride_b + d[None, :] * features_stride_d,
            mask=b_inside[:, None] & d_inside[None, :],
            other=0.0,
        )
        w = tl.load(
            rows_ptr + c[None, :] * rows_stride_c + d[:, None] * rows_stride_d,
            mask=c_inside[None, :] & d_inside[:, None],
            other=0.0,
        )
        scores = tl.dot(x.to(tl.float32), w.to(tl.float32), scores, input_precision=PRECISION)
    if HAS_BIAS:
        scores += tl.load(bias_ptr + c, mask=c_inside, other=0.0).to(tl.float32)[None, :]
    return scores


@triton.jit
def candidates_of(ranges_ptr, b, b_inside, C, HAS_RANGES: tl.constexpr, BLOCK_B: tl.constexpr):
    """First candidate and end of each example of a block, and of all of them together; int32, which saves registers."""
    if HAS_RANGES:
        start = tl.load(ranges_ptr + 2 * b, mask=b_inside, other=0).to(tl.int32)
        stop = tl.load(ranges_ptr + 2 * b + 1, mask=b_inside, other=0).to(tl.int32)
        some = b_inside & (start < stop)
        return start, stop, tl.min(tl.where(some, start, C)), tl.max(tl.where(some, stop, 0))
    else:
        zero = tl.zeros([BLOCK_B], dtype=tl.int32)
        return zero, zero + C, tl.min(zero), tl.max(zero + C)


@triton.jit
def softmax_forward_kernel(
    features_ptr,  # [B, D]
    features_stride_b,
    features_stride_d,
    rows_ptr,  # [C, D]
    rows_stride_c,
    rows_stride_d,
    bias_ptr,  # [C], or anything where HAS_BIAS is false
    labels_ptr,  # [B] int64: a row, or -1 - the row that it would stand before
    ranges_ptr,  # [B, 2] int64, or anything where HAS_RANGES is false
    at_label_ptr,  # [B] fp32
    best_ptr,  # [B, S] fp32: the highest score of the split
    total_ptr,  # [B, S] fp32: sum of exp(score - best)
    place_ptr,  # [B, S] int64: row of the highest score
    better_ptr,  # [B, S] int64: how many beat the label
    B,
    C,
    D,
    S,
    HAS_BIAS: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT_C: tl.constexpr,
):
    """One program per (block of examples, split of the candidates)."""
    split = tl.program_id(1)
    b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    b_inside = b < B
    label = tl.load(labels_ptr + b, mask=b_inside, other=-1).to(tl.int32)
    behind = tl.where(label >= 0, label + 1, -1 - label)  # candidates from here on lose a tie against the label
    start, stop, low, high = candidates_of(ranges_ptr, b, b_inside, C, HAS_RANGES, BLOCK_B)
    column = tl.arange(0, BLOCK_C)

    # 1. Which blocks of the split hold candidates of these examples: with ranges often none.
    first = split * SPLIT_C
    begin = first + tl.maximum(low - first, 0) // BLOCK_C * BLOCK_C
    end = tl.minimum(first + SPLIT_C, high)

    # 2. The label's score, as the diagonal of a tile whose column j is the label of example j. A tile of the same shape
    #    runs the same instructions as those below, so equal rows have equal scores and ties are seen as ties.
    owner = tl.program_id(0) * BLOCK_B + column
    owner_label = tl.load(labels_ptr + owner, mask=(column < BLOCK_B) & (owner < B), other=-1)  # int64
    read = tl.where((begin < end) | (split == 0), D, 0)
    tile = scores_tile(
        features_ptr, features_stride_b, features_stride_d, rows_ptr, rows_stride_c, rows_stride_d, bias_ptr,
        b, b_inside, owner_label, owner_label >= 0, read, HAS_BIAS, PRECISION, BLOCK_B, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    diagonal = tl.arange(0, BLOCK_B)[:, None] == column[None, :]
    at_label = tl.where(label >= 0, tl.sum(tl.where(diagonal, tile, 0.0), axis=1), float("nan"))

    # 3. Stream the split: m is the running maximum, l the running sum of exp(score - m).
    m = tl.full([BLOCK_B], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_B], dtype=tl.float32)  # noqa: E741 - the paper's letters
    place = start
    better = tl.zeros([BLOCK_B], dtype=tl.int32)
    for block in range(begin, end, BLOCK_C):
        c = block + column
        scores = scores_tile(
            features_ptr, features_stride_b, features_stride_d, rows_ptr, rows_stride_c, rows_stride_d, bias_ptr,
            b, b_inside, c.to(tl.int64), c < C, D, HAS_BIAS, PRECISION, BLOCK_B, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        inside = (c[None, :] >= start[:, None]) & (c[None, :] < stop[:, None])
        scores = tl.where(inside, scores, float("-inf"))

        # 3a. A later block takes the lead only with a higher score; within a block the lowest row leads.
        block_best = tl.max(scores, axis=1)
        block_place = tl.min(tl.where(scores == block_best[:, None], c[None, :], C), axis=1)
        place = tl.where(block_best > m, block_place, place)

        # 3b. Everything that is not beaten by the label beats it, a NaN included.
        beaten = (scores < at_label[:, None]) | ((scores == at_label[:, None]) & (c[None, :] >= behind[:, None]))
        beats = inside & (c[None, :] != label[:, None]) & (beaten == 0)
        better += tl.sum(beats.to(tl.int32), axis=1)

        # 3c. Move the sum to the new maximum. While every score is -inf the difference would be NaN: stand at 0.
        m_new = tl.maximum(m, block_best)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - shift) + tl.sum(tl.exp(scores - shift[:, None]), axis=1)  # noqa: E741
        m = m_new

    # 4. Leave what was found.
    found = b * S + split
    tl.store(best_ptr + found, m, mask=b_inside)
    tl.store(total_ptr + found, l, mask=b_inside)
    tl.store(place_ptr + found, place.to(tl.int64), mask=b_inside)
    tl.store(better_ptr + found, better.to(tl.int64), mask=b_inside)
    tl.store(at_label_ptr + b, at_label, mask=b_inside & (split == 0))


@triton.jit
def softmax_weights_kernel(
    features_ptr,  # [B, D]
    features_stride_b,
    features_stride_d,
    rows_ptr,  # [C, D]
    rows_stride_c,
    rows_stride_d,
    bias_ptr,  # [C], or anything where HAS_BIAS is false
    labels_ptr,  # [B] int64, as forward
    ranges_ptr,  # [B, 2] int64, or anything where HAS_RANGES is false
    lse_ptr,  # [B] fp32
    at_label_ptr,  # [B] fp32, or anything where COUNT is false
    weights_ptr,  # [B, W] fp32, or anything where WEIGH is false
    better_ptr,  # [B, W / BLOCK_C] int64, or anything where COUNT is false
    first,  # the first of the W candidates
    W,
    B,
    C,
    D,
    HAS_BIAS: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    WEIGH: tl.constexpr,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (block of examples, block of the W candidates).

    loss = lse - score[label],  d lse / d score[c] = exp(score[c] - lse),  d score[c] / d features = rows[c],  therefore
    d loss / d features = sum over c of weight[c] * rows[c]  with  weight[c] = exp(score[c] - lse) - (c == label).
    """
    block = tl.program_id(1)
    b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    b_inside = b < B
    start, stop, low, high = candidates_of(ranges_ptr, b, b_inside, C, HAS_RANGES, BLOCK_B)
    begin = first + block * BLOCK_C
    c = begin + tl.arange(0, BLOCK_C)
    label = tl.load(labels_ptr + b, mask=b_inside, other=-1).to(tl.int32)

    # 1. Scores again: reading the rows twice is cheaper than keeping [B, C]. Blocks without candidates read nothing.
    read = tl.where((begin < high) & (begin + BLOCK_C > low), D, 0)
    scores = scores_tile(
        features_ptr, features_stride_b, features_stride_d, rows_ptr, rows_stride_c, rows_stride_d, bias_ptr,
        b, b_inside, c.to(tl.int64), c < C, read, HAS_BIAS, PRECISION, BLOCK_B, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    inside = b_inside[:, None] & (c[None, :] >= start[:, None]) & (c[None, :] < stop[:, None])

    # 2. What is wanted of them.
    if WEIGH:
        lse = tl.load(lse_ptr + b, mask=b_inside, other=0.0)
        weight = tl.exp(scores - lse[:, None]) - (c[None, :] == label[:, None]).to(tl.float32)
        weight = tl.where(inside, weight, 0.0)
        place = b[:, None] * W + block * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        tl.store(weights_ptr + place, weight, mask=b_inside[:, None] & (c[None, :] < C))
    if COUNT:
        at_label = tl.load(at_label_ptr + b, mask=b_inside, other=0.0)
        behind = tl.where(label >= 0, label + 1, -1 - label)
        beaten = (scores < at_label[:, None]) | ((scores == at_label[:, None]) & (c[None, :] >= behind[:, None]))
        beats = inside & (c[None, :] != label[:, None]) & (beaten == 0)
        tl.store(
            better_ptr + b * tl.num_programs(1) + block, tl.sum(beats.to(tl.int32), axis=1).to(tl.int64), mask=b_inside
        )


@triton.jit
def weighted_rows_kernel(
    weights_ptr,  # [B, W] fp32
    rows_ptr,  # [C, D]
    rows_stride_c,
    rows_stride_d,
    ranges_ptr,  # [B, 2] int64, or anything where HAS_RANGES is false
    parts_ptr,  # [W / PRODUCT_C, B, D] fp32
    first,
    width,  # how many of the W candidates there are
    W,
    B,
    D,
    HAS_RANGES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRODUCT_C: tl.constexpr,
):
    """One program per (block of examples, block of D, PRODUCT_C of the candidates): its part of weights @ rows."""
    part = tl.program_id(2)
    b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    b_inside = b < B
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    d_inside = d < D
    _, _, low, high = candidates_of(ranges_ptr, b, b_inside, first + width, HAS_RANGES, BLOCK_B)
    begin, end = part * PRODUCT_C, tl.minimum((part + 1) * PRODUCT_C, width)
    end = tl.where((first + begin < high) & (first + end > low), end, begin)  # no candidates, no work

    total = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)
    for block in range(begin, end, BLOCK_C):
        w = block + tl.arange(0, BLOCK_C)
        w_inside = w < width
        weight = tl.load(
            weights_ptr + b[:, None] * W + w[None, :], mask=b_inside[:, None] & w_inside[None, :], other=0.0
        )
        c = (first + w).to(tl.int64)
        row = tl.load(
            rows_ptr + c[:, None] * rows_stride_c + d[None, :] * rows_stride_d,
            mask=w_inside[:, None] & d_inside[None, :],
            other=0.0,
        )
        total = tl.dot(weight, row.to(tl.float32), total, input_precision=PRECISION)
    place = (part * B + b[:, None]) * D + d[None, :]
    tl.store(parts_ptr + place, total, mask=b_inside[:, None] & d_inside[None, :])


def softmax_forward(
    features: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ranges: Tensor | None,
    at_label: Tensor,
    best: Tensor,
    total: Tensor,
    place: Tensor,
    better: Tensor,
) -> None:
    (B, D), C, S = features.shape, rows.shape[0], best.shape[1]
    inputs = _inputs(features, rows, bias, labels, ranges)
    with torch.cuda.device_of(features):
        softmax_forward_kernel[(triton.cdiv(B, BLOCK_B), S)](
            *inputs, at_label, best, total, place, better, B, C, D, S, **_switches(features, rows, bias, ranges),
            SPLIT_C=SPLIT_C,
        )  # fmt: skip


def softmax_weights(
    features: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ranges: Tensor | None,
    lse: Tensor,
    at_label: Tensor | None,
    first: int,
    weights: Tensor | None,
    better: Tensor | None,
) -> None:
    (B, D), C = features.shape, rows.shape[0]
    inputs = *_inputs(features, rows, bias, labels, ranges), lse.contiguous()
    at_label_ = lse if at_label is None else at_label.contiguous()
    outputs = lse if weights is None else weights, labels if better is None else better
    width = 0 if weights is None else weights.shape[1]
    blocks = better.shape[1] if better is not None else triton.cdiv(min(C - first, width), BLOCK_C)
    with torch.cuda.device_of(features):
        softmax_weights_kernel[(triton.cdiv(B, BLOCK_B), blocks)](
            *inputs, at_label_, *outputs, first, width, B, C, D, **_switches(features, rows, bias, ranges),
            WEIGH=weights is not None, COUNT=better is not None,
        )  # fmt: skip


def weighted_rows(
    weights: Tensor, rows: Tensor, ranges: Tensor | None, first: int, width: int, exact: bool, parts: Tensor
) -> None:
    _, B, D = parts.shape
    grid = triton.cdiv(B, BLOCK_B), triton.cdiv(D, PRODUCT_BLOCK_D), triton.cdiv(width, PRODUCT_C)
    with torch.cuda.device_of(weights):
        weighted_rows_kernel[grid](
            weights, rows, *rows.stride(), weights if ranges is None else ranges, parts,
            first, width, weights.shape[1], B, D, HAS_RANGES=ranges is not None, PRECISION="ieee" if exact else "tf32",
            BLOCK_B=BLOCK_B, BLOCK_C=PRODUCT_BLOCK_C, BLOCK_D=PRODUCT_BLOCK_D, PRODUCT_C=PRODUCT_C,
        )  # fmt: skip


def _inputs(
    features: Tensor, rows: Tensor, bias: Tensor | None, labels: Tensor, ranges: Tensor | None
) -> tuple[Any, ...]:
    bias = features if bias is None else bias.contiguous()
    ranges = labels if ranges is None else ranges.contiguous()
    return features, *features.stride(), rows, *rows.stride(), bias, labels.contiguous(), ranges


def _switches(features: Tensor, rows: Tensor, bias: Tensor | None, ranges: Tensor | None) -> dict[str, Any]:
    precision = "ieee" if torch.float32 in (features.dtype, rows.dtype) else "tf32"
    return {
        "HAS_BIAS": bias is not None,
        "HAS_RANGES": ranges is not None,
        "PRECISION": precision,
        "BLOCK_B": BLOCK_B,
        "BLOCK_C": BLOCK_C,
        "BLOCK_D": BLOCK_D[precision],
    }
