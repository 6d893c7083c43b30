"""The ops in Triton."""

from types import SimpleNamespace

from . import triton_softmax, triton_splice
from .streaming import implement

ops = implement(
    "triton",
    SimpleNamespace(
        splice_forward=triton_splice.splice_forward,
        splice_backward=triton_splice.splice_backward,
        softmax_forward=triton_softmax.softmax_forward,
        softmax_weights=triton_softmax.softmax_weights,
        weighted_rows=triton_softmax.weighted_rows,
    ),
)
