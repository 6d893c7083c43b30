"""Every figure of the runs as CSV in long form: a row per task, method, seed, variant, reading and metric."""

import csv
import io
from typing import Any

from megaptune.report.provenance import command
from megaptune.report.runs import JobRecord, Run

COLUMNS = (
    "run",
    "backbone",
    "fingerprint",
    "task",
    "type",
    "method",
    "seed",
    "variant",
    "template",
    "status",
    "split",
    "reading",
    "metric",
    "value",
    "train_count",
    "dev_count",
    "test_count",
    "candidates",
    "best_epoch",
    "steps",
    "learning_rate",
    "run_time_s",
    "config",
    "command",
)
"""split: test, dev, or baseline (of the task, with no method). A job without a result has one row without a value."""


def rows(runs: list[Run]) -> list[dict[str, Any]]:
    found = []
    for run in runs:
        common = {
            "run": run.name,
            "backbone": run.backbone_name,
            "fingerprint": run.backbone.get("rows_sha256", ""),
            "run_time_s": round(run.run_time_s, 3),
            "config": str(run.path / "config.yaml"),
            "command": command(run),
        }
        told: set[str] = set()
        for job in run.jobs:
            about = {**common, **_about(job)}
            if job.status != "finished":
                found.append(about)
                continue
            for reading, metrics in job.test.items():
                candidates = job.result.get("candidates", {}).get(reading, "")
                place = {"split": "test", "reading": reading, "candidates": candidates}
                found += [{**about, **place, "metric": metric, "value": value} for metric, value in metrics.items()]
            if job.dev is not None:
                found.append({**about, "split": "dev", "metric": "best", "value": job.dev})
            if job.task not in told:
                told.add(job.task)
                of_task = {key: about[key] for key in (*common, "task", "type", "test_count")}
                baselines = job.result.get("baselines", {"majority": job.result.get("majority", "")})
                found += [
                    {**of_task, "split": "baseline", "status": "finished", "metric": metric, "value": value}
                    for metric, value in baselines.items()
                    if value not in ("", None)
                ]
    return found


def csv_text(runs: list[Run]) -> str:
    """Numbers are written so that they read back to the same bits."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows(runs):
        writer.writerow({key: repr(value) if isinstance(value, float) else value for key, value in row.items()})
    return buffer.getvalue()


def _about(job: JobRecord) -> dict[str, Any]:
    result, counts = job.result, job.result.get("counts", {})
    return {
        "task": job.task,
        "type": result.get("type", ""),
        "method": job.method,
        "seed": "" if job.seed is None else job.seed,
        "variant": job.variant,
        "template": result.get("template", ""),
        "status": job.status,
        **{f"{split}_count": counts.get(split, "") for split in ("train", "dev", "test")},
        **{key: result.get(key, "") for key in ("best_epoch", "steps", "learning_rate")},
    }
