"""A GGUF file, made here from a tiny Llama as llama.cpp lays it out, converted back."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from tiny import HEADS, LAYERS, MAX_TOKENS, WIDTH
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaptune.backbone.convert.command import Options, convert
from megaptune.backbone.weight_files import verify_checksums
from megaptune.errors import BackboneError, ConfigError

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def rotary_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp turns neighbours (0, 1), (2, 3), ..., Hugging Face the halves (0, N/2), ...: rows change places."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def llama_file(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    config, state = model.config, model.state_dict()
    tokenizer = json.loads((tiny("llama") / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(MAX_TOKENS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    vocabulary = tokenizer["model"]["vocab"]
    specials = {entry["id"] for entry in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([3 if number in specials else 1 for number in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(vocabulary["<s>"])
    writer.add_eos_token_id(vocabulary["</s>"])
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    heads = {"attn_q": HEADS, "attn_k": config.num_key_value_heads}
    for layer in range(LAYERS):
        for name, short in NAMES.items():
            weight = state[f"model.layers.{layer}.{name}.weight"]
            weight = rotary_pairs(weight, heads[short]) if short in heads else weight
            writer.add_tensor(f"blk.{layer}.{short}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_come_back_to_the_bit(llama_file, tiny, tmp_path):
    said: list[str] = []
    convert(llama_file, tmp_path / "converted", "auto", Options(max_shard_bytes=60_000), said.append)
    source = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert found.dtype == torch.float32
    for name, values in source.state_dict().items():
        assert torch.equal(found.state_dict()[name], values), name
    ids = torch.tensor([[5, 17, 260, 3]])
    with torch.no_grad():
        assert torch.equal(found.eval()(ids).logits, source.eval()(ids).logits)
    assert len(list((tmp_path / "converted").glob("model-*.safetensors"))) > 1
    verify_checksums(tmp_path / "converted")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert tokenizer.decode(tokenizer("Paris is in France").input_ids, skip_special_tokens=True) == "Paris is in France"
    assert said[-1].startswith(f"wrote {tmp_path / 'converted'}: ")


def test_another_dtype(llama_file, tmp_path):
    convert(llama_file, tmp_path / "converted", "gguf", Options(dtype=torch.bfloat16), lambda line: None)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "converted").dtype == torch.bfloat16


@pytest.mark.parametrize("kept", [0, 100, 0.9])
def test_a_damaged_file_is_refused(llama_file, tmp_path, kept):
    whole = llama_file.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else kept])
    with pytest.raises(BackboneError, match=r"damaged\.gguf"):
        convert(damaged, tmp_path / "converted", "auto", Options(), lambda line: None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged.gguf"]


def test_options_of_another_format_are_refused(llama_file, tmp_path):
    with pytest.raises(ConfigError, match="only --dtype and --max-shard apply"):
        convert(llama_file, tmp_path / "converted", "auto", Options(vocab_size=10), lambda line: None)
