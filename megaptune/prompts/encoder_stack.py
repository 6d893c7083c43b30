"""Encoders of one shape side by side, with their optimizer: one table's rows, one gradient and one step for each.

Parameters of all encoders are stacked [J, ...]. A group is walked over in chunks, whose weights and gradients stay in
a CPU's cache between product and step; an encoder's result does not depend on its chunk.

J encoders, R table rows of each, D backbone width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megaptune.config import PromptConfig, TrainConfig
from megaptune.prompts.encoder import build_encoder
from megaptune.prompts.grouped import bilstm, linear

CHUNK = {"cpu": 4, "cuda": 16}  # encoders computed together
MOMENTS = ("exp_avg", "exp_avg_sq")
BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch.optim.Adam's defaults
REVERSE = "_reverse"


def stacked_name(name: str) -> tuple[str, int | None]:
    """A parameter's stack, and which direction of it: an LSTM layer's two directions lie together."""
    if not name.startswith("lstm."):
        return name, None
    return name.removesuffix(REVERSE), int(name.endswith(REVERSE))


def encode(
    kind: str, weights: dict[str, Tensor], dropped: Tensor | None = None, outs: dict[str, Tensor] | None = None
) -> Tensor:
    """Rows [J, R, D] of J encoders; ``dropped`` [J, R, 2 H] multiplies the states between the LSTM's layers.

    ``outs`` take the gradients of the weight matrices.
    """
    into = outs or {}
    states = weights["embedding.weight"]
    if kind in ("table", "head", "deep_table"):
        return states * 1.0
    if kind == "lstm":
        for layer in (0, 1):
            names = [f"lstm.{part}_l{layer}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            w_ih, w_hh, b_ih, b_hh = (weights[name] for name in names)
            states = bilstm(states, w_ih, w_hh, b_ih, b_hh, (into[names[0]], into[names[1]]) if into else None)
            if layer == 0 and dropped is not None:
                states = states * dropped
    squash = torch.tanh if kind == "deep_mlp" else torch.relu
    states = squash(linear(states, weights["mlp.0.weight"], weights["mlp.0.bias"], into.get("mlp.0.weight")))
    states = linear(states, weights["mlp.2.weight"], weights["mlp.2.bias"], into.get("mlp.2.weight"))
    return states.unflatten(2, (-1, weights["embedding.weight"].shape[2])).flatten(
        1, 2
    )  # deep_mlp: several rows a token


class EncoderStack:
    """At most ``capacity`` encoders of ``rows`` rows; places 0 to ``count`` - 1 are taken."""

    def __init__(
        self,
        rows: int,
        width: int,
        prompt: PromptConfig,
        train: TrainConfig,
        capacity: int,
        device: torch.device,
        kind: str | None = None,
    ) -> None:
        self.kind, self.rows, self.width, self.deep = kind or prompt.encoder, rows, width, prompt.deep
        self.train, self.device, self.count = train, device, 0
        self.dropout = prompt.dropout
        with torch.device("meta"):
            parameters = dict(build_encoder(self.kind, rows, width, 0.0, 0, self.deep).named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        stacked: dict[str, tuple[int, ...]] = {}
        for name, shape in self.shapes.items():
            stack, direction = stacked_name(name)
            stacked[stack] = shape if direction is None else (2, *shape)
        kinds = ("weight", *(MOMENTS if train.optimizer == "adam" else ()))
        self.stacks = {
            kind: {name: torch.zeros(capacity, *shape, device=device) for name, shape in stacked.items()}
            for kind in kinds
        }
        chunk = min(capacity, CHUNK.get(device.type, 1))
        self.gradients = {
            name: torch.empty(chunk, *shape, device=device)
            for name, shape in stacked.items()
            if "weight" in name and name != "embedding.weight"
        }
        self.graphs: list[tuple[int, int, list[Tensor], Tensor]] = []

    @property
    def num_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    # -- places --------------------------------------------------------------------------------------------------

    def add(self, seed: int, start: Tensor | None = None) -> int:
        """Take a place for a new encoder, whose weights depend on ``seed`` alone, a table's on ``start`` [R, D] too."""
        place = self.count
        self.count += 1
        for stacks in self.stacks.values():
            for stack in stacks.values():
                stack[place].zero_()
        state = build_encoder(self.kind, self.rows, self.width, 0.0, seed, self.deep).state_dict()
        if start is not None:
            state["embedding.weight"] += start.cpu()
        self.put("weight", place, state)
        return place

    def remove(self, place: int) -> None:
        """Give a place up; the encoder of the last place moves into it."""
        self.count -= 1
        self.graphs = []
        if place != self.count:
            for stacks in self.stacks.values():
                for stack in stacks.values():
                    stack[place].copy_(stack[self.count])

    def put(self, kind: str, place: int, tensors: dict[str, Tensor]) -> None:
        """Set an encoder's tensors of a kind (``weight`` or a moment) by their parameters' names."""
        for name in self.shapes:
            self._view(kind, place, name).copy_(tensors[name])

    def views(self, kind: str, place: int) -> dict[str, Tensor]:
        """An encoder's tensors of a kind by their parameters' names, in place."""
        return {name: self._view(kind, place, name) for name in self.shapes}

    def _view(self, kind: str, place: int, name: str) -> Tensor:
        stack, direction = stacked_name(name)
        found = self.stacks[kind][stack][place]
        return found if direction is None else found[direction]

    # -- rows and steps ------------------------------------------------------------------------------------------

    def table(self, draws: list[int] | None) -> Tensor:
        """The rows [J, R, D]; with ``draws``, a seed an encoder, those to train with: dropout, and a graph."""
        self.graphs = []
        parts = []
        for first, stop in self._chunks():
            # .data: a version counter of its own, for chunks step one after the other within one stack.
            weights = {name: stack.data[first:stop] for name, stack in self.stacks["weight"].items()}
            if draws is None:
                with torch.no_grad():
                    parts.append(encode(self.kind, weights))
                continue
            with torch.enable_grad():
                leaves = [weight.requires_grad_() for weight in weights.values()]
                outs = {name: gradient[: stop - first] for name, gradient in self.gradients.items()}
                rows = encode(self.kind, weights, self._dropped(draws[first:stop]), outs)
            self.graphs.append((first, stop, leaves, rows))
            parts.append(rows.detach())
        return torch.cat(parts)

    def _dropped(self, draws: list[int]) -> Tensor | None:
        if not self.dropout or self.kind != "lstm":
            return None
        width, masks = 2 * self.shapes["lstm.weight_hh_l0"][1], []
        for seed in draws:
            generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
            kept = torch.rand(self.rows, width, generator=generator) >= self.dropout
            masks.append(kept.float() / (1 - self.dropout))
        return torch.stack(masks).to(self.device)

    def step(self, gradient: Tensor, rates: list[float], steps: list[int]) -> list[float]:
        """One optimizer step from d loss / d table [J, R, D]: torch's Adam or SGD, each encoder at its own rate.

        :param steps: how many steps each encoder has taken. :returns: each gradient's norm before clipping.
        """
        norms = []
        for first, stop, leaves, rows in self.graphs:
            gradients = list(torch.autograd.grad(rows, leaves, gradient[first:stop]))
            squares = torch.stack([_row_norms(g).double().square().sum(dim=1) for g in gradients]).sum(dim=0)
            found = squares.sqrt().tolist()
            for place in range(first, stop):
                self._update(place, [g[place - first] for g in gradients], found[place - first], rates[place], steps)
            norms += found
        self.graphs = []
        return norms

    @torch.no_grad()
    def _update(self, place: int, gradients: list[Tensor], norm: float, rate: float, steps: list[int]) -> None:
        train, limit = self.train, self.train.max_gradient_norm
        if limit is not None and norm > limit:
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))  # as torch's clip_grad_norm_
        weights = [stack[place] for stack in self.stacks["weight"].values()]
        if train.optimizer == "sgd":
            torch._foreach_add_(gradients, weights, alpha=train.weight_decay)
            torch._foreach_add_(weights, gradients, alpha=-rate)
            return
        averages, squares = ([stack[place] for stack in self.stacks[moment].values()] for moment in MOMENTS)
        counts = [torch.tensor(float(steps[place] + 1), device=self.device)] * len(weights)
        torch._fused_adam_(
            weights, gradients, averages, squares, [], counts, lr=rate, beta1=BETAS[0], beta2=BETAS[1],
            weight_decay=train.weight_decay, eps=EPSILON, amsgrad=False, maximize=False,
        )  # fmt: skip

    def _chunks(self) -> Iterator[tuple[int, int]]:
        size = CHUNK.get(self.device.type, 1)
        return ((first, min(first + size, self.count)) for first in range(0, self.count, size))


def _row_norms(gradient: Tensor) -> Tensor:
    """[J, n]: norms along the last dimension, whose sums do not depend on the number of threads."""
    return torch.linalg.vector_norm(gradient, dim=-1).reshape(len(gradient), -1)
