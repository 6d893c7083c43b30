"""Miniature run directories for the report's tests: the files that a run leaves, with figures to be checked by hand.

python tests/helpers/report_runs.py       # write tests/golden/report.md anew; look at the difference
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from megaptune import __version__  # noqa: E402
from megaptune.report.document import Document  # noqa: E402
from megaptune.report.runs import read_runs  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "report.md"
RELATIONS = {"P17": ("located in", "N-1", 100), "P36": ("capital", "1-1", 300), "P103": ("native language", "N-1", 100)}


def write_run(folder: Path, task: dict[str, Any], methods: list[str], seeds: list[int], **more: Any) -> Path:
    """A run directory without jobs."""
    folder.mkdir(parents=True)
    config = {
        "run": {"directory": str(folder), "seeds": seeds},
        "backbone": {"path": "models/tiny-lm", "dtype": "fp32"},
        "task": task,
        "methods": methods,
        "scoring": {"evaluate_over": ["answers", "word_list"], "select_on": "word_list"},
        **more,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "command.txt").write_text("2026-01-01T00:00:00+00:00 megaptune train --config tiny.yaml\n")
    write_json(folder / "environment.json", {"megaptune": "1.2.3", "torch": "2.0"})
    write_json(folder / "backbone.json", {"rows_sha256": "0123456789abcdef" * 4, "dtype": "fp32", "family": "gpt2"})
    write_json(folder / "state.json", {"status": "finished", "exit_code": 0, "reason": ""})
    return folder


def write_job(run: Path, task: str, job: str, test: dict[str, Any], **more: Any) -> None:
    """``job``: the folder's name. ``more``: further keys of result.json."""
    counts = {"train": 64, "dev": 16, "test": 100, **more.pop("counts", {})}
    result = {"task": task, "method": job.split("-")[0], "test": test, "counts": counts, **more}
    write_json(run / "jobs" / task / job / "result.json", result)


def write_curve(run: Path, job: str, losses: list[float], dev: list[float], start_s: float = 0.0) -> None:
    """Two steps an epoch, one second a step, and a pass over dev after each epoch."""
    with (run / "metrics.jsonl").open("a") as handle:
        for step, loss in enumerate(losses, start=1):
            line = {"kind": "train", "job": job, "step": step, "loss": loss, "time_s": start_s + step}
            handle.write(json.dumps(line) + "\n")
            if step % 2 == 0 and step // 2 <= len(dev):
                epoch = step // 2
                line = {"kind": "dev", "job": job, "step": step, "epoch": epoch, "p_at_1": dev[epoch - 1]}
                handle.write(json.dumps({**line, "time_s": start_s + step}) + "\n")


def lama_run(folder: Path) -> Path:
    """Three relations, two seeds, one of P103's prompts diverged: its second seed has no result."""
    run = write_run(folder, {"type": "lama", "limit_test": 300}, ["manual", "ptuning"], [0, 1])
    figures = {"P17": (0.2, 0.5, 0.6), "P36": (0.6, 0.7, 0.8), "P103": (0.4, 0.3, None)}
    for relation, values in figures.items():
        label, kind, count = RELATIONS[relation]
        for seed, value in zip((None, 0, 1), values, strict=True):
            job = "manual" if seed is None else f"ptuning-seed{seed}"
            about = {
                "label": label,
                "type": kind,
                "counts": {"test": count},
                "template": "[X] in [answer]" if seed is None else "[P*3] [X] [P*3] [answer]",
                "baselines": {"majority": 0.1, "unseen": 0.05, "in_subject": 0.0},
                "candidates": {"answers": 7, "word_list": 1000},
                **({} if seed is None else {"seed": seed, "best_epoch": 2, "best_dev_p_at_1": value, "steps": 4}),
            }
            (run / "jobs" / relation / job).mkdir(parents=True)
            if value is not None:
                test = {"answers": {"p_at_1": value + 0.1, "loss": 1 / 3}, "word_list": {"p_at_1": value, "loss": 0.5}}
                write_job(run, relation, job, test, **about)
            if seed is not None:
                write_curve(run, f"{relation}/{job}", [3.0, 2.0 + seed, 1.5, 1.0], [0.25, value or 0.0], 4.0 * seed)
    reason = "P103/ptuning-seed1: loss is nan at step 4. All other jobs have their results; lower the learning rate"
    write_json(run / "state.json", {"status": "failed", "exit_code": 5, "reason": reason})
    return run


def superglue_run(folder: Path) -> Path:
    """RTE and CB of 32 training examples: two manual patterns, P-tuning with two patterns and two seeds."""
    task = {"type": "superglue", "splits": {"dev": "dev32", "test": "val"}}
    run = write_run(folder, task, ["manual", "ptuning+finetune"], [0, 1])
    about = {"suite": "superglue", "majority": 0.5, "counts": {"train": 32, "dev": 32, "test": 50}}

    def scored(metrics: dict[str, float]) -> dict[str, float]:
        return {**metrics, "score": sum(metrics.values()) / len(metrics), "loss": 0.5, "count": 50}

    for name, metrics, base in (("RTE", ["accuracy"], 0.5), ("CB", ["accuracy", "f1"], 0.7)):
        for place, pattern in enumerate(("question", "cloze")):
            test = {metric: base + 0.2 * place - 0.1 * at for at, metric in enumerate(metrics)}
            write_job(run, name, f"manual-{pattern}", {"options": scored(test)}, **about, template=pattern)
            for seed in (0, 1):
                trained = {metric: value + 0.04 * seed for metric, value in test.items()}
                dev = 0.9 - 0.3 * place  # dev prefers the pattern that test does not
                more = {**about, "template": f"{pattern} [P]", "best_dev_score": dev, "seed": seed}
                write_job(run, name, f"ptuning+finetune-seed{seed}-{pattern}", {"options": scored(trained)}, **more)
    return run


def golden_markdown(folder: Path) -> str:
    """The report on :func:`lama_run`, with RUN for the folder that holds it and VERSION for megaptune's."""
    text = Document.of(read_runs([lama_run(folder / "lama")])).markdown(with_plots=True)
    return text.replace(str(folder), "RUN").replace(__version__, "VERSION")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        GOLDEN.write_text(golden_markdown(Path(temporary).resolve()), encoding="utf-8")
