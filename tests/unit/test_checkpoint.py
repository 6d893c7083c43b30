"""Checkpoints: whole or not there, found damaged before they are used, and one damaged one is not the end."""

import hashlib
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaptune.errors import CheckpointError
from megaptune.run import checkpoint
from megaptune.run.checkpoint import (
    CheckpointFolder,
    read_checkpoint,
    write_checkpoint,
    write_checkpoint_together,
)
from megaptune.run.topology import Topology

STATE = {"step": 16, "selection": {"best": 0.5, "best_epoch": 2}, "word": "Málaga"}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoder.weight": torch.randn(3, 4, generator=generator),
        "optimizer.weight.step": torch.tensor(16.0),
        "best.weight": torch.randn(3, 4, generator=generator),
    }


def flip_bit(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def save_steps(folder: Path, *steps: int, keep: int = 5) -> CheckpointFolder:
    checkpoints = CheckpointFolder(folder, keep)
    for step in steps:
        checkpoints.save(step, tensors(step), {**STATE, "step": step})
    return checkpoints


def never(message: str) -> None:
    raise AssertionError(f"an unexpected warning: {message}")


DAMAGE = {
    "tensors truncated": lambda folder: truncate(folder / "tensors.safetensors"),
    "tensors bit-flipped": lambda folder: flip_bit(folder / "tensors.safetensors", -1),
    "tensors header bit-flipped": lambda folder: flip_bit(folder / "tensors.safetensors", 20),
    "tensors missing": lambda folder: (folder / "tensors.safetensors").unlink(),
    "tensors empty": lambda folder: (folder / "tensors.safetensors").write_bytes(b""),
    "manifest truncated": lambda folder: truncate(folder / "manifest.json"),
    "manifest brace flipped": lambda folder: flip_bit(folder / "manifest.json", 0),
    "manifest not UTF-8": lambda folder: (folder / "manifest.json").write_bytes(b'{"format": "\xff"}'),
    "manifest missing": lambda folder: (folder / "manifest.json").unlink(),
    "manifest empty": lambda folder: (folder / "manifest.json").write_bytes(b""),
    "manifest without its keys": lambda folder: (folder / "manifest.json").write_text("{}"),
    "manifest of another shape": lambda folder: (folder / "manifest.json").write_text("[]"),
}
damage = pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())


# -- one checkpoint --------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_bit_by_bit(tmp_path: Path):
    write_checkpoint(tmp_path / "one", tensors(), STATE)
    found = read_checkpoint(tmp_path / "one")
    assert found.state == STATE
    assert found.tensors.keys() == tensors().keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors().items())


def test_writing_again_replaces_the_older_one(tmp_path: Path):
    write_checkpoint(tmp_path / "one", tensors(1), STATE)
    write_checkpoint(tmp_path / "one", tensors(2), {"step": 17})
    found = read_checkpoint(tmp_path / "one")
    assert found.state == {"step": 17}
    assert torch.equal(found.tensors["best.weight"], tensors(2)["best.weight"])


def test_nothing_is_left_beside_a_written_checkpoint(tmp_path: Path):
    write_checkpoint(tmp_path / "one", tensors(), STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["manifest.json", "tensors.safetensors"]


def test_part_of_an_interrupted_write_does_not_disturb_the_next(tmp_path: Path):
    (tmp_path / ".one.part").mkdir()
    (tmp_path / ".one.part" / "tensors.safetensors").write_bytes(b"half")
    write_checkpoint(tmp_path / "one", tensors(), STATE)
    assert read_checkpoint(tmp_path / "one").state == STATE
    assert not (tmp_path / ".one.part").exists()


@damage
def test_damage_is_refused_naming_the_file(tmp_path: Path, damage):
    write_checkpoint(tmp_path / "one", tensors(), STATE)
    damage(tmp_path / "one")
    with pytest.raises(CheckpointError, match=r"one/(manifest\.json|tensors\.safetensors): "):
        read_checkpoint(tmp_path / "one")


def test_every_flipped_bit_of_the_tensors_is_found(tmp_path: Path):
    write_checkpoint(tmp_path / "one", {"w": torch.ones(2)}, {})
    file = tmp_path / "one" / "tensors.safetensors"
    for offset in range(file.stat().st_size):
        flip_bit(file, offset)
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / "one")
        flip_bit(file, offset)
    assert read_checkpoint(tmp_path / "one").state == {}


def test_flipped_bit_in_the_manifests_state_is_found(tmp_path: Path):
    write_checkpoint(tmp_path / "one", tensors(), STATE)
    manifest = tmp_path / "one" / "manifest.json"
    flip_bit(manifest, manifest.read_bytes().index(b'"step": 16') + len(b'"step": 1'))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "one")


def test_another_format_is_refused_with_both_numbers(tmp_path: Path):
    write_checkpoint(tmp_path / "one", tensors(), STATE)
    manifest = tmp_path / "one" / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace('"format": 1', '"format": 2'), encoding="utf-8")
    with pytest.raises(CheckpointError, match="format 2, this version reads format 1"):
        read_checkpoint(tmp_path / "one")


