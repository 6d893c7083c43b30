"""P-tuning many prompts against one frozen backbone; or one job whose method tunes the backbone, with or without a
prompt.

A step: the bank's encoders give the table, its rows are spliced into the jobs' examples, the losses at the answers give
a gradient of the table, ranks sum it, and every encoder takes its step. Batches are cut into micro-batches, all jobs'
examples together, before replicas take them, and their gradients are summed exactly, so the result does not depend on
the number of replicas. The gradient of a tuned backbone's weights stays inside ``host.weights``, where DeepSpeed sums
it.

B examples, R table rows, D backbone width.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megaptune.backbone.host import BackboneHost
from megaptune.batches import Member, collate, micro_batches, rounds
from megaptune.config import Config, Reading
from megaptune.errors import DivergedError
from megaptune.evaluation import Outcome, Outcomes, evaluate
from megaptune.jobs import Job, Training
from megaptune.option_scoring import OptionOutcome, OptionScorer, collate_options, evaluate_options
from megaptune.prompts.bank import PromptBank
from megaptune.run import roll_call
from megaptune.run.exact_sum import sum_exactly
from megaptune.run.monitor import Monitor
from megaptune.run.stopping import StopRequest
from megaptune.run.topology import Topology
from megaptune.schedule import rate_factor
from megaptune.scoring import Scorer
from megaptune.superglue_examples import EncodedOptions, PreparedSuperGlue
from megaptune.training_report import TrainingReport
from megaptune.training_state import TrainingState


@dataclass
class Stage:
    """What jobs train and are evaluated on. options: scores examples that are answered by options; then no reading is
    looked at."""

    config: Config
    host: BackboneHost
    topology: Topology
    scorers: dict[Reading, Scorer]
    pad_id: int
    monitor: Monitor
    stop: StopRequest
    options: OptionScorer | None = None

    def evaluate(self, members: Sequence[Member], table: Tensor, readings: list[Reading]) -> Outcomes:
        """By reading; of examples with options, one outcome called so."""
        batch = self.config.evaluation.batch
        if self.options is not None:
            found = evaluate_options(self.host, members, table, self.options, batch, self.pad_id)
            return {"options": found}
        scorers = {reading: self.scorers[reading] for reading in readings}
        by_reading = evaluate(self.host, members, table, scorers, batch, self.pad_id)
        return {reading: outcome for reading, outcome in by_reading.items()}  # noqa: C416  of a wider type

    @property
    def selects_on(self) -> Literal["options"] | Reading:
        return self.config.scoring.select_on if self.options is None else "options"

    def losses(self, members: Sequence[Member], table: Tensor, stand_in: Member) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, ranks and weights [B] of the members, or of the stand-in, which counts nothing."""
        if self.options is not None:
            options = collate_options(members, self.host, self.pad_id, stand_in)
            return *self.options.losses(options, table), options.weights
        batch = collate(members, self.host, self.pad_id, stand_in)
        return *self.scorers[self.config.scoring.train_over].losses(batch, table), batch.weights


HEADLINES = {"p_at_1": "P@1", "score": "score"}


def dev_figures(job: Job, outcome: Outcome | OptionOutcome) -> dict[str, float]:
    """What dev says of a job: the figures of its reading, or the task's own metrics."""
    if isinstance(outcome, Outcome):
        return asdict(outcome.figures)
    assert isinstance(job.task, PreparedSuperGlue)
    assert isinstance(job.encoded, EncodedOptions)
    return {**job.task.figures(job.encoded, "dev", outcome.best), "loss": outcome.mean_loss}


@dataclass(frozen=True)
class StepSums:
    """Sums over all replicas of one step: of each job, in the bank's order; stops: ranks that were asked to stop."""

    loss: list[float]
    hits: list[float]
    examples: list[float]
    tokens: list[float]
    stops: float


