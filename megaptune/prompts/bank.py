"""The prompts that train together: their encoders in stacks of equal shape, one table over all of them.

With several ranks the bank may be sharded: every rank owns some prompts (weights, optimizer state, best epoch),
computes their rows, and all have the table. The gradient of the table is the same on all ranks, so owners step alone.

R table rows of all prompts, D their width: the backbone's, or of deep prompts that of a layer's keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megaptune.config import PromptConfig, TrainConfig
from megaptune.prompts.encoder_stack import MOMENTS, EncoderStack, encode, stacked_name
from megaptune.run.topology import Topology, all_reduce_sum
from megaptune.schedule import rate_factor

Shape = int | tuple[str, int]
"""Rows, of the configuration's encoder or of one that is named."""


@dataclass(eq=False)
class Prompt:
    """One prompt in training: ``rows`` of the table from ``first_row`` on, after ``step`` steps.

    encoder: its kind, where it is not the configuration's. owner: the rank that holds it, None where all do. best: the
    best epoch's weights on the CPU, where it is held.
    """

    name: str
    rows: int
    seed: int
    learning_rate: float
    steps_per_epoch: int
    encoder: str | None = None
    step: int = 0
    first_row: int = 0
    place: int = 0
    owner: int | None = None
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        """What prompts of one stack have in common."""
        return self.rows if self.encoder is None else (self.encoder, self.rows)

    @property
    def span(self) -> slice:
        return slice(self.first_row, self.first_row + self.rows)

    def rate(self, train: TrainConfig) -> float:
        """The learning rate of the coming step."""
        return self.learning_rate * rate_factor(train, self.step, self.steps_per_epoch)


