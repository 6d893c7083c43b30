"""A tiny Megatron-LM GPT as NVIDIA's program writes it, and what it computes, in plain torch.

Written from the format's description; shares nothing with the converter.
"""

import contextlib
import enum
import math
import random
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

WIDTH, FFN, LAYERS, HEADS, MAX_TOKENS = 32, 48, 4, 8, 24
REAL_ROWS, DIVISIBLE_BY = 267, 8
"""267: the bytes, ten merges and the end of text."""


def padded_rows(tensor_parallel: int) -> int:
    multiple = DIVISIBLE_BY * tensor_parallel
    return (REAL_ROWS + multiple - 1) // multiple * multiple


def random_model(rows: int, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
    """fp32 tensors; query, key and value apart, heads one after another in the rows of each."""
    width, ffn = sizes.get("width", WIDTH), sizes.get("ffn", FFN)
    generator = torch.Generator().manual_seed(seed)

    def linear(name: str, outputs: int, inputs: int) -> dict[str, Tensor]:
        weight = torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)
        return {f"{name}.weight": weight, f"{name}.bias": 0.2 * torch.randn(outputs, generator=generator)}

    def norm(name: str) -> dict[str, Tensor]:
        weight = 1 + 0.2 * torch.randn(width, generator=generator)
        return {f"{name}.weight": weight, f"{name}.bias": 0.2 * torch.randn(width, generator=generator)}

    model = {"words": torch.randn(rows, width, generator=generator) / 4}
    model["positions"] = torch.randn(MAX_TOKENS, width, generator=generator) / 4
    for layer in range(sizes.get("layers", LAYERS)):
        for name in ("q", "k", "v", "dense"):
            model |= linear(f"{layer}.{name}", width, width)
        model |= linear(f"{layer}.h_to_4h", ffn, width) | linear(f"{layer}.4h_to_h", width, ffn)
        model |= norm(f"{layer}.input") | norm(f"{layer}.post")
    return model | norm("final")


