"""The table at the end of a run: a column per method, per relation, micro and macro, with its baselines.

Built from the jobs' result files, so it can be made again at any time, also of an unfinished run.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from rich import box
from rich.table import Table

from megaptune.config import Config, Reading
from megaptune.methods import METHODS, MethodName
from megaptune.run.files import read_json, write_json, write_whole


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and its sample deviation (NaN with fewer than two seeds)."""

    mean: float
    deviation: float
    seeds: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread | None":
        if not values:
            return None
        return cls(mean(values), stdev(values) if len(values) > 1 else math.nan, len(values))

    def __str__(self) -> str:
        spread = "" if math.isnan(self.deviation) else f" ± {100 * self.deviation:.1f}"
        return f"{100 * self.mean:.1f}{spread}"

    def as_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "sd": None if math.isnan(self.deviation) else self.deviation, "seeds": self.seeds}


@dataclass(frozen=True)
class Row:
    """One relation, or an average of relations, under one reading."""

    name: str
    reading: Reading
    candidates: int | None
    test_count: int
    scores: dict[MethodName, Spread]
    majority: float
    unseen: float
    in_subject: float

    @property
    def manual(self) -> Spread | None:
        return self.scores.get("manual")

    @property
    def ptuning(self) -> Spread | None:
        return self.scores.get("ptuning")

    @property
    def gain(self) -> float | None:
        return None if self.manual is None or self.ptuning is None else self.ptuning.mean - self.manual.mean


class ResultsTable:
    """P@1 in per cent. Macro: mean over relations; micro: mean over test records. Gain: of P-tuning over manual."""

    def __init__(self, results: list[dict[str, Any]], readings: list[Reading], seeds: list[int]) -> None:
        self.results, self.readings = results, readings
        there = {"manual", "ptuning", *(result["method"] for result in results)}
        self.methods = [name for name in METHODS if name in there]
        labels = [METHODS[name].label for name in self.methods]
        self.columns = [
            "relation",
            "reading",
            "candidates",
            "test",
            "majority",
            *labels,
            "gain",
            "unseen",
            "in subject",
        ]
        tasks = list(dict.fromkeys(result["task"] for result in results))
        self.rows = [self._row(task, reading, seeds) for task in tasks for reading in readings]
        if len(tasks) > 1:
            self.rows += [
                self._average(kind, reading, tasks, seeds) for kind in ("macro", "micro") for reading in readings
            ]

    @classmethod
    def read(cls, run: Path, config: Config) -> "ResultsTable":
        files = sorted((run / "jobs").glob("*/*/result.json"), key=lambda file: _natural(file.parent))
        return cls([read_json(file) for file in files], config.scoring.evaluate_over, config.run.seeds)

    def _jobs(self, task: str, method: str) -> list[dict[str, Any]]:
        return [result for result in self.results if result["task"] == task and result["method"] == method]

    def _row(self, task: str, reading: Reading, seeds: list[int]) -> Row:
        any_job = next(result for result in self.results if result["task"] == task)
        by_method = {
            method: Spread.of([job["test"][reading]["p_at_1"] for job in self._jobs(task, method)])
            for method in self.methods
        }
        scores = {method: spread for method, spread in by_method.items() if spread is not None}
        base = any_job["baselines"]
        shares = base["majority"], base["unseen"], base["in_subject"]
        count = any_job["counts"]["test"]
        return Row(task, reading, any_job["candidates"][reading], count, scores, *shares)

    def _average(self, kind: str, reading: Reading, tasks: list[str], seeds: list[int]) -> Row:
        """Averaged over relations per seed first, so that the deviation is that of the average."""
        rows = [row for row in self.rows if row.reading == reading and row.name in tasks]
        weights = [1.0 if kind == "macro" else float(row.test_count) for row in rows]

        def average(values: list[float]) -> float:
            return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

        scores: dict[MethodName, Spread] = {}
        for method in self.methods:
            per_seed = []
            for seed in seeds if METHODS[method].trains else [None]:
                found = {
                    job["task"]: job["test"][reading]["p_at_1"]
                    for job in self.results
                    if job["method"] == method and job["seed"] == seed
                }
                if len(found) == len(tasks):
                    per_seed.append(average([found[task] for task in tasks]))
            spread = Spread.of(per_seed)
            if spread is not None:
                scores[method] = spread
        return Row(
            f"{kind} average of {len(tasks)}",
            reading,
            None,
            sum(row.test_count for row in rows),
            scores,
            average([row.majority for row in rows]),
            average([row.unseen for row in rows]),
            average([row.in_subject for row in rows]),
        )

    def _cells(self, row: Row) -> list[str]:
        return [
            row.name,
            row.reading,
            "" if row.candidates is None else str(row.candidates),
            str(row.test_count),
            f"{100 * row.majority:.1f}",
            *(str(row.scores.get(method, "")) for method in self.methods),
            "" if row.gain is None else f"{100 * row.gain:+.1f}",
            f"{100 * row.unseen:.1f}",
            f"{100 * row.in_subject:.1f}",
        ]

    def console(self) -> Table:
        """With more than two methods a line has no room for the last two baselines; results.md has them."""
        crowded = len(self.methods) > 2
        padding = (0, 0, 0, 1) if crowded else (0, 1)
        table = Table(title="test P@1, per cent", box=box.SIMPLE_HEAD, padding=padding)
        shown = len(self.columns) - (2 if crowded else 0)
        for index, name in enumerate(self.columns[:shown]):
            justify: Literal["left", "right"] = "left" if index < 2 else "right"
            table.add_column(name.replace(" + ", "\n+ "), justify=justify, no_wrap=True)
        for row in self.rows:
            table.add_row(*self._cells(row)[:shown])
        return table

    def markdown(self) -> str:
        lines = [" | ".join(("", *self.columns, "")).strip(), "| --- | --- |" + " ---: |" * (len(self.columns) - 2)]
        lines += [" | ".join(("", *self._cells(row), "")).strip() for row in self.rows]
        notes = (
            "Test P@1 in per cent, mean ± sample deviation over seeds, at the epoch that was best on dev. *answers*: "
            "only the relation's own answers compete; *word_list*: the task's word list; *vocabulary*: every token. "
            "*majority*: always the commonest training answer. *unseen*: test answers that no training record has. "
            "*in subject*: test answers that stand inside the subject. *FT*: the LM itself is tuned. *gain*: of "
            "P-tuning over manual."
        )
        return "\n".join([*lines, "", notes, ""])

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {
                "relation": row.name,
                "reading": row.reading,
                "candidates": row.candidates,
                "test": row.test_count,
                **{name: row.scores[name].as_json() if name in row.scores else None for name in self.methods},
                "gain": row.gain,
                "majority": row.majority,
                "unseen": row.unseen,
                "in_subject": row.in_subject,
            }
            for row in self.rows
        ]

    def write(self, folder: Path) -> None:
        """results.json, results.md and the full figures of every job beside each other."""
        write_json(folder / "results.json", {"table": self.as_json(), "jobs": self.results})
        write_whole(folder / "results.md", self.markdown())


def _natural(folder: Path) -> tuple[int, str, str]:
    task = folder.parent.name
    return (int(task[1:]) if task[1:].isdecimal() else 0, task, folder.name)
