"""What torch.save wrote, read back without torch.load: the same values, and nothing run on the way."""

import argparse
import enum
import os
import pickle
import random
import struct
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaptune.backbone.convert.torch_file import Placeholder, StoredTensor, load
from megaptune.errors import BackboneError

BASE = torch.arange(24.0).reshape(4, 6)
TENSORS = {
    "whole": BASE,
    "a view with gaps": BASE[1:, ::2],
    "transposed": BASE.t(),
    "half": torch.randn(3, 5).half(),
    "bfloat16": torch.randn(7).bfloat16(),
    "double": torch.randn(2, 2).double(),
    "integers": torch.tensor([1, -2]),
    "bytes": torch.tensor([255], dtype=torch.uint8),
    "truths": torch.tensor([True, False]),
    "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3.5),
}


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_of_every_kind_have_their_values(tmp_path, legacy):
    torch.save(TENSORS, tmp_path / "file.pt", _use_new_zipfile_serialization=not legacy)
    found = load(tmp_path / "file.pt")
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].shape == tuple(tensor.shape)
        values = found[name].read()
        assert values.dtype == tensor.dtype, name
        assert torch.equal(values, tensor.detach()), name


@pytest.mark.parametrize("legacy", [False, True])
def test_settings_and_states_come_through(tmp_path, legacy):
    content = {
        "args": argparse.Namespace(layers=3, dtype=torch.float16, name="größe", betas=(0.9, 0.95), flags={1, 2}),
        "state": torch.nn.Linear(2, 3).state_dict(),
        "rng": [np.random.get_state(), random.getstate(), np.float64(2.5)],
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
    }
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=not legacy)
    found = load(tmp_path / "file.pt")
    assert vars(found["args"]) == vars(content["args"])
    assert isinstance(found["state"], OrderedDict)
    assert torch.equal(found["state"]["weight"].read(), content["state"]["weight"])
    assert found["rng"][1] == content["rng"][1]
    assert isinstance(found["rng"][2], Placeholder)
    assert found["size"] == (1, 2)


def test_enums_of_a_package_that_is_not_there(tmp_path, monkeypatch):
    """Releases of Python 3.11 pickle a member by its value or by its name."""

    class ByValue(enum.Enum):
        encoder = 1

        def __reduce_ex__(self, protocol: Any) -> Any:
            return type(self), (self.value,)

    class ByName(enum.Enum):
        causal = 2

        def __reduce_ex__(self, protocol: Any) -> Any:
            return getattr, (type(self), self.name)

    module = types.ModuleType("megatron")
    for kind in (ByValue, ByName):
        kind.__module__, kind.__qualname__ = "megatron", kind.__name__
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "megatron", module)
    torch.save({"args": argparse.Namespace(kind=ByValue.encoder, mask=ByName.causal)}, tmp_path / "file.pt")
    monkeypatch.delitem(sys.modules, "megatron")
    args = load(tmp_path / "file.pt")["args"]
    assert (args.kind.arguments, args.mask.arguments) == ((1,), ("causal",))
    assert "megatron" not in sys.modules


class Trap:
    """A pickle of it runs a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def save(path: Path, content: Any, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("function", "name"), [(os.mkdir, "posix.mkdir"), (eval, "builtins.eval")])
def test_a_function_that_the_file_asks_for_is_refused_and_not_run(tmp_path, function, name, legacy):
    made = tmp_path / "made"
    argument = f"__import__('os').mkdir({str(made)!r})" if function is eval else str(made)
    file = save(tmp_path / "file.pt", {"args": Trap(function, argument), "model": {}}, legacy)
    with pytest.raises(BackboneError, match=rf"file\.pt: the file asks for {name}, which is not allowed"):
        load(file)
    assert not made.exists()
    torch.load(file, weights_only=False)  # the trap is a real one
    assert made.exists()


def test_getattr_reaches_nothing(tmp_path):
    file = save(tmp_path / "file.pt", Trap(getattr, argparse.Namespace, "__init__"))
    with pytest.raises(BackboneError, match="getattr on something else than an enum"):
        load(file)


@pytest.mark.parametrize(
    "victim",
    [b"cargparse\nNamespace\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"c_codecs\nencode\n"],
    ids=["class", "function", "encoder"],
)
def test_a_file_cannot_change_what_reads_it(tmp_path, victim):
    # The name, then BUILD with (None, {"planted": 1}): attributes to be set on the object that the name gave.
    attack = b"\x80\x02" + victim + b"N}X\x07\x00\x00\x00plantedK\x01s\x86b."
    head = b"".join(pickle.dumps(item, 2) for item in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    (tmp_path / "file.pt").write_bytes(head + attack + pickle.dumps([], 2))
    with pytest.raises(BackboneError, match="an attempt to change"):
        load(tmp_path / "file.pt")
    assert not hasattr(argparse.Namespace, "planted")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, -1000, -1])
def test_a_file_cut_short_is_refused(tmp_path, legacy, kept):
    file = save(tmp_path / "file.pt", {"model": {"a": torch.zeros(1000), "b": torch.zeros(10)}}, legacy)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else kept])
    with pytest.raises(BackboneError, match=r"file\.pt: truncated"):
        load(file)


def test_files_of_other_kinds_are_refused(tmp_path):
    for number, content in enumerate((b"hello", b"PK\x03\x04 no archive", pickle.dumps({"model": 1}), bytes(1000))):
        file = tmp_path / f"{number}.pt"
        file.write_bytes(content)
        with pytest.raises(BackboneError, match=r"truncated, damaged or not written by torch\.save"):
            load(file)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    file = save(tmp_path / "file.pt", torch.zeros(8), legacy=True)
    # The shape (8,) stands in the pickle as BININT1 8, TUPLE1.
    assert file.read_bytes().count(b"K\x08\x85") == 1
    file.write_bytes(file.read_bytes().replace(b"K\x08\x85", b"K\x09\x85"))
    with pytest.raises(BackboneError, match=r"a tensor of shape \(9,\) needs 36 bytes of a storage of 32"):
        load(file)


def test_a_storage_of_another_length_is_refused(tmp_path):
    file = save(tmp_path / "file.pt", torch.ones(8), legacy=True)
    length, values = struct.pack("<q", 8), torch.ones(8).numpy().tobytes()
    assert file.read_bytes().endswith(length + values)
    file.write_bytes(file.read_bytes().replace(length + values, struct.pack("<q", 2**40) + values))
    with pytest.raises(BackboneError, match="truncated"):
        load(file)


def test_no_tensor_is_read_before_it_is_asked_for(tmp_path):
    file = save(tmp_path / "file.pt", {"a": torch.zeros(10), "b": torch.ones(10)}, legacy=True)
    found = load(file)
    data = file.read_bytes()
    file.write_bytes(data[:-4] + struct.pack("<f", 7.0))
    last = max(found.values(), key=lambda tensor: tensor.storage.start)
    assert isinstance(last, StoredTensor)
    assert last.read()[-1] == 7
