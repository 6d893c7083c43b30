"""Pieces of weights: written in one layout, read in another, and what is said when some are missing."""

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megaptune.backbone.architectures import Shard
from megaptune.backbone.weight_pieces import Pieces, Place, write_tensors
from megaptune.errors import CheckpointError

WHOLE = {"matrix": torch.arange(48.0).view(6, 8), "row": torch.arange(100.0, 112), "norm": torch.tensor([1.0, 2, 3])}


def shard(name: str, index: int, shards: int) -> Shard | None:
    """The matrix by columns in two ranges, as GPT-2's fused layers; the row by its only dimension; the norm never."""
    if shards == 1 or name == "norm":
        return None
    if name == "row":
        size = 12 // shards
        return Shard(0, ((index * size, (index + 1) * size),))
    size = 4 // shards
    return Shard(1, tuple((start + index * size, start + (index + 1) * size) for start in (0, 4)))


def place(name: str, index: int, shards: int, replica: int, replicas: int) -> Place:
    part = Place(tuple(WHOLE[name].shape), shard(name, index, shards), 0, 0)
    count = torch.Size(part.part_shape).numel()
    size = -(-count // replicas)
    start = min(size * replica, count)
    return Place(part.whole, part.shard, start, min(size, count - start))


def values(name: str, where: Place) -> torch.Tensor:
    """Cut out independently of the code under test: by the indices that belong to the place."""
    whole = WHOLE[name]
    if where.shard is not None:
        keep = [i for start, stop in where.shard.ranges for i in range(start, stop)]
        whole = whole.index_select(where.shard.dim, torch.tensor(keep))
    return whole.reshape(-1)[where.start : where.start + where.count]


def write(folder: Path, shards: int, replicas: int) -> list[Path]:
    files = []
    for index, replica in product(range(shards), range(replicas)):
        names = [name for name in WHOLE if name != "norm" or index == 0]
        places = {name: place(name, index, shards, replica, replicas) for name in names}
        files.append(folder / f"{index}-{replica}.safetensors")
        write_tensors(files[-1], [(f"weight.{name}", values(name, where)) for name, where in places.items()], places)
    return files


LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 5), (4, 1)]


@pytest.mark.parametrize("after", LAYOUTS)
@pytest.mark.parametrize("before", LAYOUTS)
def test_any_layout_reads_what_any_layout_wrote(tmp_path, before, after):
    pieces = Pieces(write(tmp_path, *before))
    assert pieces.kinds == {"weight"}
    for name, index, replica in product(WHOLE, range(after[0]), range(after[1])):
        where = place(name, index, after[0], replica, after[1])
        assert torch.equal(pieces.take("weight", name, where), values(name, where))


def test_a_missing_file_is_told_with_what_it_leaves_out(tmp_path):
    files = write(tmp_path, 2, 2)
    pieces = Pieces(files[:-1])
    with pytest.raises(CheckpointError, match=r"36 of 48 elements of weight\.matrix are there"):
        pieces.take("weight", "matrix", place("matrix", 0, 1, 0, 1))


def test_another_shape_is_refused(tmp_path):
    pieces = Pieces(write(tmp_path, 1, 1))
    with pytest.raises(CheckpointError, match=r"has shape \(6, 8\), expected \(6, 9\)"):
        pieces.take("weight", "matrix", Place((6, 9), None, 0, 54))


def test_a_truncated_file_is_named(tmp_path):
    (file,) = write(tmp_path, 1, 1)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"0-0\.safetensors: missing or damaged"):
        Pieces([file])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_are_safetensors_also_of_views_and_empty_tensors(tmp_path, dtype):
    """Views of one buffer, which safetensors' own writer refuses."""
    flat = torch.arange(10.0).to(dtype)
    tensors = {"a": flat[:4].view(2, 2), "b": flat[4:], "c": flat[:0], "d": flat.view(2, 5).T}
    write_tensors(tmp_path / "file", list(tensors.items()))
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == dtype for name, tensor in tensors.items())
