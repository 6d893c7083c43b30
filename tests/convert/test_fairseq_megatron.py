"""megatron_11b in small: the converted folder computes what fairseq's decoder computes, from fairseq's ids."""

import json
import os
from pathlib import Path

import bpe_reference
import fairseq_source
import pytest
import torch
from fairseq_source import FILLERS, ROWS, plain_logits, random_state, write, write_dictionary
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaptune.backbone.convert.command import Options, convert
from megaptune.backbone.weight_files import check_headers, verify_checksums
from megaptune.errors import BackboneError, ConfigError

WORDS = len(bpe_reference.MERGES) + 257


@pytest.fixture
def merges(tmp_path: Path) -> Path:
    return bpe_reference.write_merges(tmp_path / "vocab.bpe")


def converted(source: Path, merges: Path, **options) -> Path:
    target = source.with_name("converted")
    convert(source, target, "auto", Options(bpe_merges=merges, **options), lambda line: None)
    return target


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    norm = {"model.layer_norm.weight", "model.layer_norm.bias"}
    if model.config.final_layer_norm:
        norm = set()
    else:
        model.model.layer_norm = torch.nn.Identity()
    assert set(info["missing_keys"]) == norm
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize(("parts", "legacy"), [(1, True), (2, False), (8, True)])
def test_logits_are_those_of_the_source(tmp_path, merges, parts, legacy, final_norm):
    state = random_state(final_norm)
    write(tmp_path / "source", state, parts, legacy)
    folder = converted(tmp_path / "source", merges)
    assert json.loads((folder / "config.json").read_text())["final_layer_norm"] is final_norm
    ids = torch.randint(4, ROWS, (2, 9), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits_of(folder, ids), plain_logits(state, ids), atol=1e-5, rtol=1e-5)


