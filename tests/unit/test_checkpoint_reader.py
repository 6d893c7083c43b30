"""Parts of tensors, against slices of the whole one; and which bytes of the file are touched for them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megaptune.backbone.architectures import Shard
from megaptune.backbone.checkpoint_reader import CheckpointReader
from megaptune.errors import BackboneError

CPU = torch.device("cpu")
SHARDS = {
    "whole": None,
    "rows": Shard(0, ((3, 9),)),
    "columns": Shard(1, ((2, 6),)),
    "three blocks of columns": Shard(1, ((1, 3), (5, 7), (9, 11))),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(12, 12, generator=generator),
        "half": torch.randn(12, 12, generator=generator).bfloat16(),
        "vector": torch.randn(12, generator=generator),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def sliced(tensor: torch.Tensor, shard: Shard | None) -> torch.Tensor:
    if shard is None:
        return tensor
    dim = min(shard.dim, tensor.dim() - 1)
    return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in shard.ranges], dim)


@pytest.mark.parametrize("name", ["matrix", "half"])
@pytest.mark.parametrize("shard", SHARDS.values(), ids=SHARDS.keys())
@pytest.mark.parametrize("mapped", [True, False])
def test_part_is_the_slice(folder, name, shard, mapped):
    reader = CheckpointReader(folder)
    expected = sliced(reader.whole(name).clone(), shard)
    found = reader.part(name, shard, expected.dtype, CPU, mapped)
    assert torch.equal(found, expected)
    in_file = found.data_ptr() == reader.views(name, shard)[0].data_ptr()
    assert in_file == (mapped and (shard is None or shard.dim == 0))


@pytest.mark.parametrize("shard", SHARDS.values(), ids=SHARDS.keys())
@pytest.mark.parametrize("replicas", [1, 2, 3, 5, 7])
def test_shares_make_up_the_part_and_nothing_else_is_filled(folder, shard, replicas, monkeypatch):
    """Also where shares begin within a row, and where rows are copied in several steps."""
    monkeypatch.setattr("megaptune.backbone.checkpoint_reader._PREFETCH_BYTES", 100)
    reader = CheckpointReader(folder)
    expected = sliced(reader.whole("matrix").clone(), shard)
    size = -(-expected.numel() // replicas)
    seen = 0
    for replica in range(replicas):
        start, stop = min(size * replica, expected.numel()), min(size * (replica + 1), expected.numel())
        target = torch.full(expected.shape, -777.0)
        assert reader.fill(target, "matrix", shard, start, stop) == 4 * (stop - start)
        share = target.view(-1)
        assert torch.equal(share[start:stop], expected.reshape(-1)[start:stop])
        assert (share[:start] == -777).all()
        assert (share[stop:] == -777).all()
        seen += stop - start
    assert seen == expected.numel()


def test_vectors_and_empty_tensors(folder):
    reader = CheckpointReader(folder)
    blocks = Shard(0, ((0, 2), (4, 6), (8, 10)))
    whole = reader.whole("vector").clone()
    assert torch.equal(reader.part("vector", blocks, torch.float32, CPU, False), sliced(whole, blocks))
    assert reader.part("empty", None, torch.float32, CPU, True).shape == (0, 4)


def test_another_dtype_is_converted_on_the_way(folder):
    reader = CheckpointReader(folder)
    found = reader.part("half", SHARDS["columns"], torch.float32, CPU, mapped=True)
    assert torch.equal(found, sliced(reader.whole("half").float(), SHARDS["columns"]))


def test_writing_to_a_mapped_weight_never_reaches_the_file(folder):
    reader = CheckpointReader(folder)
    before = (folder / "model.safetensors").read_bytes()
    reader.part("matrix", None, torch.float32, CPU, mapped=True)[0] = 0
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "a ends at byte"),
        (b'{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,8]}}', "8 bytes for shape"),
        (b'{"a":{"dtype":"Q4","shape":[4],"data_offsets":[0,2]}}', "dtype Q4"),
        (b'{"a":{"dtype":"F32"}}', "damaged"),
        (b"not json", "damaged"),
    ],
)
def test_header_that_does_not_fit_the_file(tmp_path, header, told):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(BackboneError, match=told):
        CheckpointReader(tmp_path)


def test_a_tensor_that_stands_in_two_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for part in ("a", "b"):
        save_file({"x": torch.zeros(2)}, tmp_path / f"{part}.safetensors")
    index = '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BackboneError, match=r"x stands in a\.safetensors and b\.safetensors"):
        CheckpointReader(tmp_path)
