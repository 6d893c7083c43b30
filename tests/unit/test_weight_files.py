"""The safetensors of a backbone folder: missing, cut short, changed, or not the ones that were recorded."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megaptune.backbone.weight_files import check_headers, verify_checksums, weight_files, write_checksums
from megaptune.errors import BackboneError


@pytest.fixture
def folder(tmp_path: Path, tiny: Callable[[str], Path]) -> Path:
    """A backbone to damage."""
    return Path(shutil.copytree(tiny("gpt2"), tmp_path / "backbone"))


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A backbone folder whose weights are in two files with an index."""
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for tensor, name in names.items():
        save_file({tensor: torch.ones(3)}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def flip_last_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def refusal(check: Callable[[Path], object], folder: Path) -> str:
    with pytest.raises(BackboneError) as caught:
        check(folder)
    return str(caught.value)


# -- which there are -------------------------------------------------------------------------------------------------


def test_one_file_is_found(folder: Path):
    assert weight_files(folder) == [folder / "model.safetensors"]


def test_parts_are_those_that_the_index_names(parts: Path):
    save_file({"x": torch.ones(1)}, parts / "other.safetensors")
    assert [file.name for file in weight_files(parts)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_missing_part_is_named(parts: Path):
    (parts / "model-00002-of-00002.safetensors").unlink()
    assert "1 of 2 weight files are missing: model-00002-of-00002.safetensors" in refusal(weight_files, parts)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {}}'])
def test_damaged_index_is_named(parts: Path, text: str):
    index = parts / "model.safetensors.index.json"
    index.write_text(text)
    assert refusal(weight_files, parts) == f"{index}: not a safetensors index"


def test_missing_folder_is_named(tmp_path: Path):
    assert refusal(weight_files, tmp_path / "no") == f"backbone.path: folder not found: {tmp_path / 'no'}"


def test_folder_without_config_is_refused(folder: Path):
    (folder / "config.json").unlink()
    assert "has no config.json: expected a Hugging Face model folder" in refusal(weight_files, folder)


def test_folder_without_weights_is_told_what_is_expected(folder: Path):
    (folder / "model.safetensors").unlink()
    assert "has no weights: expected model.safetensors or model.safetensors.index.json" in refusal(weight_files, folder)


def test_weights_of_another_kind_are_told_what_to_do(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin must be converted to safetensors first" in refusal(weight_files, folder)


# -- whether they are whole ------------------------------------------------------------------------------------------


def test_whole_files_are_counted_in_bytes(parts: Path):
    assert check_headers(parts) == sum(file.stat().st_size for file in parts.glob("*.safetensors"))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_file_is_named(folder: Path, share: float):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    message = refusal(check_headers, folder)
    assert message.startswith(f"{file}: truncated or damaged safetensors file")
    assert message.endswith("copy or convert it again")


def test_damaged_header_is_named(folder: Path):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8] ^= 0xFF
    file.write_bytes(data)
    assert str(file) in refusal(check_headers, folder)


# -- what identifies them --------------------------------------------------------------------------------------------


def test_record_has_the_format_of_sha256sum(folder: Path):
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert write_checksums(folder).read_text() == f"{expected}  model.safetensors\n"


def test_flipped_bit_is_found_against_the_record(folder: Path):
    write_checksums(folder)
    flip_last_bit(folder / "model.safetensors")
    assert check_headers(folder) > 0  # the header is whole; only the checksum can tell
    message = refusal(verify_checksums, folder)
    assert f"{folder / 'model.safetensors'}: its bytes changed" in message
    assert "copy or convert it again" in message


def test_flipped_bit_of_a_part_names_that_part(parts: Path):
    write_checksums(parts)
    flip_last_bit(parts / "model-00002-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors: its bytes changed" in refusal(verify_checksums, parts)


def test_without_a_record_nothing_is_read(folder: Path, monkeypatch):
    monkeypatch.setattr("megaptune.backbone.weight_files.file_checksum", lambda file: pytest.fail("was read"))
    verify_checksums(folder)


def test_link_into_a_hugging_face_cache_is_checked_against_the_name_of_its_target(folder: Path, tmp_path: Path):
    file = folder / "model.safetensors"
    blob = tmp_path / hashlib.sha256(file.read_bytes()).hexdigest()
    file.rename(blob)
    file.symlink_to(blob)
    verify_checksums(folder)
    flip_last_bit(blob)
    assert "its bytes changed" in refusal(verify_checksums, folder)


def test_record_in_sha256sums_binary_form_counts_too(folder: Path):
    record = write_checksums(folder)
    record.write_text(record.read_text().replace("  ", " *"))
    flip_last_bit(folder / "model.safetensors")
    assert "its bytes changed" in refusal(verify_checksums, folder)
