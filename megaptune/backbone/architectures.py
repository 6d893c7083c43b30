"""Per family: which layers tensor parallelism divides, and how. The only place that knows module names.

A *column* layer gives each rank some of its outputs, a *row* layer takes the matching inputs and the ranks' partial
outputs are summed. Everything that a table does not name is whole on every rank; the vocabulary (input embedding,
output embedding and its bias) is divided by rows in every family.

Layer names are those of transformers' modules, relative to a block; files of weights use the same names.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from megaptune.errors import BackboneError

Outputs = Literal["heads", "kv_heads", "q|k|v", "features"]
"""How a column layer's outputs are laid out: whole query heads, whole key or value heads (which may be fewer than the
ranks: then several ranks hold the same one), GPT-2's three blocks side by side, or plain features."""


@dataclass(frozen=True)
class Family:
    """blocks: the list of blocks; enters: modules (in a block) at whose input the ranks' gradients are summed;
    columns, rows: the layers; keys_and_values: those that attention needs of every token; divided: attributes of a
    module, counts that its code reads, that shrink with the slice; unread: patterns of tensors that files hold and the
    model has no use for; renamed: beginnings of names in files that the model calls otherwise; counts_from_padding: the
    first position is the one after the padding id."""

    blocks: str
    enters: tuple[str, ...]
    columns: dict[str, Outputs]
    rows: tuple[str, ...]
    keys_and_values: tuple[str, ...]
    divided: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)
    counts_from_padding: bool = False


_LLAMA = Family(
    blocks="model.layers",
    enters=("self_attn", "mlp"),
    columns={
        "self_attn.q_proj": "heads",
        "self_attn.k_proj": "kv_heads",
        "self_attn.v_proj": "kv_heads",
        "mlp.gate_proj": "features",
        "mlp.up_proj": "features",
    },
    rows=("self_attn.o_proj", "mlp.down_proj"),
    keys_and_values=("self_attn.k_proj", "self_attn.v_proj"),
    unread=(r"rotary_emb\.inv_freq$",),
)

_SEPARATE = {"self_attn.q_proj": "heads", "self_attn.k_proj": "heads", "self_attn.v_proj": "heads", "fc1": "features"}
_FAIRSEQ: dict[str, Any] = {
    "enters": ("self_attn", "fc1"),
    "columns": _SEPARATE,
    "rows": ("self_attn.out_proj", "fc2"),
    "keys_and_values": ("self_attn.k_proj", "self_attn.v_proj"),
}

_BERT: dict[str, Any] = {
    "enters": ("attention.self", "intermediate"),
    "columns": {
        "attention.self.query": "heads",
        "attention.self.key": "heads",
        "attention.self.value": "heads",
        "intermediate.dense": "features",
    },
    "rows": ("attention.output.dense", "output.dense"),
    "keys_and_values": ("attention.self.key", "attention.self.value"),
    "unread": (r"\.pooler\.", r"^cls\.seq_relationship\.", r"position_ids$"),
}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        blocks="transformer.h",
        enters=("attn", "mlp"),
        columns={"attn.c_attn": "q|k|v", "mlp.c_fc": "features"},
        rows=("attn.c_proj", "mlp.c_proj"),
        keys_and_values=("attn.c_attn",),
        divided={"attn": ("num_heads", "split_size")},
        unread=(r"(^|\.)attn\.(masked_)?bias$",),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "gpt_neox": Family(
        blocks="gpt_neox.layers",
        enters=("attention", "mlp"),
        columns={"attention.query_key_value": "heads", "mlp.dense_h_to_4h": "features"},
        rows=("attention.dense", "mlp.dense_4h_to_h"),
        keys_and_values=("attention.query_key_value",),
        unread=(r"attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$"),
        renamed={"embed_out.": "lm_head."},
    ),
    "opt": Family(blocks="model.decoder.layers", divided={"self_attn": ("num_heads",)}, **_FAIRSEQ),
    "xglm": Family(
        blocks="model.layers",
        divided={"self_attn": ("num_heads", "embed_dim")},
        unread=(r"embed_positions\.weights?$",),
        **_FAIRSEQ,
    ),
    "bert": Family(blocks="bert.encoder.layer", **_BERT),
    "roberta": Family(blocks="roberta.encoder.layer", counts_from_padding=True, **_BERT),
}
"""Families that are loaded slice by slice and can be divided. Others are read whole, by transformers."""


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that a rank holds: ``ranges`` of dimension ``dim``, one after the other."""

    dim: int
    ranges: tuple[tuple[int, int], ...]

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape, of a tensor of shape ``whole``."""
        held = sum(stop - start for start, stop in self.ranges)
        return (*whole[: self.dim], held, *whole[self.dim + 1 :])


