"""fairseq's ``megatron_11b`` (``transformer_lm_megatron``), in any number of parts, as an XGLM folder.

XGLM in transformers is the same decoder: embedding times the root of its width, fixed sinusoids from index 2, norms
before attention and FFN, exact GELU, tied output embedding. Two keys of ``config.json`` say what XGLM's own can't:

``final_layer_norm``   false when the source has no ``decoder.layer_norm``. fairseq has built decoders with and without
                       it under the same name, so what the files hold decides.
``unused_token_ids``   ``[[start, end), ...]``: rows that no text uses: ``madeupword`` fillers, rows beyond dict.txt.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megaptune.backbone.convert.conversion import Conversion, Options
from megaptune.backbone.convert.fairseq_dictionary import vocabulary
from megaptune.backbone.convert.output import OutputTensor
from megaptune.backbone.convert.parts import Keys, PartedTensor, check_same_keys
from megaptune.backbone.convert.torch_file import StoredTensor, load
from megaptune.errors import BackboneError, ConfigError

_PART = re.compile(r"(?P<stem>.+)-model_part-(?P<number>\d+)\.pt")
_MAX_PARTS = 64

_LAYER = {
    **{f"self_attn.{name}_proj.{kind}": 0 for name in "qkv" for kind in ("weight", "bias")},
    "self_attn.out_proj.weight": 1,
    "self_attn.out_proj.bias": None,
    "fc1.weight": 0,
    "fc1.bias": 0,
    "fc2.weight": 1,
    "fc2.bias": None,
    **{f"{name}.{kind}": None for name in ("self_attn_layer_norm", "final_layer_norm") for kind in ("weight", "bias")},
}
"""Where a layer's tensors are split; None: every part holds a copy. ``final_layer_norm`` is the norm before the FFN."""

_IGNORED = {
    "decoder.version",
    "decoder.embed_positions._float_tensor",
}  # a format's number; a buffer that marks the dtype

_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "gelu_accurate": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}

_REQUIRED = {
    "decoder_normalize_before": True,
    "share_decoder_input_output_embed": True,
    "decoder_learned_pos": False,
    "no_token_positional_embeddings": False,
    "character_embeddings": False,
    "adaptive_input": False,
    "layernorm_embedding": False,
    "adaptive_softmax_cutoff": None,
}
"""The settings that XGLM has built in; one that the checkpoint does not have is as here."""


def is_source(source: Path) -> bool:
    return source.is_dir() and any(_PART.fullmatch(file.name) for file in source.iterdir())


def prepare(source: Path, options: Options) -> Conversion:
    """:raises BackboneError: parts or tensors that are missing, left over or of the wrong shape; other architectures.
    :raises ConfigError: options that don't belong here.
    """
    if options.vocab_size is not None or options.heads is not None:
        raise ConfigError("--vocab-size and --heads are for megatron-lm: a fairseq checkpoint says both itself")
    files = _parts(source)
    parts, settings = _load(files)
    check_same_keys(parts, files)
    keys = Keys(list(parts[0]), files[0])

    def whole(key: str, dim: int | None) -> PartedTensor:
        tensor = PartedTensor(keys.use(key), [part[key] for part in parts], dim, options.average_copies)
        tensor.check()
        return tensor

    embedding = whole("decoder.embed_tokens.weight", 0)
    tensors = [embedding]
    layers = _count_layers(parts[0], files[0])
    tensors += [whole(f"decoder.layers.{layer}.{name}", dim) for layer in range(layers) for name, dim in _LAYER.items()]
    final_norm = any(key.startswith("decoder.layer_norm.") for key in parts[0])
    if final_norm:
        tensors += [whole(f"decoder.layer_norm.{kind}", None) for kind in ("weight", "bias")]
    if "decoder.output_projection.weight" in keys:
        _check_tied(embedding, whole("decoder.output_projection.weight", 0))
    keys.finish(lambda key: key in _IGNORED)

    config = _config(settings, tensors, layers, files)
    unused, save_tokenizer = vocabulary(source, options, config["vocab_size"], config["max_position_embeddings"])
    config |= {"final_layer_norm": final_norm, "unused_token_ids": unused}
    return Conversion(
        config=config,
        tensors=[
            OutputTensor("model." + tensor.key.removeprefix("decoder."), tensor.shape, tensor.dtype, tensor.read)
            for tensor in tensors
        ],
        save_tokenizer=save_tokenizer,
        source_files=files,
        found=[
            f"fairseq megatron, {len(files)} parts: {layers} layers, width {config['d_model']}, "
            f"FFN {config['ffn_dim']}, {config['attention_heads']} heads, {config['vocab_size']} rows",
            "final norm: " + ("decoder.layer_norm" if final_norm else "none in the files, so none in the model"),
            f"{sum(end - start for start, end in unused)} rows that no text uses",
        ],
    )


def _parts(source: Path) -> list[Path]:
    if not is_source(source):
        raise BackboneError(f"{source}: no parts: expected model-model_part-0.pt, model-model_part-1.pt, ...")
    matches = [match for file in source.iterdir() if (match := _PART.fullmatch(file.name))]
    stem, *others = sorted({match["stem"] for match in matches})
    if others:
        raise BackboneError(f"{source} holds parts of several checkpoints: {stem}, {', '.join(others)}; expected one")
    numbers = sorted(int(match["number"]) for match in matches)
    missing = sorted(set(range(numbers[-1] + 1)) - set(numbers))
    if missing:
        raise BackboneError(f"{source}: {stem}-model_part-{missing[0]}.pt is missing ({len(numbers)} parts are there)")
    if len(numbers) > _MAX_PARTS:
        raise BackboneError(f"{source}: {len(numbers)} parts; at most {_MAX_PARTS} are expected")
    return [source / f"{stem}-model_part-{number}.pt" for number in numbers]