def test_every_value_arrives_in_half_precision_as_it_was(tmp_path, merges):
    state = {key: value.half() for key, value in random_state().items()}
    write(tmp_path / "source", state, parts=4)
    folder = converted(tmp_path / "source", merges, max_shard_bytes=25_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    verify_checksums(folder)
    check_headers(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float16
    for key, value in model.state_dict().items():
        source = key.replace("model.", "decoder.", 1)
        if source in state:
            assert torch.equal(value, state[source]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_dtype(tmp_path, merges, dtype):
    state = {key: value.half() for key, value in random_state().items()}
    write(tmp_path / "source", state)
    model = AutoModelForCausalLM.from_pretrained(converted(tmp_path / "source", merges, dtype=dtype))
    assert model.dtype == dtype
    assert torch.equal(model.model.embed_tokens.weight, state["decoder.embed_tokens.weight"].to(dtype))


def test_weights_that_overflow_half_precision_are_refused(tmp_path, merges):
    state = random_state()
    state["decoder.layers.1.fc1.bias"][3] = 1e6
    write(tmp_path / "source", state)
    with pytest.raises(BackboneError, match=r"model\.layers\.1\.fc1\.bias .*not finite in float16.*--dtype fp32"):
        converted(tmp_path / "source", merges, dtype=torch.float16)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source", "vocab.bpe"]


def test_tokenizer_has_fairseqs_ids_and_adds_nothing(tmp_path, merges):
    write(tmp_path / "source", random_state())
    words = write_dictionary(tmp_path / "source" / "dict.txt")
    tokenizer = AutoTokenizer.from_pretrained(converted(tmp_path / "source", merges))
    assert_fairseqs_ids(tokenizer, words, bpe_reference.MERGES, bpe_reference.TEXTS)
    names = ("bos_token", "pad_token", "eos_token", "unk_token")
    assert [getattr(tokenizer, f"{name}_id") for name in names] == [0, 1, 2, 3]
    assert tokenizer("hello", return_tensors="pt").input_ids.shape == (1, 1)


def assert_fairseqs_ids(tokenizer, words, merges, texts):
    for text in texts:
        expected = [4 + words.index(str(number)) for number in bpe_reference.encode(text, merges)]
        assert tokenizer(text).input_ids == expected, text
        assert tokenizer.decode(expected) == text


@pytest.mark.data
def test_tokenizer_from_gpt2s_own_merges(tmp_path):
    if "MEGAPTUNE_DATA" not in os.environ:
        pytest.skip("MEGAPTUNE_DATA is not set: GPT-2's real merges were NOT tested")
    file = Path(os.environ["MEGAPTUNE_DATA"]) / "gpt2-bpe" / "vocab.bpe"
    merges = bpe_reference.read_merges(file)
    assert bpe_reference.encode("The capital of France is", merges) == [464, 3139, 286, 4881, 318]
    rows = 51_200
    write(tmp_path / "source", random_state(rows=rows, layers=1), decoder_layers=1)
    words = write_dictionary(tmp_path / "source" / "dict.txt", merges, fillers=939)
    assert len(words) == 51_196
    folder = converted(tmp_path / "source", file)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [*bpe_reference.TEXTS, "The capital of France is Paris.", "<|endoftext|> is text here, as in fairseq"]
    assert_fairseqs_ids(tokenizer, words, merges, texts)
    unused = json.loads((folder / "config.json").read_text())["unused_token_ids"]
    assert unused == [[104, 106], [rows - 937, rows]]


def test_fillers_and_rows_beyond_the_dictionary_are_named(tmp_path, merges):
    write(tmp_path / "source", random_state())
    folder = converted(tmp_path / "source", merges)
    config = json.loads((folder / "config.json").read_text())
    words = write_dictionary(tmp_path / "dict.txt")
    made_up = [4 + index for index, word in enumerate(words) if word.startswith("madeupword")]
    unused = [index for start, end in config["unused_token_ids"] for index in range(start, end)]
    assert unused == [*made_up, *range(4 + WORDS + FILLERS, ROWS)]
    assert config["unused_token_ids"][0] == [104, 106]


def test_a_finished_tokenizer_is_copied(tmp_path, tiny):
    write(tmp_path / "source", random_state(rows=440))
    target = tmp_path / "converted"
    convert(tmp_path / "source", target, "fairseq-megatron", Options(tokenizer=tiny("gpt2")), lambda line: None)
    assert (target / "tokenizer.json").read_bytes() == (tiny("gpt2") / "tokenizer.json").read_bytes()
    AutoTokenizer.from_pretrained(target)


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path, tiny):
    write(tmp_path / "source", random_state())
    with pytest.raises(BackboneError, match="ids up to 421, but the model has 320 rows"):
        converted(tmp_path / "source", None, tokenizer=tiny("gpt2"))


def test_an_output_projection_equal_to_the_embedding_is_dropped(tmp_path, merges):
    state = random_state()
    state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"].clone()
    write(tmp_path / "source", state)
    logits_of(converted(tmp_path / "source", merges), torch.tensor([[5]]))


def test_copies_that_drifted_apart(tmp_path, merges):
    state = random_state()
    pieces = write(tmp_path / "source", state)
    name = "decoder.layers.0.fc2.bias"
    pieces[1][name] = pieces[1][name] + 0.5
    torch.save({"args": fairseq_source.settings(2), "model": pieces[1]}, tmp_path / "source" / "model-model_part-1.pt")
    with pytest.raises(BackboneError, match=r"fc2\.bias should be the same.*differ by up to 0\.5.*--average-copies"):
        converted(tmp_path / "source", merges)
    folder = converted(tmp_path / "source", merges, average_copies=True)
    found = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].fc2.bias
    torch.testing.assert_close(found.detach(), state[name] + 0.25)


def damage(change):
    """A writer that changes what a part holds before it is saved."""

    def write_damaged(source: Path) -> None:
        pieces = write(source, random_state())
        for number, piece in enumerate(pieces):
            change(number, piece)
            torch.save({"args": fairseq_source.settings(2), "model": piece}, source / f"model-model_part-{number}.pt")

    return write_damaged


def changed_settings(**changes):
    return lambda source: write(source, random_state(), **changes)


def missing_part(source: Path) -> None:
    write(source, random_state(), parts=4)
    (source / "model-model_part-2.pt").unlink()


def missing_last_part(source: Path) -> None:
    write(source, random_state(), parts=4)
    (source / "model-model_part-3.pt").unlink()


def truncated(source: Path) -> None:
    write(source, random_state())
    file = source / "model-model_part-1.pt"
    file.write_bytes(file.read_bytes()[:-100])


def without_dictionary(source: Path) -> None:
    write(source, random_state())
    (source / "dict.txt").unlink()


def other_dictionary(text: str, keep: bool = True):
    def write_other(source: Path) -> None:
        write(source, random_state())
        file = source / "dict.txt"
        file.write_text((file.read_text() if keep else "") + text)

    return write_other


FC1 = "decoder.layers.0.fc1.weight"
NORM = "decoder.layers.1.self_attn_layer_norm.weight"

BAD = {
    "missing part": (missing_part, r"model-model_part-2\.pt is missing \(3 parts"),
    "missing last part": (missing_last_part, "written as one of 4 parts, but 3 parts are there"),
    "truncated": (truncated, r"model-model_part-1\.pt: truncated"),
    "left-over key": (
        damage(lambda number, piece: piece.update({"decoder.project_in_dim.weight": piece[FC1]})),
        r"1 tensors have no place in the converted model.*decoder\.project_in_dim\.weight",
    ),
    "key of one part": (
        damage(lambda number, piece: piece.update({"decoder.extra": piece[FC1]} if number else {})),
        r"hold different tensors: decoder\.extra is only in .*part-1\.pt",
    ),
    "missing key": (damage(lambda number, piece: piece.pop(NORM)), rf"the tensor {NORM} is missing"),
    "half a final norm": (
        damage(lambda number, piece: piece.update({"decoder.layer_norm.weight": piece[NORM]})),
        r"decoder\.layer_norm\.bias is missing",
    ),
    "parts of other shapes": (
        damage(lambda number, piece: piece.update({FC1: piece[FC1][:20]} if number else {})),
        r"the parts disagree on decoder\.layers\.0\.fc1\.weight: \(24, 32\) float32 in .*\(20, 32\)",
    ),
    "parts of other dtypes": (
        damage(lambda number, piece: piece.update({FC1: piece[FC1].half()} if number else {})),
        "float32 in .*float16 in",
    ),
    "wrong shape": (
        damage(lambda number, piece: piece.update({FC1: piece[FC1][:, :16]})),
        r"fc1\.weight has shape \(48, 16\) in all parts together, expected \(48, 32\)",
    ),
    "integers": (
        damage(lambda number, piece: piece.update({FC1: piece[FC1].int()})),
        "torch.int32, expected floating-point",
    ),
    "untied": (
        damage(lambda number, piece: piece.update({"decoder.output_projection.weight": torch.zeros(160, 32)})),
        "differs from decoder.embed_tokens.weight",
    ),
    "other layers": (changed_settings(decoder_layers=5), "its args say decoder_layers 5, its tensors 3"),
    "other parts": (changed_settings(model_parallel_size=8), "written as one of 8 parts"),
    "post-norm": (changed_settings(decoder_normalize_before=False), "decoder_normalize_before False; only True"),
    "activation": (changed_settings(activation_fn="swish"), "activation 'swish'"),
    "heads": (changed_settings(decoder_attention_heads=5), "decoder_attention_heads 5; expected a number that divides"),
    "heads over parts": (changed_settings(decoder_attention_heads=1), "2 parts share evenly"),
    "no dictionary": (without_dictionary, r"dict\.txt is missing"),
    "dictionary line": (other_dictionary("abc\n"), r"dict\.txt:273: expected 'token count', found 'abc'"),
    "doubled word": (other_dictionary("17 1\n"), "17 stands here for the second time"),
    "unknown word": (other_dictionary("267 1\n"), "'267' is none of the 267 GPT-2 tokens"),
    "word": (other_dictionary("hello 1\n"), "'hello' is none of the 267 GPT-2 tokens"),
    "short dictionary": (other_dictionary("17 1\n", keep=False), "lacks 265 of the tokens that the merges make"),
    "long dictionary": (
        other_dictionary("".join(f"madeupword1{number:03d} 0\n" for number in range(60))),
        "332 words and 4 special symbols, but the model has only 320 rows",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_source_is_refused_in_one_sentence(tmp_path, merges, case):
    make, message = BAD[case]
    make(tmp_path / "source")
    with pytest.raises(BackboneError, match=message):
        converted(tmp_path / "source", merges)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source", "vocab.bpe"]


def test_without_merges_or_tokenizer_the_message_says_what_to_give(tmp_path):
    write(tmp_path / "source", random_state())
    with pytest.raises(ConfigError, match=r"--bpe-merges .*--tokenizer"):
        converted(tmp_path / "source", None)


def test_options_of_another_format_are_refused(tmp_path, merges):
    write(tmp_path / "source", random_state())
    with pytest.raises(ConfigError, match="--vocab-size and --heads are for megatron-lm"):
        converted(tmp_path / "source", merges, heads=8)