def plain_logits(model: dict[str, Tensor], ids: Tensor, tanh: bool = True) -> Tensor:
    """ids [B, T] -> [B, T, rows]."""
    length = ids.shape[1]
    hidden = model["words"][ids] + model["positions"][:length]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), model[f"{name}.weight"], model[f"{name}.bias"], 1e-5)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ model[f"{name}.weight"].T + model[f"{name}.bias"]

    layer = 0
    while f"{layer}.dense.weight" in model:
        x = norm(f"{layer}.input", hidden)
        q, k, v = (linear(f"{layer}.{kind}", x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for kind in "qkv")
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        hidden = hidden + linear(f"{layer}.dense", mixed.transpose(1, 2).flatten(2))
        x = linear(f"{layer}.h_to_4h", norm(f"{layer}.post", hidden))
        if tanh:
            x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        else:
            x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        hidden = hidden + linear(f"{layer}.4h_to_h", x)
        layer += 1
    return norm("final", hidden) @ model.get("output", model["words"]).T


def fused_rows(model: dict[str, Tensor], layer: int, kind: str, version: float, rank: int, ranks: int) -> Tensor:
    """A rank's query_key_value, row by row."""
    q, k, v = (model[f"{layer}.{name}.{kind}"] for name in "qkv")
    size = len(q) // HEADS
    mine = range(rank * HEADS // ranks, (rank + 1) * HEADS // ranks)
    if version == 0:
        rows = [source[head * size + n] for source in (q, k, v) for head in mine for n in range(size)]
    elif version == 1:
        rows = [source[head * size + n] for head in mine for n in range(size) for source in (q, k, v)]
    else:
        rows = [source[head * size + n] for head in mine for source in (q, k, v) for n in range(size)]
    return torch.stack(rows)


def layer_tensors(model: dict[str, Tensor], layer: int, version: float, rank: int, ranks: int) -> dict[str, Tensor]:
    attention = "self_attention" if version >= 2 else "attention"
    tensors = {}
    for kind in ("weight", "bias"):
        tensors[f"input_layernorm.{kind}"] = model[f"{layer}.input.{kind}"]
        tensors[f"{attention}.query_key_value.{kind}"] = fused_rows(model, layer, kind, version, rank, ranks)
        tensors[f"post_attention_layernorm.{kind}"] = model[f"{layer}.post.{kind}"]
        tensors[f"mlp.dense_h_to_4h.{kind}"] = model[f"{layer}.h_to_4h.{kind}"].chunk(ranks, 0)[rank]
    tensors[f"{attention}.dense.weight"] = model[f"{layer}.dense.weight"].chunk(ranks, 1)[rank]
    tensors[f"{attention}.dense.bias"] = model[f"{layer}.dense.bias"]
    tensors["mlp.dense_4h_to_h.weight"] = model[f"{layer}.4h_to_h.weight"].chunk(ranks, 1)[rank]
    tensors["mlp.dense_4h_to_h.bias"] = model[f"{layer}.4h_to_h.bias"]
    if version == 0:
        tensors[f"{attention}.masked_bias"] = torch.tensor(-10000.0)
    return {key: value.clone() for key, value in tensors.items()}


def chunk(model: dict[str, Tensor], layers: range, version: float, rank: int, ranks: int) -> dict[str, Any]:
    """What a pipeline stage saves as ``model``: its layers numbered from 0."""
    count = sum(key.endswith(".dense.weight") for key in model)
    body: dict[str, Any] = {}
    for number, layer in enumerate(layers):
        for key, tensor in layer_tensors(model, layer, version, rank, ranks).items():
            body[f"layers.{number}.{key}"] = tensor
    language: dict[str, Any] = {"encoder" if version >= 2 else "transformer": body}
    saved: dict[str, Any] = {"language_model": language}
    words = model["words"].chunk(ranks, 0)[rank].clone()
    first, last = layers.start == 0, layers.stop == count
    if first:
        language["embedding"] = {
            "word_embeddings": {"weight": words},
            "position_embeddings": {"weight": model["positions"]},
        }
    if last:
        body["final_layernorm.weight"], body["final_layernorm.bias"] = model["final.weight"], model["final.bias"]
        if "output" in model:
            language["output_layer"] = {"weight": model["output"].chunk(ranks, 0)[rank].clone()}
        elif not first:
            saved["word_embeddings_for_head"] = {"weight": words}
    return saved


@contextlib.contextmanager
def foreign_modules() -> Iterator[dict[str, Any]]:
    """Megatron's own classes, there while a file is written and gone when it is read."""

    class AttnMaskType(enum.Enum):
        padding = 1
        causal = 2

    class DynamicLossScaler:
        def __init__(self) -> None:
            self.cur_scale = 65536.0

    names = ("megatron", "megatron.model", "megatron.model.enums", "fp16", "fp16.loss_scaler")
    sys.modules.update({name: types.ModuleType(name) for name in names})
    for name, made in (("megatron.model.enums", AttnMaskType), ("fp16.loss_scaler", DynamicLossScaler)):
        made.__module__, made.__qualname__ = name, made.__name__
        setattr(sys.modules[name], made.__name__, made)
    try:
        yield {"mask": AttnMaskType.causal, "scaler": DynamicLossScaler()}
    finally:
        for name in names:
            del sys.modules[name]


def settings(tensor_parallel: int, pipeline_parallel: int, foreign: dict[str, Any], **changes: Any) -> Namespace:
    values = {
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "ffn_hidden_size": FFN,
        "num_attention_heads": HEADS,
        "kv_channels": WIDTH // HEADS,
        "max_position_embeddings": MAX_TOKENS,
        "padded_vocab_size": padded_rows(tensor_parallel),
        "make_vocab_size_divisible_by": DIVISIBLE_BY,
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": pipeline_parallel,
        "layernorm_epsilon": 1e-5,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "bias_gelu_fusion": True,
        "openai_gelu": False,
        "params_dtype": torch.float16,
        "attn_mask_type": foreign["mask"],
        "apply_residual_connection_post_layernorm": False,
    }
    return Namespace(**{**values, **changes})


def write(
    folder: Path,
    model: dict[str, Tensor],
    version: float = 3.0,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    virtual: int = 1,
    iteration: int | str = 2000,
    file: str = "model_optim_rng.pt",
    args: bool = True,
    **changes: Any,
) -> Path:
    """The folder with its tracker; the folder of the ranks. Stages of an equal number of layers."""
    place = folder / (iteration if isinstance(iteration, str) else f"iter_{iteration:07d}")
    count = sum(key.endswith(".dense.weight") for key in model)
    size = count // (pipeline_parallel * virtual)
    with foreign_modules() as foreign:
        for rank in range(tensor_parallel):
            for stage in range(pipeline_parallel):
                content: dict[str, Any] = {"iteration": iteration}
                for turn in range(virtual):
                    start = (turn * pipeline_parallel + stage) * size
                    name = "model" if virtual == 1 else f"model{turn}"
                    content[name] = chunk(model, range(start, start + size), version, rank, tensor_parallel)
                if version:
                    content["checkpoint_version"] = version
                if args:
                    content["args"] = settings(tensor_parallel, pipeline_parallel, foreign, **changes)
                content["optimizer"] = {"loss_scaler": foreign["scaler"], "state": [torch.zeros(3)]}
                content["rng_state"] = [{"np_rng_state": np.random.get_state(), "random_rng_state": random.getstate()}]
                suffix = f"_{stage:03d}" if pipeline_parallel > 1 else ""
                target = place / f"mp_rank_{rank:02d}{suffix}" / file
                target.parent.mkdir(parents=True)
                torch.save(content, target, _use_new_zipfile_serialization=version >= 2)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return place
