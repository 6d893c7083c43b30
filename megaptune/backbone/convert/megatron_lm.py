"""NVIDIA's Megatron-LM GPT checkpoints (the ``language_model`` layout), any tensor and pipeline parallelism, as GPT-2.

    FOLDER/latest_checkpointed_iteration.txt            "release", or the number of an iteration
    FOLDER/iter_0001000/mp_rank_TT/model_optim_rng.pt           TT: tensor-parallel rank
    FOLDER/iter_0001000/mp_rank_TT_PPP/model_optim_rng.pt       PPP: pipeline stage

A stage numbers its layers from 0, so a layer's number in the model is counted through the stages. With interleaved
stages a file holds ``model0``, ``model1``, ...: the model runs through chunk 0 of every stage, then through chunk 1.

Query, key and value are rows of one matrix, for a rank with K heads of width N in the order ``[3, K, N]`` (checkpoint
version 0, or none), ``[K, N, 3]`` (1.0) or ``[K, 3, N]`` (2.0 and 3.0). GPT-2 wants ``[3, K, N]`` over all heads, and
its matrices the other way round: ``[inputs, outputs]``.
"""

import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megaptune.backbone.convert import bpe
from megaptune.backbone.convert.conversion import Conversion, Options
from megaptune.backbone.convert.output import OutputTensor
from megaptune.backbone.convert.parts import Keys, PartedTensor, check_same_keys, same
from megaptune.backbone.convert.torch_file import StoredTensor, load
from megaptune.errors import BackboneError, ConfigError

_TRACKER = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
_WEIGHTS = ("model_optim_rng.pt", "model_rng.pt")

_NORMS = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}

_VERSIONS = (0, 1, 2, 3)

# Buffers and what an accelerated kernel keeps about its number format.
_IGNORED = re.compile(r".*\.(self_attention\.(masked_bias|bias)|_extra_state)")

_REQUIRED = {
    "apply_residual_connection_post_layernorm": False,
    "apply_layernorm_1p": False,
    "swiglu": False,
    "squared_relu": False,
    "group_query_attention": False,
    "multi_query_attention": False,
    "num_experts": None,
    "use_rotary_position_embeddings": False,
    "normalization": "LayerNorm",
}
"""The settings that GPT-2 has built in; one that the checkpoint does not have is as here."""


@dataclass(frozen=True)
class _Chunk:
    """Consecutive layers of the model. ``parts``: by tensor-parallel rank, normalised key to tensor."""

    parts: Sequence[dict[str, StoredTensor]]
    keys: Keys
    average_copies: bool

    def whole(self, key: str, dim: int | None, shape: tuple[int | None, ...]) -> PartedTensor:
        """:raises BackboneError: missing, or of another shape (None: any size)."""
        tensor = PartedTensor(self.keys.use(key), [part[key] for part in self.parts], dim, self.average_copies)
        tensor.check()
        fits = len(tensor.shape) == len(shape)
        if not fits or any(wanted not in (None, size) for size, wanted in zip(tensor.shape, shape, strict=True)):
            raise BackboneError(
                f"{tensor.pieces[0].file}: {key} has shape {tensor.shape} in all parts together, expected "
                f"({', '.join('any' if size is None else str(size) for size in shape)})"
            )
        return tensor

    @property
    def num_layers(self) -> int:
        numbers = [int(match[1]) for key in self.parts[0] if (match := re.match(r"encoder\.layers\.(\d+)\.", key))]
        return max(numbers, default=-1) + 1


@dataclass(frozen=True)
class _Checkpoint:
    chunks: Sequence[_Chunk]
    settings: dict[str, Any]
    version: float
    tensor_parallel: int
    pipeline_parallel: int
    files: Sequence[Path]


def is_source(source: Path) -> bool:
    if not source.is_dir():
        return False
    names = [entry.name for entry in source.iterdir()]
    return _TRACKER in names or any(_RANK.fullmatch(name) for name in names)


