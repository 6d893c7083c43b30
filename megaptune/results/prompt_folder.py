"""The trained prompt as a folder: vectors to use, encoder weights to go on from, and what they belong to."""

from pathlib import Path
from typing import Any

from torch import Tensor

from megaptune.run.checkpoint import write_checkpoint


def write_prompt(folder: Path, vectors: Tensor, encoder: dict[str, Tensor], about: dict[str, Any]) -> None:
    """vectors [R, D] fp32 in the order of the template's pseudo tokens, in unscaled embedding space."""
    tensors = {"vectors": vectors.cpu().contiguous()}
    tensors.update({f"encoder.{name}": weight.contiguous() for name, weight in encoder.items()})
    write_checkpoint(folder, tensors, about)
