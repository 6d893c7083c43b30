"""P-tuning one prompt against a backbone, which is frozen or tuned with it; or tuning the backbone alone.

A step: the encoder gives the table, its rows are spliced into the batch, the loss at the answers gives a gradient of
the table, ranks sum that gradient, and each rank runs the encoder backward and steps. A global batch is cut into
micro-batches before replicas take them, and their gradients are summed exactly, so the result does not depend on the
number of replicas. The gradient of a tuned backbone's weights stays inside ``host.weights``, where DeepSpeed sums it.

B examples, R table rows, D backbone width.
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaptune.backbone.host import BackboneHost
from megaptune.batches import EpochPlan, Member, collate, micro_batches, rounds
from megaptune.config import Config, Reading
from megaptune.errors import CheckpointError, DivergedError
from megaptune.evaluation import Outcome, evaluate
from megaptune.examples import EncodedTask, Example
from megaptune.prompts.soft_prompt import NoPrompt, SoftPrompt
from megaptune.run import roll_call
from megaptune.run.checkpoint import CheckpointFolder, read_checkpoint
from megaptune.run.exact_sum import sum_exactly
from megaptune.run.monitor import Monitor, Pace, memory
from megaptune.run.stopping import StopRequest
from megaptune.run.topology import Topology, everywhere, on_main
from megaptune.schedule import rate_factor
from megaptune.scoring import Scorer


@dataclass
class Selection:
    """Early stopping on dev P@1: ties replace, as in the released code, and a tie counts as a gain."""

    patience: int
    best: float = -1.0
    best_epoch: int = 0
    misses: int = 0

    def improves(self, epoch: int, score: float) -> bool:
        if score >= self.best:
            self.best, self.best_epoch, self.misses = score, epoch, 0
            return True
        self.misses += 1
        return False

    @property
    def exhausted(self) -> bool:
        return self.patience > 0 and self.misses >= self.patience


@dataclass(frozen=True)
class StepSums:
    """Sums over all replicas of one step, and how many ranks were asked to stop."""

    loss: float
    hits: float
    examples: float
    tokens: float
    stops: float


class Trainer:
    """Trains what one job trains: one relation, one template, one seed."""

    def __init__(
        self,
        config: Config,
        seed: int,
        name: str,
        host: BackboneHost,
        topology: Topology,
        task: EncodedTask,
        scorers: dict[Reading, Scorer],
        pad_id: int,
        monitor: Monitor,
        folder: Path,
        stop: StopRequest,
    ) -> None:
        self.config, self.name, self.host, self.topology = config, name, host, topology
        self.train, self.dev, self.pad_id = task.train, task.dev, pad_id
        self.monitor, self.stop = monitor, stop
        self.loss_over = scorers[config.scoring.train_over]
        self.dev_scorers = {config.scoring.select_on: scorers[config.scoring.select_on]}
        settings = config.train
        self.batches = EpochPlan(len(task.train), settings.global_batch, settings.drop_last, seed)
        self.total_steps = settings.epochs * self.batches.steps_per_epoch
        rows, per_epoch = task.template.num_pseudo_tokens, self.batches.steps_per_epoch
        self.prompt: SoftPrompt | NoPrompt = NoPrompt(host.width, host.device)
        if rows:
            self.prompt = SoftPrompt(rows, host.width, config.prompt, settings, per_epoch, seed, host.device)
        self.selection = Selection(settings.patience)
        self.best_weights = self.prompt.weights()
        self.checkpoints = CheckpointFolder(folder / "checkpoints", config.checkpoint.keep)
        self.lengths = [len(example.slots) for example in task.train]
        self.digest = _digest(task.train)
        self.pace = Pace(self.total_steps, 0)

    def fit(self) -> None:
        """Train to the last epoch or until dev stops gaining; the best epoch's weights are then the backbone's, and
        :meth:`best_vectors` the prompt.

        :raises StoppedEarly: when a stop was asked for; state is saved.
        :raises DivergedError: when a loss or gradient is not finite; the last checkpoint stays.
        """
        self.host.weights.begin()
        self.resume()
        self.monitor.begin(self.name, self.total_steps, self.prompt.step)
        try:
            while self.prompt.step < self.total_steps and not self.selection.exhausted:
                sums = self.train_step()
                ends_epoch = self.prompt.step % self.batches.steps_per_epoch == 0
                if ends_epoch:
                    self.end_epoch(self.prompt.step // self.batches.steps_per_epoch)
                every = self.config.checkpoint.every_steps
                if ends_epoch or sums.stops or (every and self.prompt.step % every == 0):
                    self.save()
                if sums.stops:
                    self.stop.leave()
        finally:
            self.monitor.end()
        self.host.weights.use_best()

    def train_step(self) -> StepSums:
        indices = self.batches.indices(self.prompt.step)
        table = self.prompt.table()
        gradient, sums = self.gradient(indices, table.detach())
        if not math.isfinite(sums.loss) or not torch.isfinite(gradient).all():
            raise DivergedError(f"{self.name}: the loss or gradient of step {self.prompt.step + 1} is not finite")
        factor = rate_factor(self.config.train, self.prompt.step, self.batches.steps_per_epoch)
        rates = {"learning_rate": self.prompt.learning_rate()} if self.prompt.num_parameters else {}
        norms = {"encoder_gradient_norm": self.prompt.apply(table, gradient)}
        if self.host.trained:
            rates["lm_learning_rate"] = self.config.train.lm_learning_rate * factor
            norms["lm_gradient_norm"] = self.host.weights.step(factor)
            if not math.isfinite(norms["lm_gradient_norm"]):
                raise DivergedError(f"{self.name}: the LM's gradient of step {self.prompt.step} is not finite")
        roll_call.mark("training")
        self.report(sums, table, gradient, norms, rates)
        return sums

    def gradient(self, indices: list[int], table: Tensor) -> tuple[Tensor, StepSums]:
        """d mean loss / d ``table`` [R, D] over the global batch ``indices``, and its sums; the same on all ranks."""
        leaf, grid = table.requires_grad_(), self.host.grid
        gradients: list[Tensor] = []
        sums = torch.zeros(4, dtype=torch.float64, device=self.host.device)  # loss, hits, examples, tokens
        pieces = micro_batches(self.lengths, indices, self.config.train.micro_batch, self.host.speed.length_buckets)
        for piece in rounds(pieces, grid.replica, grid.replicas):
            members = [Member(self.train[index]) for index in piece]
            batch = collate(members, self.host, self.pad_id, Member(self.train[indices[0]]))
            losses, ranks = self.loss_over.losses(batch, leaf)
            loss = (losses * batch.weights).sum()
            leaf.grad = None
            self.host.weights.backward(loss / len(indices))
            gradients.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)  # None: a table of no rows
            hits = ((ranks == 0) * batch.weights).sum()
            tokens = sum(len(member.example.slots) for member in members)
            sums += torch.stack(
                [loss.detach(), hits, batch.weights.sum(), torch.tensor(float(tokens)).to(hits)]
            ).double()
        total, sums = sum_exactly(gradients, len(pieces), sums, grid.speaks, float(bool(self.stop)))
        return total, StepSums(*sums.tolist())

    def end_epoch(self, epoch: int) -> None:
        if epoch % self.config.evaluation.every_epochs and self.prompt.step < self.total_steps:
            return
        reading = self.config.scoring.select_on
        figures = self.evaluate(self.dev, self.prompt.vectors(), self.dev_scorers)[reading].figures
        gained = self.selection.improves(epoch, figures.p_at_1)
        if gained:
            self.best_weights = self.prompt.weights()
            self.host.weights.keep_best()
        self.monitor.record("dev", self.name, self.prompt.step, {"epoch": epoch, "reading": reading, **asdict(figures)})
        mark = " *" if gained else ""
        self.monitor.say(
            f"{self.name}  epoch {epoch}/{self.config.train.epochs}  dev P@1 {100 * figures.p_at_1:.1f}  "
            f"loss {figures.loss:.3f}{mark}"
        )

    def evaluate(
        self, examples: list[Example], table: Tensor, scorers: dict[Reading, Scorer]
    ) -> dict[Reading, Outcome]:
        batch = self.config.evaluation.batch
        return evaluate(self.host, [Member(example) for example in examples], table, scorers, batch, self.pad_id)

    def best_vectors(self) -> Tensor:
        """The rows [R, D] of the best dev epoch."""
        return self.prompt.vectors_of(self.best_weights)

    def report(
        self, sums: StepSums, table: Tensor, gradient: Tensor, norms: dict[str, float], rates: dict[str, float]
    ) -> None:
        step, loss = self.prompt.step, sums.loss / sums.examples
        self.pace.mark(step, sums.examples, sums.tokens)
        if not self.monitor.speaks:
            return
        values = {
            "loss": loss,
            "p_at_1": sums.hits / sums.examples,
            **rates,
            "table_gradient_norm": float(gradient.norm()),
            **norms,
            "prompt_norm": float(table.detach().norm(dim=-1).sum() / max(1, len(table))),
        }
        self.monitor.record("train", self.name, step, {**values, **self.pace.rates(), **memory()})
        line = f"loss {loss:.3f}  P@1 {100 * sums.hits / sums.examples:.0f}"
        self.monitor.advance(step, line)
        if step % self.config.monitor.log_every == 0 and not self.monitor.draws_progress:
            speed = self.pace.rates().get("examples_per_s")
            pace = f"  {speed:.1f} examples/s  left {self.pace.left()}" if speed else ""
            shown = " ".join(f"{rate:.2e}" for rate in rates.values())
            self.monitor.say(f"{self.name}  step {step}/{self.total_steps}  {line}  lr {shown}{pace}")

    # -- saving and resuming -------------------------------------------------------------------------------------

    def save(self) -> None:
        if not self.topology.is_main and not self.host.trained:
            return
        tensors = {**self.prompt.tensors(), **{f"best.{name}": weight for name, weight in self.best_weights.items()}}
        state = {
            "step": self.prompt.step,
            "selection": asdict(self.selection),
            "data": self.digest,
            "backbone": self.host.fingerprint.as_dict(),
            "metrics_bytes": self.monitor.position(),
        }
        if self.host.trained:
            write = self.host.weights.write
            self.checkpoints.save_together(self.topology, write, self.prompt.step, tensors, state)
        else:
            self.checkpoints.save(self.prompt.step, tensors, state)

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, if there is one."""
        newest = on_main(self.topology, lambda: self.checkpoints.newest(self.monitor.warn))
        if newest is None:
            self.monitor.rewind(self.name, None, 0)
            return
        found = read_checkpoint(newest, check_pieces=False)  # rank 0 has checked them
        if found.state["data"] != self.digest:
            raise CheckpointError(
                f"{found.folder}: the training records or their tokens changed since this checkpoint was saved; "
                "name another run.directory"
            )
        self.host.fingerprint.require(found.state["backbone"], found.folder)
        self.load(found.tensors, found.state)
        if self.host.trained:
            everywhere(self.topology, lambda: self.host.weights.read(found.pieces, self.prompt.step))
            self.host.weights.renew()
        self.monitor.rewind(self.name, found.state["metrics_bytes"], self.prompt.step)
        self.monitor.say(f"{self.name}  resumed at step {self.prompt.step} of {self.total_steps}")

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.prompt.load(tensors, state["step"])
        best = {name.removeprefix("best."): weight for name, weight in tensors.items() if name.startswith("best.")}
        self.best_weights = best
        self.selection = Selection(**{**state["selection"], "patience": self.config.train.patience})
        self.pace = Pace(self.total_steps, self.prompt.step)


def _digest(examples: list[Example]) -> str:
    """What identifies training data as the backbone sees it."""
    text = ";".join(f"{example.slots}{example.answer_position}{example.answer}" for example in examples)
    return hashlib.sha256(text.encode()).hexdigest()