def test_place_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not write the checkpoint"):
        write_checkpoint(tmp_path / "file" / "one", tensors(), STATE)


@contextmanager
def small_disk() -> Iterator[None]:
    """Files may not grow beyond 10 kB, as on a disk that is full. No longer than needed: pytest's log is a file too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_is_told_and_leaves_the_older_one(tmp_path: Path):
    write_checkpoint(tmp_path / "one", tensors(), STATE)
    with small_disk(), pytest.raises(CheckpointError, match="could not write the checkpoint"):
        write_checkpoint(tmp_path / "one", {"big": torch.zeros(10_000)}, STATE)
    assert read_checkpoint(tmp_path / "one").state == STATE


# -- with a file from every rank (here: from one) --------------------------------------------------------------------


def write_together(folder: Path, data: bytes = b"weights") -> Path:
    def write_piece(file: Path) -> str:
        file.write_bytes(data)
        return hashlib.sha256(data).hexdigest()

    write_checkpoint_together(Topology(), folder, write_piece, tensors(), STATE)
    return folder / "lm-rank-00000.safetensors"


def test_pieces_are_listed_and_checked(tmp_path: Path):
    piece = write_together(tmp_path / "one")
    assert read_checkpoint(tmp_path / "one").pieces == [piece]
    flip_bit(piece, 3)
    with pytest.raises(CheckpointError, match=r"lm-rank-00000\.safetensors: its bytes do not match"):
        read_checkpoint(tmp_path / "one")
    piece.unlink()
    with pytest.raises(CheckpointError, match=r"lm-rank-00000\.safetensors: missing or damaged"):
        read_checkpoint(tmp_path / "one")


def test_a_piece_that_cannot_be_written_leaves_the_older_checkpoint(tmp_path: Path):
    def failing(file: Path) -> str:
        raise CheckpointError(f"could not write {file}: no space left on device")

    write_together(tmp_path / "one")
    with pytest.raises(CheckpointError, match="no space left"):
        write_checkpoint_together(Topology(), tmp_path / "one", failing, tensors(), {"step": 17})
    assert read_checkpoint(tmp_path / "one").state == STATE


def test_a_rank_that_does_not_see_the_folder_asks_for_a_shared_file_system(tmp_path: Path, monkeypatch):
    begin = checkpoint._begin

    def elsewhere(folder: Path) -> Path:
        part = begin(folder)
        part.rmdir()
        return part

    monkeypatch.setattr(checkpoint, "_begin", elsewhere)
    with pytest.raises(CheckpointError, match="file system that they share"):
        write_together(tmp_path / "one")


# -- the checkpoints of a job ----------------------------------------------------------------------------------------


def test_no_checkpoint_is_none(tmp_path: Path):
    assert CheckpointFolder(tmp_path / "checkpoints", keep=2).newest(never) is None


def test_newest_is_the_one_of_the_highest_step(tmp_path: Path):
    newest = save_steps(tmp_path, 9, 10, 100).newest(never)
    assert newest is not None
    assert read_checkpoint(newest).state["step"] == 100


def test_only_the_newest_few_are_kept(tmp_path: Path):
    save_steps(tmp_path, 8, 16, 24, 32, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000024", "step-00000032"]


@damage
def test_damaged_newest_one_falls_back_with_a_warning(tmp_path: Path, damage):
    checkpoints = save_steps(tmp_path, 8, 16)
    damage(tmp_path / "step-00000016")
    warnings: list[str] = []
    newest = checkpoints.newest(warnings.append)
    assert newest is not None
    assert read_checkpoint(newest).state["step"] == 8
    assert len(warnings) == 1
    assert "falling back to the one before" in warnings[0]
    assert "step-00000016" in warnings[0]


def test_all_damaged_is_an_error_that_says_how_to_start_over(tmp_path: Path):
    checkpoints = save_steps(tmp_path, 8, 16)
    for folder in tmp_path.iterdir():
        truncate(folder / "tensors.safetensors")
    warnings: list[str] = []
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged; remove them to start over"):
        checkpoints.newest(warnings.append)
    assert len(warnings) == 2


def test_leftover_part_is_no_checkpoint(tmp_path: Path):
    checkpoints = save_steps(tmp_path, 8)
    (tmp_path / ".step-00000016.part").mkdir()
    newest = checkpoints.newest(never)
    assert newest is not None
    assert newest.name == "step-00000008"


def test_saving_over_a_damaged_one_mends_it(tmp_path: Path):
    checkpoints = save_steps(tmp_path, 8, 16)
    truncate(tmp_path / "step-00000016" / "tensors.safetensors")
    checkpoints.save(16, tensors(16), {"step": 16})
    newest = checkpoints.newest(never)
    assert newest is not None
    assert newest.name == "step-00000016"


def test_clear_removes_all(tmp_path: Path):
    save_steps(tmp_path / "checkpoints", 8, 16).clear()
    assert not (tmp_path / "checkpoints").exists()
