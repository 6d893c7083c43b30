"""What a saved prompt remembers of its backbone: checksums of a few rows of every tensor, and scores of a probe input.

The rows are read from the files, so they do not depend on how ranks share the weights; the scores come from the hosted
model, so they also notice weights that were divided or loaded wrongly.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megaptune.backbone.checkpoint_reader import CheckpointReader
from megaptune.errors import BackboneError

_ROWS = 4  # of a tensor
_ROW_BYTES = 65536  # of a row, at most
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}
"""Of the largest score. Layouts and machines round differently; another model differs by its whole size."""


@dataclass(frozen=True)
class Fingerprint:
    """rows_sha256: over names, shapes and some rows of all tensors; probe: scores at fixed places for a fixed input."""

    rows_sha256: str
    probe: tuple[float, ...]
    dtype: str

    @property
    def digest(self) -> str:
        """Short and fit for a file name."""
        return self.rows_sha256[:16]

    def as_dict(self) -> dict[str, Any]:
        return {"rows_sha256": self.rows_sha256, "probe": list(self.probe), "dtype": self.dtype}

    def require(self, stored: dict[str, Any], where: object) -> None:
        """:raises BackboneError: when what is ``stored`` in ``where`` is of another backbone."""
        before = stored.get("rows_sha256", "")
        if before != self.rows_sha256:
            raise BackboneError(
                f"{where} belongs to another backbone (rows' SHA-256 {before[:12]}..., of this one "
                f"{self.rows_sha256[:12]}...); point backbone.path at that one, or name another run.directory"
            )
        probe = torch.tensor(stored["probe"], dtype=torch.float64)
        mine = torch.tensor(self.probe, dtype=torch.float64)
        limit = max(TOLERANCE[self.dtype], TOLERANCE[stored["dtype"]])
        error = float((probe - mine).abs().max() / probe.abs().max().clamp(min=1e-6))
        if not error <= limit:
            raise BackboneError(
                f"{where} was made with this backbone's files, but a probe input scores otherwise now (by {error:.1e} "
                f"of the largest score; {limit:.0e} is rounding): compare the versions in environment.json, verify the "
                "weight files with `megaptune checksum`, or name another run.directory"
            )


def rows_checksum(folder: Path, random_seed: int | None = None) -> str:
    """SHA-256 over every tensor's name, dtype, shape and four of its rows; it does not depend on the cut into files.

    :param random_seed: what weights are drawn from, where the files' own are not read; it counts too.
    """
    reader, whole = CheckpointReader(folder), hashlib.sha256()
    whole.update(b"" if random_seed is None else f"drawn from {random_seed};".encode())
    for name in sorted(reader.entries):
        entry = reader.entries[name]
        whole.update(f"{name} {entry.dtype} {list(entry.shape)};".encode())
        rows = entry.shape[0] if entry.shape else 1
        row_bytes = (entry.stop - entry.start) // max(rows, 1)
        with entry.file.open("rb") as file:  # not through the map, which would bring in pages around each row
            for row in sorted({(rows - 1) * step // (_ROWS - 1) for step in range(_ROWS)} if row_bytes else ()):
                file.seek(entry.start + row * row_bytes)
                whole.update(file.read(min(row_bytes, _ROW_BYTES)))
    return whole.hexdigest()


def probe_ids(vocabulary_size: int) -> torch.Tensor:
    """The same five tokens [1, 5] for every model of a vocabulary."""
    return torch.tensor([[(7919 * (position + 1)) % vocabulary_size for position in range(5)]])
