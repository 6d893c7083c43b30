"""One run: every task with every method and seed, one after the other on one resident backbone.

A job that has its result is not run again, so the same command continues an interrupted run.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megaptune.backbone import nvme
from megaptune.backbone.fingerprint import rows_checksum
from megaptune.backbone.host import BackboneHost
from megaptune.backbone.weight_files import verify_checksums
from megaptune.config import Config, Reading
from megaptune.errors import SetupError
from megaptune.evaluation import Outcome, evaluate
from megaptune.examples import EncodedTask, Example, PreparedTask, baselines
from megaptune.kernels import dispatch
from megaptune.preparation import PreparedRun
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


@dataclass(frozen=True)
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
        roll_call.mark("reading the backbone")
        host = BackboneHost(backbone, config.backbone.dtype, config.parallel, grid, topology.device)
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
            self.run_task(task)
        return ResultsTable.read(self.directory.path, self.config)

    def run_task(self, task: PreparedTask) -> None:
        name = task.data.name
        jobs: list[tuple[str, int | None]] = [("manual", None)] if task.manual else []
        jobs += [("ptuning", seed) for seed in self.config.run.seeds] if task.tuned else []
        pending = agree([job for job in jobs if not (self.directory.job(name, *job) / "result.json").is_file()])
        if not pending:
            self.monitor.say(f"{name}  done before: its results are in {self.directory.path / 'jobs' / name}")
            return
        readings = {*self.config.scoring.evaluate_over, self.config.scoring.train_over}
        scorers = {reading: Scorer(self.host, task.candidates[reading]) for reading in sorted(readings)}
        for method, seed in pending:
            if method == "manual":
                self.run_manual(task, scorers)
            else:
                assert seed is not None
                self.run_ptuning(task, scorers, seed)

    # -- jobs ----------------------------------------------------------------------------------------------------

    def run_manual(self, task: PreparedTask, scorers: dict[Reading, Scorer]) -> None:
        """Zero-shot: the manual prompt, nothing trained."""
        assert task.manual is not None
        self.monitor.rewind(f"{task.data.name}/manual", None, 0)
        nothing = torch.zeros(0, self.host.width, device=self.host.device)
        outcomes = self.evaluate(task.manual.test, nothing, scorers)
        if "ptuning" not in self.config.methods:
            roll_call.mark("training")  # no step will come
        self.finish(task, "manual", None, task.manual, outcomes, {})

    def run_ptuning(self, task: PreparedTask, scorers: dict[Reading, Scorer], seed: int) -> None:
        assert task.tuned is not None
        folder = self.directory.job(task.data.name, "ptuning", seed)
        trainer = Trainer(
            self.config,
            seed,
            f"{task.data.name}/{folder.name}",
            self.host,
            self.topology,
            task.tuned,
            scorers,
            self.prepared.pad_id,
            self.monitor,
            folder,
            self.stop,
        )
        trainer.fit()
        vectors = trainer.best_vectors()
        outcomes = self.evaluate(task.tuned.test, vectors, scorers)
        if self.topology.is_main:
            about = {
                "template": task.tuned.template.text,
                "kind": self.host.kind,
                "encoder": self.config.prompt.encoder,
                "seed": seed,
                "backbone": self.host.fingerprint.as_dict(),
            }
            write_prompt(folder / "prompt", vectors, trainer.best_weights, about)
        selection = {"best_epoch": trainer.selection.best_epoch, "best_dev_p_at_1": trainer.selection.best}
        steps = {"steps": trainer.prompt.step, "parameters": trainer.prompt.num_parameters}
        self.finish(task, "ptuning", seed, task.tuned, outcomes, {**selection, **steps})
        if self.topology.is_main:
            trainer.checkpoints.clear()

    def evaluate(
        self, examples: list[Example], table: torch.Tensor, scorers: dict[Reading, Scorer]
    ) -> dict[Reading, Outcome]:
        wanted = {reading: scorers[reading] for reading in self.config.scoring.evaluate_over}
        batch = self.config.evaluation.batch
        return evaluate(self.host, examples, table, wanted, batch, self.prepared.pad_id)

    def finish(
        self,
        task: PreparedTask,
        method: str,
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
        tuned = {"encoder": self.config.prompt.encoder, "learning_rate": self.config.train.learning_rate}
        self.monitor.hyperparameters(job, {**settings, **tuned}, {r: v["p_at_1"] for r, v in figures.items()})
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
            f"{host.num_parameters:,} frozen parameters\n"
            f"layout     {world} rank{'s' if world > 1 else ''} ({self.topology.launcher}) = {host.grid.replicas} "
            f"replicas x {host.grid.shards} tensor parallel, ZeRO {host.zero_stage}{extras}, {host.device.type}, "
            f"{torch.get_num_threads()} threads a rank\n"
            f"batch      {train.global_batch} examples = {pieces} micro-batches of {micro}, "
            f"{-(-pieces // replicas)} a replica at most{idle}\n"
            f"loaded     {host.load_report}\n"
            f"kernels    {kernels}\n"
            f"run        {self.directory.path}"
        )


def _check_files(prepared: PreparedRun, directory: RunDirectory) -> None:
    """Before weights are read: are they whole, and those that the run directory knows?"""
    folder = prepared.backbone.folder
    if prepared.config.backbone.verify:
        verify_checksums(folder)
    directory.check_backbone(rows_checksum(folder))
