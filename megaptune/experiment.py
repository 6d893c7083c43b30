"""One run: every task with every method, seed, learning rate and template, on one resident backbone.

Methods that leave the LM frozen go first, and their prompts train together. Those that tune it follow one by one, on a
backbone of their own whose weights are the original ones again before each job. A job that has its result is not run
again, so the same command continues an interrupted run.
"""

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megaptune.backbone import nvme
from megaptune.backbone.fingerprint import rows_checksum
from megaptune.backbone.host import BackboneHost
from megaptune.backbone.tuned_host import TunedHost
from megaptune.backbone.weight_files import verify_checksums
from megaptune.batches import Member
from megaptune.config import Config, Reading
from megaptune.errors import DivergedError, SetupError
from megaptune.evaluation import Outcome, Outcomes
from megaptune.examples import EncodedTask, Example, PreparedTask
from megaptune.jobs import Job, Training
from megaptune.kernels import dispatch
from megaptune.long_answers import LongMember, LongOutcome, rank_answers
from megaptune.methods import METHODS, MethodName
from megaptune.option_examples import OptionExample
from megaptune.option_scoring import OptionOutcome, OptionScorer
from megaptune.pet import PatternEnsemble
from megaptune.preparation import PreparedRun
from megaptune.results.facts_job import finish_facts
from megaptune.results.lm_folder import write_tuned_lm
from megaptune.results.prompt_folder import write_prompt
from megaptune.results.superglue_job import finish_superglue
from megaptune.results.superglue_table import SuperGlueTable
from megaptune.results.table import ResultsTable
from megaptune.results.tables import read_table
from megaptune.run import roll_call
from megaptune.run.directory import RunDirectory
from megaptune.run.grid import ProcessGrid
from megaptune.run.monitor import Monitor
from megaptune.run.stopping import StopRequest
from megaptune.run.topology import Topology, agree, on_main
from megaptune.scoring import Scorer
from megaptune.superglue_examples import EncodedOptions, PreparedSuperGlue
from megaptune.trainer import Stage, Trainer, dev_figures


