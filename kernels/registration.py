"""The ops as torch custom ops, one set per implementation, so that torch.compile passes through without looking inside.

An implementation is five functions on plain tensors. What they share stands here: the shapes of what they return, and
how gradients flow.

B examples, T tokens, R table rows, D backbone width, V vocabulary, C candidates.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Ops:
    """The ops of one implementation as the rest of the program calls them; arguments as in reference.py."""

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self._splice, self._softmax, self.softmax_partials, self.softmax_finish = (
            getattr(torch.ops.megaptune, f"{implementation}_{name}")
            for name in ("prompt_splice", "verbalizer_softmax", "softmax_partials", "softmax_finish")
        )

    def prompt_splice(self, slots: Tensor, vocab_weight: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
        return self._splice(slots, vocab_weight.detach(), table, float(scale))

    def verbalizer_softmax(
        self,
        features: Tensor,
        rows: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        ranges: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = torch.is_grad_enabled() and features.requires_grad
        bias = None if bias is None else bias.detach()
        loss, rank, prediction, _ = self._softmax(features, rows.detach(), labels, bias, ranges, wanted)
        return loss, rank, prediction


REGISTERED: dict[str, Ops] = {}  # by implementation


def register(
    implementation: str,
    splice: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    splice_backward: Callable[[Tensor, Tensor, int, float], Tensor],
    softmax: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
    partials: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]],
    finish: Callable[..., tuple[Tensor, Tensor]],
    keeps_scores: bool,
) -> Ops:
    """Define ``megaptune::<implementation>_<op>`` for each op; once, even if a file is imported under two names.

    softmax(features, rows, labels, bias, ranges, wanted) -> loss, rank, prediction, slope
        ``slope`` [B, D] is d loss / d features where it is ``wanted``, else [0]
    partials, finish
        the two halves of it for ranks that hold the rows in parts: dispatch.softmax_partials and softmax_finish
    keeps_scores
        whether all scores, flat, pass from one half to the other; nothing does otherwise
    """
    if not hasattr(torch.ops.megaptune, f"{implementation}_prompt_splice"):

        def define(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
            op = torch.library.custom_op(f"megaptune::{implementation}_{name}", function, mutates_args=())
            op.register_fake(fake)
            return op

        backward = define("prompt_splice_backward", splice_backward, _fake_splice_backward)
        op = define("prompt_splice", splice, _fake_splice)
        op.register_autograd(_splice_autograd(backward), setup_context=_splice_context)
        op = define("verbalizer_softmax", softmax, _fake_softmax)
        op.register_autograd(_softmax_autograd, setup_context=_softmax_context)
        define("softmax_partials", partials, _fake_partials(keeps_scores))
        define("softmax_finish", finish, _fake_finish)
    REGISTERED[implementation] = Ops(implementation)
    return REGISTERED[implementation]


def _fake_splice(slots: Tensor, vocab_weight: Tensor, table: Tensor, scale: float) -> Tensor:
    return vocab_weight.new_empty(*slots.shape, vocab_weight.shape[1])


def _fake_splice_backward(slots: Tensor, grad: Tensor, R: int, scale: float) -> Tensor:
    return grad.new_empty(R, grad.shape[-1], dtype=wide_dtype(grad.dtype))


def _splice_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    slots, _, table, ctx.scale = inputs
    ctx.save_for_backward(slots)
    ctx.num_rows = table.shape[0]


def _splice_autograd(backward: Any) -> Callable[..., tuple[None, None, Tensor, None]]:
    def autograd(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None]:
        (slots,) = ctx.saved_tensors
        return None, None, backward(slots, grad, ctx.num_rows, ctx.scale), None

    return autograd


def _fake_softmax(
    features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None, ranges: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = features.new_empty(features.shape[0], dtype=wide_dtype(features.dtype, rows.dtype))
    slope = loss.new_empty(features.shape if wanted else (0,))
    return loss, torch.empty_like(labels), torch.empty_like(labels), slope


def _softmax_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, rank, prediction, slope = output
    ctx.mark_non_differentiable(rank, prediction, slope)
    ctx.save_for_backward(slope)
    ctx.dtype = inputs[0].dtype


def _softmax_autograd(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (slope,) = ctx.saved_tensors
    return (dloss[:, None] * slope).to(ctx.dtype), None, None, None, None, None


def _fake_partials(keeps_scores: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    def fake(
        features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None, ranges: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        best = features.new_empty(features.shape[0], dtype=wide_dtype(features.dtype, rows.dtype))
        kept = 0
        if keeps_scores:  # of all rows, or of as many as the ranges say
            kept = len(features) * len(rows) if ranges is None else torch.library.get_ctx().new_dynamic_size()
        return best, torch.empty_like(best), torch.empty_like(best), torch.empty_like(labels), best.new_empty(kept)

    return fake


def _fake_finish(
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
    return torch.empty_like(labels), lse.new_empty(features.shape if wanted else (0,))


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32
