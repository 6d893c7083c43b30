"""Saving prompts in training: a folder of safetensors files and a JSON manifest with their SHA-256.

A checkpoint is written beside its place and renamed, so a folder that exists was whole; the checksum finds damage that
came later. It holds nothing of a frozen backbone. Where ranks own what is trained, a tuned LM or a sharded bank's
prompts, each writes a file of its own, and ranks of any layout read what they need. No pickle.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from megaptune.backbone.weight_files import file_checksum
from megaptune.backbone.weight_pieces import write_tensors
from megaptune.errors import CheckpointError, first_line
from megaptune.run.files import flush, read_json, write_json
from megaptune.run.topology import Topology, everywhere, on_main

FORMAT = 1
_TENSORS = "tensors.safetensors"
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """state: the JSON part (cursor, early stopping, history); pieces: files of single ranks."""

    state: dict[str, Any]
    folder: Path
    pieces: list[Path]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that rank 0 wrote, by name."""
        return load_file(self.folder / _TENSORS)

    @property
    def lm_pieces(self) -> list[Path]:
        return [file for file in self.pieces if file.name.startswith("lm-")]

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names begin with ``prefix``, without it, whichever rank wrote them; no others are read."""
        found = {}
        for file in [self.folder / _TENSORS, *self.pieces]:
            if not file.name.startswith("lm-"):
                with safe_open(file, framework="pt") as handle:
                    names = [name for name in handle.keys() if name.startswith(prefix)]  # noqa: SIM118  no mapping
                    found.update({name.removeprefix(prefix): handle.get_tensor(name) for name in names})
        return found


def save_file(tensors: dict[str, Tensor], path: Path) -> str:
    """Write and flush a safetensors file; its SHA-256. Views of one buffer are welcome."""
    return write_tensors(path, tensors.items())


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write ``folder`` whole, replacing an older one of that name."""
    _commit(_begin(folder), folder, tensors, state, {})


def write_checkpoint_together(
    topology: Topology,
    folder: Path,
    write_piece: Callable[[Path], str],
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    kind: str = "lm",
) -> None:
    """The same with a file from every rank; all ranks call this, and rank 0's tensors and state count.

    :param write_piece: writes this rank's file and returns its SHA-256.
    :param kind: what the files begin their names with: ``lm`` or ``prompts``.
    """
    part = on_main(topology, lambda: _begin(folder))

    def mine() -> tuple[str, str]:
        if not part.is_dir():
            raise CheckpointError(
                f"rank {topology.rank} does not see {part.parent}, which rank 0 made: to tune the LM or to "
                "shard the prompt encoders on several nodes, run.directory must lie on a file system that they share"
            )
        name = f"{kind}-rank-{topology.rank:05d}.safetensors"
        return name, write_piece(part / name)

    checksums = dict(everywhere(topology, mine))
    on_main(topology, lambda: _commit(part, folder, tensors, state, checksums))


def _begin(folder: Path) -> Path:
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"could not write the checkpoint {folder}: {first_line(error)}") from error
    return part


def _commit(
    part: Path, folder: Path, tensors: dict[str, Tensor], state: dict[str, Any], pieces: dict[str, str]
) -> None:
    try:
        checksums = {_TENSORS: save_file(tensors, part / _TENSORS), "state": _state_checksum(state), **pieces}
        manifest = {"format": FORMAT, "sha256": checksums, "state": state}
        write_json(part / _MANIFEST, manifest)
        flush(part)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
        flush(folder.parent)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"could not write the checkpoint {folder}: {first_line(error)}") from error


def _state_checksum(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def read_checkpoint(folder: Path, check: bool = True) -> Checkpoint:
    """:param check: compare the files' bytes with their checksums; one rank's doing so is enough.
    :raises CheckpointError: naming the file that is missing or damaged."""
    try:
        manifest = read_json(folder / _MANIFEST)
        checksums, state, version = manifest["sha256"], manifest["state"], manifest["format"]
        whole = checksums.pop("state") == _state_checksum(state)
        files = {folder / name: str(sum_) for name, sum_ in checksums.items()}
        expected = files.pop(folder / _TENSORS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / _MANIFEST}: missing or damaged ({type(error).__name__})") from None
    if version != FORMAT:
        raise CheckpointError(f"{folder}: format {version}, this version reads format {FORMAT}")
    if not whole:
        raise CheckpointError(f"{folder / _MANIFEST}: its state does not match its SHA-256")
    file = folder / _TENSORS
    try:
        for file, checksum in {folder / _TENSORS: expected, **files}.items() if check else ():
            if file_checksum(file) != checksum:
                raise CheckpointError(f"{file}: its bytes do not match the manifest's SHA-256")
        return Checkpoint(state, folder, sorted(files))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: missing or damaged ({error})") from None


class CheckpointFolder:
    """The checkpoints of jobs that train together, named by step; the newest ``keep`` stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        target = self._of(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(target, tensors, state)
        self._prune()
        return target

    def save_together(
        self,
        topology: Topology,
        write_piece: Callable[[Path], str],
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        kind: str = "lm",
    ) -> None:
        """With a file from every rank; all ranks call this."""
        write_checkpoint_together(topology, self._of(step), write_piece, tensors, state, kind)
        if topology.is_main:
            self._prune()

    def _of(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _prune(self) -> None:
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def newest(self, warn: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is whole; ``warn`` hears of each damaged one that is passed over.

        :raises CheckpointError: when there are checkpoints and all are damaged.
        """
        found = self._steps()
        for folder in reversed(found):
            try:
                return read_checkpoint(folder).folder
            except CheckpointError as error:
                warn(f"damaged checkpoint, falling back to the one before: {error}")
        if found:
            raise CheckpointError(
                f"all {len(found)} checkpoints in {self.folder} are damaged; remove them to start over"
            )
        return None

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []

    def clear(self) -> None:
        """Remove all: the jobs have their results."""
        shutil.rmtree(self.folder, ignore_errors=True)
