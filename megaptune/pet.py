"""PET and iPET up to the examples that the classifier learns from (Schick and Schütze 2021).

The LM is tuned under every pattern; these models label examples that nobody has labelled. iPET repeats that: the next
generation's models train on more examples, with labels that other models of the last one are surest of. Nothing is
chosen by the records that are reported on; dev chooses every model's epoch.

Every model leaves ``scores.jsonl`` in a folder of its own and the last ensemble ``soft_labels.jsonl`` in the job's.
What has its file is not done again. PET's models are iPET's first generation.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaptune.config import Config
from megaptune.errors import CheckpointError
from megaptune.examples import Variant
from megaptune.jobs import Job, Training, digest
from megaptune.option_examples import OptionExample
from megaptune.option_models import ask, with_soft_labels
from megaptune.run.directory import RunDirectory
from megaptune.run.files import write_whole
from megaptune.run.monitor import Monitor
from megaptune.run.topology import Topology, on_main
from megaptune.soft_labels import combined, drawn, most_confident, softened
from megaptune.superglue_examples import EncodedOptions, PreparedSuperGlue
from megaptune.tasks.records import Record
from megaptune.tasks.superglue.records import SuperGlueRecord
from megaptune.trainer import Stage, Trainer

Row = dict[str, Any]


@dataclass(frozen=True)
class PatternModel:
    """What a tuned model left. about: its pattern, weight and figures; scores [N, O] of the examples to label, test
    [M, O] of the reported ones."""

    name: str
    about: Row
    scores: Tensor
    test: Tensor

    @property
    def weight(self) -> float:
        return float(self.about["weight"])


class PatternEnsemble:
    """The stages of one job that come before its classifier. ``stage_of``: what jobs train and are evaluated on."""

    def __init__(
        self,
        job: Job,
        config: Config,
        directory: RunDirectory,
        topology: Topology,
        monitor: Monitor,
        stage_of: Callable[[list[Job]], Stage],
    ) -> None:
        assert isinstance(job.task, PreparedSuperGlue)
        assert isinstance(job.encoded, EncodedOptions)
        assert job.seed is not None
        self.job, self.task, self.classifier, self.seed = job, job.task, job.encoded, job.seed
        self.config, self.pet = config, config.pet
        self.directory, self.topology, self.monitor, self.stage_of = directory, topology, monitor, stage_of

    def distillation(self) -> tuple[Job, Config]:
        """The classifier's job, which learns the ensemble's labels, and the configuration that it is trained with."""
        file = self.job.folder / "soft_labels.jsonl"
        data = digest(self.classifier.to_label)
        found = on_main(self.topology, lambda: _read(file, data))
        if found is None:
            found = self.label(data)
            on_main(self.topology, lambda: _write(file, *found))
        about, rows = found
        probabilities = torch.tensor([row["probabilities"] for row in rows], dtype=torch.float64)
        records = self.task.data.splits["to_label"].records
        ours = {"epochs": self.pet.epochs, "lm_learning_rate": self.pet.lm_learning_rate}
        changed = {key: value for key, value in ours.items() if value is not None}
        settings = self.config.train.model_copy(update=changed)
        rate = self.pet.head_learning_rate or self.job.variant.learning_rate
        job = replace(
            self.job,
            encoded=with_soft_labels(self.classifier, records, probabilities, self.pet.temperature),
            variant=replace(self.job.variant, learning_rate=rate),
            notes={"ensemble": {key: value for key, value in about.items() if key != "data"}},
        )
        return job, self.config.model_copy(update={"train": settings})

    def label(self, data: str) -> tuple[Row, list[Row]]:
        """The last generation's labels, and what is to be told of them."""
        last = self.pet.generations - 1 if self.job.method_name == "ipet" else 0
        models = self.generation(0, [])
        for number in range(1, last + 1):
            models = self.generation(number, models)
        weights = [model.weight for model in models]
        together = combined([model.scores for model in models], weights)
        labels = self.classifier.labels or tuple(map(str, range(together.shape[1])))
        predicted = Counter(labels[option] for option in together.argmax(dim=1).tolist())
        best = combined([model.test for model in models], weights).argmax(dim=1).tolist()
        figures = self.task.figures(self.classifier, "test", best)
        counts = {label: predicted[label] for label in labels}
        about: Row = {
            "data": data,
            "labelled": len(together),
            "predicted": counts,
            "temperature": self.pet.temperature,
            "test": figures,
            "models": [{"name": model.name, **model.about} for model in models],
        }
        self.monitor.say(
            f"{self.job.name}  {len(models)} models labelled {len(together)} examples: "
            + ", ".join(f"{count} {label}" for label, count in counts.items())
        )
        probabilities = softened(together, self.pet.temperature).tolist()
        return about, _rows(self.classifier.to_label, "to_label", "probabilities", probabilities)

    def generation(self, number: int, before: list[PatternModel]) -> list[PatternModel]:
        """A model for every pattern and repetition, in this order; ``before``: the last generation's."""
        models: list[PatternModel] = []
        for encoded in self.task.ensemble:
            for repeat in range(self.pet.models):
                examples, place = encoded.train, len(models)
                others = [model for model in before if model is not before[place]]
                labellers = drawn(others, self.pet.share, f"{self.seed}/{number}/{place}") if others else []
                if labellers:
                    examples = [*examples, *self.new_examples(encoded, number, labellers)]
                about = {"generation": number, "labelled_by": [model.name for model in labellers]}
                models.append(self.model(replace(encoded, train=examples), repeat, len(encoded.train), about))
        return models

    def new_examples(self, encoded: EncodedOptions, number: int, labellers: list[PatternModel]) -> list[OptionExample]:
        """What a model trains on besides the labelled examples: others' surest labels, in their shares there."""
        together = combined([model.scores for model in labellers], [model.weight for model in labellers])
        labelled = Counter(example.right[0] for example in encoded.train)
        counts = [labelled[option] for option in range(together.shape[1])]
        wanted = round(len(encoded.train) * self.pet.growth**number) - len(encoded.train)
        chosen = most_confident(softened(together), counts, wanted)
        if len(chosen) < wanted:
            self.monitor.warn(
                f"{self.job.name}  generation {number}, {encoded.name}: {len(chosen)} of {wanted} new examples, "
                "without changing the labels' shares"
            )
        return [replace(encoded.to_label[example], right=(option,)) for example, option in chosen]

    def model(self, encoded: EncodedOptions, repeat: int, labelled: int, about: Row) -> PatternModel:
        """One tuned model's scores, from its file if there is one. The first ``labelled`` of train weigh it."""
        method, seed = "ipet" if about["generation"] else "pet", self.seed * self.pet.models + repeat
        name = f"{method}-seed{self.seed}-g{about['generation']}-{encoded.name}"
        name += f"-{repeat}" if self.pet.models > 1 else ""
        folder = self.directory.model(self.task.name, name)
        job = Job(0, "manual+finetune", self.task, encoded, seed, Variant(0.0, encoded.name, ""), folder)
        file, data = folder / "scores.jsonl", digest([*encoded.train, *encoded.to_label, *encoded.test])
        found = on_main(self.topology, lambda: _read(file, data))
        if found is None:
            found = self.tuned(job, encoded, labelled, {"data": data, **about})
            on_main(self.topology, lambda: _write(file, *found))
        told, rows = found
        scores, test = (
            torch.tensor([row["scores"] for row in rows if row["split"] == split]) for split in ("to_label", "test")
        )
        return PatternModel(folder.name, {key: value for key, value in told.items() if key != "data"}, scores, test)

    def tuned(self, job: Job, encoded: EncodedOptions, labelled: int, about: Row) -> tuple[Row, list[Row]]:
        """Tune the LM under one pattern, and let it score the examples to label and the reported ones."""
        stage = self.stage_of([job])
        about |= {"pattern": encoded.name, "seed": job.seed, "trained_on": len(encoded.train)}
        about["weight"] = self.untuned_accuracy(stage, job, encoded.train[:labelled])
        rows: list[Row] = []

        def finish(trainings: list[Training], table: Tensor) -> None:
            (training,) = trainings
            records = [example.record for example in (*encoded.to_label, *encoded.test)]
            scores = ask(stage, job, _of_superglue(records), table, training.prompt.first_row).scores
            count = len(encoded.to_label)
            rows.extend(_rows(encoded.to_label, "to_label", "scores", scores[:count].tolist()))
            rows.extend(_rows(encoded.test, "test", "scores", scores[count:].tolist()))
            about["best_epoch"], about["best_dev_score"] = training.selection.best_epoch, training.selection.best
            about.update(self.task.figures(encoded, "test", scores[count:].argmax(dim=1).tolist()))

        Trainer(stage, [job], job.folder / "checkpoints", finish).fit()
        told = f"score {100 * about['score']:.1f}  weight {about['weight']:.2f}"
        self.monitor.say(f"{job.name}  trained on {len(encoded.train)} examples  test {told}")
        return about, rows

    def untuned_accuracy(self, stage: Stage, job: Job, examples: list[OptionExample]) -> float:
        """Of the LM that nobody has tuned; 1 where weights are uniform."""
        if self.pet.weights == "uniform":
            return 1.0
        stage.host.weights.begin(self.config.train)
        nothing = torch.zeros(0, stage.host.width, device=stage.host.device)
        best = ask(stage, job, _of_superglue([example.record for example in examples]), nothing).best
        return sum(option in example.right for option, example in zip(best, examples, strict=True)) / len(examples)


def _of_superglue(records: Sequence[SuperGlueRecord | Record]) -> list[SuperGlueRecord]:
    return [record for record in records if isinstance(record, SuperGlueRecord)]


# -- files: one line that tells of them, then one for every example ---------------------------------------------------


def _rows(examples: list[OptionExample], split: str, what: str, values: list[list[float]]) -> list[Row]:
    rows = []
    for example, value in zip(examples, values, strict=True):
        assert isinstance(example.record, SuperGlueRecord)
        rows.append({"split": split, "idx": list(example.record.idx), what: value})
    return rows


def _write(file: Path, about: Row, rows: list[Row]) -> None:
    write_whole(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (about, *rows)))


def _read(file: Path, data: str) -> tuple[Row, list[Row]] | None:
    """:raises CheckpointError: when the file was made of other data."""
    if not file.is_file():
        return None
    about, *rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    if about["data"] != data:
        raise CheckpointError(
            f"{file}: the examples or their tokens changed since this file was written; name another run.directory, "
            "or remove the file to make it again"
        )
    return about, rows
