"""Megatron-LM's GPT in small, every order of query, key and value, tensor and pipeline parallel: the same logits."""

import json
import sys
from pathlib import Path

import bpe_reference
import pytest
import torch
from megatron_source import LAYERS, MAX_TOKENS, REAL_ROWS, WIDTH, padded_rows, plain_logits, random_model, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaptune.backbone.convert.command import Options, convert
from megaptune.errors import BackboneError, ConfigError, MegaptuneError


@pytest.fixture
def merges(tmp_path: Path) -> Path:
    return bpe_reference.write_merges(tmp_path / "vocab.bpe")


def converted(source: Path, merges: Path | None, **options) -> Path:
    target = source.with_name("converted")
    convert(source, target, "auto", Options(bpe_merges=merges, **options), lambda line: None)
    return target


def assert_same_logits(folder: Path, model: dict[str, torch.Tensor], tanh: bool = True) -> None:
    ids = torch.randint(0, REAL_ROWS, (2, 11), generator=torch.Generator().manual_seed(1))
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found = plain.eval()(ids).logits
    expected = plain_logits(model, ids, tanh)[..., :REAL_ROWS]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("version", [0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize(("tensor_parallel", "pipeline_parallel"), [(1, 1), (2, 1), (8, 1), (2, 2), (1, 4)])
def test_logits_are_those_of_the_source(tmp_path, merges, version, tensor_parallel, pipeline_parallel):
    model = random_model(padded_rows(tensor_parallel))
    write(tmp_path / "source", model, version, tensor_parallel, pipeline_parallel)
    folder = converted(tmp_path / "source", merges)
    assert_same_logits(folder, model)
    config = json.loads((folder / "config.json").read_text())
    sizes = {"vocab_size": REAL_ROWS, "n_positions": MAX_TOKENS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 8}
    assert config == {**config, **sizes, "tie_word_embeddings": True, "eos_token_id": REAL_ROWS - 1}
    assert not [name for name in sys.modules if name.partition(".")[0] in ("megatron", "fp16")]


def test_interleaved_stages(tmp_path, merges):
    model = random_model(padded_rows(2))
    write(tmp_path / "source", model, 3.0, tensor_parallel=2, pipeline_parallel=2, virtual=2)
    assert_same_logits(converted(tmp_path / "source", merges), model)


def test_an_output_layer_of_its_own(tmp_path, merges):
    model = random_model(padded_rows(2))
    model["output"] = torch.randn(model["words"].shape, generator=torch.Generator().manual_seed(3)) / 4
    write(tmp_path / "source", model, 3.0, tensor_parallel=2, pipeline_parallel=2)
    assert_same_logits(converted(tmp_path / "source", merges), model)


@pytest.mark.parametrize(
    ("changes", "tanh"),
    [
        ({"bias_gelu_fusion": True}, True),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, True),
        ({"bias_gelu_fusion": False}, False),
    ],
)
def test_activation_is_the_one_of_the_args(tmp_path, merges, changes, tanh):
    model = random_model(padded_rows(1))
    write(tmp_path / "source", model, **changes)
    assert_same_logits(converted(tmp_path / "source", merges), model, tanh)


def test_a_release_without_args_needs_the_number_of_heads(tmp_path, merges):
    model = random_model(128 * 3)
    write(tmp_path / "source", model, version=0, iteration="release", args=False)
    with pytest.raises(ConfigError, match="number of attention heads with --heads"):
        converted(tmp_path / "source", merges)
    assert_same_logits(converted(tmp_path / "source", merges, heads=8), model)


def test_heads_that_contradict_the_args_are_refused(tmp_path, merges):
    write(tmp_path / "source", random_model(padded_rows(1)))
    with pytest.raises(ConfigError, match=r"--heads 4, but the args of .* say num_attention_heads 8"):
        converted(tmp_path / "source", merges, heads=4)


def test_the_ranks_folder_itself_and_model_rng(tmp_path, merges):
    model = random_model(padded_rows(2))
    place = write(tmp_path / "source", model, tensor_parallel=2, file="model_rng.pt")
    (place / "mp_rank_00_000_001").mkdir()
    (place / "mp_rank_00_000_001" / "optim.pt").write_bytes(b"a rank's part of the optimizer")
    target = tmp_path / "converted"
    convert(place, target, "auto", Options(bpe_merges=merges), lambda line: None)
    assert_same_logits(target, model)


def test_vocabulary_size_given_by_hand(tmp_path, merges):
    write(tmp_path / "source", random_model(400))
    with pytest.raises(
        BackboneError, match=r"267 tokens, which Megatron-LM pads to 272 rows, .*400: another tokenizer\?"
    ):
        converted(tmp_path / "source", merges)
    folder = converted(tmp_path / "source", merges, vocab_size=300)
    assert AutoModelForCausalLM.from_pretrained(folder).lm_head.weight.shape == (300, WIDTH)


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [(500, ConfigError, "a vocabulary of 500, but"), (200, BackboneError, "ids up to 266, but the model has 200 rows")],
)
def test_vocabulary_sizes_that_do_not_fit(tmp_path, merges, size, error, message):
    write(tmp_path / "source", random_model(padded_rows(1)))
    with pytest.raises(error, match=message):
        converted(tmp_path / "source", merges, vocab_size=size)