@dataclass
class Experiment:
    """What all jobs of a run share."""

    prepared: PreparedRun
    topology: Topology
    directory: RunDirectory
    monitor: Monitor
    stop: StopRequest
    host: BackboneHost
    diverged: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        prepared: PreparedRun,
        topology: Topology,
        grid: ProcessGrid,
        directory: RunDirectory,
        monitor: Monitor,
        stop: StopRequest,
    ) -> "Experiment":
        """Load the backbone and check that the run directory knows it."""
        config, backbone = prepared.config, prepared.backbone
        try:
            dispatch.choose(config.kernels.implementation, require=config.kernels.require)
        except ValueError as error:
            raise SetupError(f"kernels.implementation: {error}") from None
        on_main(topology, lambda: _check_files(prepared, directory))
        if config.parallel.offload_folder is not None:
            nvme.prepare(topology, config.parallel.offload_folder, backbone.num_bytes, monitor.say)
        tuned = all(METHODS[name].tunes_lm for name in config.methods)
        roll_call.mark("reading the backbone")
        host = _load(prepared, grid, topology, tuned)
        roll_call.mark("working towards the first step")
        on_main(topology, lambda: directory.remember_backbone(host.fingerprint, backbone.family))
        return cls(prepared, topology, directory, monitor, stop, host)

    @property
    def config(self) -> Config:
        return self.prepared.config

    def run(self) -> ResultsTable | SuperGlueTable:
        """All jobs; the table over what they left in the run directory. :attr:`diverged` says which left nothing."""
        self.banner()
        for task in self.prepared.tasks:
            self.monitor.say(task.summary(self.host.vocabulary_size))
        for tuned, deep in ((False, False), (False, True), (True, False)):
            wanted = [name for name in METHODS if name in self.config.methods]
            jobs = self.jobs([n for n in wanted if (METHODS[n].tunes_lm, METHODS[n].deep) == (tuned, deep)])
            done = set(agree([job.number for job in jobs if job.has_result]))
            pending = [job for job in jobs if job.number not in done]
            self.say_done(jobs, pending)
            if not pending:
                continue
            if self.host.trained != tuned:
                self.change_host(tuned)
            if tuned:
                for job in pending:
                    self.tune(job)
            else:
                self.run_frozen(pending, self.stage(jobs), "deep-checkpoints" if deep else "checkpoints")
        return read_table(self.directory.path, self.config)

    def jobs(self, methods: list[MethodName]) -> list[Job]:
        """Every job of ``methods``, numbered from 0."""
        found: list[Job] = []
        for task in self.prepared.tasks:
            for name in methods:
                method = METHODS[name]
                if name in task.left_out:
                    continue
                for variant in task.variants(method, self.config):
                    encoded = task.encoded(method, variant.template)
                    for seed in self.config.run.seeds if method.trains else [None]:
                        folder = self.directory.job(task.name, name, seed, variant.suffix)
                        found.append(Job(len(found), name, task, encoded, seed, variant, folder))
        return found

    def stage(self, jobs: list[Job]) -> Stage:
        """Scorers for these jobs, by their numbers."""
        pad_id = self.prepared.pad_id
        tasks = [task for task in {id(job.task): job.task for job in jobs}.values() if isinstance(task, PreparedTask)]
        if not tasks:
            options = OptionScorer(self.host, self.option_scorer(jobs))
            return Stage(self.config, self.host, self.topology, {}, pad_id, self.monitor, self.stop, options)
        readings = sorted({*self.config.scoring.by_token, self.config.scoring.train_over})
        set_of = [0] * (max(job.number for job in jobs) + 1)
        for job in jobs:
            set_of[job.number] = next(place for place, task in enumerate(tasks) if task is job.task)
        scorers = {
            reading: Scorer(self.host, [task.candidates[reading] for task in tasks], set_of) for reading in readings
        }
        return Stage(self.config, self.host, self.topology, scorers, pad_id, self.monitor, self.stop)

    def option_scorer(self, jobs: list[Job]) -> Scorer:
        """Of every token that these jobs' options ask for; of the whole vocabulary where one has choices."""
        sets = [job.encoded.candidates for job in jobs if isinstance(job.encoded, EncodedOptions)]
        if any(ids is None for ids in sets):
            return Scorer(self.host, [None])
        set_of = [0] * (max(job.number for job in jobs) + 1)
        for place, job in enumerate(jobs):
            set_of[job.number] = place
        return Scorer(self.host, sets, set_of)

    def say_done(self, jobs: list[Job], pending: list[Job]) -> None:
        for task in self.prepared.tasks:
            mine = [job for job in jobs if job.task is task]
            if mine and not any(job.task is task for job in pending):
                methods = ", ".join(dict.fromkeys(job.method_name for job in mine))
                place = self.directory.path / "jobs" / task.name
                self.monitor.say(f"{task.name}  {methods} done before: results are in {place}")

    def change_host(self, tuned: bool) -> None:
        """Let go of the backbone before another is loaded."""
        grid = self.host.grid
        del self.host
        gc.collect()
        self.monitor.say("loading the backbone again, to be tuned" if tuned else "loading the backbone again, frozen")
        self.host = _load(self.prepared, grid, self.topology, tuned)

    # -- jobs ----------------------------------------------------------------------------------------------------

    def run_frozen(self, jobs: list[Job], stage: Stage, checkpoints: str) -> None:
        """Manual prompts, and the bank of trained ones."""
        zero_shot = [job for job in jobs if job.seed is None]
        training = [job for job in jobs if job.seed is not None]
        for job in zero_shot:
            self.monitor.rewind({job.name: 0})
            extra = self.choose_prompt(job, stage)
            outcomes = self.zero_shot(job, job.encoded.reported, stage, self.config.scoring.by_token)
            nothing = torch.zeros(0, self.host.width, device=self.host.device)
            self.finish(job, outcomes, extra, self.rank_answers([(job, 0)], nothing).get(job.number))
        if training:
            self.train(training, stage, self.directory.path / checkpoints)
        else:
            roll_call.mark("training")  # no step will come

    def tune(self, job: Job) -> None:
        """A job that tunes the LM, after the models that it learns from."""
        stage = self.stage([job])
        if job.method.ensemble:
            shared = self.config, self.directory, self.topology, self.monitor, self.stage
            job, config = PatternEnsemble(job, *shared).distillation()
            stage = replace(stage, config=config)
        self.train([job], stage, job.folder / "checkpoints")

    def zero_shot(
        self, job: Job, examples: Sequence[Example | OptionExample], stage: Stage, readings: list[Reading]
    ) -> Outcomes:
        nothing = torch.zeros(0, self.host.width, device=self.host.device)
        return stage.evaluate([Member(example, 0, job.number) for example in examples], nothing, readings)

    def choose_prompt(self, job: Job, stage: Stage) -> dict[str, Any]:
        """Of several prompts the job takes the one that is best on dev, the first of equals."""
        choices = job.task.alternatives(job.method) if isinstance(job.task, PreparedTask) else []
        if len(choices) < 2:
            return {}
        reading = self.config.scoring.select_on
        scores = []
        for choice in choices:
            found = self.zero_shot(job, choice.dev, stage, [reading])[reading]
            scores.append(dev_figures(job, found)[job.task.headline])
        job.encoded = choices[scores.index(max(scores))]
        return {"best_dev_p_at_1": max(scores), "prompts_tried": len(choices)}

    def train(self, jobs: list[Job], stage: Stage, checkpoints: Path) -> None:
        """Prompts, the LM or both, as the methods say."""

        def finish(trainings: list[Training], table: torch.Tensor) -> None:
            members, first_row = [], 0
            placed = []
            for training in trainings:
                job = training.job
                placed.append((job, first_row))
                members += training.members(job.encoded.reported, first_row)
                first_row += training.prompt.rows
            outcomes = stage.evaluate(members, table, self.config.scoring.by_token)
            long = self.rank_answers(placed, table)
            first = first_row = 0
            for training in trainings:
                stop, last_row = first + len(training.job.encoded.reported), first_row + training.prompt.rows
                mine: Outcomes = {reading: found.of(slice(first, stop)) for reading, found in outcomes.items()}
                rows = table[first_row:last_row]
                self.finish_training(trainer, training, rows, mine, long.get(training.job.number))
                first, first_row = stop, last_row

        trainer = Trainer(stage, jobs, checkpoints, finish)
        trainer.fit()
        self.diverged |= trainer.diverged

    def rank_answers(self, jobs: list[tuple[Job, int]], table: torch.Tensor) -> dict[int, LongOutcome]:
        """By the jobs' numbers, where answers of several tokens are wanted; a job comes with its first row."""
        members: list[LongMember] = []
        spans: dict[int, range] = {}
        for job, first_row in jobs:
            task, encoded = job.task, job.encoded
            if isinstance(task, PreparedTask) and isinstance(encoded, EncodedTask) and task.long and encoded.long:
                first = len(members)
                members += [LongMember(e, task.long.answers, first_row, job.number) for e in encoded.long]
                spans[job.number] = range(first, len(members))
        if not members or self.host.trained:
            return {}
        batch, pad_id = self.config.evaluation.batch, self.prepared.pad_id
        outcome = rank_answers(self.host, members, table, batch, pad_id)
        return {number: outcome.among(index in span for index in range(len(members))) for number, span in spans.items()}

    def finish_training(
        self,
        trainer: Trainer,
        training: Training,
        vectors: torch.Tensor,
        outcomes: Outcomes,
        long: LongOutcome | None = None,
    ) -> None:
        job, bank = training.job, trainer.bank
        writer = training.prompt.owner or 0
        if training.prompt.rows and self.topology.rank == writer:
            about = {
                "template": job.encoded.template.text,
                "kind": self.host.kind,
                "encoder": training.prompt.encoder or self.config.prompt.encoder,
                "seed": job.seed,
                "learning_rate": job.variant.learning_rate,
                "backbone": self.host.fingerprint.as_dict(),
                "lm_tuned": job.method.tunes_lm,  # then the vectors belong to the tuned weights, not the backbone's
            }
            if trainer.deep is not None:
                vectors = trainer.deep.keys_and_values(vectors, training.virtual_tokens)
                about["deep"] = {"virtual_tokens": training.virtual_tokens, **asdict(trainer.deep)}
            write_prompt(job.folder / "prompt", vectors, training.prompt.best, about)
        if bank.sharded:
            agree(None)  # the prompt is written before the result
        if isinstance(self.host, TunedHost) and self.config.checkpoint.save_tuned_lm:
            write_tuned_lm(self.host, self.topology, job.folder / "lm")
        extra: dict[str, Any] = {
            "best_epoch": training.selection.best_epoch,
            f"best_dev_{job.task.headline}": training.selection.best,
            "steps": training.step,
            "parameters": bank.num_parameters(training.prompt) + self.host.weights.num_trained,
        }
        if training.prompt.rows:
            extra |= {"learning_rate": job.variant.learning_rate, "variant": job.variant.suffix.lstrip("-")}
        self.finish(job, outcomes, extra | job.notes, long)

    def finish(self, job: Job, outcomes: Outcomes, extra: dict[str, Any], long: LongOutcome | None = None) -> None:
        """Write the job's result last of all, so that a job with a result is a finished one."""
        if not self.topology.is_main:
            return
        if isinstance(job.task, PreparedSuperGlue):
            found = outcomes["options"]
            assert isinstance(found, OptionOutcome)
            return finish_superglue(job, found, self.config, self.directory, self.monitor, extra)
        read = {reading: outcome for reading, outcome in outcomes.items() if isinstance(outcome, Outcome)}
        finish_facts(job, read, long, self.prepared, self.host.vocabulary_size, self.monitor, extra)

    def require_finite(self) -> None:
        """:raises DivergedError: naming the jobs that diverged, when all others have their results."""
        if self.diverged:
            lines = "; ".join(f"{name}: {why}" for name, why in self.diverged.items())
            raise DivergedError(f"{lines}. All other jobs have their results; lower the learning rate for these")

    # -- words ---------------------------------------------------------------------------------------------------

    def banner(self) -> None:
        config, host, world = self.config, self.host, self.topology.world_size
        parallel, replicas = config.parallel, host.grid.replicas
        extras = ", offload to " + parallel.offload if parallel.offload != "none" else ""
        extras += ", activations recomputed" if parallel.activation_checkpointing else ""
        extras += ", blocks compiled" if host.speed.compile_blocks else ""
        seed, train = config.backbone.random_weights, config.train
        drawn = "" if seed is None else f", weights drawn from seed {seed}"
        together = config.jobs_at_once(len(self.prepared.tasks))
        union = train.global_batch * together
        micro = min(train.micro_batch, union)
        pieces = -(-union // micro)
        jobs = f" ({together} jobs x {train.global_batch})" if together > 1 else ""
        idle = f", {replicas - pieces} replicas idle: lower train.micro_batch" if pieces < replicas else ""
        kernels = ", ".join(f"{op} {how}" for op, how in dispatch.describe().items())
        self.monitor.say(
            f"backbone   {host.folder.name}{drawn}: {host.family}, {host.kind}, {config.backbone.dtype}, "
            f"{host.num_parameters:,} {'tuned' if host.trained else 'frozen'} parameters\n"
            f"layout     {world} rank{'s' if world > 1 else ''} ({self.topology.launcher}) = {host.grid.replicas} "
            f"replicas x {host.grid.shards} tensor parallel, ZeRO {host.zero_stage}{extras}, {host.device.type}, "
            f"{torch.get_num_threads()} threads a rank\n"
            f"batch      {union} examples{jobs} = {pieces} micro-batches of {micro}, "
            f"{-(-pieces // replicas)} a replica at most{idle}\n"
            f"loaded     {host.load_report}\n"
            f"kernels    {kernels}\n"
            f"run        {self.directory.path}"
        )


def _load(prepared: PreparedRun, grid: ProcessGrid, topology: Topology, tuned: bool) -> BackboneHost:
    config = prepared.config
    common = prepared.backbone, config.backbone.dtype, config.parallel, grid, topology.device
    return TunedHost(*common, config.train, config.speed) if tuned else BackboneHost(*common, config.speed)


def _check_files(prepared: PreparedRun, directory: RunDirectory) -> None:
    """Before weights are read: are they whole, and those that the run directory knows?"""
    folder, settings = prepared.backbone.folder, prepared.config.backbone
    if settings.verify and settings.random_weights is None:
        verify_checksums(folder)
    directory.check_backbone(rows_checksum(folder, settings.random_weights))