def shard_plan(model: Any, config: Any, shard: int, shards: int) -> dict[str, Shard]:
    """What rank ``shard`` of ``shards`` holds of each divided parameter of an undivided ``model`` (on meta will do).

    :raises BackboneError: the family has no table, or its heads or features do not divide.
    """
    if shards == 1:
        return {}
    family = divisible(config.model_type)
    plan: dict[str, Shard] = {}
    for block_name, block in blocks_of(model, family):
        for name, outputs in family.columns.items():
            layer: Any = block.get_submodule(name)
            dim = 1 if isinstance(layer, Conv1D) else 0
            ranges = _ranges(outputs, layer.weight.shape[dim], config, shard, shards, name)
            plan[f"{block_name}.{name}.weight"] = Shard(dim, ranges)
            if layer.bias is not None:
                plan[f"{block_name}.{name}.bias"] = Shard(0, ranges)
        for name in family.rows:
            layer = block.get_submodule(name)
            dim = 0 if isinstance(layer, Conv1D) else 1
            plan[f"{block_name}.{name}.weight"] = Shard(dim, _even(layer.weight.shape[dim], shard, shards, name))
    rows = vocabulary_range(model.get_input_embeddings().weight.shape[0], shard, shards)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in vocabulary_parameters(model):
        plan[names[id(parameter)]] = Shard(0, (rows,))
    return plan


def divisible(model_type: str) -> Family:
    """The table of a family; :raises BackboneError: when there is none."""
    if model_type not in FAMILIES:
        raise BackboneError(
            f"tensor parallelism is not available for {model_type!r}, only for {', '.join(FAMILIES)}: set "
            "parallel.tensor_parallel: 1"
        )
    return FAMILIES[model_type]


def vocabulary_parameters(model: Any) -> list[nn.Parameter]:
    """Input embedding, output embedding and its bias; a tied pair once."""
    head = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)]
    return list({id(parameter): parameter for parameter in found if parameter is not None}.values())


def vocabulary_range(vocabulary_size: int, shard: int, shards: int) -> tuple[int, int]:
    """The ids whose rows rank ``shard`` holds. None is padding: where they do not divide, the last ranks hold fewer."""
    size = -(-vocabulary_size // shards)
    return min(shard * size, vocabulary_size), min((shard + 1) * size, vocabulary_size)


def blocks_of(model: nn.Module, family: Family) -> list[tuple[str, nn.Module]]:
    """The transformer blocks with their full names."""
    blocks = model.get_submodule(family.blocks)
    return [(f"{family.blocks}.{name}", block) for name, block in blocks.named_children()]


def is_unread(key: str, family: Family) -> bool:
    """Whether a tensor of a weight file is known to be of no use to the model."""
    return any(re.search(pattern, key) for pattern in family.unread)


def _ranges(
    outputs: Outputs, size: int, config: Any, shard: int, shards: int, name: str
) -> tuple[tuple[int, int], ...]:
    heads = config.num_attention_heads
    if outputs == "kv_heads":
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        if kv_heads % shards and shards % kv_heads:
            raise BackboneError(
                f"{kv_heads} key-value heads neither divide among {shards} tensor-parallel ranks nor {shards} among "
                f"them: choose parallel.tensor_parallel from {_divisors(heads, kv_heads)}"
            )
        if shards > kv_heads:  # several ranks hold the same head, each with its own queries
            head_size = size // kv_heads
            head = shard * kv_heads // shards
            _require_heads(heads, kv_heads, shards)
            return ((head * head_size, (head + 1) * head_size),)
    if outputs in ("heads", "q|k|v"):
        _require_heads(heads, getattr(config, "num_key_value_heads", None) or heads, shards)
    if outputs == "q|k|v":
        block = size // 3
        ((start, stop),) = _even(block, shard, shards, name)
        return tuple((start + number * block, stop + number * block) for number in range(3))
    return _even(size, shard, shards, name)


def _require_heads(heads: int, kv_heads: int, shards: int) -> None:
    if heads % shards:
        raise BackboneError(
            f"{heads} attention heads do not divide among {shards} tensor-parallel ranks: choose "
            f"parallel.tensor_parallel from {_divisors(heads, kv_heads)}"
        )


def _divisors(heads: int, kv_heads: int) -> list[int]:
    """The tensor-parallel sizes that a model allows."""
    return [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]


def _even(size: int, shard: int, shards: int, name: str) -> tuple[tuple[int, int], ...]:
    if size % shards:
        raise BackboneError(
            f"the {size} features of {name} do not divide among {shards} tensor-parallel ranks: lower "
            "parallel.tensor_parallel"
        )
    return ((shard * size // shards, (shard + 1) * size // shards),)
