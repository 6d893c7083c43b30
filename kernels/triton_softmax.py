"""verbalizer_softmax in Triton: cross-entropy over the candidates without their logits ever reaching memory.

Its meaning: reference.verbalizer_softmax. Forward streams the candidates' rows once, keeping per example a running
maximum and sum (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018), the best index and the
count of better candidates. Several programs share the candidates, since a batch of answers alone would leave most of a
GPU idle; what they found, [B, S], is put together in torch. Splits depend on C alone, so an example's result does not
depend on its batch or on the device's size.

B examples, C candidates, D backbone width, S splits of the candidates.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_B = 16  # the fewest rows tl.dot takes
BLOCK_C = 64
BLOCK_D = {"ieee": 32, "tf32": 64}  # 128 bytes of a row; twice that spills registers with strided fp32 rows
SPLIT_C = 512  # candidates per forward program
WAVE_C = 8192  # candidates whose part of the gradient is held at a time: [WAVE_C / BLOCK_C, B, D] fp32


@triton.jit
def logits_tile(
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
    D,
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
    logits = tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float32)
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
        logits = tl.dot(x.to(tl.float32), w.to(tl.float32), logits, input_precision=PRECISION)
    if HAS_BIAS:
        logits += tl.load(bias_ptr + c, mask=c_inside, other=0.0).to(tl.float32)[None, :]
    return logits


@triton.jit
def softmax_forward_kernel(
    features_ptr,  # [B, D]
    features_stride_b,
    features_stride_d,
    rows_ptr,  # [C, D]
    rows_stride_c,
    rows_stride_d,
    bias_ptr,  # [C], or anything where HAS_BIAS is false
    labels_ptr,  # [B] int64
    label_logit_ptr,  # [B] fp32
    best_ptr,  # [B, S] fp32: the highest logit of the split
    total_ptr,  # [B, S] fp32: sum of exp(logit - best)
    place_ptr,  # [B, S] int64: index of the highest logit
    better_ptr,  # [B, S] int64: how many beat the label
    B,
    C,
    D,
    S,
    HAS_BIAS: tl.constexpr,
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
    label = tl.load(labels_ptr + b, mask=b_inside, other=0)
    column = tl.arange(0, BLOCK_C)

    # 1. The label's logit, as the diagonal of a tile whose column j is the label of example j. A tile of the same shape
    #    runs the same instructions as those below, so equal rows have equal logits and ties are seen as ties.
    #    A label outside 0..C-1 gives NaN, which the trainer stops at, and reads nothing.
    owner = tl.program_id(0) * BLOCK_B + column
    owner_label = tl.load(labels_ptr + owner, mask=(column < BLOCK_B) & (owner < B), other=-1)
    owner_inside = (owner_label >= 0) & (owner_label < C)
    tile = logits_tile(
        features_ptr, features_stride_b, features_stride_d, rows_ptr, rows_stride_c, rows_stride_d, bias_ptr,
        b, b_inside, owner_label, owner_inside, D, HAS_BIAS, PRECISION, BLOCK_B, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    diagonal = tl.arange(0, BLOCK_B)[:, None] == column[None, :]
    label_logit = tl.sum(tl.where(diagonal, tile, 0.0), axis=1)
    label_logit = tl.where((label >= 0) & (label < C), label_logit, float("nan"))

    # 2. Stream the split: m is the running maximum, l the running sum of exp(logit - m).
    first = split * SPLIT_C
    m = tl.full([BLOCK_B], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_B], dtype=tl.float32)  # noqa: E741 - the paper's letters
    place = tl.full([BLOCK_B], first, dtype=tl.int64)
    better = tl.zeros([BLOCK_B], dtype=tl.int64)
    for start in range(first, tl.minimum(first + SPLIT_C, C), BLOCK_C):
        c = (start + column).to(tl.int64)
        c_inside = c < C
        logits = logits_tile(
            features_ptr, features_stride_b, features_stride_d, rows_ptr, rows_stride_c, rows_stride_d, bias_ptr,
            b, b_inside, c, c_inside, D, HAS_BIAS, PRECISION, BLOCK_B, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        logits = tl.where(c_inside[None, :], logits, float("-inf"))

        # 2a. A later block takes the lead only with a higher logit; within a block the lowest index leads.
        block_best = tl.max(logits, axis=1)
        block_place = tl.min(tl.where(logits == block_best[:, None], c[None, :], C), axis=1)
        place = tl.where(block_best > m, block_place, place)

        # 2b. Everything that is not beaten by the label beats it, a NaN included.
        at_label = label_logit[:, None]
        beaten = (logits < at_label) | ((logits == at_label) & (c[None, :] > label[:, None]))
        beats = c_inside[None, :] & (c[None, :] != label[:, None]) & (beaten == 0)
        better += tl.sum(beats.to(tl.int64), axis=1)

        # 2c. Move the sum to the new maximum. While every logit is -inf the difference would be NaN: stand at 0.
        m_new = tl.maximum(m, block_best)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)  # noqa: E741
        m = m_new

    # 3. Leave what was found.
    found = b * S + split
    tl.store(best_ptr + found, m, mask=b_inside)
    tl.store(total_ptr + found, l, mask=b_inside)
    tl.store(place_ptr + found, place, mask=b_inside)
    tl.store(better_ptr + found, better, mask=b_inside)
    tl.store(label_logit_ptr + b, label_logit, mask=b_inside & (split == 0))


@triton.jit
def softmax_backward_kernel(
    features_ptr,  # [B, D]
    features_stride_b,
    features_stride_d,
    rows_ptr,  # [C, D]
    rows_stride_c,
    rows_stride_d,
    bias_ptr,  # [C], or anything where HAS_BIAS is false
    labels_ptr,  # [B] int64
    lse_ptr,  # [B] fp32
    dloss_ptr,  # [B] fp32
    parts_ptr,  # [wave's blocks, B, D] fp32
    first,  # the wave's first candidate
    B,
    C,
    D,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (block of examples, block of the wave's candidates).

    loss = lse - logit[label],   d lse / d logit[c] = exp(logit[c] - lse) = p[c],   d logit[c] / d features = rows[c],
    therefore d features = dloss * sum over c of (p[c] - [c == label]) * rows[c].
    """
    b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    b_inside = b < B
    c = (first + tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    c_inside = c < C

    # 1. Logits again: reading the rows twice is cheaper than keeping [B, C].
    logits = logits_tile(
        features_ptr, features_stride_b, features_stride_d, rows_ptr, rows_stride_c, rows_stride_d, bias_ptr,
        b, b_inside, c, c_inside, D, HAS_BIAS, PRECISION, BLOCK_B, BLOCK_C, BLOCK_D,
    )  # fmt: skip

    # 2. d loss / d logits; lanes outside [B, C] weigh nothing.
    label = tl.load(labels_ptr + b, mask=b_inside, other=0)
    lse = tl.load(lse_ptr + b, mask=b_inside, other=0.0)
    dloss = tl.load(dloss_ptr + b, mask=b_inside, other=0.0)
    weight = tl.exp(logits - lse[:, None]) - (c[None, :] == label[:, None]).to(tl.float32)
    weight = tl.where(b_inside[:, None] & c_inside[None, :], weight * dloss[:, None], 0.0)

    # 3. This block's part of the gradient. Parts are summed in torch, in order: no atomics.
    part_ptr = parts_ptr + tl.program_id(1).to(tl.int64) * B * D
    for start in range(0, D, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        d_inside = d < D
        w = tl.load(
            rows_ptr + c[:, None] * rows_stride_c + d[None, :] * rows_stride_d,
            mask=c_inside[:, None] & d_inside[None, :],
            other=0.0,
        )
        part = tl.dot(weight, w.to(tl.float32), input_precision=PRECISION)
        tl.store(part_ptr + b[:, None] * D + d[None, :], part, mask=b_inside[:, None] & d_inside[None, :])


def verbalizer_softmax(
    features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """features [B, D], rows [C, D], labels [B] int64, bias [C] or None -> loss [B] fp32, rank [B], prediction [B].

    As reference.verbalizer_softmax, except that a label outside 0..C-1 gives a loss of NaN and rank C.
    """
    detached = None if bias is None else bias.detach()
    loss, rank, prediction, _ = torch.ops.megaptune.verbalizer_softmax(features, rows.detach(), labels, detached)
    return loss, rank, prediction


def _forward(
    features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, D), C = features.shape, rows.shape[0]
    S = triton.cdiv(C, SPLIT_C)
    best, total = features.new_empty(2, B, S, dtype=torch.float32)
    place, better = labels.new_empty(2, B, S)
    label_logit = features.new_empty(B, dtype=torch.float32)
    if B:
        inputs = _kernel_inputs(features, rows, labels, bias)
        with torch.cuda.device_of(features):
            softmax_forward_kernel[(triton.cdiv(B, BLOCK_B), S)](
                *inputs, label_logit, best, total, place, better, B, C, D, S, **_switches(features, rows, bias),
                SPLIT_C=SPLIT_C,
            )  # fmt: skip
    lse = torch.logsumexp(best + total.log(), dim=1)
    leader = best.argmax(dim=1, keepdim=True)  # the first of equals: the split with the lowest indices
    return lse - label_logit, better.sum(dim=1), place.gather(1, leader).squeeze(1), lse


def _backward(
    dloss: Tensor, features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None, lse: Tensor
) -> Tensor:
    (B, D), C = features.shape, rows.shape[0]
    total = features.new_zeros(B, D, dtype=torch.float32)
    if total.numel():
        inputs = _kernel_inputs(features, rows, labels, bias)
        parts = total.new_empty(triton.cdiv(min(C, WAVE_C), BLOCK_C), B, D)
        for first in range(0, C, WAVE_C):
            blocks = triton.cdiv(min(C - first, WAVE_C), BLOCK_C)
            with torch.cuda.device_of(features):
                softmax_backward_kernel[(triton.cdiv(B, BLOCK_B), blocks)](
                    *inputs, lse, dloss.contiguous(), parts, first, B, C, D, **_switches(features, rows, bias)
                )
            total += parts[:blocks].sum(dim=0)
    return total.to(features.dtype)


def _kernel_inputs(features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    bias = features if bias is None else bias.contiguous()
    return features, *features.stride(), rows, *rows.stride(), bias, labels.contiguous()


def _switches(features: Tensor, rows: Tensor, bias: Tensor | None) -> dict[str, Any]:
    precision = "ieee" if torch.float32 in (features.dtype, rows.dtype) else "tf32"
    return {
        "HAS_BIAS": bias is not None,
        "PRECISION": precision,
        "BLOCK_B": BLOCK_B,
        "BLOCK_C": BLOCK_C,
        "BLOCK_D": BLOCK_D[precision],
    }


def _fake_forward(
    features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = features.new_empty(features.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(labels), torch.empty_like(labels), torch.empty_like(loss)


def _fake_backward(
    dloss: Tensor, features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None, lse: Tensor
) -> Tensor:
    return features.new_empty(features.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, rank, prediction, lse = output
    ctx.mark_non_differentiable(rank, prediction, lse)
    ctx.save_for_backward(*inputs, lse)


def _autograd(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.megaptune.verbalizer_softmax_backward(dloss, *ctx.saved_tensors), None, None, None


# A file imported under two names must not define the op twice: torch would drop the first definition.
if not hasattr(torch.ops.megaptune, "verbalizer_softmax"):
    _op = torch.library.custom_op("megaptune::verbalizer_softmax", _forward, mutates_args=())
    _op.register_fake(_fake_forward)
    _op.register_autograd(_autograd, setup_context=_setup_context)
    _op_backward = torch.library.custom_op("megaptune::verbalizer_softmax_backward", _backward, mutates_args=())
    _op_backward.register_fake(_fake_backward)
