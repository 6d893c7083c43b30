"""What the Triton and the CUDA kernels have in common: memory, launches, and putting together what programs found.

Neither ever holds scores of all candidates. Forward streams the candidates' rows once, keeping per example a running
maximum and sum (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018), the best index and the
count of better candidates. Several programs share the candidates, since a batch of answers alone would leave most of a
GPU idle; what they found, [B, S], is put together in torch. The gradient takes WAVE_C candidates at a time: weights
[B, WAVE_C] = softmax - onehot, computed again from the rows, then weights @ rows in parts that are summed in order.
Splits depend on C alone, so an example's result depends neither on its batch nor on the device's size; there are no
atomics, so equal inputs give equal bits.

B examples, C candidates, D backbone width, R table rows, S splits of the candidates.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from .registration import Ops, register

BLOCK_B = 16  # examples per program
BLOCK_C = 64  # candidates in a tile of scores
SPLIT_C = 512  # candidates per forward program
WAVE_C = 8192  # candidates whose weights are held at a time
PRODUCT_C = 1024  # candidates per program of weights @ rows


class Launcher(Protocol):
    """The kernels. Outputs come last and are filled; they are contiguous, other tensors may have any strides.

    labels [B] int64 are signed rows: ``label < 0`` is not among these, and would stand before row ``-1 - label``.
    ranges [B, 2] int64, contiguous, within 0..C, or None; bias [C] or None.
    """

    def splice_forward(self, slots: Tensor, vocab_weight: Tensor, table: Tensor, scale: float, out: Tensor) -> None:
        """out [B, T, D]; NaN for a slot outside the vocabulary or the table."""

    def splice_backward(self, slots: Tensor, grad: Tensor, scale: float, out: Tensor) -> None:
        """out [R, D] fp32: the ordered sum."""

    def softmax_forward(
        self,
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
        """at_label [B] fp32, NaN for a label < 0; the rest [B, S]: the split's highest score (-inf where the example
        has no candidate there), sum of exp(score - best), row of the highest (where all are -inf: the first of the
        example's range), and how many beat at_label."""

    def softmax_weights(
        self,
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
        """weights [B, W] fp32 of the candidates from ``first`` on, 0 outside an example's range; better
        [B, W / BLOCK_C] int64: how many of each block beat at_label. Either may not be wanted."""

    def weighted_rows(
        self, weights: Tensor, rows: Tensor, ranges: Tensor | None, first: int, width: int, exact: bool, parts: Tensor
    ) -> None:
        """parts [W / PRODUCT_C, B, D] fp32: weights[:, :width] @ rows[first:first + width], by PRODUCT_C candidates.
        Unless ``exact``, weights may be rounded to tf32."""


def implement(name: str, launch: Launcher) -> Ops:
    """Register the ops whose kernels ``launch`` starts."""

    def splice(slots: Tensor, vocab_weight: Tensor, table: Tensor, scale: float) -> Tensor:
        out = vocab_weight.new_empty(*slots.shape, vocab_weight.shape[1])
        if out.numel():
            launch.splice_forward(slots.contiguous(), vocab_weight, table, scale, out)
        return out

    def splice_backward(slots: Tensor, grad: Tensor, R: int, scale: float) -> Tensor:
        out = grad.new_empty(R, grad.shape[-1], dtype=torch.float32)
        if out.numel():
            launch.splice_backward(slots.contiguous(), grad.contiguous(), scale, out)
        return out

    def softmax(
        features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None, ranges: Tensor | None, wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        start, count, signed, ranges, right = _within(labels, ranges, len(rows))
        order = _order(ranges)
        features, signed, ranges = _take(order, features, signed, ranges)
        at_label, best, total, place, better = _forward(launch, features, rows, bias, signed, ranges)
        lse = torch.logsumexp(best + total.log(), dim=1)
        leader = best.argmax(dim=1, keepdim=True)  # the first of equals: the split with the lowest rows
        slope = lse.new_empty(0)
        if wanted:
            lse_or_nan = torch.where(at_label.isnan(), at_label, lse)
            _, slope = _finish(launch, features, rows, bias, signed, ranges, lse_or_nan, None, True)
            (slope,) = _put(order, slope)
        loss, rank, place = _put(order, lse - at_label, better.sum(dim=1), place.gather(1, leader).squeeze(1))
        return loss, torch.where(right, rank, count.clamp(min=1)), place - start, slope

    def partials(
        features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None, ranges: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        total = features.new_zeros(len(features), dtype=torch.float32)
        kept = total.new_empty(0)
        if not len(rows):
            return torch.full_like(total, float("-inf")), total, total.clone(), torch.full_like(labels, -1), kept
        order = _order(ranges)
        features, labels, ranges = _take(order, features, labels, ranges)
        at_label, best, total, place, _ = _forward(launch, features, rows, bias, labels, ranges)
        top, leader = best.amax(dim=1), best.argmax(dim=1, keepdim=True)
        total = torch.where(total == 0, 0.0, total * torch.exp(best - top[:, None])).sum(dim=1)
        place = place.gather(1, leader).squeeze(1)
        if ranges is not None:
            place = torch.where(ranges[:, 0] < ranges[:, 1], place, -1)
        return (*_put(order, top, total, torch.where(labels >= 0, at_label, 0.0), place), kept)

    def finish(
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
        order = _order(ranges)
        features, labels, ranges, lse, at_label = _take(order, features, labels, ranges, lse, at_label)
        better, slope = _finish(launch, features, rows, bias, labels, ranges, lse, at_label, wanted)
        if wanted:
            (slope,) = _put(order, slope)
        return _put(order, better)[0], slope

    return register(name, splice, splice_backward, softmax, partials, finish, keeps_scores=False)


def _within(labels: Tensor, ranges: Tensor | None, C: int) -> tuple[Any, Tensor, Tensor, Tensor | None, Tensor]:
    """First candidate [B] and number of candidates [B] of each example, its label as a signed row, ranges cut to the
    rows, and whether all of it was as it should be."""
    start: Any = 0
    stop = torch.full_like(labels, C)
    right: Any = True
    if ranges is not None:
        right = (ranges[:, 0] >= 0) & (ranges[:, 1] <= C)
        start = ranges[:, 0].clamp(0, C)
        stop = torch.maximum(ranges[:, 1].clamp(max=C), start)
        ranges = torch.stack([start, stop], dim=1)
    count = stop - start
    right = right & (labels >= 0) & (labels < count)
    return start, count, torch.where(right, labels + start, -1), ranges, right


def _order(ranges: Tensor | None) -> Tensor | None:
    """Examples by their ranges, so that those of one program have few between them; None to leave them as they are."""
    return None if ranges is None else ranges[:, 0].argsort(stable=True)


def _take(order: Tensor | None, *tensors: Any) -> tuple[Any, ...]:
    return tensors if order is None else tuple(tensor[order] for tensor in tensors)


def _put(order: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Undoes _take."""
    if order is None:
        return tensors
    return tuple(torch.empty_like(tensor).index_copy_(0, order, tensor) for tensor in tensors)


def _forward(
    launch: Launcher, features: Tensor, rows: Tensor, bias: Tensor | None, labels: Tensor, ranges: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, S = len(features), -(-len(rows) // SPLIT_C)
    best, total = features.new_empty(2, B, S, dtype=torch.float32)
    place, better = labels.new_empty(2, B, S)
    at_label = features.new_empty(B, dtype=torch.float32)
    if B:
        launch.softmax_forward(features, rows, bias, labels, ranges, at_label, best, total, place, better)
    return at_label, best, total, place, better


def _finish(
    launch: Launcher,
    features: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ranges: Tensor | None,
    lse: Tensor,
    at_label: Tensor | None,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    """How many beat the label [B], where at_label is given; and the gradient [B, D] fp32, where it is wanted."""
    (B, D), C = features.shape, len(rows)
    better = torch.zeros_like(labels)
    slope = lse.new_zeros((B, D) if wanted else (0,))
    if not B or not C:
        return better, slope
    width = min(C, WAVE_C)
    weights = lse.new_empty(B, width) if wanted else None
    parts = lse.new_empty(-(-width // PRODUCT_C), B, D) if wanted else None
    exact = torch.float32 in (features.dtype, rows.dtype)
    for first in range(0, C, WAVE_C):
        width = min(C - first, WAVE_C)
        counts = None if at_label is None else labels.new_empty(B, -(-width // BLOCK_C))
        launch.softmax_weights(features, rows, bias, labels, ranges, lse, at_label, first, weights, counts)
        if counts is not None:
            better += counts.sum(dim=1)
        if weights is not None and parts is not None:
            launch.weighted_rows(weights, rows, ranges, first, width, exact, parts)
            slope += parts[: -(-width // PRODUCT_C)].sum(dim=0)
    return better, slope
