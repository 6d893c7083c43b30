"""One tensor of a model whose tensor-parallel parts lie in several files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megaptune.backbone.convert.torch_file import StoredTensor
from megaptune.errors import BackboneError


def same(piece: torch.Tensor) -> torch.Tensor:
    return piece


@dataclass(frozen=True)
class PartedTensor:
    """``dim`` is where the pieces meet, counted after ``prepare``; None where every part holds a copy."""

    key: str
    pieces: Sequence[StoredTensor]
    dim: int | None
    average_copies: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor, with the pieces as they are stored."""
        shape = list(self.pieces[0].shape)
        if self.dim is not None:
            shape[self.dim] *= len(self.pieces)
        return tuple(shape)

    def check(self) -> None:
        """:raises BackboneError: pieces that do not fit together."""
        first = self.pieces[0]
        if not first.dtype.is_floating_point:
            raise BackboneError(f"{first.file}: {self.key} holds {first.dtype}, expected floating-point weights")
        for piece in self.pieces:
            if (piece.shape, piece.dtype) != (first.shape, first.dtype):
                raise BackboneError(
                    f"the parts disagree on {self.key}: {_kind(first)} in {first.file}, {_kind(piece)} in {piece.file}"
                )
        if self.dim is not None and self.dim >= len(first.shape):
            raise BackboneError(f"{first.file}: {self.key} has shape {first.shape}: too few dimensions to be split")

    def read(self, prepare: Callable[[torch.Tensor], torch.Tensor] = same) -> torch.Tensor:
        """The whole tensor; one piece at a time is in memory beside it.

        :raises BackboneError: copies that differ.
        """
        if self.dim is None:
            return prepare(self._copies())
        whole = None
        for index, piece in enumerate(self.pieces):
            values = prepare(piece.read())
            size = values.shape[self.dim]
            if whole is None:
                shape = [*values.shape]
                shape[self.dim] *= len(self.pieces)
                whole = torch.empty(shape, dtype=values.dtype)
            whole.narrow(self.dim, index * size, size).copy_(values)
        assert whole is not None
        return whole

    def _copies(self) -> torch.Tensor:
        first = self.pieces[0].read()
        total = first.double() if self.average_copies else None
        for piece in self.pieces[1:]:
            other = piece.read()
            if total is not None:
                total += other
            elif not torch.equal(first, other):
                apart = (first.double() - other.double()).abs().max().item()
                raise BackboneError(
                    f"{self.key} should be the same in every part, but {self.pieces[0].file} and {piece.file} differ "
                    f"by up to {apart:.3g}: parts of different checkpoints, or copies that drifted apart in training; "
                    "--average-copies takes their mean"
                )
        return first if total is None else (total / len(self.pieces)).to(first.dtype)


def _kind(piece: Any) -> str:
    return f"{tuple(piece.shape)} {str(piece.dtype).removeprefix('torch.')}"


def check_same_keys(parts: Sequence[dict[str, Any]], files: Sequence[Any]) -> None:
    """:raises BackboneError: naming a tensor that one part has and another has not."""
    for part, file in zip(parts[1:], files[1:], strict=True):
        different = sorted(parts[0].keys() ^ part.keys())
        if different:
            has = files[0] if different[0] in parts[0] else file
            raise BackboneError(
                f"the parts {files[0]} and {file} hold different tensors: {different[0]} is only in {has}"
                f" ({len(different)} such tensors)"
            )


class Keys:
    """A part's tensors, crossed off as they are used, so that none is dropped in silence."""

    def __init__(self, names: Sequence[str], where: Any) -> None:
        self._left = dict.fromkeys(names)
        self._where = where

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def use(self, name: str) -> str:
        """:raises BackboneError: when it is missing."""
        if name not in self._left:
            raise BackboneError(f"{self._where}: the tensor {name} is missing: not a whole checkpoint of this kind")
        del self._left[name]
        return name

    def finish(self, ignored: Callable[[str], bool]) -> None:
        """:raises BackboneError: naming what was not used."""
        left = [name for name in self._left if not ignored(name)]
        if left:
            raise BackboneError(
                f"{self._where}: {len(left)} tensors have no place in the converted model, which would be another "
                f"model without them: {', '.join(left[:4])}{', ...' if len(left) > 4 else ''}"
            )