def test_tokenizer_has_gpt2s_ids(tmp_path, merges):
    write(tmp_path / "source", random_model(padded_rows(1)))
    tokenizer = AutoTokenizer.from_pretrained(converted(tmp_path / "source", merges))
    for text in bpe_reference.TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == bpe_reference.encode(text, bpe_reference.MERGES), text
        assert tokenizer.decode(ids) == text


def test_tokenizer_with_a_vocabulary_of_its_own(tmp_path, merges):
    numbers = {token: 266 - index for token, index in bpe_reference.ids_by_token(bpe_reference.MERGES).items()}
    (tmp_path / "vocab.json").write_text(json.dumps(numbers))
    write(tmp_path / "source", random_model(padded_rows(1)))
    folder = converted(tmp_path / "source", merges, tokenizer=tmp_path / "vocab.json")
    expected = [266 - index for index in bpe_reference.encode("hello world", bpe_reference.MERGES)]
    assert AutoTokenizer.from_pretrained(folder)("hello world").input_ids == expected


def test_a_tokenizers_folder(tmp_path, tiny):
    write(tmp_path / "source", random_model(424))
    folder = converted(tmp_path / "source", None, tokenizer=tiny("gpt2"))
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 422
    assert (folder / "tokenizer.json").read_bytes() == (tiny("gpt2") / "tokenizer.json").read_bytes()


def changed(**changes):
    return lambda source: write(source, random_model(padded_rows(1)), **changes)


def edited(change, tensor_parallel: int = 2, pipeline_parallel: int = 1):
    """A source whose file of rank (tensor, stage) goes through ``change(rank, content)``."""

    def make(source: Path) -> None:
        place = write(
            source, random_model(padded_rows(tensor_parallel)), 3.0, tensor_parallel, pipeline_parallel, args=False
        )
        for folder in place.iterdir():
            content = _load(folder)
            change(folder.name, content)
            torch.save(content, folder / "model_optim_rng.pt")

    return make


def _load(folder: Path):
    """The tensors of a file that also holds objects of classes that are not there."""
    from megaptune.backbone.convert import torch_file

    def values(item):
        if isinstance(item, dict):
            return {key: values(value) for key, value in item.items()}
        return item.read() if isinstance(item, torch_file.StoredTensor) else item

    content = torch_file.load(folder / "model_optim_rng.pt")
    return {key: values(content[key]) for key in ("model", "checkpoint_version", "iteration")}


def layer(content):
    return content["model"]["language_model"]["encoder"]


def without(*names: str):
    def make(source: Path) -> None:
        place = write(source, random_model(padded_rows(2)), tensor_parallel=2, pipeline_parallel=2)
        for name in names:
            (place / name).unlink() if (place / name).is_file() else (place / name).rename(source / "gone")

    return make


