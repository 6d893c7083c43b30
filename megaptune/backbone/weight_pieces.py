"""Pieces of weights in safetensors files, each with its place in the whole tensor: written in one layout of ranks, read
in any other.

A rank holds consecutive elements (ZeRO's share) of its part (tensor parallelism's) of a parameter. A file carries those
places in its metadata, so whoever reads needs neither the model nor the layout that wrote it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaptune.backbone.architectures import Shard
from megaptune.errors import CheckpointError, first_line

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Place:
    """Elements ``start`` to ``start + count``, counted by rows, of the part ``shard`` (None: all) of a tensor of shape
    ``whole``."""

    whole: tuple[int, ...]
    shard: Shard | None
    start: int
    count: int

    @property
    def part_shape(self) -> tuple[int, ...]:
        return self.whole if self.shard is None else self.shard.shape(self.whole)

    def as_json(self) -> list[Any]:
        shard = None if self.shard is None else [self.shard.dim, self.shard.ranges]
        return [self.whole, shard, self.start, self.count]

    @classmethod
    def from_json(cls, value: list[Any]) -> "Place":
        whole, shard, start, count = value
        made = None if shard is None else Shard(shard[0], tuple((a, b) for a, b in shard[1]))
        return cls(tuple(whole), made, start, count)


def write_tensors(file: Path, tensors: Iterable[tuple[str, Tensor]], places: dict[str, Place] | None = None) -> str:
    """Write a safetensors file, one tensor at a time, and flush it to disk; its SHA-256.

    safetensors' own writer takes all tensors at once, and refuses those that are views of one buffer.
    """
    listed = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    if places is not None:
        header["__metadata__"]["places"] = json.dumps({name: place.as_json() for name, place in places.items()})
    offset = 0
    for name, tensor in listed:
        end = offset + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    checksum = hashlib.sha256()
    try:
        with file.open("wb") as handle:
            for data in _contents(raw, listed):
                checksum.update(data)
                handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise CheckpointError(f"could not write {file}: {first_line(error)}") from error
    return checksum.hexdigest()


def _contents(header: bytes, tensors: list[tuple[str, Tensor]]) -> Iterator[Any]:
    yield len(header).to_bytes(8, "little") + header
    for _, tensor in tensors:
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


class Pieces:
    """What several files hold together. Opening reads headers; tensors are fetched one at a time.

    :raises CheckpointError: a file that is missing or damaged; in :meth:`take` also a piece that no file has.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self._found: dict[str, list[tuple[Any, Place]]] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
                places = json.loads(handle.metadata()["places"])
                names = list(handle.keys())
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{file}: missing or damaged ({type(error).__name__})") from None
            for name in names:
                self._found.setdefault(name, []).append((handle, Place.from_json(places[name.partition(".")[2]])))

    @property
    def kinds(self) -> set[str]:
        """What is held of each parameter: ``weight``, moments, ``best``."""
        return {name.partition(".")[0] for name in self._found}

    def take(self, kind: str, name: str, place: Place) -> Tensor:
        """The elements at ``place`` of ``kind.name`` [count]; no more than one whole tensor is held meanwhile."""
        pieces = self._found.get(f"{kind}.{name}", [])
        for handle, held in pieces:
            if held == place:
                return handle.get_tensor(f"{kind}.{name}")
        whole = self._whole(f"{kind}.{name}", place.whole)
        if place.shard is not None:
            shard = place.shard
            whole = torch.cat([whole.narrow(shard.dim, a, b - a) for a, b in shard.ranges], dim=shard.dim)
        return whole.reshape(-1)[place.start : place.start + place.count]

    def _whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        parts: dict[Shard | None, Tensor] = {}
        held = 0
        for handle, place in self._found.get(name, []):
            if place.whole != shape:
                raise CheckpointError(f"{self.files[0].parent}: {name} has shape {place.whole}, expected {shape}")
            piece = handle.get_tensor(name)
            part = parts.setdefault(place.shard, torch.empty(prod(place.part_shape), dtype=piece.dtype))
            part[place.start : place.start + place.count] = piece
            held += place.count
        if held != prod(shape):
            raise CheckpointError(f"{self.files[0].parent}: {held} of {prod(shape)} elements of {name} are there")
        if set(parts) == {None}:
            return parts[None].view(shape)
        whole = torch.empty(shape, dtype=next(iter(parts.values())).dtype)
        for shard, part in parts.items():
            assert shard is not None, "a tensor is either divided or not"
            rest = part.view(shard.shape(shape))
            for start, stop in shard.ranges:
                whole.narrow(shard.dim, start, stop - start).copy_(rest.narrow(shard.dim, 0, stop - start))
                rest = rest.narrow(shard.dim, stop - start, rest.shape[shard.dim] - stop + start)
        return whole
