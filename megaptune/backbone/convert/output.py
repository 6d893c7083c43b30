"""A Hugging Face folder written one tensor at a time: never more than one output tensor in memory."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megaptune.backbone.weight_files import write_checksums
from megaptune.errors import BackboneError, SetupError

_SPARE_BYTES = 64 * 2**20  # tokenizer, index and what else comes into the folder

_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True)
class OutputTensor:
    """``make()`` gives the values, of ``shape``, in any dtype; they are written as ``dtype``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that becomes it at the end, with ``SHA256SUMS``: a target that exists is whole.

    :raises SetupError: when the file system refuses.
    """
    part = target.with_name(f"{target.name}.part-{os.getpid()}")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        write_checksums(part)
        part.rename(target)
    except OSError as error:
        raise SetupError(f"could not write {target}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_space(target: Path, num_bytes: int) -> None:
    """:raises SetupError: when the disk that will hold ``target`` has too little room."""
    existing = next(folder for folder in target.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes + _SPARE_BYTES:
        raise SetupError(
            f"{target} needs {num_bytes / 2**30:.2f} GiB and its disk has {free / 2**30:.2f} GiB free: "
            "make room, or choose another target or a smaller --dtype"
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(
    folder: Path, tensors: Sequence[OutputTensor], max_shard_bytes: int, say: Callable[[str], None]
) -> None:
    """``model.safetensors``, or numbered shards of at most ``max_shard_bytes`` (or one tensor) with their index.

    :raises BackboneError: a value that is not finite in the dtype that is written.
    """
    shards = _shards(tensors, max_shard_bytes)
    total = sum(tensor.num_bytes for tensor in tensors)
    weight_map = {}
    written = 0
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        file = folder / ("model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        with file.open("wb") as handle:
            _write_shard(handle, shard)
        weight_map.update({tensor.name: file.name for tensor in shard})
        written += sum(tensor.num_bytes for tensor in shard)
        say(f"  {file.name}: {written / 2**30:.2f} of {total / 2**30:.2f} GiB")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def _shards(tensors: Sequence[OutputTensor], max_shard_bytes: int) -> list[list[OutputTensor]]:
    shards: list[list[OutputTensor]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    # Wider elements first, so that each tensor starts at a multiple of its element's size.
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def _write_shard(handle: BinaryIO, tensors: Sequence[OutputTensor]) -> None:
    """The safetensors format: the header's length in 8 bytes, a JSON header, the values in the header's order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    handle.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        values = tensor.make()
        assert tuple(values.shape) == tensor.shape, tensor.name
        values = values.to(tensor.dtype).contiguous()
        _check_finite(tensor, values)
        handle.write(values.view(-1).view(torch.uint8).numpy().data)


def _check_finite(tensor: OutputTensor, values: torch.Tensor) -> None:
    if values.numel() and not all(bound.isfinite() for bound in values.aminmax()):
        raise BackboneError(
            f"{tensor.name} holds values that are not finite in {str(tensor.dtype).removeprefix('torch.')}: "
            "a damaged source, or weights that need --dtype fp32 or bf16"
        )