def _load(files: Sequence[Path]) -> tuple[list[dict[str, StoredTensor]], dict[str, Any]]:
    parts = []
    settings: dict[str, Any] = {}
    for file in files:
        content = load(file)
        model = content.get("model") if isinstance(content, dict) else None
        if not isinstance(model, dict) or not all(isinstance(value, StoredTensor) for value in model.values()):
            raise BackboneError(f"{file}: expected a fairseq checkpoint: a dictionary with 'args' and 'model'")
        if getattr(content.get("args"), "__dict__", None) is None:
            raise BackboneError(f"{file}: no 'args': a checkpoint of another version of fairseq than megatron_11b's")
        parts.append(dict(model))
        settings = settings or vars(content["args"])
    stated = settings.get("model_parallel_size")
    if stated not in (None, len(files)):
        raise BackboneError(f"{files[0]}: written as one of {stated} parts, but {len(files)} parts are there")
    return parts, settings


def _count_layers(part: dict[str, Any], file: Path) -> int:
    numbers = {int(match[1]) for key in part if (match := re.match(r"decoder\.layers\.(\d+)\.", key))}
    if not numbers:
        raise BackboneError(f"{file}: no decoder.layers.*: not a fairseq language model")
    return max(numbers) + 1


def _check_tied(embedding: PartedTensor, output: PartedTensor) -> None:
    for stored, other in zip(embedding.pieces, output.pieces, strict=True):
        if stored.shape != other.shape or not torch.equal(stored.read(), other.read()):
            raise BackboneError(f"{other.file}: {output.key} differs from {embedding.key}, but XGLM needs them tied")


def _config(
    settings: dict[str, Any], tensors: Sequence[PartedTensor], layers: int, files: Sequence[Path]
) -> dict[str, Any]:
    shapes = {tensor.key: tensor.shape for tensor in tensors}
    if any(len(shape) != (2 if _is_matrix(key) else 1) for key, shape in shapes.items()):
        raise BackboneError(f"{files[0]}: weights should be matrices, biases and norms vectors")
    rows, width = shapes["decoder.embed_tokens.weight"]
    ffn = shapes["decoder.layers.0.fc1.weight"][0]
    for key, shape in shapes.items():
        wanted = _expected_shape(key, rows, width, ffn)
        if shape != wanted:
            raise BackboneError(f"{files[0]}: {key} has shape {shape} in all parts together, expected {wanted}")
    stated = {"decoder_layers": layers, "decoder_embed_dim": width, "decoder_ffn_embed_dim": ffn}
    stated |= {"decoder_input_dim": width, "decoder_output_dim": width}
    for name, found in stated.items():
        if settings.get(name, found) != found:
            raise BackboneError(f"{files[0]}: its args say {name} {settings[name]}, its tensors {found}")
    for name, needed in _REQUIRED.items():
        if settings.get(name, needed) != needed:
            raise BackboneError(f"{files[0]}: its args say {name} {settings[name]!r}; only {needed!r} can be converted")
    activation = settings.get("activation_fn", "gelu")
    if activation not in _ACTIVATIONS:
        raise BackboneError(f"{files[0]}: activation {activation!r}; expected one of {', '.join(_ACTIVATIONS)}")
    return {
        "architectures": ["XGLMForCausalLM"],
        "model_type": "xglm",
        "vocab_size": rows,
        "max_position_embeddings": settings.get("max_target_positions") or settings.get("tokens_per_sample") or 1024,
        "d_model": width,
        "ffn_dim": ffn,
        "num_layers": layers,
        "attention_heads": _heads(settings, width, files),
        "activation_function": _ACTIVATIONS[activation],
        "scale_embedding": not settings.get("no_scale_embedding", False),
        "dropout": settings.get("dropout", 0.1),
        "attention_dropout": settings.get("attention_dropout", 0.1),
        "activation_dropout": settings.get("activation_dropout", 0.0),
        "layerdrop": settings.get("decoder_layerdrop", 0.0),
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "tie_word_embeddings": True,
    }


def _is_matrix(key: str) -> bool:
    return key.endswith(".weight") and "norm" not in key


def _expected_shape(key: str, rows: int, width: int, ffn: int) -> tuple[int, ...]:
    outputs, inputs = width, width
    if "embed_tokens" in key:
        outputs = rows
    elif ".fc1." in key:
        outputs = ffn
    elif ".fc2." in key:
        inputs = ffn
    return (outputs, inputs) if _is_matrix(key) else (outputs,)


def _heads(settings: dict[str, Any], width: int, files: Sequence[Path]) -> int:
    heads = settings.get("decoder_attention_heads")
    if type(heads) is not int or heads < 1 or width % heads or heads % len(files):
        raise BackboneError(
            f"{files[0]}: its args say decoder_attention_heads {heads!r}; expected a number that divides the width "
            f"{width} and that {len(files)} parts share evenly"
        )
    return heads
