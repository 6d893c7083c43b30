"""What a finished job on facts leaves: its figures under every reading, and a line for every prediction."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megaptune.baselines import baselines, easy
from megaptune.config import LONG_ANSWERS, Reading
from megaptune.evaluation import Outcome
from megaptune.examples import EncodedTask, PreparedTask
from megaptune.jobs import Job
from megaptune.long_answers import BEST, LongOutcome
from megaptune.preparation import PreparedRun
from megaptune.prompts.verbalizer import AnswerTokens
from megaptune.run.files import write_json, write_whole
from megaptune.run.monitor import Monitor


def finish_facts(
    job: Job,
    outcomes: dict[Reading, Outcome],
    long: LongOutcome | None,
    run: PreparedRun,
    vocabulary_size: int,
    monitor: Monitor,
    extra: dict[str, Any],
) -> None:
    """Write all of it, the result last; ``outcomes`` are those of the test examples, ``long`` that of the answers of
    any number of tokens."""
    task, encoded, config = job.task, job.encoded, run.config
    assert isinstance(task, PreparedTask)
    assert isinstance(encoded, EncodedTask)
    data, template, folder = task.data, encoded.template.text, job.folder
    figures: dict[Reading, dict[str, Any]] = {reading: asdict(o.figures) for reading, o in outcomes.items()}
    other_baselines = _baselines_of(encoded, outcomes, task)
    parts: dict[str, dict[str, float]] = {}
    if long is not None and task.long is not None:
        figures[LONG_ANSWERS] = long.figures
        other_baselines[LONG_ANSWERS] = asdict(baselines(task.long.data))
        parts = {
            "one_token": long.among(not several for several in long.regained).figures,
            "regained": long.among(long.regained).figures,
        }
        _write_lines(folder / "predictions_multi.jsonl", _long_predictions(encoded, long, task.long.answers))
    lines = _predictions(encoded, outcomes[config.scoring.select_on], run.tokenizer)
    _write_lines(folder / "predictions.jsonl", lines)
    for reading, values in figures.items():
        monitor.record("test", job.name, extra.get("steps", 0), {"reading": reading, **values})
    shown = lines[: config.monitor.sample_predictions]
    rows = "\n".join(f"| {p['subject']} | {p['answer']} | {p['predicted']} | {p['rank']} |" for p in shown)
    monitor.text(job.name, "predictions", f"| subject | answer | predicted | rank |\n| --- | --- | --- | --- |\n{rows}")
    monitor.text(job.name, "config", "```json\n" + config.model_dump_json(indent=2) + "\n```")
    train, seed = config.train, -1 if job.seed is None else job.seed
    rate = extra.get("learning_rate", train.learning_rate)
    settings = {"method": job.method_name, "task": data.name, "seed": seed, "template": template}
    settings |= {"encoder": config.encoder(job.method)}
    settings |= {"learning_rate": rate, "lm_learning_rate": train.lm_learning_rate}
    monitor.hyperparameters(job.name, settings, {r: v["p_at_1"] for r, v in figures.items()})
    monitor.flush()
    write_json(
        folder / "result.json",
        {
            "task": data.name,
            "label": data.label,
            "type": data.type,
            "method": job.method_name,
            "seed": job.seed,
            "template": template,
            "test": figures,
            "baselines": asdict(baselines(data)),
            "baselines_of": other_baselines,
            **({LONG_ANSWERS: parts} if parts else {}),
            "difficulty": _by_difficulty(outcomes, task),
            "counts": {split: len(records) for split, records in data.splits.items()},
            "dropped": data.dropped,
            "left_out": task.left_out,
            "candidates": {reading: task.num_candidates(reading, vocabulary_size) for reading in figures},
            **extra,
        },
    )
    line = "  ".join(f"{reading} {100 * values['p_at_1']:.1f}" for reading, values in figures.items())
    monitor.say(f"{job.name}  test P@1: {line}")


def _predictions(encoded: EncodedTask, outcome: Outcome, tokenizer: Any) -> list[dict[str, Any]]:
    """Rank 1 is a hit; None where the answer is no candidate."""
    words = [tokenizer.decode([token]).strip() for token in outcome.prediction.tolist()]
    return [
        {
            "subject": example.record.subject,
            "answer": example.record.answer,
            "predicted": word,
            "rank": rank + 1 if rank >= 0 else None,
        }
        for example, word, rank in zip(encoded.test, words, outcome.rank.tolist(), strict=True)
    ]


def _long_predictions(encoded: EncodedTask, outcome: LongOutcome, answers: AnswerTokens) -> list[dict[str, Any]]:
    """The best answer with its log-probability; the rank is None where the right one is not among the ten best."""
    return [
        {
            "subject": example.record.subject,
            "answer": example.record.answer,
            "predicted": answers.words[best[0][1]][0],
            "log_probability": round(best[0][0], 4),
            "rank": rank + 1 if rank < BEST else None,
        }
        for example, best, rank in zip(encoded.long, outcome.best, outcome.rank, strict=True)
    ]


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _baselines_of(
    encoded: EncodedTask, outcomes: dict[Reading, Outcome], task: PreparedTask
) -> dict[Reading, dict[str, float]]:
    """The baselines of readings that do not count every test record."""
    found = {}
    for reading, outcome in outcomes.items():
        counted = (outcome.rank >= 0).tolist()
        if not all(counted):
            records = [e.record for e, counts in zip(encoded.test, counted, strict=True) if counts]
            found[reading] = asdict(baselines(task.data, records))
    return found


def _by_difficulty(outcomes: dict[Reading, Outcome], task: PreparedTask) -> dict[str, dict[str, Any]]:
    """Figures of the easy and of the hard test records, under every reading that has some."""
    flags = torch.tensor(easy(task.data))
    found: dict[str, dict[str, Any]] = {}
    for part, members in (("easy", flags), ("hard", ~flags)):
        figures = {reading: outcome.of(members).figures for reading, outcome in outcomes.items()}
        records = [r for r, is_member in zip(task.data.splits["test"], members.tolist(), strict=True) if is_member]
        if records:
            counted = {reading: asdict(values) for reading, values in figures.items() if values.count}
            found[part] = {"test": counted, "baselines": asdict(baselines(task.data, records))}
    return found
