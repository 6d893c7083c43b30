"""Who holds what: the slices of all ranks make up every tensor, each element once (or once per copy)."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from megaptune.backbone.architectures import FAMILIES, blocks_of, shard_plan, vocabulary_range
from megaptune.errors import BackboneError

HEADS, WIDTH, FFN, VOCABULARY = 4, 32, 64, 121
_COMMON = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS, "vocab_size": VOCABULARY}
OWN = {
    "gpt2": {"n_inner": FFN},
    "xglm": {"d_model": WIDTH, "num_layers": 1, "attention_heads": HEADS, "ffn_dim": FFN},
    "opt": {"ffn_dim": FFN},
}


def on_meta(family: str, **changes):
    config = AutoConfig.for_model(family, **{**_COMMON, "intermediate_size": FFN, **OWN.get(family, {}), **changes})
    auto = AutoModelForMaskedLM if family in ("bert", "roberta") else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config), config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [2, 4])
def test_ranks_together_hold_every_element_once(family, shards):
    model, config = on_meta(family)
    plans = [shard_plan(model, config, shard, shards) for shard in range(shards)]
    assert all(plan.keys() == plans[0].keys() for plan in plans)
    for name, parameter in model.named_parameters():
        if name in plans[0]:
            dim = plans[0][name].dim
            held = [index for plan in plans for start, stop in plan[name].ranges for index in range(start, stop)]
            assert sorted(held) == list(range(parameter.shape[dim])), name
            assert all(plan[name].dim == dim for plan in plans)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_but_norms_and_small_vectors_is_divided(family):
    """A table that forgot a layer would still train rightly; it would only hold too much."""
    model, config = on_meta(family)
    plan = shard_plan(model, config, 0, 4)
    whole = [name for name, parameter in model.named_parameters() if name not in plan and parameter.dim() > 1]
    # position and token-type embeddings, and the square layer of a masked head
    assert all("position" in name or "wpe" in name or "token_type" in name or "dense" in name for name in whole), whole
    assert sum(model.get_parameter(name).numel() for name in whole) <= 1200 * WIDTH * 2 + WIDTH * WIDTH


def test_every_module_that_a_table_names_is_there():
    for family, table in FAMILIES.items():
        model, _ = on_meta(family)
        for _, block in blocks_of(model, table):
            for name in (*table.columns, *table.rows, *table.enters, *table.divided):
                block.get_submodule(name)
            for name, counts in table.divided.items():
                assert all(isinstance(getattr(block.get_submodule(name), count), int) for count in counts)


@pytest.mark.parametrize("shards", [4, 8])
def test_fewer_key_value_heads_than_ranks_are_held_more_than_once(shards):
    model, config = on_meta("llama", num_attention_heads=8, num_key_value_heads=2)
    size = WIDTH // 8
    plans = [shard_plan(model, config, shard, shards) for shard in range(shards)]
    for shard, plan in enumerate(plans):
        ((start, stop),) = plan["model.layers.0.self_attn.k_proj.weight"].ranges
        queries = plan["model.layers.0.self_attn.q_proj.weight"].ranges[0]
        assert stop - start == size
        head = queries[0] // size // 4  # four queries share a key-value head
        assert start == head * size, shard


@pytest.mark.parametrize(
    ("sizes", "shards", "told"),
    [
        (
            {"num_attention_heads": 4, "num_key_value_heads": 4},
            3,
            r"4 attention heads do not divide among 3.*\[1, 2, 4\]",
        ),
        ({"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}, 2, r"from \[1, 3, 6\]"),
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, 8, r"do not divide among 8.*from \[1, 2, 4\]"),
    ],
)
def test_heads_that_do_not_divide(sizes, shards, told):
    model, config = on_meta("llama", **sizes)
    with pytest.raises(BackboneError, match=told):
        shard_plan(model, config, 0, shards)


def test_features_that_do_not_divide():
    model, config = on_meta("llama", num_attention_heads=4, num_key_value_heads=4, intermediate_size=66)
    with pytest.raises(BackboneError, match=r"the 66 features of mlp\.gate_proj do not divide among 4"):
        shard_plan(model, config, 0, 4)


def test_gpt2_keeps_queries_keys_and_values_of_the_same_heads():
    model, config = on_meta("gpt2")
    plan = shard_plan(model, config, 1, 2)["transformer.h.0.attn.c_attn.weight"]
    assert plan.dim == 1
    assert plan.ranges == ((16, 32), (48, 64), (80, 96))


@pytest.mark.parametrize(("vocabulary", "shards"), [(121, 4), (8, 3), (3, 4), (50257, 8)])
def test_vocabulary_has_no_padding(vocabulary, shards):
    ranges = [vocabulary_range(vocabulary, shard, shards) for shard in range(shards)]
    assert [index for start, stop in ranges for index in range(start, stop)] == list(range(vocabulary))
    assert max(stop - start for start, stop in ranges) == math.ceil(vocabulary / shards)
