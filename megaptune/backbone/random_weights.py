"""A control: the backbone's architecture with weights that were never trained.

What a prompt gains on it owes nothing to what a language model knows: it learnt the training answers' distribution
(Zhong et al. 2021 hold prompts against such models).
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from megaptune.backbone.architectures import Shard
from megaptune.backbone.checkpoint_reader import CheckpointReader
from megaptune.backbone.description import read_config

STANDARD_DEVIATION = 0.02  # where config.json states no initializer_range


class RandomWeights(CheckpointReader):
    """The tensors of a folder by name and shape, with values drawn from ``seed``; the files' own are not read.

    Matrices are normal with config.json's ``initializer_range`` as deviation, the scales of norms 1, biases 0, as
    these families begin their training. A tensor's values depend on the seed and its name alone, so every layout has
    the same model.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder)
        self.seed = seed
        self.deviation = float(getattr(read_config(folder), "initializer_range", STANDARD_DEVIATION))
        self._drawn: tuple[str, Tensor] | None = None  # the last one: a tensor is asked for several times in a row

    def whole(self, name: str) -> Tensor:
        """All of a tensor, in memory of its own."""
        if self._drawn is None or self._drawn[0] != name:
            entry = self.entries[name]
            if len(entry.shape) < 2:
                scale = name.endswith(("weight", "gamma"))
                values = torch.full(entry.shape, 1.0 if scale else 0.0)
            else:
                digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
                values = torch.randn(entry.shape, generator=generator) * self.deviation
            self._drawn = name, values.to(entry.dtype)
        return self._drawn[1]

    def part(self, name: str, shard: Shard | None, dtype: torch.dtype, device: torch.device, mapped: bool) -> Tensor:
        """A rank's part; a slice is copied, so that the rest of its tensor can go."""
        return super().part(name, shard, dtype, device, mapped=mapped and shard is None)

    def _advise(self, *_: object) -> None:
        """There are no pages to ask for or to let go of."""


def open_weights(folder: Path, random_seed: int | None) -> CheckpointReader:
    """The folder's weights, or drawn ones."""
    return CheckpointReader(folder) if random_seed is None else RandomWeights(folder, random_seed)
