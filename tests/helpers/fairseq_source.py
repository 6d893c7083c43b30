"""A tiny megatron_11b as fairseq writes it, and what fairseq computes with it, in plain torch.

Written from the format's description; shares nothing with the converter.
"""

import math
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from bpe_reference import MERGES, ids_by_token
from torch import Tensor
from torch.nn import functional as F

WIDTH, FFN, LAYERS, HEADS, ROWS, MAX_TOKENS = 32, 48, 3, 8, 320, 64
FILLERS = 5
"""madeupword lines of dict.txt: two amid the tokens, three at the end."""


def random_state(final_norm: bool = False, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
    """The whole decoder's tensors, fp32, by fairseq's names."""
    width, ffn = sizes.get("width", WIDTH), sizes.get("ffn", FFN)
    generator = torch.Generator().manual_seed(seed)

    def matrix(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)

    def vector(size: int, around: float = 0.0) -> Tensor:
        return around + 0.2 * torch.randn(size, generator=generator)

    state = {"decoder.version": torch.tensor([3.0]), "decoder.embed_positions._float_tensor": torch.zeros(1)}
    state["decoder.embed_tokens.weight"] = matrix(sizes.get("rows", ROWS), width)
    for layer in range(sizes.get("layers", LAYERS)):
        at = f"decoder.layers.{layer}."
        for name in ("q", "k", "v", "out"):
            state[f"{at}self_attn.{name}_proj.weight"] = matrix(width, width)
            state[f"{at}self_attn.{name}_proj.bias"] = vector(width)
        state[f"{at}fc1.weight"], state[f"{at}fc1.bias"] = matrix(ffn, width), vector(ffn)
        state[f"{at}fc2.weight"], state[f"{at}fc2.bias"] = matrix(width, ffn), vector(width)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            state[f"{at}{name}.weight"], state[f"{at}{name}.bias"] = vector(width, 1.0), vector(width)
    if final_norm:
        state["decoder.layer_norm.weight"], state["decoder.layer_norm.bias"] = vector(width, 1.0), vector(width)
    return state


def plain_logits(state: dict[str, Tensor], ids: Tensor, heads: int = HEADS) -> Tensor:
    """ids [B, T] without padding -> [B, T, rows]."""
    embedding = state["decoder.embed_tokens.weight"]
    width, length = embedding.shape[1], ids.shape[1]
    rates = torch.exp(torch.arange(width // 2).float() * -(math.log(10000) / (width // 2 - 1)))
    angles = torch.arange(2, 2 + length).float()[:, None] * rates[None]
    hidden = math.sqrt(width) * embedding[ids] + torch.cat([angles.sin(), angles.cos()], dim=1)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    layer = 0
    while f"decoder.layers.{layer}.fc1.weight" in state:

        def linear(name: str, x: Tensor, at: str = f"decoder.layers.{layer}.") -> Tensor:
            return x @ state[f"{at}{name}.weight"].T + state[f"{at}{name}.bias"]

        def norm(name: str, x: Tensor, at: str = f"decoder.layers.{layer}.") -> Tensor:
            return F.layer_norm(x, (width,), state[f"{at}{name}.weight"], state[f"{at}{name}.bias"], 1e-5)

        x = norm("self_attn_layer_norm", hidden)
        q, k, v = (
            linear(f"self_attn.{name}_proj", x).unflatten(-1, (heads, width // heads)).transpose(1, 2) for name in "qkv"
        )
        scores = (q / math.sqrt(width // heads)) @ k.transpose(-1, -2)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        hidden = hidden + linear("self_attn.out_proj", mixed.transpose(1, 2).flatten(2))
        x = linear("fc1", norm("final_layer_norm", hidden))
        hidden = hidden + linear("fc2", 0.5 * x * (1 + torch.erf(x / math.sqrt(2))))
        layer += 1
    if "decoder.layer_norm.weight" in state:
        hidden = F.layer_norm(hidden, (width,), state["decoder.layer_norm.weight"], state["decoder.layer_norm.bias"])
    return hidden @ embedding.T


def settings(parts: int, **changes: Any) -> Namespace:
    values = {
        "arch": "transformer_lm_megatron_11b",
        "criterion": "vocab_parallel_cross_entropy",
        "decoder_layers": LAYERS,
        "decoder_embed_dim": WIDTH,
        "decoder_input_dim": WIDTH,
        "decoder_output_dim": WIDTH,
        "decoder_ffn_embed_dim": FFN,
        "decoder_attention_heads": HEADS,
        "decoder_normalize_before": True,
        "share_decoder_input_output_embed": True,
        "no_scale_embedding": False,
        "activation_fn": "gelu",
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "tokens_per_sample": MAX_TOKENS,
        "model_parallel_size": parts,
        "adam_betas": "(0.9, 0.98)",
        "lr": [0.00015],
    }
    return Namespace(**{**values, **changes})


def split(state: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """Rows of what makes features, columns of what takes them, copies of the rest."""
    result: list[dict[str, Tensor]] = [{} for _ in range(parts)]
    for key, tensor in state.items():
        leaf = ".".join(key.split(".")[-2:])
        if leaf in ("out_proj.weight", "fc2.weight"):
            pieces = tensor.chunk(parts, dim=1)
        elif leaf.split(".")[0] in ("embed_tokens", "output_projection", "q_proj", "k_proj", "v_proj", "fc1"):
            pieces = tensor.chunk(parts, dim=0)
        else:
            pieces = (tensor,) * parts
        for part, piece in zip(result, pieces, strict=True):
            part[key] = piece.clone()
    return result


def write_dictionary(path: Path, merges: list[tuple[str, str]] | None = None, fillers: int = FILLERS) -> list[str]:
    """A dict.txt in an order of its own; its words."""
    merges = MERGES if merges is None else merges
    words = [str(number) for number in range(len(ids_by_token(merges)))]
    random.Random(5).shuffle(words)
    made_up = [f"madeupword{number:04d}" for number in range(fillers)]
    words = [*words[:100], *made_up[:2], *words[100:], *made_up[2:]]
    counts = range(len(words), 0, -1)
    path.write_text("".join(f"{word} {count}\n" for word, count in zip(words, counts, strict=True)), encoding="utf-8")
    return words


def write(
    folder: Path, state: dict[str, Tensor], parts: int = 2, legacy: bool = True, **changes: Any
) -> list[dict[str, Tensor]]:
    """The folder as the archive unpacks; what each part holds."""
    folder.mkdir(parents=True)
    pieces = split(state, parts)
    for number, piece in enumerate(pieces):
        content = {
            "args": settings(parts, **changes),
            "model": piece,
            "optimizer_history": [{"criterion_name": "VocabParallelCrossEntropyCriterion", "num_updates": 300000}],
            "extra_state": {"train_iterator": {"epoch": 2}, "best": None},
        }
        file = folder / f"model-model_part-{number}.pt"
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    write_dictionary(folder / "dict.txt")
    return pieces
