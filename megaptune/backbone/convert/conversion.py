"""What every converter is given, and what it gives back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megaptune.backbone.convert.output import OutputTensor


@dataclass(frozen=True)
class Options:
    """dtype: None keeps the source's; tokenizer: a folder, or a vocab.json beside ``bpe_merges``."""

    dtype: torch.dtype | None = None
    bpe_merges: Path | None = None
    tokenizer: Path | None = None
    vocab_size: int | None = None
    heads: int | None = None
    max_shard_bytes: int = 2 * 2**30
    average_copies: bool = False


@dataclass(frozen=True)
class Conversion:
    """A checked source, ready to be written: no tensor has been read yet. ``found``: lines for the user."""

    config: dict[str, Any]
    tensors: Sequence[OutputTensor]
    save_tokenizer: Callable[[Path], Any]
    source_files: Sequence[Path]
    found: Sequence[str]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)
