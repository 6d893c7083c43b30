"""Layers of several encoders of one shape in one grouped computation: J linear layers, J bidirectional LSTM layers.

An encoder's result does not depend on which others are computed with it. The LSTM walks over the few rows; its weight
gradients are one product at the end, not one a row. They are written into memory that the caller keeps: fresh pages
cost a CPU several times what the product does.

J encoders, R table rows, H LSTM width of a direction, I and O widths of a layer's inputs and outputs.
"""

from typing import Any

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """x [J, R, I], weight [J, O, I], bias [J, O] -> [J, R, O]; ``out`` takes the weight's gradient."""
    return _Linear.apply(x, weight, bias, out)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.out = out
        if _is_one_row(x):
            x, weight, bias = _twice(x), _twice(weight), _twice(bias)
            return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))[:1]
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        # The weight's gradient comes out contiguous, as the optimizer reads it.
        to_weight = _product(gradient.transpose(1, 2), x, ctx.out)
        one = _is_one_row(gradient)
        to_x = torch.bmm(_twice(gradient), _twice(weight))[:1] if one else torch.bmm(gradient, weight)
        return to_x, to_weight, gradient.sum(dim=1), None


def _is_one_row(x: Tensor) -> bool:
    """One encoder of one row: torch takes it for a matrix and a vector and sums in another order than for several."""
    return x.shape[:2] == (1, 1)


def _twice(x: Tensor) -> Tensor:
    return x.expand(2, *x.shape[1:])


def _product(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)


def bilstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    outs: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A bidirectional LSTM layer, as torch's: x [J, R, I] -> states [J, R, 2 H], forward ones first.

    w_ih [J, 2, 4 H, I], w_hh [J, 2, 4 H, H], b_ih and b_hh [J, 2, 4 H]: forward, then backward direction; gates in
    the order input, forget, cell, output. ``outs`` take the gradients of w_ih and w_hh.
    """
    return _BiLstm.apply(x, w_ih, w_hh, b_ih, b_hh, outs)


class _BiLstm(torch.autograd.Function):
    """Both directions of all encoders are 2 J recurrences side by side; the backward one reads the rows reversed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, outs: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        jobs, rows, hidden = x.shape[0], x.shape[1], w_hh.shape[3]
        inputs = torch.stack([x, x.flip(1)], dim=1).flatten(0, 1)  # [2 J, R, I]
        biases = (b_ih + b_hh).flatten(0, 1)[:, None]
        gates = torch.baddbmm(biases, inputs, w_ih.flatten(0, 1).transpose(1, 2))  # [2 J, R, 4 H]
        recurrent = w_hh.flatten(0, 1).transpose(1, 2)
        states, cells = gates.new_empty(2 * jobs, rows, hidden), gates.new_empty(2 * jobs, rows, hidden)
        for row in range(rows):
            now = gates[:, row]
            if row:
                now += torch.bmm(states[:, row - 1 : row], recurrent)[:, 0]
            now[:, : 2 * hidden].sigmoid_()
            now[:, 2 * hidden : 3 * hidden].tanh_()
            now[:, 3 * hidden :].sigmoid_()
            enter, keep, cell, leave = now.chunk(4, dim=1)
            torch.mul(enter, cell, out=cells[:, row])
            if row:
                cells[:, row].addcmul_(keep, cells[:, row - 1])
            torch.mul(leave, cells[:, row].tanh(), out=states[:, row])
        ctx.save_for_backward(inputs, w_ih, w_hh, gates, cells, states)
        ctx.outs = (None, None) if outs is None else tuple(out.flatten(0, 1) for out in outs)
        forth, back = states.view(jobs, 2, rows, hidden).unbind(dim=1)
        return torch.cat([forth, back.flip(1)], dim=2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, w_ih, w_hh, gates, cells, states = ctx.saved_tensors
        jobs, rows, hidden = gradient.shape[0], gradient.shape[1], w_hh.shape[3]
        forth, back = gradient.split(hidden, dim=2)
        wanted = torch.stack([forth, back.flip(1)], dim=1).flatten(0, 1)  # [2 J, R, H]
        slopes = torch.empty_like(gates)  # d loss / d gates before their nonlinearities
        recurrent = w_hh.flatten(0, 1)
        to_state = to_cell = None
        for row in reversed(range(rows)):
            enter, keep, cell, leave = gates[:, row].chunk(4, dim=1)
            d_enter, d_keep, d_cell, d_leave = slopes[:, row].chunk(4, dim=1)
            squashed = cells[:, row].tanh()
            state = wanted[:, row] if to_state is None else wanted[:, row] + to_state
            memory = state * leave * (1 - squashed * squashed)
            if to_cell is not None:
                memory += to_cell
            torch.mul(memory * cell, enter * (1 - enter), out=d_enter)
            torch.mul(memory * enter, 1 - cell * cell, out=d_cell)
            torch.mul(state * squashed, leave * (1 - leave), out=d_leave)
            if row:
                torch.mul(memory * cells[:, row - 1], keep * (1 - keep), out=d_keep)
                to_cell = memory * keep
                to_state = torch.bmm(slopes[:, row : row + 1], recurrent)[:, 0]
            else:
                d_keep.zero_()
        turned = slopes.transpose(1, 2)
        to_w_ih = _product(turned, inputs, ctx.outs[0]).view_as(w_ih)
        to_w_hh = _product(turned[:, :, 1:], states[:, :-1], ctx.outs[1]).view_as(w_hh)
        to_bias = slopes.sum(dim=1).view(jobs, 2, 4 * hidden)
        to_inputs = torch.bmm(slopes, w_ih.flatten(0, 1)).view(jobs, 2, rows, -1)
        to_x = to_inputs[:, 0] + to_inputs[:, 1].flip(1)
        return to_x, to_w_ih, to_w_hh, to_bias, to_bias.clone(), None
