"""``megaptune convert``: recognise a checkpoint, check it whole, write the folder, say what was done."""

import re
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from megaptune.backbone.convert import fairseq_megatron, gguf, megatron_lm
from megaptune.backbone.convert.conversion import Conversion, Options
from megaptune.backbone.convert.output import check_space, staged_folder, write_json, write_weights
from megaptune.errors import BackboneError, ConfigError

Format = Literal["auto", "fairseq-megatron", "megatron-lm", "gguf"]

DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def parse_size(text: str) -> int:
    """``2GiB``, ``500MB`` or a number of bytes.

    :raises ConfigError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]|[KMG]i|)B?", text.strip())
    num_bytes = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if num_bytes < 1:
        raise ConfigError(f"--max-shard {text!r}: expected a size such as 2GiB or 500MB")
    return num_bytes


def convert(source: Path, target: Path, kind: Format, options: Options, say: Callable[[str], None]) -> None:
    """Write ``source`` as a Hugging Face folder ``target``, which must not exist.

    :raises ConfigError: options that don't fit; a target that exists.
    :raises BackboneError: a source that is unknown, damaged, incomplete, or of an architecture without a counterpart.
    :raises SetupError: no room on the disk.
    """
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists already: choose another target, or remove it first")
    if not source.exists():
        raise BackboneError(f"{source}: not found")
    kind = _recognise(source) if kind == "auto" else kind
    if kind == "gguf":
        bytes_in = _convert_gguf(source, target, options, say)
    else:
        prepare = fairseq_megatron.prepare if kind == "fairseq-megatron" else megatron_lm.prepare
        bytes_in = _write(prepare(source, options), target, options, say)
    bytes_out = sum(file.stat().st_size for file in target.iterdir())
    # Linux counts in KiB.
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say(
        f"wrote {target}: {bytes_in / 2**30:.2f} GiB in, {bytes_out / 2**30:.2f} GiB out, "
        f"peak memory of the process {peak_bytes / 2**30:.2f} GiB"
    )


def _recognise(source: Path) -> Format:
    if gguf.is_source(source):
        return "gguf"
    if fairseq_megatron.is_source(source):
        return "fairseq-megatron"
    if megatron_lm.is_source(source):
        return "megatron-lm"
    raise BackboneError(
        f"{source}: no checkpoint of a known kind: expected a folder with model-model_part-0.pt (fairseq), "
        "a folder with latest_checkpointed_iteration.txt or mp_rank_00 (Megatron-LM), or a .gguf file"
    )


def _write(conversion: Conversion, target: Path, options: Options, say: Callable[[str], None]) -> int:
    """The number of bytes of the source."""
    tensors = [replace(tensor, dtype=options.dtype or tensor.dtype) for tensor in conversion.tensors]
    dtypes = {tensor.dtype for tensor in tensors}
    # Where a few tensors are wider than the rest, a reader takes the narrower kind for the model's.
    dtype = min(dtypes, key=lambda kind: kind.itemsize)
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    for line in (*conversion.found, f"{num_bytes / 2**30:.2f} GiB of {' and '.join(sorted(map(_name, dtypes)))}"):
        say(line)
    check_space(target, num_bytes)
    with staged_folder(target) as part:
        write_json(part / "config.json", conversion.config | {"dtype": _name(dtype)})
        conversion.save_tokenizer(part)
        write_weights(part, tensors, options.max_shard_bytes, say)
    return sum(file.stat().st_size for file in conversion.source_files)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _convert_gguf(source: Path, target: Path, options: Options, say: Callable[[str], None]) -> int:
    if any((options.bpe_merges, options.tokenizer, options.vocab_size, options.heads, options.average_copies)):
        raise ConfigError("a GGUF file has its own tokenizer and vocabulary: only --dtype and --max-shard apply to it")
    say(f"GGUF file {source.name}, dequantised by transformers to fp32 (the whole model in memory, twice)")
    check_space(target, gguf.num_elements(source) * (options.dtype or torch.float32).itemsize)
    gguf.convert(source, target, options.dtype, options.max_shard_bytes)
    return source.stat().st_size
