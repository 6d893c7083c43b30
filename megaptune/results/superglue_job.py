"""What a finished SuperGLUE job leaves: its metrics, a line for every prediction, and files for SuperGLUE's server."""

import json
from typing import Any

import torch

from megaptune.config import Config
from megaptune.jobs import Job
from megaptune.option_examples import OptionExample
from megaptune.option_scoring import OptionOutcome
from megaptune.run.directory import RunDirectory
from megaptune.run.files import write_json, write_whole
from megaptune.run.monitor import Monitor
from megaptune.superglue_examples import EncodedOptions, PreparedSuperGlue
from megaptune.tasks.superglue.records import SuperGlueRecord
from megaptune.tasks.superglue.submission import write_predictions


def finish_superglue(
    job: Job, outcome: OptionOutcome, config: Config, directory: RunDirectory, monitor: Monitor, extra: dict[str, Any]
) -> None:
    """Write all of it, the result last; ``outcome`` is that of the job's ``reported`` examples."""
    task, encoded = job.task, job.encoded
    assert isinstance(task, PreparedSuperGlue)
    assert isinstance(encoded, EncodedOptions)
    count = len(encoded.test)
    tested, rest = outcome.of(slice(0, count)), outcome.of(slice(count, None))
    metrics = task.figures(encoded, "test", tested.best)
    lines = [
        _line(encoded, example, best, probabilities)
        for example, best, probabilities in zip(encoded.test, tested.best, tested.log_probabilities.exp(), strict=True)
    ]
    write_whole(
        job.folder / "predictions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )
    if encoded.unlabelled:
        found = encoded.predictions(encoded.unlabelled, rest.best)
        folder = directory.path / "submission" / job.folder.name
        write_predictions(folder, task.name, task.data.splits["unlabelled"].complete(found))
    figures = {**metrics, "loss": tested.mean_loss, "count": len(task.data.splits["test"].gold)}
    monitor.record("test", job.name, extra.get("steps", 0), {"reading": "options", **figures})
    shown = lines[: config.monitor.sample_predictions]
    rows = "\n".join(f"| {line['idx']} | {' / '.join(line['gold'])} | {line['predicted']} |" for line in shown)
    monitor.text(job.name, "predictions", f"| example | answer | predicted |\n| --- | --- | --- |\n{rows}")
    monitor.text(job.name, "config", "```json\n" + config.model_dump_json(indent=2) + "\n```")
    rates = {"learning_rate": job.variant.learning_rate, "lm_learning_rate": config.train.lm_learning_rate}
    settings = {"method": job.method_name, "task": task.name, "seed": -1 if job.seed is None else job.seed, **rates}
    monitor.hyperparameters(job.name, {**settings, "pattern": encoded.name or "classifier"}, metrics)
    monitor.flush()
    write_json(
        job.folder / "result.json",
        {
            "suite": "superglue",
            "task": task.name,
            "method": job.method_name,
            "seed": job.seed,
            "pattern": encoded.name,
            "template": encoded.template.text,
            "metrics": {name: value for name, value in metrics.items() if name != "score"},
            "score": metrics["score"],
            "majority": task.majority,
            "test": {"options": figures},
            "counts": {name: len(split.records) for name, split in task.data.splits.items()},
            "skipped": {name: len(split.skipped) for name, split in task.data.splits.items()},
            "trained_on": len(encoded.train),
            "splits": {name: split.split for name, split in task.data.splits.items()},
            **extra,
        },
    )
    told = "  ".join(f"{name} {100 * value:.1f}" for name, value in metrics.items())
    monitor.say(f"{job.name}  test {told}")


def _line(encoded: EncodedOptions, example: OptionExample, best: int, probabilities: torch.Tensor) -> dict[str, Any]:
    record = example.record
    assert isinstance(record, SuperGlueRecord)
    names = encoded.labels or record.choices
    return {
        "idx": list(record.idx),
        "gold": list(record.gold),
        "predicted": encoded.prediction(record, best),
        "options": {name: round(float(p), 6) for name, p in zip(names, probabilities, strict=False)},
    }
