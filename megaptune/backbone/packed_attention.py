"""Attention over a packed batch, in place of transformers' own; and layers that run at the answers alone.

transformers lets attention be any registered function. This one lays the packed queries, keys and values side by side,
puts each sequence's prefix before its own keys, and attends. All other layers of a block see N
tokens of one example, none of them padding.

S sequences, Q tokens of the longest, P of the longest prefix, N packed tokens, K query heads, k key-value heads, E head
width, L layers, J deep prompts in the table.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from megaptune.backbone.architectures import Family, blocks_of
from megaptune.backbone.inputs import Packed

NAME = "megaptune"


class Reading:
    """What is being read at the moment: None for a padded batch. It stays until the next forward, because blocks may
    be computed again in backward.

    kept: keys and values of the sequences' contexts [L, 2, S, k, P, E]; record: where each layer's keys and values go;
    deep: keys and values of the table's deep prompts, L x [J, 2, k, P, E] fp32, of which the batch says which sequence
    reads which.
    """

    def __init__(self) -> None:
        self.packed: Packed | None = None
        self.kept: Tensor | None = None
        self.record: list[Tensor] | None = None
        self.deep: list[Tensor] | None = None
        # For the block that runs: of its contexts [2, S, k, P, E]; what its queries see, as attention takes it.
        self.context: Tensor | None = None
        self.mask: Tensor | None = None

    def begin(
        self,
        packed: Packed | None,
        kept: Tensor | None = None,
        record: list[Tensor] | None = None,
        deep: list[Tensor] | None = None,
    ) -> None:
        self.packed, self.kept, self.record, self.deep = packed, kept, record, deep

    def enter(self, block: int, repeats: int, dtype: torch.dtype) -> None:
        """Lay out for a block what tracing could not tell apart from a constant."""
        if self.packed is not None:
            self.context = None if self.kept is None else self.kept[block].to(dtype)
            if self.deep is not None:  # gathered in fp32, in which the sequences' gradients are then summed
                found = _Prefixes.apply(self.deep[block], self.packed.prompts)
                self.context = found.transpose(0, 1).to(dtype)
            self.mask = self.packed.additive_mask(repeats, dtype)


class BlockForward:
    """A block's forward; packed batches may go through another form of it (a compiled one)."""

    def __init__(self, forward: Any, reading: Reading, number: int, repeats: int) -> None:
        self.reading, self.number, self.repeats = reading, number, repeats
        self.padded = self.packed = forward

    def __call__(self, hidden_states: Tensor, *inputs: Any, **named: Any) -> Any:
        reading = self.reading
        reading.enter(self.number, self.repeats, hidden_states.dtype)
        whole = reading.packed is None or reading.record is not None
        return (self.padded if whole else self.packed)(hidden_states, *inputs, **named)


def read_packed(model: Any, family: Family) -> Reading:
    """Let a model of a known family take packed batches beside padded ones."""
    reading = Reading()
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    blocks = blocks_of(model, family)
    for number, (_, block) in enumerate(blocks):
        for module in block.modules():
            module.reading = reading  # type: ignore[assignment]
        own = getattr(block, "self_attn", None)
        if type(own).__name__ == "XGLMAttention":
            _read_packed_xglm(own)
        repeats = int(getattr(own, "num_key_value_groups", 1))
        block.forward = BlockForward(block.forward, reading, number, repeats)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)
    return reading


def no_mask(embeds: Tensor) -> Tensor:
    """In four dimensions, which transformers hands on as it is: so it makes no mask of N x N of its own."""
    return embeds.new_zeros(1, 1, 1, 1)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    reading: Reading = module.reading
    if reading.packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **named)
    return _packed_attention(reading, query, key, value, named.get("scaling")), None


def _packed_attention(reading: Reading, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """query [1, K, N, E], key and value [1, k, N, E] -> [1, N, K, E]."""
    packed = reading.packed
    assert packed is not None
    keys, values = _side_by_side(key, packed), _side_by_side(value, packed)  # [S, k, Q, E]
    if reading.record is not None:
        reading.record.append(torch.stack([key[0], value[0]]))
    if packed.leads is not None:
        length = packed.lead_length
        keys, values = (
            torch.cat([_Prefixes.apply(own[:, :, :length], packed.leads), own], dim=2) for own in (keys, values)
        )
    sequences, kv_heads = keys.shape[:2]
    length = packed.visible.shape[1]
    repeats = query.shape[1] // kv_heads  # query heads that share a key-value head lie along the queries
    queries = _side_by_side(query, packed).unflatten(1, (kv_heads, repeats)).flatten(2, 3)
    if reading.context is None:
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=reading.mask, scale=scale)
    else:
        assert reading.mask is not None
        fused = reading.context.is_cuda or packed.prompts is not None
        found = _behind_context(queries, keys, values, reading.context, reading.mask, scale, fused)
    found = found.unflatten(2, (repeats, length)).permute(0, 3, 1, 2, 4)  # [S, Q, k, repeats, E]
    flat = found.reshape(sequences * length, query.shape[1], query.shape[3])
    return _PickRows.apply(flat, packed.order)[None]


