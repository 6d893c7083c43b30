"""One run: every task with every method and seed, one after the other on one resident backbone.

Methods that leave the LM frozen go first. Those that tune it follow on a backbone of their own, whose weights are the
original ones again before each job. A job that has its result is not run again, so the same command continues an
interrupted run.
"""

import gc
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megaptune.backbone import nvme
from megaptune.backbone.fingerprint import rows_checksum
from megaptune.backbone.host import BackboneHost
from megaptune.backbone.tuned_host import TunedHost
from megaptune.backbone.weight_files import verify_checksums
from megaptune.batches import Member
from megaptune.config import Config, Reading
from megaptune.errors import SetupError
from megaptune.evaluation import Outcome, evaluate
from megaptune.examples import EncodedTask, Example, PreparedTask, baselines
from megaptune.kernels import dispatch
from megaptune.methods import METHODS, MethodName
from megaptune.preparation import PreparedRun
from megaptune.results.lm_folder import write_tuned_lm
from megaptune.results.prompt_folder import write_prompt
from megaptune.results.table import ResultsTable
from megaptune.run import roll_call
from megaptune.run.directory import RunDirectory
from megaptune.run.files import write_json, write_whole
from megaptune.run.grid import ProcessGrid
from megaptune.run.monitor import Monitor
from megaptune.run.stopping import StopRequest
from megaptune.run.topology import Topology, agree, on_main
from megaptune.scoring import Scorer
from megaptune.trainer import Trainer

Job = tuple[MethodName, int | None]
"""A method and its seed."""


