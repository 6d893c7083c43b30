"""Deep prompts on transformers' own models: an input's logits behind the keys and values of every layer.

logits = plain_logits(folder, masked=False)
logits(prompt, slots)                        # prompt [L, 2, P, k, E], as prompt folders have it -> [T, V]
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache

from megaptune.option_examples import OptionExample

Logits = Callable[[Tensor, list[int]], Tensor]


def plain_logits(folder: Path, masked: bool) -> Logits:
    return _written_out(folder) if masked else _continued(folder)


def _continued(folder: Path) -> Logits:
    """By the cache that a causal model continues."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)

    def logits(prompt: Tensor, slots: list[int]) -> Tensor:
        cache = DynamicCache()
        for layer, pair in enumerate(_pairs(prompt)):
            cache.update(*pair, layer)
        whole = torch.ones(1, prompt.shape[2] + len(slots), dtype=torch.long)
        return model(torch.tensor([slots]), attention_mask=whole, past_key_values=cache).logits[0]

    return logits


def _written_out(folder: Path) -> Logits:
    """For a masked model, which takes no cache: softmax(q [P; k]^T / sqrt(E)) [P; v] with every layer's P."""
    model = AutoModelForMaskedLM.from_pretrained(folder).eval().requires_grad_(False)
    pairs: list[tuple[Tensor, Tensor]] = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        first_key, first_value = pairs.pop(0)
        key, value = torch.cat([first_key, key], dim=2), torch.cat([first_value, value], dim=2)
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1)
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("written_out", attention)
    model.set_attn_implementation("written_out")
    begin = model.config.pad_token_id + 1 if model.config.model_type == "roberta" else 0

    def logits(prompt: Tensor, slots: list[int]) -> Tensor:
        pairs.extend(_pairs(prompt))
        first = begin + prompt.shape[2]
        return model(torch.tensor([slots]), position_ids=torch.arange(first, first + len(slots))[None]).logits[0]

    return logits


def _pairs(prompt: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
    """Every layer's keys and values [1, k, P, E]."""
    return [(key.transpose(0, 1)[None], value.transpose(0, 1)[None]) for key, value in prompt]


def option_scores(logits: Logits, prompt: Tensor, example: OptionExample) -> Tensor:
    """[O]: a Python sum over each option's tokens."""
    log_p: list[Tensor] = []
    for slots, places in zip(example.inputs, example.reads, strict=True):
        found = logits(prompt, slots).log_softmax(dim=1)
        log_p += [found[place] for place in places]
    sums = [torch.stack([log_p[read][token] for read, token in terms]).sum() for terms in example.options]
    lengths = [len(terms) if example.mean else 1 for terms in example.options]
    return torch.stack([total / length for total, length in zip(sums, lengths, strict=True)])
