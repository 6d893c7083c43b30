"""What a step of many jobs tells: a line of metrics and curves for each, one line on the console for all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaptune.config import Config
from megaptune.jobs import Training
from megaptune.run.monitor import Monitor, Pace, memory


class TrainingReport:
    def __init__(self, config: Config, monitor: Monitor, device: torch.device) -> None:
        self.config, self.monitor, self.device = config, monitor, device
        self.pace, self.total, self.done, self.jobs = Pace(0, 0), 0, 0, 0

    def begin(self, active: list[Training], waiting: list[Training]) -> None:
        """Count the steps that are to come: of all jobs together, if none stops early."""
        listed = [*active, *waiting]
        if not listed:
            return
        self.jobs = len(listed)
        self.total = sum(training.total_steps for training in listed)
        self.done = sum(training.step for training in listed)
        self.pace = Pace(self.total, self.done, warm_up=2 * len(active))
        label = listed[0].name if len(listed) == 1 else f"{len(listed)} jobs"
        self.monitor.begin(label, self.total, self.done)

    def end(self) -> None:
        self.monitor.end()

    def step(
        self,
        step: int,
        active: list[Training],
        sums: Any,
        table: Tensor,
        gradient: Tensor,
        rates: dict[str, float],
        norms: dict[str, float],
        tuned: tuple[float, float] | None,
    ) -> None:
        """:param step: of the bank. :param sums: of each job. :param tuned: learning rate and gradient norm of a LM."""
        self.done += len(active)
        self.pace.mark(self.done, sum(sums.examples), sum(sums.tokens))
        if not self.monitor.speaks:
            return
        common = {**self.pace.rates(), **memory()}
        lm = {} if tuned is None else {"lm_learning_rate": tuned[0], "lm_gradient_norm": tuned[1]}
        squares = gradient.double().square().sum(dim=1).tolist()
        lengths = table.norm(dim=-1).tolist()
        shown: list[float] = []
        for index, training in enumerate(active):
            prompt = training.prompt
            rate = {"learning_rate": rates[training.name]} if prompt.rows else {}
            values = {
                "loss": sums.loss[index] / sums.examples[index],
                "p_at_1": sums.hits[index] / sums.examples[index],
                **rate,
                "table_gradient_norm": sum(squares[prompt.span]) ** 0.5,
                "encoder_gradient_norm": norms[training.name],
                "prompt_norm": sum(lengths[prompt.span]) / max(1, prompt.rows),
                **lm,
            }
            self.monitor.record("train", training.name, training.step, {**values, **common})
            shown = [*rate.values(), *list(lm.values())[:1]]
        self.say(step, active, sums, shown)

    def say(self, step: int, active: list[Training], sums: Any, rates: list[float]) -> None:
        losses = [loss / count for loss, count in zip(sums.loss, sums.examples, strict=True)]
        line = f"loss {sum(losses) / len(losses):.3f}  P@1 {100 * sum(sums.hits) / sum(sums.examples):.0f}"
        self.monitor.advance(self.done, line)
        if step % self.config.monitor.log_every or self.monitor.draws_progress:
            return
        speed = self.pace.rates().get("examples_per_s")
        pace = f"  {speed:.1f} examples/s  left {self.pace.left()}" if speed else ""
        if self.jobs == 1:
            (training,) = active
            shown = " ".join(f"{rate:.2e}" for rate in rates)
            self.monitor.say(f"{training.name}  step {training.step}/{training.total_steps}  {line}  lr {shown}{pace}")
        else:
            self.monitor.say(f"step {step}  {len(active)} of {self.jobs} jobs  {line}{pace}")
