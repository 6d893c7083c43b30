"""Reading parts of tensors from a folder of safetensors: bytes are fetched when, and only where, a part is taken.

The files are memory-mapped. On a CPU a contiguous part can serve as the weight itself: the ranks of a host then share
one copy in the page cache. Everything else is copied out, one tensor at a time, and the map lets go of it.
"""

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaptune.backbone.architectures import Shard
from megaptune.backbone.weight_files import weight_files
from megaptune.errors import BackboneError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PREFETCH_BYTES = 64 << 20  # fetched ahead of the copy; larger steps gained nothing


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: file, dtype, shape, and its bytes' start and end in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class CheckpointReader:
    """The tensors of a folder by name. Opening reads the headers alone.

    :raises BackboneError: a file that is missing, truncated or no safetensors; a tensor that stands in two files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, TensorEntry] = {}
        for file in weight_files(folder):
            for name, entry in _read_header(file).items():
                if name in self.entries:
                    raise BackboneError(f"{folder}: {name} stands in {self.entries[name].file.name} and {file.name}")
                self.entries[name] = entry
        self._maps: dict[Path, mmap.mmap] = {}

    def whole(self, name: str) -> Tensor:
        """A tensor as a view of its file: nothing is read before it is used. Never write to it."""
        entry = self.entries[name]
        if entry.start == entry.stop:
            return torch.empty(entry.shape, dtype=entry.dtype)
        count = (entry.stop - entry.start) // entry.dtype.itemsize
        if entry.start % entry.dtype.itemsize:  # an unaligned header of an old writer
            data = bytearray(self._map(entry.file)[entry.start : entry.stop])
            return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)
        flat = torch.frombuffer(self._map(entry.file), dtype=entry.dtype, count=count, offset=entry.start)
        return flat.view(entry.shape)

    def views(self, name: str, shard: Shard | None) -> list[Tensor]:
        """A rank's part of a tensor as views of the file; together, along ``shard.dim``, they are the part."""
        whole = self.whole(name)
        if shard is None:
            return [whole]
        return [whole.narrow(shard.dim, start, stop - start) for start, stop in shard.ranges]

    def part(self, name: str, shard: Shard | None, dtype: torch.dtype, device: torch.device, mapped: bool) -> Tensor:
        """A rank's part in memory of its own; as a view of the file where ``mapped`` and that is possible."""
        views = self.views(name, shard)
        if mapped and device.type == "cpu" and len(views) == 1 and views[0].is_contiguous() and views[0].dtype == dtype:
            return views[0]
        shape = shard.shape(tuple(self.entries[name].shape)) if shard else self.entries[name].shape
        target = torch.empty(shape, dtype=dtype, device=device)
        self.fill(target, name, shard, 0, target.numel())
        return target

    def fill(self, target: Tensor, name: str, shard: Shard | None, start: int, stop: int) -> int:
        """Copy the elements ``start`` to ``stop`` of a rank's part, counted by rows, to the same places of ``target``.

        ``target`` has the part's shape and is contiguous; its other elements are left alone, and their bytes are not
        read. Returns the bytes taken from the file.
        """
        if start >= stop:
            return 0
        views, entry = self.views(name, shard), self.entries[name]
        if target.dim() < 2:
            target.view(-1)[start:stop].copy_(torch.cat([view.reshape(-1) for view in views])[start:stop])
        else:
            length = target[0].numel()  # elements of a row
            rows = _rows_per_step(length * entry.dtype.itemsize)
            for row in range(start // length, -(-stop // length), rows):
                last = min(row + rows, -(-stop // length))
                self._prefetch(entry, shard, row, last)
                self._copy_rows(target, views, shard, row, last, start, stop)
        self._let_go(entry)
        return (stop - start) * entry.dtype.itemsize

    def _copy_rows(
        self, target: Tensor, views: list[Tensor], shard: Shard | None, row: int, last: int, start: int, stop: int
    ) -> None:
        length = target[0].numel()
        whole_rows = row * length >= start and last * length <= stop
        goal = target[row:last] if whole_rows else torch.empty_like(target[row:last])
        place = 0
        for view in views:
            if shard is not None and shard.dim == 0 and len(views) > 1:
                raise AssertionError("several ranges of rows")
            width = view.shape[1]
            goal.narrow(1, place, width).copy_(view[row:last])
            place += width
        if not whole_rows:
            first, end = max(start, row * length), min(stop, last * length)
            taken = goal.view(-1)[first - row * length : end - row * length]
            target.view(-1)[first:end].copy_(taken)

    def populate(self, name: str, shard: Shard | None) -> None:
        """Bring a mapped part (one view of the file) into memory, so that the first step does not wait for the disk."""
        entry = self.entries[name]
        raw = self.views(name, shard)[0].reshape(-1).view(torch.uint8)
        start = entry.start if shard is None else self._row_start(entry, shard.ranges[0][0])
        for offset in range(0, len(raw), _PREFETCH_BYTES):
            begin = start + offset
            self._advise(entry, mmap.MADV_WILLNEED, begin, begin + 2 * _PREFETCH_BYTES)
            raw[offset : offset + _PREFETCH_BYTES : mmap.PAGESIZE].sum()

    def prefetch(self, name: str, shard: Shard | None) -> None:
        """Ask the disk for a part that is wanted soon; what is in memory already costs nothing."""
        entry = self.entries[name]
        if shard is not None and shard.dim == 0:
            start, stop = (self._row_start(entry, row) for row in (shard.ranges[0][0], shard.ranges[-1][1]))
        else:
            start, stop = entry.start, entry.stop
        self._advise(entry, mmap.MADV_WILLNEED, start, stop)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as handle:
                # Private and writable: torch wants writable memory. Pages that nobody writes stay shared.
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]

    def _prefetch(self, entry: TensorEntry, shard: Shard | None, row: int, last: int) -> None:
        """Ask for the rows that are copied now and as many after them."""
        skipped = shard.ranges[0][0] if shard is not None and shard.dim == 0 else 0
        begin, end = self._row_start(entry, skipped + row), self._row_start(entry, skipped + 2 * last - row)
        self._advise(entry, mmap.MADV_WILLNEED, begin, end)

    @staticmethod
    def _row_start(entry: TensorEntry, row: int) -> int:
        return entry.start + row * ((entry.stop - entry.start) // max(1, entry.shape[0]))

    def _let_go(self, entry: TensorEntry) -> None:
        """Unmap a tensor's pages: they stay in the page cache, and no longer count as this process's."""
        self._advise(entry, mmap.MADV_DONTNEED, entry.start, entry.stop)

    def _advise(self, entry: TensorEntry, advice: int, start: int, stop: int) -> None:
        begin = start // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(stop, entry.stop)
        if end > begin:
            self._map(entry.file).madvise(advice, begin, end - begin)


def _rows_per_step(row_bytes: int) -> int:
    return max(1, _PREFETCH_BYTES // max(1, row_bytes))


def _read_header(file: Path) -> dict[str, TensorEntry]:
    damaged = f"{file}: truncated or damaged safetensors file"
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            size = file.stat().st_size
            if not 2 <= length <= size - 8:
                raise BackboneError(f"{damaged} (header of {length} bytes in {size}); copy or convert it again")
            header: dict[str, Any] = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        entries = {}
        for name, about in header.items():
            start, stop = (8 + length + offset for offset in about["data_offsets"])
            if about["dtype"] not in _DTYPES:
                raise BackboneError(f"{file}: {name} has dtype {about['dtype']}, which is not supported")
            entry = TensorEntry(file, _DTYPES[about["dtype"]], tuple(about["shape"]), start, stop)
            if stop > size:
                raise BackboneError(f"{damaged} ({name} ends at byte {stop} of {size}); copy or convert it again")
            elements = torch.Size(entry.shape).numel()
            if stop - start != elements * entry.dtype.itemsize:
                raise BackboneError(f"{damaged} ({name}: {stop - start} bytes for shape {list(entry.shape)})")
            entries[name] = entry
        return entries
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(f"{damaged} ({type(error).__name__}: {error}); copy or convert it again") from None