def truncated(source: Path) -> None:
    file = write(source, random_model(padded_rows(1))) / "mp_rank_00" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:5000])


def tracker(text: str):
    def make(source: Path) -> None:
        write(source, random_model(padded_rows(1)))
        (source / "latest_checkpointed_iteration.txt").write_text(text)

    return make


H_TO_4H = "layers.1.mlp.dense_h_to_4h.weight"
DENSE_BIAS = "layers.0.self_attention.dense.bias"

BAD = {
    "missing rank": (without("mp_rank_01_000"), r"mp_rank_01_000 is missing: 3 of 4 ranks"),
    "missing file": (
        without("mp_rank_01_001/model_optim_rng.pt"),
        "mp_rank_01_001 holds neither model_optim_rng.pt nor",
    ),
    "truncated": (truncated, "model_optim_rng.pt: truncated"),
    "tracker": (tracker("three"), "expected 'release' or a number, found 'three'"),
    "iteration that is not there": (tracker("5"), "names iter_0000005, which is not there"),
    "left-over key": (
        edited(lambda rank, content: layer(content).update({"layers.0.adapter.weight": torch.zeros(4)})),
        r"no place in the converted model.*encoder\.layers\.0\.adapter\.weight",
    ),
    "missing key": (edited(lambda rank, content: layer(content).pop(H_TO_4H)), rf"encoder\.{H_TO_4H} is missing"),
    "key of one rank": (
        edited(lambda rank, content: layer(content).pop(H_TO_4H) if rank == "mp_rank_01" else None),
        "hold different tensors",
    ),
    "wrong shape": (
        edited(lambda rank, content: layer(content).update({H_TO_4H: torch.zeros(24, 16)})),
        r"has shape \(48, 16\) in all parts together, expected \(48, 32\)",
    ),
    "ranks of other shapes": (
        edited(lambda rank, content: layer(content).update({H_TO_4H: torch.zeros(24 + int(rank[-1]), 32)})),
        "the parts disagree on",
    ),
    "copies that differ": (
        edited(lambda rank, content: layer(content)[DENSE_BIAS].add_(int(rank[-1]))),
        r"encoder\.layers\.0\.self_attention\.dense\.bias should be the same in every part",
    ),
    "first and last stage of different embeddings": (
        edited(
            lambda rank, content: [
                tensor.add_(1) for tensor in content["model"].get("word_embeddings_for_head", {}).values()
            ],
            pipeline_parallel=2,
        ),
        "word embeddings of the first stage .* differ",
    ),
    "other iterations": (
        edited(lambda rank, content: content.update(iteration=rank)),
        "are of different checkpoints: iteration mp_rank_0",
    ),
    "unknown version": (edited(lambda rank, content: content.update(checkpoint_version=4.0)), "checkpoint version 4"),
    "Megatron-Core": (
        edited(lambda rank, content: content.update(model={"decoder.layers.0.x.weight": torch.zeros(2)})),
        "a Megatron-Core model",
    ),
    "other layers": (changed(num_layers=5), "its args say 5 layers, its files hold 4"),
    "heads": (changed(num_attention_heads=5), "5 heads; expected a number that divides the width 32"),
    "wide heads": (changed(kv_channels=64), "heads of 64; GPT-2 needs width / heads = 4"),
    "SwiGLU": (changed(swiglu=True), "its args say swiglu True; expected False"),
    "RMSNorm": (changed(normalization="RMSNorm"), "its args say normalization 'RMSNorm'; expected 'LayerNorm'"),
    "experts": (changed(num_experts=4), "its args say num_experts 4"),
    "other parallelism": (changed(tensor_model_parallel_size=2), "tensor_model_parallel_size 2; expected 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_source_is_refused_in_one_sentence(tmp_path, merges, case):
    make, message = BAD[case]
    make(tmp_path / "source")
    heads = None if case in ("heads", "wide heads") else 8
    with pytest.raises(MegaptuneError, match=message) as refusal:
        converted(tmp_path / "source", merges, heads=heads, vocab_size=REAL_ROWS)
    assert refusal.value.exit_code == 4
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source", "vocab.bpe"]