def prepare(source: Path, options: Options) -> Conversion:
    """:raises BackboneError: files or tensors that are missing, left over or of the wrong shape; other architectures.
    :raises ConfigError: options that don't fit.
    """
    checkpoint = _load(_files(source), options.average_copies)
    first, last = checkpoint.chunks[0], checkpoint.chunks[-1]
    words = first.whole("embedding.word_embeddings.weight", 0, (None, None))
    rows, width = words.shape
    positions = first.whole("embedding.position_embeddings.weight", None, (None, width))
    heads = _heads(checkpoint, options, width)
    real, tokenizer, save_tokenizer = _vocabulary(checkpoint, options, rows, positions.shape[0])

    tensors = [
        _output("transformer.wte.weight", words, (real, width), lambda values: values[:real]),
        _output("transformer.wpe.weight", positions),
    ]
    layers = ((chunk, layer) for chunk in checkpoint.chunks for layer in range(chunk.num_layers))
    num_layers = 0
    for chunk, layer in layers:
        name = f"transformer.h.{num_layers}"
        tensors += _layer(chunk, f"encoder.layers.{layer}", name, width, width // heads, checkpoint.version)
        num_layers += 1
    if checkpoint.settings.get("num_layers", num_layers) != num_layers or not num_layers:
        stated = checkpoint.settings.get("num_layers", "some")
        raise BackboneError(f"{source}: its args say {stated} layers, its files hold {num_layers}")
    tensors += [
        _output(f"transformer.ln_f.{kind}", last.whole(f"encoder.final_layernorm.{kind}", None, (width,)))
        for kind in ("weight", "bias")
    ]
    tied = "output_layer.weight" not in last.keys
    if not tied:
        head = last.whole("output_layer.weight", 0, (rows, width))
        tensors.append(_output("lm_head.weight", head, (real, width), lambda values: values[:real]))
    elif "word_embeddings_for_head.weight" in last.keys:
        _check_tied(words, last.whole("word_embeddings_for_head.weight", 0, (rows, width)))
    for chunk in checkpoint.chunks:
        chunk.keys.finish(lambda key: bool(_IGNORED.fullmatch(key)))

    ffn, *others = {tensor.shape[1] for tensor in tensors if tensor.name.endswith("mlp.c_fc.weight")}
    if others:
        raise BackboneError(f"{source}: layers with FFNs of different widths: {ffn}, {', '.join(map(str, others))}")
    config = _config(checkpoint) | {
        "vocab_size": real,
        "n_positions": positions.shape[0],
        "n_embd": width,
        "n_layer": num_layers,
        "n_head": heads,
        "n_inner": ffn,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": tied,
    }
    return Conversion(
        config=config,
        tensors=tensors,
        save_tokenizer=save_tokenizer,
        source_files=checkpoint.files,
        found=[
            f"Megatron-LM GPT, checkpoint version {checkpoint.version:g}, "
            f"tensor parallel {checkpoint.tensor_parallel}, pipeline parallel {checkpoint.pipeline_parallel}: "
            f"{num_layers} layers, width {width}, FFN {ffn}, {heads} heads, {config['activation_function']}",
            f"{real} of {rows} rows of the embedding, output embedding {'tied' if tied else 'of its own'}",
        ],
    )


def _output(
    name: str,
    tensor: PartedTensor,
    shape: Sequence[int] | None = None,
    change: Callable[[torch.Tensor], torch.Tensor] = same,
) -> OutputTensor:
    return OutputTensor(name, tuple(shape or tensor.shape), tensor.dtype, lambda: change(tensor.read()))


def _layer(chunk: _Chunk, old: str, new: str, width: int, head_width: int, version: float) -> Iterator[OutputTensor]:
    for norm, name in _NORMS.items():
        for kind in ("weight", "bias"):
            yield _output(f"{new}.{name}.{kind}", chunk.whole(f"{old}.{norm}.{kind}", None, (width,)))
    for kind, rest in (("weight", (width,)), ("bias", ())):
        tensor = chunk.whole(f"{old}.self_attention.query_key_value.{kind}", 0, (3 * width, *rest))
        yield _query_key_value(f"{new}.attn.c_attn.{kind}", tensor, head_width, version)
    ffn_bias = chunk.whole(f"{old}.mlp.dense_h_to_4h.bias", 0, (None,))
    (ffn,) = ffn_bias.shape
    yield _output(f"{new}.mlp.c_fc.bias", ffn_bias)
    yield _transposed(f"{new}.mlp.c_fc.weight", chunk.whole(f"{old}.mlp.dense_h_to_4h.weight", 0, (ffn, width)))
    for matrix, name, inputs in (
        ("self_attention.dense", "attn.c_proj", width),
        ("mlp.dense_4h_to_h", "mlp.c_proj", ffn),
    ):
        yield _transposed(f"{new}.{name}.weight", chunk.whole(f"{old}.{matrix}.weight", 1, (width, inputs)))
        yield _output(f"{new}.{name}.bias", chunk.whole(f"{old}.{matrix}.bias", None, (width,)))


def _transposed(name: str, tensor: PartedTensor) -> OutputTensor:
    return _output(name, tensor, tensor.shape[::-1], torch.t)


def _query_key_value(name: str, tensor: PartedTensor, head_width: int, version: float) -> OutputTensor:
    def by_kind(piece: torch.Tensor) -> torch.Tensor:
        """A rank's rows ``[3 K N, ...]`` in its version's order, as ``[3, K N, ...]``."""
        heads, rest = piece.shape[0] // (3 * head_width), piece.shape[1:]
        if version >= 2:
            piece = piece.reshape(heads, 3, head_width, *rest).transpose(0, 1)
        elif version == 1:
            piece = piece.reshape(heads, head_width, 3, *rest).movedim(2, 0)
        return piece.reshape(3, heads * head_width, *rest)

    ranks_meet_at_heads = replace(tensor, dim=1)
    return OutputTensor(
        name, tensor.shape[::-1], tensor.dtype, lambda: ranks_meet_at_heads.read(by_kind).flatten(0, 1).t()
    )


def _check_tied(words: PartedTensor, head: PartedTensor) -> None:
    for first, last in zip(words.pieces, head.pieces, strict=True):
        if not torch.equal(first.read(), last.read()):
            raise BackboneError(
                f"the word embeddings of the first stage ({first.file}) and of the last ({last.file}) differ: "
                "files of different checkpoints?"
            )


def _files(source: Path) -> list[list[Path]]:
    """The weight files by pipeline stage and tensor-parallel rank."""
    folder = source
    if (source / _TRACKER).is_file():
        stated = (source / _TRACKER).read_text(encoding="utf-8", errors="replace").strip()
        folder = source / (f"iter_{int(stated):07d}" if stated.isdecimal() else stated)
        if stated != "release" and not stated.isdecimal():
            raise BackboneError(f"{source / _TRACKER}: expected 'release' or a number, found {stated[:40]!r}")
        if not folder.is_dir():
            raise BackboneError(f"{source / _TRACKER} names {folder.name}, which is not there")
    found: dict[tuple[int, int], Path] = {}
    for entry in sorted(folder.iterdir()):
        match = _RANK.fullmatch(entry.name)
        file = next((entry / name for name in _WEIGHTS if (entry / name).is_file()), None)
        if not match or (match[3] and file is None):  # a third number: a rank's part of the optimizer
            continue
        if match[3]:
            raise BackboneError(f"{entry}: expert parallelism cannot be converted to GPT-2")
        if file is None:
            raise BackboneError(f"{entry} holds neither {' nor '.join(_WEIGHTS)}")
        rank = (int(match[2] or 0), int(match[1]))
        if rank in found:
            raise BackboneError(f"{entry} and {found[rank].parent} are the same rank")
        found[rank] = file
    if not found:
        raise BackboneError(f"{folder}: no mp_rank_00 folder: expected a Megatron-LM checkpoint")
    stages, ranks = (max(numbers) + 1 for numbers in zip(*found, strict=True))
    for stage in range(stages):
        for number in range(ranks):
            if (stage, number) not in found:
                name = f"mp_rank_{number:02d}" + (f"_{stage:03d}" if stages > 1 else "")
                raise BackboneError(f"{folder}: {name} is missing: {len(found)} of {stages * ranks} ranks are there")
    return [[found[stage, number] for number in range(ranks)] for stage in range(stages)]


def _load(grid: Sequence[Sequence[Path]], average_copies: bool) -> _Checkpoint:
    contents = {file: _read(file) for stage in grid for file in stage}
    head = contents[grid[0][0]]
    settings = dict(vars(head["args"])) if isinstance(head.get("args"), Namespace) else {}
    version = head.get("checkpoint_version", 0)
    if version not in _VERSIONS:
        raise BackboneError(f"{grid[0][0]}: checkpoint version {version}; known are 0 (or none), 1, 2 and 3")
    for file, content in contents.items():
        for key in ("checkpoint_version", "iteration"):
            if content.get(key) != head.get(key):
                raise BackboneError(
                    f"{grid[0][0]} and {file} are of different checkpoints: "
                    f"{key} {head.get(key)} and {content.get(key)}"
                )
    sizes = {
        "model_parallel_size": len(grid[0]),
        "tensor_model_parallel_size": len(grid[0]),
        "pipeline_model_parallel_size": len(grid),
    }
    for name, needed in (sizes | _REQUIRED).items():
        if (settings.get(name, needed) or needed) != needed:
            raise BackboneError(f"{grid[0][0]}: its args say {name} {settings[name]!r}; expected {needed!r}")
    names = ["model"] if "model" in head else sorted(key for key in head if re.fullmatch(r"model\d+", key))
    chunks = []
    for name in names:
        for files in grid:
            parts = [_flatten(contents[file].get(name), file, name) for file in files]
            check_same_keys(parts, files)
            chunks.append(_Chunk(parts, Keys(list(parts[0]), files[0]), average_copies))
    return _Checkpoint(chunks, settings, version, len(grid[0]), len(grid), [file for stage in grid for file in stage])


def _read(file: Path) -> dict[str, Any]:
    content = load(file)
    if not isinstance(content, dict) or not ("model" in content or "model0" in content):
        raise BackboneError(f"{file}: expected a Megatron-LM checkpoint: a dictionary with 'model'")
    return content


def _flatten(model: Any, file: Path, name: str) -> dict[str, StoredTensor]:
    """Keys of all ages in one form: ``embedding.*``, ``encoder.layers.0.self_attention.*``, ``output_layer.weight``."""
    if not isinstance(model, dict):
        raise BackboneError(f"{file}: {name!r} is missing or no dictionary")
    if any(str(key).startswith("decoder.layers.") for key in model):
        raise BackboneError(
            f"{file}: a Megatron-Core model (decoder.layers.*); only the language_model layout can be converted: "
            "Megatron-LM's tools/checkpoint writes it"
        )
    flat: dict[str, StoredTensor] = {}

    def descend(prefix: str, values: Any) -> None:
        for key, value in values.items():
            path = f"{prefix}{key}"
            if isinstance(value, dict):
                descend(f"{path}.", value)
                continue
            path = re.sub(r"^language_model\.", "", path)
            path = re.sub(r"^transformer\.", "encoder.", path).replace(".attention.", ".self_attention.")
            if isinstance(value, StoredTensor):
                flat[path] = value
            elif not _IGNORED.fullmatch(path):
                raise BackboneError(f"{file}: {path} is no tensor")

    descend("", model)
    return flat


def _heads(checkpoint: _Checkpoint, options: Options, width: int) -> int:
    settings, file = checkpoint.settings, checkpoint.files[0]
    heads = settings.get("num_attention_heads", options.heads)
    if options.heads not in (None, heads):
        raise ConfigError(f"--heads {options.heads}, but the args of {file} say num_attention_heads {heads}")
    if heads is None:
        raise ConfigError(f"{file} has no args, as early checkpoints: give the number of attention heads with --heads")
    if type(heads) is not int or heads < 1 or width % heads or heads % checkpoint.tensor_parallel:
        raise BackboneError(
            f"{file}: {heads} heads; expected a number that divides the width {width} and that "
            f"{checkpoint.tensor_parallel} tensor-parallel ranks share evenly"
        )
    if (settings.get("kv_channels") or width // heads) != width // heads:
        raise BackboneError(f"{file}: heads of {settings['kv_channels']}; GPT-2 needs width / heads = {width // heads}")
    return heads


def _vocabulary(
    checkpoint: _Checkpoint, options: Options, rows: int, max_tokens: int
) -> tuple[int, Any, bpe.SaveTokenizer]:
    """The number of rows that are real, the tokenizer, and what saves it."""
    if options.bpe_merges is not None:
        tokenizer = bpe.gpt2_tokenizer(options.bpe_merges, options.tokenizer, max_tokens)
        what, save = f"the tokenizer of {options.bpe_merges}", tokenizer.save_pretrained
    elif options.tokenizer is not None:
        tokenizer, save = bpe.copied_tokenizer(options.tokenizer)
        what = f"the tokenizer of {options.tokenizer}"
    else:
        raise ConfigError(
            "a Megatron-LM checkpoint holds no tokenizer: give GPT-2's merges with --bpe-merges (and a vocab.json with "
            "--tokenizer where the ids are not GPT-2's own), or a tokenizer's folder with --tokenizer"
        )
    settings = checkpoint.settings
    real = options.vocab_size
    if real is None:
        real = max(bpe.size(tokenizer), settings.get("vocab_size") or 0)
        multiple = (settings.get("make_vocab_size_divisible_by") or 128) * checkpoint.tensor_parallel
        padded = -(-real // multiple) * multiple
        if padded != rows:
            raise BackboneError(
                f"{what} has {real} tokens, which Megatron-LM pads to {padded} rows, but the checkpoint has {rows}: "
                "another tokenizer? If it is the right one, say with --vocab-size how many rows are real"
            )
    if not 0 < real <= rows:
        raise ConfigError(f"a vocabulary of {real}, but the checkpoint has {rows} rows of embedding")
    bpe.check_fits(tokenizer, real, what)
    return real, tokenizer, save


def _config(checkpoint: _Checkpoint) -> dict[str, Any]:
    settings = checkpoint.settings
    dropout = settings.get("hidden_dropout", 0.1)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": _activation(settings),
        "layer_norm_epsilon": settings.get("layernorm_epsilon") or settings.get("norm_epsilon") or 1e-5,
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": settings.get("attention_dropout", 0.1),
    }


def _activation(settings: dict[str, Any]) -> str:
    """The tanh approximation: of the fused bias-GELU, of OpenAI's form, and of early versions, which stored no args."""
    if not settings or settings.get("bias_gelu_fusion") or settings.get("openai_gelu"):
        return "gelu_pytorch_tanh"
    return "gelu"
