"""prompt_splice in Triton: one gather forward, one ordered sum backward. What launches it: streaming.py.

B examples, T tokens, N = B * T positions, R table rows, D backbone width, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_BLOCK_D = 1024
BACKWARD_BLOCK_D = 256
BACKWARD_BLOCK_N = 1024


@triton.jit
def splice_forward_kernel(
    slots_ptr,  # [N] int64
    vocab_ptr,  # [V, D]
    vocab_stride_v,
    vocab_stride_d,
    table_ptr,  # [R, D] fp32
    table_stride_r,
    table_stride_d,
    out_ptr,  # [N, D] contiguous
    scale,
    V,
    R,
    D,
    BLOCK_D: tl.constexpr,
):
    """One program per (position, D block)."""
    n = tl.program_id(0).to(tl.int64)  # int64 wherever a stride is multiplied: V * D passes 2**31 at 128 k x 16 k
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    inside = d < D

    # 1. Read the one row the slot names; slots are int64, hence so are the offsets. A slot outside both gives NaN,
    #    which the trainer stops at, and reads nothing.
    slot = tl.load(slots_ptr + n)
    if slot < 0:
        exists = -1 - slot < R
        row = tl.load(table_ptr + (-1 - slot) * table_stride_r + d * table_stride_d, mask=inside & exists, other=0.0)
    else:
        exists = slot < V
        row = tl.load(vocab_ptr + slot * vocab_stride_v + d * vocab_stride_d, mask=inside & exists, other=0.0)
        row = row.to(tl.float32)

    # 2. Scale in fp32 and round once: what `weight * scale` does too, for any weight dtype.
    scaled = tl.where(exists, row * scale, float("nan"))
    tl.store(out_ptr + n * D + d, scaled.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def splice_backward_kernel(
    slots_ptr,  # [N] int64
    grad_ptr,  # [N, D] contiguous
    out_ptr,  # [R, D] fp32 contiguous
    scale,
    N,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (table row, D block).

    out[n] = scale * table[r] at the positions where slots[n] == -1 - r, therefore
    d table[r] = scale * sum of grad[n] over those positions. One program owns the whole sum and takes the positions in
    order, so no atomics are needed and the bits do not depend on scheduling.
    """
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    total = tl.zeros([BLOCK_D], dtype=tl.float32)

    # 1. Look at a block of slots at a time; most hold no use of this row and cost one load.
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        used = tl.load(slots_ptr + n, mask=n < N, other=0) == -1 - r

        # 2. Go from use to use in position order.
        use = tl.min(tl.where(used, n, N))
        while use < N:
            grad = tl.load(grad_ptr + use.to(tl.int64) * D + d, mask=inside, other=0.0)
            total += grad.to(tl.float32)
            use = tl.min(tl.where(used & (n > use), n, N))

    tl.store(out_ptr + r * D + d, total * scale, mask=inside)


def splice_forward(slots: Tensor, vocab_weight: Tensor, table: Tensor, scale: float, out: Tensor) -> None:
    (V, D), R = vocab_weight.shape, table.shape[0]
    grid = (slots.numel(), triton.cdiv(D, FORWARD_BLOCK_D))
    block_d = min(FORWARD_BLOCK_D, triton.next_power_of_2(D))
    inputs = slots, vocab_weight, *vocab_weight.stride(), table, *table.stride()
    with torch.cuda.device_of(out):
        splice_forward_kernel[grid](*inputs, out, scale, V, R, D, BLOCK_D=block_d)


def splice_backward(slots: Tensor, grad: Tensor, scale: float, out: Tensor) -> None:
    (R, D), N = out.shape, slots.numel()
    block_d = min(BACKWARD_BLOCK_D, triton.next_power_of_2(D))
    block_n = min(BACKWARD_BLOCK_N, triton.next_power_of_2(max(N, 1)))
    with torch.cuda.device_of(out):
        splice_backward_kernel[(R, triton.cdiv(D, block_d))](
            slots, grad, out, scale, N, D, BLOCK_N=block_n, BLOCK_D=block_d
        )
