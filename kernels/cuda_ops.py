"""The ops in CUDA C++: the kernels of csrc/."""

import functools
from types import ModuleType

import torch
from torch import Tensor

from . import cuda_extension
from .registration import Ops
from .streaming import BLOCK_C, implement


@functools.cache
def implemented() -> Ops:
    """The ops, after building csrc/ where that has not been done yet."""
    return implement("cuda", ExtensionLauncher(cuda_extension.build()))


class ExtensionLauncher:
    """Starts the kernels of an extension, on the stream that is current; see streaming.Launcher.

    Features, biases and sums are fp32 here and products exact; the rows, which are many, are read as they are.
    """

    def __init__(self, extension: ModuleType) -> None:
        self.extension = extension

    def splice_forward(self, slots: Tensor, vocab_weight: Tensor, table: Tensor, scale: float, out: Tensor) -> None:
        with torch.cuda.device_of(out):
            self.extension.splice_forward(slots, vocab_weight, table, scale, out, _stream(out))

    def splice_backward(self, slots: Tensor, grad: Tensor, scale: float, out: Tensor) -> None:
        with torch.cuda.device_of(out):
            self.extension.splice_backward(slots, grad, scale, out, _stream(out))

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
        inputs = _fp32(features), rows, _fp32(bias), labels.contiguous(), _contiguous(ranges)
        with torch.cuda.device_of(rows):
            self.extension.softmax_forward(*inputs, at_label, best, total, place, better, _stream(rows))

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
        inputs = _fp32(features), rows, _fp32(bias), labels.contiguous(), _contiguous(ranges), lse.contiguous()
        width = weights.shape[1] if weights is not None else 0
        blocks = better.shape[1] if better is not None else -(-min(len(rows) - first, width) // BLOCK_C)
        with torch.cuda.device_of(rows):
            self.extension.softmax_weights(
                *inputs, _contiguous(at_label), first, blocks, weights, better, _stream(rows)
            )

    def weighted_rows(
        self, weights: Tensor, rows: Tensor, ranges: Tensor | None, first: int, width: int, exact: bool, parts: Tensor
    ) -> None:
        with torch.cuda.device_of(rows):
            self.extension.weighted_rows(weights, rows, _contiguous(ranges), first, width, parts, _stream(rows))


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _fp32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
