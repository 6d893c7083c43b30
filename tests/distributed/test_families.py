"""Backbones of many families, tiny and random: read our way they score as transformers does, or are refused."""

from pathlib import Path

import pytest
import torch
from hosting import open_host
from ranks import RankFailed, run_ranks
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from megaptune.backbone.inputs import Padded
from megaptune.run.topology import disconnect

pytestmark = pytest.mark.dist

LLAMA_LIKE = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
CAUSAL = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 8},
    "gemma": {**LLAMA_LIKE, "head_dim": 8},
    "phi": {"num_attention_heads": 4, "intermediate_size": 64},
    "gpt_neox": {"num_attention_heads": 4, "intermediate_size": 64},
    "opt": {"num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 16},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
    "bloom": {"n_layer": 2, "n_head": 4},
}
MASKED = {
    "bert": {"num_attention_heads": 4, "intermediate_size": 64},
    "roberta": {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 66},
    "albert": {"num_attention_heads": 4, "intermediate_size": 64, "embedding_size": 16},
    "electra": {"num_attention_heads": 4, "intermediate_size": 64, "embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
}
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 120, "max_position_embeddings": 64}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def save(family: str, folder: Path) -> Path:
    own = {**CAUSAL, **MASKED}[family]
    config = AutoConfig.for_model(family, **{**COMMON, **IDS, **own})
    auto = AutoModelForCausalLM if family in CAUSAL else AutoModelForMaskedLM
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    return folder


def _scores(folder: Path, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [2, V] of the same input, read our way and by transformers' own model."""
    host = open_host(folder, zero_stage=stage)
    slots, places = torch.tensor([[5, 9, 11, 4], [7, 3, 8, 6]]), torch.tensor([3, 1])
    mask = torch.ones_like(slots) if host.kind == "masked" else None
    rows = host.output_rows()
    with torch.no_grad():
        features = host.features(Padded(slots, mask, places), torch.zeros(0, host.width))
        ours = features @ rows.weight.T + (0 if rows.bias is None else rows.bias)
        auto = AutoModelForCausalLM if host.kind == "causal" else AutoModelForMaskedLM
        plain = auto.from_pretrained(folder).eval()(input_ids=slots).logits[torch.arange(2), places]
    disconnect()
    return ours, plain


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("family", [*CAUSAL, "bert", "roberta", "albert"])
def test_scores_are_those_of_transformers(family, stage, tmp_path):
    folder = save(family, tmp_path / family)
    for ours, plain in run_ranks(2, _scores, folder, stage):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("family", ["electra", "distilbert"])
def test_a_read_out_of_another_shape_is_refused(family, tmp_path):
    """Their head has layers beside the output embedding, outside its module: scored our way they would be wrong."""
    folder = save(family, tmp_path / family)
    with pytest.raises(RankFailed, match=f"unsupported architecture '{family}'"):
        run_ranks(1, _scores, folder, 0)
