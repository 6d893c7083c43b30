"""The trained prompt as a folder: vectors to use, encoder weights to go on from, and what they belong to."""

from pathlib import Path
from typing import Any

from torch import Tensor

from megaptune.run.checkpoint import write_checkpoint


def write_prompt(folder: Path, vectors: Tensor, encoder: dict[str, Tensor], about: dict[str, Any]) -> None:
    """vectors [R, D] fp32 in the order of the template's pseudo tokens, in unscaled embedding space; of a deep prompt
    [L, 2, P, k, E]: every layer's keys, of rotary models already rotated, and values of P virtual tokens, of all heads,
    at positions 0 to P - 1. ``about`` has ``deep`` for these, with L, P, k and E."""
    tensors = {"vectors": vectors.cpu().contiguous()}
    tensors.update({f"encoder.{name}": weight.contiguous() for name, weight in encoder.items()})
    write_checkpoint(folder, tensors, about)