class PromptBank:
    """:param width: of the table's rows. :param capacity: how many prompts of each shape may train at once."""

    def __init__(
        self,
        width: int,
        prompt: PromptConfig,
        train: TrainConfig,
        capacity: Mapping[Shape, int],
        device: torch.device,
        topology: Topology,
        sharded: bool,
    ) -> None:
        self.width, self.config, self.train, self.device = width, prompt, train, device
        self.topology, self.sharded = topology, sharded
        self.capacity = capacity
        self.stacks: dict[Shape, EncoderStack] = {}
        self.members: dict[Shape, list[Prompt]] = {}
        self.prompts: list[Prompt] = []

    def add(self, prompt: Prompt, start: Tensor | None = None) -> None:
        """Take in a prompt at its start; with a sharded bank it goes to the rank with the fewest rows.

        :param start: rows [R, D] that a table starts at, beside what its seed draws.
        """
        if self.sharded:
            load = [sum(p.rows for p in self.prompts if p.owner == r) for r in range(self.topology.world_size)]
            prompt.owner = load.index(min(load))
        self.prompts.append(prompt)
        if self.holds(prompt):
            stack = self._stack(prompt)
            prompt.place = stack.add(prompt.seed, start)
            self.members[prompt.shape].append(prompt)
            self.keep_best(prompt)
        self._number()

    def remove(self, prompt: Prompt) -> None:
        self.prompts.remove(prompt)
        if self.holds(prompt):
            members = self.members[prompt.shape]
            self.stacks[prompt.shape].remove(prompt.place)
            members[prompt.place] = members[-1]
            members[prompt.place].place = prompt.place
            members.pop()
        self._number()

    def holds(self, prompt: Prompt) -> bool:
        """Whether this rank has the prompt's encoder; a prompt of no rows has none."""
        return prompt.rows > 0 and prompt.owner in (None, self.topology.rank)

    def _stack(self, prompt: Prompt) -> EncoderStack:
        shape = prompt.shape
        if shape not in self.stacks:
            capacity = self.capacity[shape]
            if self.sharded and len(self.capacity) == 1:  # ranks have as many rows, so of one shape as many prompts
                capacity = min(capacity, -(-sum(self.capacity.values()) // self.topology.world_size) + 1)
            self.stacks[shape] = EncoderStack(
                prompt.rows, self.width, self.config, self.train, capacity, self.device, prompt.encoder
            )
            self.members[shape] = []
        return self.stacks[shape]

    def _number(self) -> None:
        first = 0
        for prompt in self.prompts:
            prompt.first_row = first
            first += prompt.rows

    # -- rows and steps ------------------------------------------------------------------------------------------

    def table(self) -> Tensor:
        """The rows [R, D] to train with; dropout, if any, is drawn from (seed, step), alike on every rank."""
        return self._table(training=True)

    def vectors(self) -> Tensor:
        """The rows [R, D] to answer with: no dropout, no graph."""
        return self._table(training=False)

    def _table(self, training: bool) -> Tensor:
        table = torch.zeros(sum(prompt.rows for prompt in self.prompts), self.width, device=self.device)
        for shape, members in self.members.items():
            if members:
                draws = [prompt.seed * 1_000_003 + prompt.step for prompt in members] if training else None
                for prompt, found in zip(members, self.stacks[shape].table(draws), strict=True):
                    table[prompt.span] = found
        return all_reduce_sum(table) if self.sharded and table.numel() else table  # the others' rows are zeros

    def step(self, gradient: Tensor) -> dict[str, float]:
        """One optimizer step of every prompt from d loss / d table [R, D]; its gradient's norm before clipping."""
        norms = torch.zeros(len(self.prompts), dtype=torch.float64, device=self.device)
        place = {prompt.name: index for index, prompt in enumerate(self.prompts)}
        for shape, members in self.members.items():
            if members:
                mine = torch.stack([gradient[prompt.span] for prompt in members])
                rates, steps = [p.rate(self.train) for p in members], [p.step for p in members]
                for prompt, norm in zip(members, self.stacks[shape].step(mine, rates, steps), strict=True):
                    norms[place[prompt.name]] = norm
        for prompt in self.prompts:
            prompt.step += 1
        if self.sharded:
            all_reduce_sum(norms)
        return dict(zip(place, norms.tolist(), strict=True))

    # -- the best epoch ------------------------------------------------------------------------------------------

    def keep_best(self, prompt: Prompt) -> None:
        """Remember the prompt's weights as they are."""
        if self.holds(prompt):
            for name, weight in self.stacks[prompt.shape].views("weight", prompt.place).items():
                if name in prompt.best:
                    prompt.best[name].copy_(weight)
                else:
                    prompt.best[name] = weight.detach().to("cpu", copy=True)

    def best_vectors(self, prompt: Prompt) -> Tensor:
        """The rows [R, D] of the prompt's best dev epoch, on every rank."""
        rows = torch.zeros(prompt.rows, self.width, device=self.device)
        if self.holds(prompt):
            halves: dict[str, list[Tensor]] = {}
            for name, weight in prompt.best.items():
                halves.setdefault(stacked_name(name)[0], []).append(weight.to(self.device))
            weights = {
                name: (torch.stack(found) if name.startswith("lstm.") else found[0])[None]
                for name, found in halves.items()
            }
            with torch.no_grad():
                rows = encode(prompt.encoder or self.config.encoder, weights)[0]
        return all_reduce_sum(rows) if self.sharded and prompt.rows else rows

    def num_parameters(self, prompt: Prompt) -> int:
        """Of its encoder; the same on every rank."""
        return self._stack(prompt).num_parameters if prompt.rows else 0

    # -- saving --------------------------------------------------------------------------------------------------

    def tensors(self, prompt: Prompt) -> dict[str, Tensor]:
        """Weights, optimizer moments and the best weights, by name, for a checkpoint; {} where it is not held."""
        if not self.holds(prompt):
            return {}
        stack = self.stacks[prompt.shape]
        found = {f"encoder.{name}": weight for name, weight in stack.views("weight", prompt.place).items()}
        for moment in MOMENTS:
            if moment in stack.stacks:
                views = stack.views(moment, prompt.place)
                found |= {f"optimizer.{name}.{moment}": value for name, value in views.items()}
        return found | {f"best.{name}": weight for name, weight in prompt.best.items()}

    def load(self, prompt: Prompt, tensors: dict[str, Tensor], step: int) -> None:
        """The state that :meth:`tensors` gave after ``step`` steps."""
        prompt.step = step
        if not self.holds(prompt):
            return
        stack = self.stacks[prompt.shape]
        stack.put("weight", prompt.place, {name: tensors[f"encoder.{name}"] for name in stack.shapes})
        for moment in MOMENTS:
            if moment in stack.stacks:
                found = {name: tensors[f"optimizer.{name}.{moment}"] for name in stack.shapes}
                stack.put(moment, prompt.place, found)
        prompt.best = {name: tensors[f"best.{name}"].clone() for name in stack.shapes}
