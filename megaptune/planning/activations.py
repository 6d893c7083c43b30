"""What autograd keeps for backward, and what lives at the peak: found by running the model's own code on meta tensors.

Nothing is computed and no weight exists: shapes alone pass through the layers of this rank. Attention stands for the
fused kernels (queries, keys, values, output and one fp32 per query are kept), which torch takes on a CPU and on CUDA.

B examples, T tokens, D backbone width.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from megaptune.backbone.architectures import FAMILIES, blocks_of, shard_plan
from megaptune.backbone.host import PromptedBackbone, checkpoint_activations
from megaptune.backbone.tensor_parallel import divide
from megaptune.run.grid import ProcessGrid


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch. saved: kept from forward to backward; working: above that at the peak of the step."""

    saved_bytes: int
    working_bytes: int


def trace(
    model: Any,
    config: Any,
    shards: int,
    examples: int,
    tokens: int,
    masked: bool,
    checkpointing: bool = False,
    backward: bool = True,
    blocks: int = 0,
) -> Activations:
    """Forward, and backward if wanted, of ``examples`` inputs of ``tokens`` tokens on the first of ``shards`` ranks.

    :param model: on meta, undivided, nobody else's: it is taken apart. Parameters that require gradients are tuned.
    :param blocks: how many the model really has; those that it lacks keep what its last one keeps.
    """
    grid = ProcessGrid(shards=shards)
    divide(model, config, shard_plan(model, config, 0, shards), grid)
    if checkpointing:
        checkpoint_activations(model, config.model_type)
    module = PromptedBackbone(model, grid, 0).to("meta")
    own = {_storage(tensor) for tensor in (*module.parameters(), *module.buffers())}
    width = model.get_input_embeddings().weight.shape[1]
    dtype = module.vocabulary.dtype
    embeds = torch.empty(examples, tokens, width, dtype=dtype, device="meta", requires_grad=backward)
    # 0 and 1, as the padding of batches makes it; in four dimensions, which transformers takes as it is.
    mask = torch.ones(examples, 1, tokens, tokens, dtype=torch.bool, device="meta") if masked else None
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            saved[_storage(tensor)] = tensor
        return tensor

    of_last_block: list[int] = []  # before it runs, less; after it, more
    held_blocks = 0
    if blocks:
        held = blocks_of(model, FAMILIES[config.model_type])
        held_blocks, last = len(held), held[-1][1]
        last.register_forward_pre_hook(lambda *_: of_last_block.append(-_bytes(saved)))
        last.register_forward_hook(lambda *_: of_last_block.append(_bytes(saved)))

    with _stand_ins(), _Live(own) as live, torch.set_grad_enabled(backward):
        live.see(embeds)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks:
            features = module.read(embeds, mask, torch.zeros(examples, dtype=torch.int64, device="meta"))
        saved_bytes = _bytes(saved)
        saved.clear()
        if backward:
            features.backward(torch.empty_like(features))
    working_bytes = max(0, live.peak_bytes - saved_bytes)
    for last_block_bytes in of_last_block:
        saved_bytes += (blocks - held_blocks) * last_block_bytes
    return Activations(saved_bytes, working_bytes)


def _bytes(tensors: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Live(TorchDispatchMode):
    """Bytes of the storages that exist at a time, and their peak."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.own = own
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()
        self.bytes = self.peak_bytes = 0

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.own or storage in self.known:
            return
        self.known.add(storage)
        self.bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return result


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """In place of what meta tensors cannot do or torch does otherwise on them."""
    kept = F.scaled_dot_product_attention, masking_utils.find_packed_sequence_indices
    F.scaled_dot_product_attention = _attention
    masking_utils.find_packed_sequence_indices = lambda position_ids: None  # looks into values: packed or not?
    try:
        yield
    finally:
        F.scaled_dot_product_attention, masking_utils.find_packed_sequence_indices = kept


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        examples, heads, length, _ = query.shape
        output = query.new_empty(examples, length, heads, value.shape[-1]).transpose(1, 2)  # as the kernels lay it out
        normaliser = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, normaliser, mask)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # what torch adds to the products
    return _Attention.apply(query, key, value, attn_mask)
