"""Random backbones of any family and size, without a tokenizer: for what depends on shapes and not on words.

folder = save_sized("llama", tmp_path / "llama")          # 128 wide, three blocks, eight heads, 512 words
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

MASKED = ("bert", "roberta")
MAX_TOKENS = 64
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def settings(family: str, width: int = 128, blocks: int = 3, heads: int = 8, vocabulary: int = 512) -> dict[str, Any]:
    """The configuration's sizes under the names that the family gives them; four times as many features inside."""
    inner = 4 * width
    common = {"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": heads}
    common |= {"vocab_size": vocabulary, "max_position_embeddings": MAX_TOKENS, "intermediate_size": inner, **_IDS}
    own: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": width, "n_layer": blocks, "n_head": heads, "n_positions": MAX_TOKENS},
        "llama": {"num_key_value_heads": heads // 2},
        "opt": {"ffn_dim": inner, "word_embed_proj_dim": width},
        "xglm": {"d_model": width, "num_layers": blocks, "attention_heads": heads, "ffn_dim": inner},
        "roberta": {"max_position_embeddings": MAX_TOKENS + 2},
    }
    return {**common, **own.get(family, {})}


def save_sized(family: str, folder: Path, weights: bool = True, **sizes: int) -> Path:
    """Save config.json, and random weights unless they are not wanted."""
    config = AutoConfig.for_model(family, **settings(family, **sizes))
    auto = AutoModelForMaskedLM if family in MASKED else AutoModelForCausalLM
    if not weights:
        config.architectures = [{"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}.get(family, "CausalLM")]
        config.save_pretrained(folder)
        return folder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto.from_config(config).save_pretrained(folder)
    return folder
