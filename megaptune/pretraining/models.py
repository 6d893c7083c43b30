"""The two models, from transformers, and the loss that each is trained with."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaptune.pretraining.config import ModelSection

_HEADS = {"gpt2": "lm_head", "bert": "cls"}  # hidden states [n, D] -> scores [n, V]
_MASKED, _REPLACED = 0.8, 0.1  # of the tokens that BERT predicts; the others stay as they are


def build(section: ModelSection, tokenizer: Any, seed: int) -> Any:
    """A model with fresh weights, fp32, input and output embeddings tied."""
    import transformers as hf

    torch.manual_seed(seed)
    width, dropout = section.width, section.dropout
    # Plain products: rows are short, and torch's fused attention is slower there on CPU.
    common = {"vocab_size": len(tokenizer), "attn_implementation": "eager"}
    if section.kind == "gpt2":
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(
                n_positions=section.max_tokens,
                n_embd=width,
                n_layer=section.layers,
                n_head=section.heads,
                activation_function="gelu_pytorch_tanh",  # gelu_new in one operation
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **common,
            )
        )
    return hf.BertForMaskedLM(
        hf.BertConfig(
            hidden_size=width,
            num_hidden_layers=section.layers,
            num_attention_heads=section.heads,
            intermediate_size=4 * width,
            max_position_embeddings=section.max_tokens,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            pad_token_id=tokenizer.pad_token_id,
            **common,
        )
    )


@dataclass(frozen=True)
class Batch:
    """ids: int64 [B, T], padded at the end; mask: int64 [B, T] or None; places: bool [B, T], where a target [n] is
    predicted."""

    ids: Tensor
    mask: Tensor | None
    places: Tensor
    targets: Tensor


def causal_batch(rows: list[np.ndarray], pad_id: int) -> Batch:
    """Every token but a row's first is predicted from those before it; nothing looks ahead: padding needs no mask."""
    ids, real = _padded(rows, pad_id)
    places = torch.zeros_like(real)
    places[:, :-1] = real[:, 1:]
    return Batch(ids, None, places, ids[:, 1:][real[:, 1:]])


def masked_batch(rows: list[np.ndarray], tokenizer: Any, fraction: float, seed: list[int]) -> Batch:
    """A share of the tokens is predicted: most of them masked, some replaced by any other token, some left."""
    ids, real = _padded(rows, tokenizer.pad_token_id)
    generator = np.random.default_rng(seed)
    special = torch.isin(ids, torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]))
    draw = torch.from_numpy(generator.random(ids.shape)).masked_fill(special, 2.0)
    places = draw < fraction
    if not places.any():
        places.view(-1)[int(draw.argmin())] = True
    targets = ids[places]
    fate = torch.from_numpy(generator.random(len(targets)))
    words = torch.from_numpy(generator.integers(0, len(tokenizer), len(targets)))
    read = torch.where(fate < _MASKED, tokenizer.mask_token_id, targets)
    ids[places] = torch.where((fate >= _MASKED) & (fate < _MASKED + _REPLACED), words, read)
    return Batch(ids, None if real.all() else real.long(), places, targets)


def loss(model: Any, kind: str, batch: Batch, precision: str) -> Tensor:
    """Mean cross-entropy over the batch's targets in nats; scores are computed at their places alone."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        hidden = model.base_model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        scores = getattr(model, _HEADS[kind])(hidden[batch.places])
    # Scores in bf16 take half the time of their copy in fp32, which a training step is mostly made of.
    scores = scores if model.training else scores.float()
    return torch.nn.functional.cross_entropy(scores, batch.targets).float()


def _padded(rows: list[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """ids int64 [B, T] and which of them are real, bool [B, T]."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad_id)
    for row, target in zip(rows, ids, strict=True):
        target[: len(row)] = torch.from_numpy(row)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]
