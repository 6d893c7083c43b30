"""A linear layer whose weight is frozen: backward needs the weight alone, so the input is not kept.

torch's own keeps no input either, but at ZeRO 3 it would keep the gathered weight; DeepSpeed's replacement for it lets
go of the weight, but keeps the input. This one keeps neither, and rounds as torch's does.
"""

from typing import Any

import torch
from torch import Tensor, nn


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)  # the parameter itself, whose data ZeRO 3 takes away and brings back
        return torch._C._nn.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight, None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] or None -> [..., O]; differentiable in ``x`` alone."""
    return _FrozenLinear.apply(x, weight, bias)


def keep_no_inputs(module: nn.Module) -> None:
    """Let every linear layer of a frozen model compute that way."""

    def replace(layer: nn.Linear) -> None:
        layer.forward = lambda input: frozen_linear(input, layer.weight, layer.bias)  # type: ignore[method-assign]

    for layer in module.modules():
        if type(layer) is nn.Linear:
            replace(layer)