class Trainer:
    """Trains jobs, ``jobs.at_once`` of them together; one that is done makes room for the next. Deep prompts have a
    trainer of their own: rows of their table have another width.

    :param folder: of the checkpoints.
    :param finish: hears of jobs that are done, with a table of their best prompts, in which they stand one after the
        other; it is called on every rank.
    """

    def __init__(
        self, stage: Stage, jobs: list[Job], folder: Path, finish: Callable[[list[Training], Tensor], None]
    ) -> None:
        self.stage, self.config, self.host, self.finish = stage, stage.config, stage.host, finish
        self.deep = self.host.deep if jobs[0].method.deep else None
        self.waiting = [Training.begin(job, self.config, self.deep) for job in jobs]
        self.active: list[Training] = []
        self.diverged: dict[str, str] = {}
        self.contexts_folder = folder.with_name("contexts")
        self.step = 0
        self.at_once = min(len(jobs), self.config.jobs.at_once or len(jobs))
        shapes = [training.prompt.shape for training in self.waiting]
        capacity = {shape: min(self.at_once, shapes.count(shape)) for shape in dict.fromkeys(shapes)}
        ranks, wanted = stage.topology.world_size, self.config.jobs.shard_encoders
        sharded = ranks > 1 and not self.host.trained and (wanted is True or (wanted == "auto" and self.at_once > 1))
        config, device = self.config, self.host.device
        width = self.host.width if self.deep is None else self.deep.width
        self.bank = PromptBank(width, config.prompt, config.train, capacity, device, stage.topology, sharded)
        self.state = TrainingState(stage.topology, self.host, self.bank, folder, config, stage.monitor)
        self.report = TrainingReport(config, stage.monitor, self.host.device)

    def fit(self) -> None:
        """Train all jobs, each to its last epoch or until dev stops gaining.

        :raises StoppedEarly: when a stop was asked for; state is saved.
        :raises DivergedError: when a tuned LM's loss or gradient is not finite; the last checkpoint stays. Prompts that
            diverge leave the bank and are named in :attr:`diverged`.
        """
        self.host.weights.begin(self.config.train)
        self.resume()
        self.keep_contexts()
        self.report.begin(self.active, self.waiting)
        try:
            while self.active:
                stops = self.train_step()
                ended = [training for training in self.active if training.ends_epoch]
                self.end_epochs(ended)
                finished = [training for training in self.active if training.finished]
                if stops or finished or self.must_save(ended):
                    self.state.save(self.step, self.active, self.diverged)
                if stops:
                    self.stage.stop.leave()
                self.retire(finished)
                self.move_up()
        finally:
            self.report.end()
        self.state.clear()
        shutil.rmtree(self.contexts_folder, ignore_errors=True)  # every rank: hosts may have folders of their own

    def keep_contexts(self) -> None:
        """Compute what precedes the prompts of all jobs once, for all epochs; nothing precedes a deep one."""
        if self.deep is not None:
            return
        pairs = [
            (example.inputs[0], training.job.number)
            for training in (*self.active, *self.waiting)
            for example in (*training.job.encoded.train, *training.job.encoded.dev)
            if len(example.inputs) == 1  # several share their leading tokens instead
        ]
        self.host.keep_contexts([slots for slots, _ in pairs], [job for _, job in pairs], self.contexts_folder)
        if self.host.contexts is not None and self.host.contexts.problem:
            self.stage.monitor.warn(f"contexts are kept in memory alone: {self.host.contexts.problem}")

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, if there is one."""
        self.step, self.active, self.waiting, self.diverged = self.state.resume(self.waiting)
        self.retire([training for training in self.active if training.finished])
        self.move_up()

    def move_up(self) -> None:
        while self.waiting and len(self.active) < self.at_once:
            training = self.waiting.pop(0)
            starts_at = training.job.encoded.deep_words
            self.bank.add(training.prompt, None if starts_at is None else self.host.deep_prompt_of(starts_at))
            self.active.append(training)

    # -- a step --------------------------------------------------------------------------------------------------

    def train_step(self) -> bool:
        """One step of every job; whether a rank was asked to stop."""
        table = self.finite(self.bank.table)
        members = [member for training in self.active for member in training.batch()]
        gradient, sums = self.gradient(members, table)
        gradient, sums, table = self.without_broken(gradient, sums, table)
        if self.active:
            rates = {training.name: training.prompt.rate(self.config.train) for training in self.active}
            norms = self.bank.step(gradient)
            self.step += 1
            tuned = self.step_backbone()
            roll_call.mark("training")
            self.report.step(self.step, self.active, sums, table, gradient, rates, norms, tuned)
        return sums.stops > 0

    def gradient(self, members: list[Member], table: Tensor) -> tuple[Tensor, StepSums]:
        """d (sum of the jobs' mean losses) / d ``table`` [R, D], and the jobs' sums; the same on all ranks."""
        leaf, grid, train = table.clone().requires_grad_(), self.host.grid, self.config.train
        place = {training.job.number: index for index, training in enumerate(self.active)}
        counts = [0] * len(place)
        for member in members:
            counts[place[member.job]] += 1
        gradients: list[Tensor] = []
        sums = torch.zeros(len(place), 4, dtype=torch.float64, device=self.host.device)
        lengths = [member.example.length for member in members]
        by_length = self.host.speed.length_buckets
        pieces = micro_batches(lengths, range(len(members)), train.micro_batch, by_length, train.micro_tokens)
        for piece in rounds(pieces, grid.replica, grid.replicas):
            mine = [members[index] for index in piece]
            with self.host.dropout(self.dropout_seed(piece)):
                losses, ranks, weights = self.stage.losses(mine, leaf, members[0])
            where = torch.tensor([place[member.job] for member in mine or members[:1]], device=self.host.device)
            share = weights / torch.tensor(counts, device=self.host.device).clamp(min=1)[where]
            leaf.grad = None
            self.host.weights.backward((losses * share).sum())
            gradients.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)  # None: a table of no rows
            if mine:
                tokens = torch.tensor([float(lengths[index]) for index in piece]).to(losses)
                columns = losses.detach(), (ranks == 0).to(losses), torch.ones_like(losses), tokens
                sums.index_add_(0, where, torch.stack(columns, dim=1).double())
        total, figures = sum_exactly(gradients, self.pieces_of_rows(pieces, members), sums.flatten(), grid.speaks,
                                     float(bool(self.stage.stop)))  # fmt: skip
        loss, hits, examples, tokens = figures[:-1].view(-1, 4).T.tolist()
        return total, StepSums(loss, hits, examples, tokens, float(figures[-1]))

    def dropout_seed(self, piece: list[int]) -> int | None:
        """Of a micro-batch, which is cut alike on every layout."""
        if not self.config.train.lm_dropout:
            return None
        seed = self.active[0].job.seed or 0
        return hash((seed, self.step, min(piece, default=0))) % 2**63

    def pieces_of_rows(self, pieces: list[list[int]], members: list[Member]) -> list[int]:
        """In how many micro-batches each row of the table occurs."""
        occurs = [{members[index].job for index in piece} for piece in pieces]
        counts = []
        for training in self.active:
            counts += [sum(training.job.number in jobs for jobs in occurs)] * training.prompt.rows
        return counts

    def step_backbone(self) -> tuple[float, float] | None:
        """One step of a tuned LM: its learning rate and its gradient's norm."""
        if not self.host.trained:
            return None
        (training,) = self.active
        factor = rate_factor(self.config.train, training.step - 1, training.plan.steps_per_epoch)
        norm = self.host.weights.step(factor)
        if not math.isfinite(norm):
            raise DivergedError(f"{training.name}: the LM's gradient of step {training.step} is not finite")
        return self.config.train.lm_learning_rate * factor, norm

    # -- jobs that diverge ---------------------------------------------------------------------------------------

    def without_broken(self, gradient: Tensor, sums: StepSums, table: Tensor) -> tuple[Tensor, StepSums, Tensor]:
        """Take jobs whose loss or gradient is not finite out of the bank; the others' gradient, sums and table.

        What is not finite may spread within a micro-batch, so where it shows in several jobs, each is computed alone.
        """
        broken = self.broken(gradient, sums)
        if not broken:
            return gradient, sums, table
        if self.host.trained:
            (training,) = broken
            raise DivergedError(f"{training.name}: {self.not_finite(training)}")
        if len(broken) > 1:
            for training in broken:
                alone, figures = self.gradient(training.batch(), table)
                place = self.active.index(training)
                gradient[training.prompt.span] = alone[training.prompt.span]
                for name in ("loss", "hits"):
                    getattr(sums, name)[place] = getattr(figures, name)[place]
            broken = self.broken(gradient, sums)
        stay = [index for index, training in enumerate(self.active) if training not in broken]
        kept = [self.active[index].prompt.span for index in stay]
        gradient = torch.cat([gradient[span] for span in kept]) if kept else gradient[:0]
        for training in broken:
            self.give_up(training, self.not_finite(training))
        columns = [[figure[index] for index in stay] for figure in (sums.loss, sums.hits, sums.examples, sums.tokens)]
        loss, hits, examples, tokens = columns
        return gradient, StepSums(loss, hits, examples, tokens, sums.stops), self.bank.table()

    def finite(self, rows: Callable[[], Tensor]) -> Tensor:
        """The bank's rows [R, D]; jobs whose rows are not finite leave it."""
        table = rows()
        finite = torch.isfinite(table).all(dim=1).cpu()
        broken = [training for training in self.active if not finite[training.prompt.span].all()]
        for training in broken:
            self.give_up(training, f"the prompt after step {training.step} is not finite")
        return rows() if broken else table

    def broken(self, gradient: Tensor, sums: StepSums) -> list[Training]:
        finite = torch.isfinite(gradient).all(dim=1).cpu()  # one wait for the device, not one a job
        return [
            training
            for training, loss in zip(self.active, sums.loss, strict=True)
            if not (math.isfinite(loss) and finite[training.prompt.span].all())
        ]

    def not_finite(self, training: Training) -> str:
        return f"the loss or gradient of step {training.step + 1} is not finite"

    def give_up(self, training: Training, why: str) -> None:
        self.active.remove(training)
        self.bank.remove(training.prompt)
        self.diverged[training.name] = why
        self.stage.monitor.warn(f"{training.name} leaves the bank: {why}")

    # -- epochs --------------------------------------------------------------------------------------------------

    def must_save(self, ended: list[Training]) -> bool:
        """At the end of the longest job's epochs, and where the configuration says."""
        every = self.config.checkpoint.every_steps
        longest = max((training.plan.steps_per_epoch for training in self.active), default=0)
        ends = any(training.plan.steps_per_epoch == longest for training in ended)
        return ends or bool(every and self.step % every == 0)

    def end_epochs(self, ended: list[Training]) -> None:
        """Evaluate the jobs that end an epoch, together, and keep what is their best."""
        every = self.config.evaluation.every_epochs
        due = [t for t in ended if t.epoch % every == 0 or t.step >= t.total_steps]
        if not due:
            return
        reading = self.stage.selects_on
        vectors = self.finite(self.bank.vectors)  # what is not would reach its neighbours in a batch
        due = [training for training in due if training in self.active]
        if not due:
            return
        members = [member for training in due for member in training.members(training.job.encoded.dev)]
        outcome = self.stage.evaluate(members, vectors, [self.config.scoring.select_on])[reading]
        first = 0
        for training in due:
            stop = first + len(training.job.encoded.dev)
            figures = dev_figures(training.job, outcome.of(slice(first, stop)))
            first = stop
            headline = training.job.task.headline
            gained = training.selection.improves(training.epoch, figures[headline])
            if gained:
                self.bank.keep_best(training.prompt)
                self.host.weights.keep_best()
            values = {"epoch": training.epoch, "reading": reading, **figures}
            self.stage.monitor.record("dev", training.name, training.step, values)
            mark = " *" if gained else ""
            self.stage.monitor.say(
                f"{training.name}  epoch {training.epoch}/{self.config.train.epochs}  "
                f"dev {HEADLINES[headline]} {100 * figures[headline]:.1f}  loss {figures['loss']:.3f}{mark}"
            )

    def retire(self, finished: list[Training]) -> None:
        """Let jobs go that are done, with their best prompts."""
        if not finished:
            return
        self.host.weights.use_best()
        best = [self.bank.best_vectors(training.prompt) for training in finished]
        for training in finished:
            self.active.remove(training)
        self.finish(finished, torch.cat(best))
        for training in finished:
            self.bank.remove(training.prompt)
