"""A prompt in training: encoder, optimizer and learning-rate schedule behind one table.

It stays outside DeepSpeed, fp32 and replicated: the gradient of the table is all that ranks exchange, and each runs
the encoder's backward itself. R rows, D backbone width.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megaptune.config import PromptConfig, TrainConfig
from megaptune.prompts.encoder import build_encoder
from megaptune.schedule import adam_or_sgd, rate_factor


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """oneDNN's LSTM backward sums in an order that depends on the number of threads; so small an LSTM needs but one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class SoftPrompt:
    def __init__(
        self,
        rows: int,
        width: int,
        prompt: PromptConfig,
        train: TrainConfig,
        steps_per_epoch: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.train, self.steps_per_epoch = train, steps_per_epoch
        self.seed = seed
        self.encoder = build_encoder(prompt.encoder, rows, width, prompt.dropout, seed).to(device)
        self.stochastic = prompt.encoder == "lstm" and prompt.dropout > 0
        self.optimizer = adam_or_sgd(train)(
            self.encoder.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay
        )
        self.step = 0

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.encoder.parameters())

    def table(self) -> Tensor:
        """The rows [R, D] to train with; dropout, if any, is drawn from (seed, step), alike on every rank."""
        if not self.stochastic:
            return self._rows()
        devices = [parameter.device for parameter in self.encoder.parameters() if parameter.device.type == "cuda"][:1]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed * 1_000_003 + self.step)
            return self._rows()

    def _rows(self) -> Tensor:
        with _one_thread():
            return self.encoder()

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """The rows [R, D] to answer with: no dropout, no graph."""
        self.encoder.eval()
        rows = self._rows()
        self.encoder.train()
        return rows.detach().clone()

    def apply(self, table: Tensor, gradient: Tensor) -> float:
        """One optimizer step from d loss / d ``table``; the norm of the encoder's gradient before clipping."""
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with _one_thread():
            table.backward(gradient)
        limit = self.train.max_gradient_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), limit)
        self.optimizer.step()
        self.step += 1
        return float(norm)

    def learning_rate(self) -> float:
        """The rate of the coming step."""
        return self.train.learning_rate * rate_factor(self.train, self.step, self.steps_per_epoch)

    def tensors(self) -> dict[str, Tensor]:
        """Encoder weights and optimizer moments, by name, for a checkpoint."""
        found = {f"encoder.{name}": weight for name, weight in self.encoder.state_dict().items()}
        names = [name for name, _ in self.encoder.named_parameters()]
        for index, moments in self.optimizer.state_dict()["state"].items():
            for key, value in moments.items():
                if value is not None:
                    found[f"optimizer.{names[index]}.{key}"] = torch.as_tensor(value)
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """The state that :meth:`tensors` gave at ``step``."""
        self.encoder.load_state_dict(_below(tensors, "encoder."))
        state = self.optimizer.state_dict()
        state["state"] = self._moments(tensors)
        self.optimizer.load_state_dict(state)
        self.step = step

    def _moments(self, tensors: dict[str, Tensor]) -> dict[int, dict[str, Any]]:
        moments: dict[int, dict[str, Any]] = {}
        for index, (name, _) in enumerate(self.encoder.named_parameters()):
            found = _below(tensors, f"optimizer.{name}.")
            if found:
                moments[index] = dict(found)
        return moments

    def weights(self) -> dict[str, Tensor]:
        """A copy of the encoder's weights on the CPU."""
        return {name: weight.detach().cpu().clone() for name, weight in self.encoder.state_dict().items()}

    @torch.no_grad()
    def vectors_of(self, weights: dict[str, Tensor]) -> Tensor:
        """The rows [R, D] of an encoder with other weights (the best epoch's)."""
        current = self.weights()
        self.encoder.load_state_dict(weights)
        rows = self.vectors()
        self.encoder.load_state_dict(current)
        return rows


class NoPrompt:
    """A table without rows, for methods that splice nothing in; it counts the steps."""

    num_parameters = 0

    def __init__(self, width: int, device: torch.device) -> None:
        self.rows = torch.zeros(0, width, device=device)
        self.step = 0

    def table(self) -> Tensor:
        return self.rows

    vectors = table

    def apply(self, table: Tensor, gradient: Tensor) -> float:
        self.step += 1
        return 0.0

    def learning_rate(self) -> float:
        return 0.0

    def tensors(self) -> dict[str, Tensor]:
        return {}

    weights = tensors

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        self.step = step

    def vectors_of(self, weights: dict[str, Tensor]) -> Tensor:
        return self.rows


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
