"""What ``torch.save`` wrote, read without running anything and without reading a tensor before it is asked for.

A pickle can call any function that it can name. Here it can name only what stands in ``_ALLOWED`` and, for the settings
objects of the programs in ``_FOREIGN``, a :class:`Placeholder`: nothing is ever imported because a file asks for it, so
neither fairseq nor Megatron needs to be installed. This is the idea of ``torch.load``'s ``weights_only``, except that
tensors stay in the file, also in the format from before torch 1.6, which ``torch.load`` can't map into memory. The
released megatron_11b and the early Megatron-LM checkpoints are of that age.
"""

import io
import math
import pickle
import struct
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megaptune.errors import BackboneError, first_line

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}

# What a pickle says when it holds something else than it should, or ends too early.
_DAMAGE = (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


class _Sealed:
    """A pickle may set any attribute of what it was given, classes and functions included; not of these."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"an attempt to change {self!r}")


@dataclass
class _Storage(_Sealed):
    """A run of bytes in a file; ``start`` is None until the place is known."""

    file: Path
    dtype: torch.dtype
    num_bytes: int
    start: int | None = None


@dataclass(frozen=True)
class StoredTensor(_Sealed):
    """A tensor that is still in its file. ``offset`` counts elements of ``dtype`` from the start of the storage."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def file(self) -> Path:
        return self.storage.file

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def _extent(self) -> int:
        """Elements from the first to the last that the tensor touches."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    def check(self) -> None:
        """:raises BackboneError: when the tensor does not lie within its storage."""
        end = (self.offset + self._extent) * self.dtype.itemsize
        if min(self.offset, *self.shape, *self.stride, 0) < 0 or end > self.storage.num_bytes:
            raise BackboneError(
                f"{self.file}: damaged file: a tensor of shape {self.shape} needs {end} bytes of a storage of "
                f"{self.storage.num_bytes}"
            )

    def read(self) -> torch.Tensor:
        """The values, in memory of their own.

        :raises BackboneError: when the file ends before the tensor does.
        """
        assert self.storage.start is not None
        size = self.dtype.itemsize
        buffer = torch.empty(self._extent * size, dtype=torch.uint8)
        with self.file.open("rb") as handle:
            handle.seek(self.storage.start + self.offset * size)
            if handle.readinto(buffer.numpy().data) != len(buffer):
                raise BackboneError(f"{self.file}: the file ended within a tensor; copy it again")
        return buffer.view(self.dtype).as_strided(self.shape, self.stride)


class _SealedClass(_Sealed, type):
    pass


class Settings(Namespace, metaclass=_SealedClass):
    """In place of ``argparse.Namespace``."""


class Placeholder:
    """Stands for an object of a package that is not needed here. It keeps its arguments, and does nothing."""

    arguments: tuple[Any, ...] = ()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"<{type(self).__name__}{self.arguments}>"


def load(path: Path) -> Any:
    """The object that ``torch.save`` wrote to ``path``, with a :class:`StoredTensor` for every tensor.

    :raises BackboneError: not a torch file, cut short, or asking for a class that is not allowed.
    """
    try:
        with path.open("rb") as handle:
            magic = handle.read(4)
            handle.seek(0)
            found, storages = _load_zip(handle, path) if magic == b"PK\x03\x04" else _load_legacy(handle, path)
    except OSError as error:
        raise BackboneError(f"{path}: cannot be read: {first_line(error)}") from None
    except (*_DAMAGE, zipfile.BadZipFile, struct.error, RecursionError) as error:
        raise BackboneError(
            f"{path}: truncated, damaged or not written by torch.save ({first_line(error)}); copy it again"
        ) from None
    length = path.stat().st_size
    for storage in storages:
        if storage.start is None or storage.start + storage.num_bytes > length:
            raise BackboneError(
                f"{path}: truncated: it has {length} bytes and its tensors reach further; copy it again"
            )
    return found


def _load_zip(handle: BinaryIO, path: Path) -> tuple[Any, list[_Storage]]:
    """The format since torch 1.6: a zip archive, uncompressed, ``data.pkl`` beside ``data/KEY`` for every storage."""
    with zipfile.ZipFile(handle) as archive:
        members = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        if "data.pkl" not in members:
            raise BackboneError(f"{path}: a zip archive without data.pkl: not written by torch.save")
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise BackboneError(f"{path}: written on a big-endian machine, which is not supported")
        storages: dict[str, _Storage] = {}

        def storage(dtype: torch.dtype, key: str, numel: int) -> _Storage:
            entry = members[f"data/{key}"]
            num_bytes = numel * dtype.itemsize
            if entry.compress_type != zipfile.ZIP_STORED or not 0 <= num_bytes <= entry.file_size:
                raise pickle.UnpicklingError(f"storage {key} has {entry.file_size} bytes, expected {num_bytes}")
            # The local header's own name and padding lie between it and the data.
            handle.seek(entry.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", handle.read(4))
            start = entry.header_offset + 30 + name_length + extra_length
            return storages.setdefault(key, _Storage(path, dtype, num_bytes, start))

        found = _Unpickler(io.BytesIO(archive.read(members["data.pkl"])), path, storage).load()
    return found, list(storages.values())


def _load_legacy(handle: BinaryIO, path: Path) -> tuple[Any, list[_Storage]]:
    """The format before torch 1.6: four pickles, one with the list of storage keys, then ``numel`` and data of each."""
    storages: dict[str, _Storage] = {}

    def storage(dtype: torch.dtype, key: str, numel: int) -> _Storage:
        return storages.setdefault(key, _Storage(path, dtype, numel * dtype.itemsize))

    def following() -> Any:
        return _Unpickler(handle, path, storage).load()

    if following() != _LEGACY_MAGIC or following() != _LEGACY_PROTOCOL:
        raise pickle.UnpicklingError("no torch file of a known kind")
    if not following()["little_endian"]:
        raise BackboneError(f"{path}: written on a big-endian machine, which is not supported")
    found = following()
    for key in following():
        place = storages[key]
        (numel,) = struct.unpack("<q", handle.read(8))
        if numel * place.dtype.itemsize != place.num_bytes:
            raise pickle.UnpicklingError(f"storage {key} has {numel} elements of {place.dtype}")
        place.start = handle.tell()
        handle.seek(place.num_bytes, 1)
    return found, list(storages.values())


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, path: Path, storage: Callable[[torch.dtype, str, int], _Storage]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._path = path
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # as protocol 2 spells it
        full = f"{module}.{name}"
        if full in _ALLOWED:
            return _ALLOWED[full]
        if full in _HARMLESS or module.partition(".")[0] in _FOREIGN:
            return type(name, (Placeholder,), {"__module__": module})
        raise BackboneError(
            f"{self._path}: the file asks for {full}, which is not allowed in a checkpoint: nothing of it was run. "
            "If you trust the file, load it with the program that wrote it and save only tensors and plain settings"
        )

    def persistent_load(self, saved_id: Any) -> _Storage:
        # ("storage", type, key, device, numel), and in the older format a sixth item for views, never used since 0.4
        if type(saved_id) is not tuple or saved_id[0] != "storage" or any(saved_id[5:]):
            raise pickle.UnpicklingError("only storages may be referred to")
        dtype, key, numel = saved_id[1], str(saved_id[2]), int(saved_id[4])
        if not isinstance(dtype, torch.dtype) or numel < 0:
            raise pickle.UnpicklingError(f"storage {key} of {numel} elements of {dtype}")
        return self._storage(dtype, key, numel)


def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, stride: Any, *unused: Any) -> StoredTensor:
    return _stored(storage, storage.dtype, offset, shape, stride)


def _rebuild_tensor_with_dtype(
    storage: _Storage, offset: int, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: torch.dtype, *unused: Any
) -> StoredTensor:
    return _stored(storage, dtype, offset, shape, stride)


def _stored(storage: _Storage, dtype: torch.dtype, offset: int, shape: Any, stride: Any) -> StoredTensor:
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor without a storage")
    tensor = StoredTensor(storage, dtype, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))
    tensor.check()
    return tensor


def _rebuild_parameter(tensor: StoredTensor, *unused: Any) -> StoredTensor:
    return tensor


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes for protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding!r}")
    return text.encode("latin1")


def _enum_member(owner: Any, name: str) -> Placeholder:
    """Some releases of Python 3.11 pickle an enum's member as ``getattr(class, name)``."""
    if not (isinstance(owner, type) and issubclass(owner, Placeholder)):
        raise pickle.UnpicklingError("getattr on something else than an enum")
    return owner(name)


class _Function(_Sealed):
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


_ALLOWED: dict[str, Any] = {
    "argparse.Namespace": Settings,
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.getattr": _Function(_enum_member),
    "_codecs.encode": _Function(_latin1),
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _Function(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": _Function(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": _Function(_rebuild_tensor_with_dtype),
    "torch._utils._rebuild_parameter": _Function(_rebuild_parameter),
    "torch._utils._rebuild_parameter_with_state": _Function(_rebuild_parameter),
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{
        f"{module}.{name}": dtype
        for name, dtype in _STORAGE_TYPES.items()
        for module in ("torch", "torch.cuda", "torch.storage")
    },
}

_HARMLESS = {
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    "numpy.ndarray",
    "numpy.dtype",
    "torch.device",
    "collections.Counter",
    "signal.Signals",
    "datetime.timedelta",
    "pathlib.PosixPath",
    "_io.BytesIO",
}
"""Placeholders for what settings and random states hold."""

_FOREIGN = {"fairseq", "megatron", "fp16", "apex", "transformer_engine", "omegaconf"}
"""Packages whose classes are replaced by placeholders."""