@dataclass
class Experiment:
    """What all jobs of a run share."""

    prepared: PreparedRun
    topology: Topology
    directory: RunDirectory
    monitor: Monitor
    stop: StopRequest
    host: BackboneHost

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

    def run(self) -> ResultsTable:
        """All jobs; the table over what they left in the run directory."""
        self.banner()
        for task in self.prepared.tasks:
            self.monitor.say(task.summary(self.host.vocabulary_size))
        for tuned in (False, True):
            methods = [name for name in METHODS if name in self.config.methods and METHODS[name].tunes_lm == tuned]
            pending = {task.data.name: self.pending(task, methods) for task in self.prepared.tasks}
            if any(pending.values()) and self.host.trained != tuned:
                self.change_host(tuned)
            for task in self.prepared.tasks:
                if methods and not pending[task.data.name]:
                    place = self.directory.path / "jobs" / task.data.name
                    self.monitor.say(f"{task.data.name}  {', '.join(methods)} done before: results are in {place}")
                elif methods:
                    self.run_task(task, pending[task.data.name])
        return ResultsTable.read(self.directory.path, self.config)

    def pending(self, task: PreparedTask, methods: list[MethodName]) -> list[Job]:
        """The jobs of a task that have no result yet."""
        jobs: list[Job] = []
        for name in methods:
            jobs += [(name, seed) for seed in self.config.run.seeds] if METHODS[name].trains else [(name, None)]
        return agree([job for job in jobs if not (self.directory.job(task.data.name, *job) / "result.json").is_file()])

    def change_host(self, tuned: bool) -> None:
        """Let go of the backbone before another is loaded."""
        grid = self.host.grid
        del self.host
        gc.collect()
        self.monitor.say("loading the backbone again, to be tuned" if tuned else "loading the backbone again, frozen")
        self.host = _load(self.prepared, grid, self.topology, tuned)

    def run_task(self, task: PreparedTask, jobs: list[Job]) -> None:
        readings = {*self.config.scoring.evaluate_over, self.config.scoring.train_over}
        scorers = {reading: Scorer(self.host, task.candidates[reading]) for reading in sorted(readings)}
        for name, seed in jobs:
            if seed is None:
                self.run_zero_shot(task, scorers, name)
            else:
                self.run_training(task, scorers, name, seed)

    # -- jobs ----------------------------------------------------------------------------------------------------

    def run_zero_shot(self, task: PreparedTask, scorers: dict[Reading, Scorer], name: MethodName) -> None:
        """The manual prompt, nothing trained."""
        encoded = task.encoded(METHODS[name])
        self.monitor.rewind(f"{task.data.name}/{name}", None, 0)
        nothing = torch.zeros(0, self.host.width, device=self.host.device)
        outcomes = self.evaluate(encoded.test, nothing, scorers)
        if not any(METHODS[method].trains for method in self.config.methods):
            roll_call.mark("training")  # no step will come
        self.finish(task, name, None, encoded, outcomes, {})

    def run_training(self, task: PreparedTask, scorers: dict[Reading, Scorer], name: MethodName, seed: int) -> None:
        """The prompt, the LM or both, as the method says."""
        method, encoded = METHODS[name], task.encoded(METHODS[name])
        folder = self.directory.job(task.data.name, name, seed)
        trainer = Trainer(
            self.config,
            seed,
            f"{task.data.name}/{folder.name}",
            self.host,
            self.topology,
            encoded,
            scorers,
            self.prepared.pad_id,
            self.monitor,
            folder,
            self.stop,
        )
        trainer.fit()
        vectors = trainer.best_vectors()
        outcomes = self.evaluate(encoded.test, vectors, scorers)
        if method.trains_prompt and self.topology.is_main:
            about = {
                "template": encoded.template.text,
                "kind": self.host.kind,
                "encoder": self.config.prompt.encoder,
                "seed": seed,
                "backbone": self.host.fingerprint.as_dict(),
                "lm_tuned": method.tunes_lm,  # then the vectors belong to the tuned weights, not to the backbone's
            }
            write_prompt(folder / "prompt", vectors, trainer.best_weights, about)
        if isinstance(self.host, TunedHost) and self.config.checkpoint.save_tuned_lm:
            write_tuned_lm(self.host, self.topology, folder / "lm")
        selection = {"best_epoch": trainer.selection.best_epoch, "best_dev_p_at_1": trainer.selection.best}
        parameters = trainer.prompt.num_parameters + self.host.weights.num_trained
        steps = {"steps": trainer.prompt.step, "parameters": parameters}
        self.finish(task, name, seed, encoded, outcomes, {**selection, **steps})
        if self.topology.is_main:
            trainer.checkpoints.clear()

    def evaluate(
        self, examples: list[Example], table: torch.Tensor, scorers: dict[Reading, Scorer]
    ) -> dict[Reading, Outcome]:
        wanted = {reading: scorers[reading] for reading in self.config.scoring.evaluate_over}
        batch = self.config.evaluation.batch
        members = [Member(example) for example in examples]
        return evaluate(self.host, members, table, wanted, batch, self.prepared.pad_id)

    def finish(
        self,
        task: PreparedTask,
        method: MethodName,
        seed: int | None,
        encoded: EncodedTask,
        outcomes: dict[Reading, Outcome],
        extra: dict[str, Any],
    ) -> None:
        """Write the job's result last of all, so that a job with a result is a finished one."""
        if not self.topology.is_main:
            return
        data, template = task.data, encoded.template.text
        folder = self.directory.job(data.name, method, seed)
        job = f"{data.name}/{folder.name}"
        figures = {reading: asdict(outcome.figures) for reading, outcome in outcomes.items()}
        headline = self.config.scoring.select_on
        predictions = self.predictions(encoded.test, outcomes[headline])
        write_whole(
            folder / "predictions.jsonl", "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions)
        )
        for reading, values in figures.items():
            self.monitor.record("test", job, extra.get("steps", 0), {"reading": reading, **values})
        shown = predictions[: self.config.monitor.sample_predictions]
        rows = "\n".join(f"| {p['subject']} | {p['answer']} | {p['predicted']} | {p['rank']} |" for p in shown)
        self.monitor.text(
            job, "predictions", f"| subject | answer | predicted | rank |\n| --- | --- | --- | --- |\n{rows}"
        )
        self.monitor.text(job, "config", "```json\n" + self.config.model_dump_json(indent=2) + "\n```")
        settings = {"method": method, "task": data.name, "seed": -1 if seed is None else seed, "template": template}
        train = self.config.train
        rates = {"learning_rate": train.learning_rate, "lm_learning_rate": train.lm_learning_rate}
        trained = {"encoder": self.config.prompt.encoder, **rates}
        self.monitor.hyperparameters(job, {**settings, **trained}, {r: v["p_at_1"] for r, v in figures.items()})
        self.monitor.position()
        write_json(
            folder / "result.json",
            {
                "task": data.name,
                "label": data.label,
                "method": method,
                "seed": seed,
                "template": template,
                "test": figures,
                "baselines": asdict(baselines(data)),
                "counts": {split: len(records) for split, records in data.splits.items()},
                "dropped": data.dropped,
                "candidates": {reading: task.num_candidates(reading, self.host.vocabulary_size) for reading in figures},
                **extra,
            },
        )
        line = "  ".join(f"{reading} {100 * values['p_at_1']:.1f}" for reading, values in figures.items())
        self.monitor.say(f"{job}  test P@1: {line}")

    def predictions(self, examples: list[Example], outcome: Outcome) -> list[dict[str, Any]]:
        words = [self.prepared.tokenizer.decode([token]).strip() for token in outcome.prediction.tolist()]
        return [
            {"subject": e.record.subject, "answer": e.record.answer, "predicted": word, "rank": rank + 1}
            for e, word, rank in zip(examples, words, outcome.rank.tolist(), strict=True)
        ]

    # -- words ---------------------------------------------------------------------------------------------------

    def banner(self) -> None:
        config, host, world = self.config, self.host, self.topology.world_size
        parallel, replicas = config.parallel, host.grid.replicas
        extras = ", offload to " + parallel.offload if parallel.offload != "none" else ""
        extras += ", activations recomputed" if parallel.activation_checkpointing else ""
        train = config.train
        micro = min(train.micro_batch, train.global_batch)
        pieces = -(-train.global_batch // micro)
        idle = f", {replicas - pieces} replicas idle: lower train.micro_batch" if pieces < replicas else ""
        kernels = ", ".join(f"{op} {how}" for op, how in dispatch.describe().items())
        self.monitor.say(
            f"backbone   {host.folder.name}: {host.family}, {host.kind}, {config.backbone.dtype}, "
            f"{host.num_parameters:,} {'tuned' if host.trained else 'frozen'} parameters\n"
            f"layout     {world} rank{'s' if world > 1 else ''} ({self.topology.launcher}) = {host.grid.replicas} "
            f"replicas x {host.grid.shards} tensor parallel, ZeRO {host.zero_stage}{extras}, {host.device.type}, "
            f"{torch.get_num_threads()} threads a rank\n"
            f"batch      {train.global_batch} examples = {pieces} micro-batches of {micro}, "
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
    folder = prepared.backbone.folder
    if prepared.config.backbone.verify:
        verify_checksums(folder)
    directory.check_backbone(rows_checksum(folder))
