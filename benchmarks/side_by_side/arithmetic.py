"""The arithmetic that a way really does, and how fast this machine multiplies matrices of the same shapes.

Counted as the operators run, forward and backward: a product of M x K by K x N is 2 M K N operations.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import megaptune.kernels.reference  # noqa: F401  registers the ops

from .timing import timed

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1}
_BATCHED = {_aten.bmm.default: 0, _aten.baddbmm.default: 1}
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default: 2,  # queries x keys, weights x values
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 5,  # the first again, and two for each
}


@dataclass(frozen=True)
class Product:
    """M x K by K x N; ``transposed``: the second matrix lies in memory as N x K, as in a linear layer's forward."""

    m: int
    k: int
    n: int
    transposed: bool

    @property
    def operations(self) -> int:
        return 2 * self.m * self.k * self.n


@dataclass
class Arithmetic:
    """Operations by what they are for, and the products with the blocks' weights."""

    operations: Counter[str] = field(default_factory=Counter)
    products: Counter[Product] = field(default_factory=Counter)

    @property
    def blocks(self) -> int:
        return self.operations["blocks"]

    @property
    def total(self) -> int:
        """Without the prompt encoder's, of which the LSTM's are out of sight."""
        return self.operations.total() - self.operations["other"]


class _Count(TorchDispatchMode):
    def __init__(self, weights: Mapping[str, Sequence[Tensor]]) -> None:
        super().__init__()
        self.owner = {tensor.data_ptr(): name for name, tensors in weights.items() for tensor in tensors}
        self.found = Arithmetic()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _PRODUCTS:
            first, second = args[_PRODUCTS[function] : _PRODUCTS[function] + 2]
            owner = self.owner.get(second.data_ptr())
            product = Product(*first.shape, second.shape[1], not second.is_contiguous())
            self.found.operations[owner or "other"] += product.operations
            if owner == "blocks":
                self.found.products[product] += 1
        elif function in _BATCHED:
            first, second = args[_BATCHED[function] : _BATCHED[function] + 2]
            self.found.operations["attention"] += 2 * first.numel() * second.shape[2]
        elif function in _ATTENTION:
            query, key = args[:2] if _ATTENTION[function] == 2 else args[1:3]
            pairs = query.shape[:-1].numel() * key.shape[2]
            self.found.operations["attention"] += _ATTENTION[function] * 2 * pairs * query.shape[3]
        elif function is torch.ops.megaptune.reference_verbalizer_softmax.default:  # its products are out of sight
            features, rows, *_, wanted = args
            products = 2 if wanted else 1  # scores, and their gradient with respect to the features
            self.found.operations["head"] += products * 2 * features.numel() * len(rows)
        return function(*args, **(kwargs or {}))


def count(work: Callable[[], Any], weights: Mapping[str, Sequence[Tensor]]) -> Arithmetic:
    """What ``work`` computes; compiled code runs as it was written, and is compiled again afterwards.

    :param weights: matrices by what they belong to, ``blocks`` among them; products with others count as "other".
    """
    with torch.compiler.set_stance("force_eager"), _Count(weights) as counter:
        work()
    return counter.found


@dataclass(frozen=True)
class Peak:
    """Operations per second of wall clock, and per second of process time."""

    wall: float
    cpu: float


def peak(products: Counter[Product], repeats: int = 3) -> Peak:
    """Plain matrix products in the given shapes and proportions, each at its best of ``repeats``.

    Operands are drawn once per shape, so they may stay in the caches: a bound that streams no weights.
    """
    wall = cpu = 0.0
    for product, times in products.items():
        first = torch.randn(product.m, product.k)
        second = torch.randn(product.n, product.k).T if product.transposed else torch.randn(product.k, product.n)
        out = torch.empty(product.m, product.n)
        taken = [timed(lambda a=first, b=second, out=out: torch.mm(a, b, out=out)) for _ in range(repeats)]
        wall += times * min(turn[0] for turn in taken)
        cpu += times * min(turn[1] for turn in taken)
    operations = sum(product.operations * times for product, times in products.items())
    return Peak(operations / wall, operations / cpu)
