"""How a trainer sees the backbone's weights: frozen here, tuned in ``tuned_weights.py``."""

from pathlib import Path
from typing import Protocol

from torch import Tensor

from megaptune.config import TrainConfig


class Weights(Protocol):
    """Collective: every rank makes the same calls."""

    num_trained: int

    def begin(self, train: TrainConfig) -> None:
        """The original weights, nothing learned, nothing remembered: how every job starts. Its learning rate is that of
        ``train``, in which nothing else may differ from job to job."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, this replica's share of a step's loss."""

    def step(self, factor: float) -> float:
        """One optimizer step with the learning rate's schedule at ``factor``; the gradient's norm before clipping."""

    def keep_best(self) -> None:
        """Remember the weights as they are."""

    def use_best(self) -> None:
        """Go back to the weights that were remembered."""

    def write(self, file: Path, weights_only: bool = False) -> str:
        """Write this rank's share of all that a resumed run needs; the SHA-256 of the file."""

    def read(self, files: list[Path], step: int) -> None:
        """Take this rank's share from what the ranks of any layout wrote after ``step`` steps. Alone not collective:
        an error of one rank must reach the others before :meth:`renew`."""

    def renew(self) -> None:
        """Let the model compute with the weights that were read."""


class FrozenWeights:
    """Nothing to train, nothing to save."""

    num_trained = 0

    def begin(self, train: TrainConfig) -> None:
        pass

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, factor: float) -> float:
        return 0.0

    def keep_best(self) -> None:
        pass

    def use_best(self) -> None:
        pass

    def write(self, file: Path, weights_only: bool = False) -> str:
        raise AssertionError("frozen weights are not saved")

    def read(self, files: list[Path], step: int) -> None:
        raise AssertionError("frozen weights are not saved")

    def renew(self) -> None:
        raise AssertionError("frozen weights are not saved")