def _behind_context(
    queries: Tensor, keys: Tensor, values: Tensor, context: Tensor, mask: Tensor, scale: float | None, fused: bool
) -> Tensor:
    """Attention to a context's keys and values [2, S, k, P, E], then to own ones [S, k, Q, E].

    :param fused: by torch's fused attention, which holds no weights: on a GPU, and for deep prompts, which are short
        and want their gradient. For kept contexts a CPU is faster with the products themselves: these are long, are
        read where they lie, and have no gradient that would be computed in vain.
    """
    if fused:
        keys, values = torch.cat([context[0], keys], dim=2), torch.cat([context[1], values], dim=2)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    length = context.shape[3]
    queries = queries * (queries.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.cat([queries @ context[0].transpose(2, 3), queries @ keys.transpose(2, 3)], dim=3)
    weights = torch.softmax(scores + mask, dim=3)
    return weights[..., :length] @ context[1] + weights[..., length:] @ values


def _side_by_side(x: Tensor, packed: Packed) -> Tensor:
    """[1, heads, N, E] -> [S, heads, Q, E]."""
    laid = _SideBySide.apply(x[0].transpose(0, 1), packed.places, packed.order)
    return laid.view(*packed.visible.shape[:2], *laid.shape[1:]).transpose(1, 2)


class _SideBySide(torch.autograd.Function):
    """Rows ``x[places]``; ``order`` says where in the result each row counts. What else reads it is padding, whose
    gradient is nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return gradient.index_select(0, order), None, None


class _PickRows(torch.autograd.Function):
    """Rows ``x[index]``, all different; the gradient of the others is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, *gradient.shape[1:]).index_copy_(0, index, gradient), None


class _Prefixes(torch.autograd.Function):
    """Rows ``x[leads]``; the gradients of those that read the same are summed in their order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leads: Tensor) -> Tensor:
        ctx.save_for_backward(leads)
        ctx.rows = len(x)
        return x.index_select(0, leads)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (leads,) = ctx.saved_tensors
        total = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        if total.is_cuda:  # as in kernels/reference.py: the one that walks in order differs by device
            return total.index_put_((leads,), gradient, accumulate=True), None
        return total.index_add_(0, leads, gradient), None


# -- the last block --------------------------------------------------------------------------------------------------


def cut_last_block(model: Any, family: Family, reading: Reading) -> None:
    """In the last block every layer but those of keys and values runs at the answers alone.

    Elsewhere they give zeros, which nothing reads.
    """
    _, block = blocks_of(model, family)[-1]
    for name in (*family.columns, *family.rows):
        if name not in family.keys_and_values:
            _at_answers(block.get_submodule(name), reading)


def _at_answers(layer: Any, reading: Reading) -> None:
    everywhere = layer.forward

    def forward(x: Tensor) -> Tensor:
        packed = reading.packed
        if packed is None:
            return everywhere(x)
        rows = x.reshape(-1, x.shape[-1])  # OPT's MLP takes two dimensions
        found = _Spread.apply(everywhere(_PickRows.apply(rows, packed.answers)), packed.answers, len(rows))
        return found.view(*x.shape[:-1], -1)

    layer.forward = forward


class _Spread(torch.autograd.Function):
    """The reverse: rows back at the answers [B] of N, zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, answers: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(answers)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, answers, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (answers,) = ctx.saved_tensors
        return gradient.index_select(0, answers), None, None


# -- XGLM, whose attention takes no function -----------------------------------------------------------------------


def _read_packed_xglm(module: Any) -> None:
    padded = module.forward

    def forward(hidden_states: Tensor, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        reading: Reading = module.reading
        if reading.packed is None:
            return padded(hidden_states, *inputs, **named)
        query, key, value = (
            layer(hidden_states).unflatten(2, (-1, module.head_dim)).transpose(1, 2)
            for layer in (module.q_proj, module.k_proj, module.v_proj)
        )
        found = _packed_attention(reading, query, key, value, module.scaling)
        return module.out_proj(found.flatten(2)), None

    module.forward = forward
