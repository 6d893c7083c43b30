"""The training loop: a state that can be put on disk between any two steps and gives the same weights afterwards.

Nothing is drawn from a generator that lives on: the order of an epoch, a step's masks and its dropout each come from
the seed and their number.
"""

import math
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megaptune.errors import CheckpointError, DivergedError, first_line
from megaptune.pretraining.config import PretrainConfig
from megaptune.pretraining.corpus import batches
from megaptune.pretraining.models import Batch, causal_batch, loss, masked_batch
from megaptune.run.files import flush
from megaptune.run.monitor import Monitor, Pace
from megaptune.run.stopping import StopRequest

_MASKS, _ORDER = 0, 1  # so that the generators of a step and of an epoch differ


class Training:
    """Model, optimizer and the place in the data. Rows: token ids, int32 [T] each."""

    def __init__(
        self,
        config: PretrainConfig,
        model: Any,
        tokenizer: Any,
        train: list[np.ndarray],
        held_out: list[np.ndarray],
    ) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.rows, self.held_out_rows = train, held_out
        matrices = [weight for weight in model.parameters() if weight.ndim > 1]
        vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": config.train.weight_decay}]
        groups += [{"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.train.learning_rate, betas=(0.9, 0.98), fused=True)
        self.epochs = [
            batches(train, config.train.batch_tokens, np.random.default_rng([config.run.seed, _ORDER, epoch]))
            for epoch in range(config.train.epochs)
        ]
        self.total_steps = sum(map(len, self.epochs))
        self.step = 0
        self.seconds = self.cpu_seconds = 0.0  # of all starts together; waiting is no CPU time
        self.held_out: list[dict[str, float]] = []  # the loss after each epoch

    # -- steps ---------------------------------------------------------------------------------------------------

    def run(self, checkpoint: Path, monitor: Monitor, stop: StopRequest) -> None:
        """Train to the end, or until a stop is asked for; ``checkpoint`` is written every so many steps.

        :raises StoppedEarly: after saving.
        :raises DivergedError: a loss that is not finite.
        """
        run = self.config.run
        pace = Pace(self.total_steps, self.step)
        mark, cpu_mark = time.monotonic(), time.process_time()
        for epoch, indices, last in self._remaining():
            value, tokens = self._take_step(indices)
            pace.mark(self.step, len(indices), tokens)
            if self.step % run.log_every == 0 or self.step == self.total_steps:
                speed = pace.rates().get("tokens_per_s", 0.0)
                monitor.say(
                    f"step {self.step}/{self.total_steps}  epoch {epoch + 1}  loss {value:.3f}  {speed:.0f} tokens/s  "
                    f"{pace.left()} left"
                )
            if last:
                held_out = self.evaluate()
                self.held_out.append({"epoch": epoch + 1, "loss": held_out})
                monitor.say(f"epoch {epoch + 1}/{len(self.epochs)}: held-out loss {held_out:.4f}")
            if stop or last or self.step % run.checkpoint_every_steps == 0:
                now, cpu_now = time.monotonic(), time.process_time()
                self.seconds, self.cpu_seconds = self.seconds + now - mark, self.cpu_seconds + cpu_now - cpu_mark
                mark, cpu_mark = now, cpu_now
                self.save(checkpoint)
            if stop and self.step < self.total_steps:
                stop.leave()

    def _remaining(self) -> Iterator[tuple[int, np.ndarray, bool]]:
        """Epoch, row indices and whether it is the epoch's last, for every batch still to come."""
        done = 0
        for epoch, plan in enumerate(self.epochs):
            for number, indices in enumerate(plan, start=1):
                done += 1
                if done > self.step:
                    yield epoch, indices, number == len(plan)

    def _take_step(self, indices: np.ndarray) -> tuple[float, int]:
        """The batch's loss before the step, and its tokens without padding."""
        train = self.config.train
        torch.manual_seed((self.config.run.seed << 32) + self.step + 1)  # dropout
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate * self._rate_factor()
        rows = [self.rows[index] for index in indices]
        self.model.train()
        value = loss(self.model, self._kind, self._batch(rows, self.step + 1), train.precision)
        if not math.isfinite(value.item()):
            raise DivergedError(
                f"the loss is {value.item()} at step {self.step + 1}; lower train.learning_rate "
                f"({train.learning_rate:g}) or raise train.warmup_fraction ({train.warmup_fraction:g})"
            )
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return value.item(), sum(map(len, rows))

    def _rate_factor(self) -> float:
        warmup = round(self.config.train.warmup_fraction * self.total_steps)
        if self.step < warmup:
            return (self.step + 1) / warmup
        return (self.total_steps - self.step) / max(1, self.total_steps - warmup)

    def _batch(self, rows: list[np.ndarray], number: int) -> Batch:
        if self._kind == "gpt2":
            return causal_batch(rows, self.tokenizer.eos_token_id)
        seed = [self.config.run.seed, _MASKS, number]
        return masked_batch(rows, self.tokenizer, self.config.train.mask_fraction, seed)

    @property
    def _kind(self) -> str:
        return self.config.model.kind

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss a predicted token over the held-out rows, in nats; BERT's masks are the same every time."""
        self.model.eval()
        total, count = 0.0, 0
        plan = batches(self.held_out_rows, self.config.train.batch_tokens, None)
        for number, indices in enumerate(plan):
            # Numbers that no step has.
            batch = self._batch([self.held_out_rows[index] for index in indices], self.total_steps + 1 + number)
            total += loss(self.model, self._kind, batch, self.config.train.precision).item() * len(batch.targets)
            count += len(batch.targets)
        return total / count

    # -- state ---------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the whole state; the file before it stays until this one is on the disk.

        :raises CheckpointError: the file cannot be written.
        """
        part = path.with_name(f".{path.name}.part")
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "held_out": self.held_out,
        }
        try:
            torch.save(state, part)
            flush(part)
            part.replace(path)
            flush(path.parent)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            raise CheckpointError(f"could not write {path}: {first_line(error)}") from error

    def load(self, path: Path) -> None:
        """Continue from a file of :meth:`save`.

        :raises CheckpointError: the file is damaged.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.held_out = state["step"], state["held_out"]
            self.seconds, self.cpu_seconds = state["seconds"], state["cpu_seconds"]
        except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{path} is damaged ({first_line(error)}); remove {path.parent} to start over"
            ) from None
