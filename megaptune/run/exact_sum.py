"""Summing gradients over ranks so that the bits do not depend on which rank computed which piece.

Adam divides by the gradient's own size, so a difference in the last bit of a sum can become a full step. Sums of
integers do not depend on their order: every piece is written as integers on a scale that all pieces share, a power of
two per row, and 32-bit integers travel: as many bytes as the table has in fp32. A row's scale follows from its largest
element over all pieces; with P pieces 30 - log2(P) bits lie below it, of which fp32 arithmetic gives some 24 a meaning.

R table rows, D backbone width.
"""

import math

import torch
from torch import Tensor

from megaptune.run import roll_call

_BITS = 30  # of the 31 that an int32 has beside its sign; one is left for rounding


def sum_exactly(
    pieces: list[Tensor], num_pieces: int | list[int], figures: Tensor, contributes: bool, flag: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The sum of all ranks' ``pieces`` (each [R, D] fp32) and of their ``figures`` [F] (fp64), the same on every rank.

    :param num_pieces: of all ranks together that a row occurs in, or one number for all rows; it decides how many bits
        a piece gets.
    :param contributes: False on a rank whose pieces and figures another rank gives too.
    :param flag: summed over all ranks, also those that do not contribute.
    :returns: the sum [R, D] fp32; the figures and the flag [F + 1] fp64. Rows in which a piece is not finite are NaN.
    """
    stacked = torch.stack(pieces)
    largest = stacked.abs().amax(dim=(0, 2)) if stacked.numel() else stacked.new_zeros(stacked.shape[1])
    given = figures if contributes else torch.zeros_like(figures)
    shared = _gather(torch.cat([given, figures.new_tensor([flag]), largest.double()]))
    width = len(figures) + 1
    sums, largest = shared[:, :width].sum(dim=0), shared[:, width:].amax(dim=0)  # amax hands NaN on
    finite = torch.isfinite(largest)
    exponent = torch.where(finite & (largest > 0), torch.frexp(largest).exponent, 0)  # largest < 2 ** exponent
    counts = torch.tensor(num_pieces, device=largest.device).expand(len(largest)).clamp(min=1)
    scale = torch.exp2((_BITS - torch.ceil(torch.log2(counts.double())) - exponent).double())[:, None]
    total = torch.zeros(pieces[0].shape, dtype=torch.int32, device=pieces[0].device)
    if contributes:
        for piece in pieces:
            total += torch.where(finite[:, None], piece.double() * scale, 0.0).round().to(torch.int32)
    if _several_ranks() and total.numel():
        torch.distributed.all_reduce(total)
    return torch.where(finite[:, None], total.double() / scale, math.nan).float(), sums


def _gather(mine: Tensor) -> Tensor:
    """Every rank's vector, one a row."""
    if not _several_ranks():
        return mine[None]
    roll_call.arrive()
    flat = mine.new_empty(torch.distributed.get_world_size() * len(mine))
    torch.distributed.all_gather_into_tensor(flat, mine)
    return flat.view(-1, len(mine))


def _several_ranks() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
