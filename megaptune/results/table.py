"""The table at the end of a run: a column per method, per relation, micro and macro, also by relation type, with its
baselines; the variants of a sweep have rows of their own.

Built from the jobs' result files, so it can be made again at any time, also of an unfinished run.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from rich import box
from rich.table import Table

from megaptune.config import LONG_ANSWERS, Config, Reading
from megaptune.methods import METHODS, MethodName
from megaptune.run.files import read_json, write_json, write_whole

LONG_PARTS = ("one_token", "regained")
CHOSEN = "dev's choice"
"""In averages over a sweep: every relation's variant that is the best on dev."""
EASY = (
    "*easy*: the answer is train's commonest or stands in the subject, so that no fact need be known to give it; "
    "*hard*: all others."
)


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
    """One relation, or an average of relations, under one reading.

    variant: of a sweep, else empty. dev_choice: whether the relation's dev split prefers this variant to its others.
    fewer: of an average, the number of relations under a method that some have no prompt for.
    """

    name: str
    reading: Reading
    candidates: int | None
    test_count: int
    scores: dict[MethodName, Spread]
    majority: float
    unseen: float
    in_subject: float
    variant: str = ""
    dev_choice: bool = False
    fewer: dict[MethodName, int] = field(default_factory=dict)

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

    def __init__(
        self, results: list[dict[str, Any]], readings: list[Reading], seeds: list[int], headline: Reading = ""
    ) -> None:
        self.results, self.readings, self.headline = results, readings, headline
        there = {"manual", "ptuning", *(result["method"] for result in results)}
        self.methods = [name for name in METHODS if name in there]
        self.seeds = seeds
        self.variants = list(dict.fromkeys(r["variant"] for r in results if r.get("variant")))
        labels = [METHODS[name].label for name in self.methods]
        swept = ["variant"] if self.variants else []
        self.columns = [
            "relation",
            *swept,
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
        self.chosen = {task: self._dev_choice(task) for task in tasks}
        self.left_out = {result["task"]: result.get("left_out", {}) for result in results}
        self.rows = [
            self._row(task, reading, variant)
            for task in tasks
            for variant in self.variants or [""]
            for reading in readings
            if self._any_job(task, reading)
        ]
        groups = [("", tasks), *self._types(tasks)] if len(tasks) > 1 else []
        self.rows += [
            self._average(f"{kind} average of {len(read)}{label}", kind, reading, read, variant)
            for label, members in groups
            for kind in ("macro", "micro")
            for variant in ([*self.variants, CHOSEN] if self.variants else [""])
            for reading in readings
            if (read := [task for task in members if self._any_job(task, reading)])
        ]

    @classmethod
    def read(cls, run: Path, config: Config) -> "ResultsTable":
        files = sorted((run / "jobs").glob("*/*/result.json"), key=lambda file: _natural(file.parent))
        scoring = config.scoring
        return cls([read_json(file) for file in files], scoring.evaluate_over, config.run.seeds, scoring.select_on)

    def by_difficulty(self) -> "ResultsTable | None":
        """The same of easy and hard facts under the headline reading, in the place of readings."""
        results = []
        for result in self.results:
            parts = {name: part for name, part in result.get("difficulty", {}).items() if self.headline in part["test"]}
            results.append(
                {
                    **result,
                    "test": {name: part["test"][self.headline] for name, part in parts.items()},
                    "baselines_of": {name: part["baselines"] for name, part in parts.items()},
                    "candidates": dict.fromkeys(parts, result["candidates"][self.headline]),
                }
            )
        table = ResultsTable(results, ["easy", "hard"], self.seeds)
        return table if table.rows else None

    def _types(self, tasks: list[str]) -> list[tuple[str, list[str]]]:
        """Relations by type, where there are several types."""
        types = {result["task"]: result.get("type", "") for result in self.results}
        names = sorted({types[task] for task in tasks} - {""})
        found = [(f", type {name}", [task for task in tasks if types[task] == name]) for name in names]
        return found if len(names) > 1 else []

    def _jobs(self, task: str, method: str, variant: str, reading: Reading) -> list[dict[str, Any]]:
        """A method that is not swept has the same jobs for every variant."""
        return [
            result
            for result in self.results
            if (result["task"], result["method"]) == (task, method)
            and result.get("variant", "") in ("", variant)
            and reading in result["test"]
        ]

    def _any_job(self, task: str, reading: Reading) -> dict[str, Any] | None:
        """A result that has the reading; what it says of the task, all of them do."""
        found = (result for result in self.results if result["task"] == task and reading in result["test"])
        return next(found, None)

    def _dev_choice(self, task: str) -> str:
        """The variant whose prompts did best on dev, by the mean over seeds of each one's best epoch."""
        scores = {}
        for variant in self.variants:
            found = [
                result["best_dev_p_at_1"]
                for result in self.results
                if result["task"] == task and result.get("variant") == variant
            ]
            if found:
                scores[variant] = mean(found)
        return max(scores, key=lambda variant: scores[variant]) if scores else ""

    def _row(self, task: str, reading: Reading, variant: str) -> Row:
        any_job = self._any_job(task, reading)
        assert any_job is not None
        by_method = {
            method: Spread.of([job["test"][reading]["p_at_1"] for job in self._jobs(task, method, variant, reading)])
            for method in self.methods
        }
        scores = {method: spread for method, spread in by_method.items() if spread is not None}
        base = any_job.get("baselines_of", {}).get(reading, any_job["baselines"])
        shares = base["majority"], base["unseen"], base["in_subject"]
        count = any_job["test"][reading].get("count", any_job["counts"]["test"])
        candidates = any_job["candidates"][reading]
        choice = bool(variant) and variant == self.chosen[task]
        return Row(task, reading, candidates, count, scores, *shares, variant, choice)

    def _average(self, name: str, kind: str, reading: Reading, tasks: list[str], variant: str) -> Row:
        """Averaged over relations per seed first, so that the deviation is that of the average."""
        first = self.variants[0] if self.variants else ""
        rows = [row for row in self.rows if (row.reading, row.variant) == (reading, first) and row.name in tasks]
        weights = {row.name: 1.0 if kind == "macro" else float(row.test_count) for row in rows}

        def average(values: dict[str, float]) -> float:
            return sum(weights[task] * value for task, value in values.items()) / sum(weights[task] for task in values)

        scores: dict[MethodName, Spread] = {}
        fewer: dict[MethodName, int] = {}
        for method in self.methods:
            there = [row.name for row in rows if method not in self.left_out[row.name]]
            per_seed = []
            for seed in self.seeds if METHODS[method].trains else [None]:
                found = {
                    job["task"]: job["test"][reading]["p_at_1"]
                    for task in there
                    for job in self._jobs(task, method, self.chosen[task] if variant == CHOSEN else variant, reading)
                    if job["seed"] == seed
                }
                if there and len(found) == len(there):
                    per_seed.append(average(found))
            spread = Spread.of(per_seed)
            if spread is not None:
                scores[method] = spread
                fewer |= {method: len(there)} if len(there) < len(tasks) else {}
        return Row(
            name,
            reading,
            None,
            sum(row.test_count for row in rows),
            scores,
            average({row.name: row.majority for row in rows}),
            average({row.name: row.unseen for row in rows}),
            average({row.name: row.in_subject for row in rows}),
            variant,
            fewer=fewer,
        )

    def _cells(self, row: Row) -> list[str]:
        return [
            row.name,
            *([row.variant + (" *" if row.dev_choice else "")] if self.variants else []),
            row.reading,
            "" if row.candidates is None else str(row.candidates),
            str(row.test_count),
            f"{100 * row.majority:.1f}",
            *(self._score(row, method) for method in self.methods),
            "" if row.gain is None else f"{100 * row.gain:+.1f}",
            f"{100 * row.unseen:.1f}",
            f"{100 * row.in_subject:.1f}",
        ]

    def _score(self, row: Row, method: MethodName) -> str:
        few = f" ({row.fewer[method]})" if method in row.fewer else ""
        return f"{row.scores.get(method, '')}{few}"

    def console(self) -> Table:
        """With more than two methods a line has no room for the last two baselines; results.md has them."""
        crowded = len(self.methods) > 2
        padding = (0, 0, 0, 1) if crowded else (0, 1)
        table = Table(title="test P@1, per cent", box=box.SIMPLE_HEAD, padding=padding)
        shown = len(self.columns) - (2 if crowded else 0)
        for index, name in enumerate(self.columns[:shown]):
            justify: Literal["left", "right"] = "left" if index < (3 if self.variants else 2) else "right"
            table.add_column(name.replace(" + ", "\n+ "), justify=justify, no_wrap=True)
        for row in self.rows:
            table.add_row(*self._cells(row)[:shown])
        return table

    def markdown(self) -> str:
        notes = (
            "Test P@1 in per cent, mean ± sample deviation over seeds, at the epoch that was best on dev. *answers*: "
            "only the relation's own answers compete; *word_list*: the task's word list; *vocabulary*: every token; "
            "any other reading: the word list of that name, and the records whose answer is on it. "
            "*majority*: always the commonest training answer. *unseen*: test answers that no training record has. "
            "*in subject*: test answers that stand inside the subject. *FT*: the LM itself is tuned. *gain*: of "
            "P-tuning over manual."
        )
        if self.variants:
            notes += f" \\*: the variant with the best dev P@1; *{CHOSEN}*: every relation with that of its own."
        notes += self._regained()
        lost = [
            f"{METHODS[method].label} without {task}: {why}"
            for task, found in self.left_out.items()
            for method, why in found.items()
        ]
        if lost:
            notes += " A number in brackets is that of the relations averaged. " + ". ".join(lost) + "."
        return "\n".join([*self.markdown_rows(), "", notes, ""])

    def _regained(self) -> str:
        """What the reading of whole answers means, and how many records it counts that others do not."""
        jobs = {result["task"]: result[LONG_ANSWERS] for result in self.results if LONG_ANSWERS in result}
        if not jobs:
            return ""
        counts = {name: sum(parts[name].get("count", 0) for parts in jobs.values()) for name in LONG_PARTS}
        return (
            f" *{LONG_ANSWERS}*: all answers of the relation by the likelihood of all their tokens; of its "
            f"{sum(counts.values())} test records {counts['regained']} have an answer of several tokens, which other "
            "readings leave out."
        )

    def markdown_rows(self) -> list[str]:
        words = 3 if self.variants else 2
        rule = "|" + " --- |" * words + " ---: |" * (len(self.columns) - words)
        return [
            " | ".join(("", *self.columns, "")).strip(),
            rule,
            *(" | ".join(("", *self._cells(row), "")).strip() for row in self.rows),
        ]

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {
                "relation": row.name,
                **({"variant": row.variant, "dev_choice": row.dev_choice} if self.variants else {}),
                "reading": row.reading,
                "candidates": row.candidates,
                "test": row.test_count,
                **{name: row.scores[name].as_json() if name in row.scores else None for name in self.methods},
                **({"fewer_relations": row.fewer} if row.fewer else {}),
                "gain": row.gain,
                "majority": row.majority,
                "unseen": row.unseen,
                "in_subject": row.in_subject,
            }
            for row in self.rows
        ]

    def write(self, folder: Path) -> None:
        """results.json, results.md and the full figures of every job beside each other."""
        parts = self.by_difficulty()
        tables = {"table": self.as_json(), "difficulty": [] if parts is None else parts.as_json()}
        write_json(folder / "results.json", {**tables, "jobs": self.results})
        text = self.markdown()
        if parts is not None:
            text += "\n".join(
                ["", f"## Easy and hard facts ({self.headline})", "", EASY, "", *parts.markdown_rows(), ""]
            )
        write_whole(folder / "results.md", text)


def _natural(folder: Path) -> tuple[int, str, str]:
    task = folder.parent.name
    return (int(task[1:]) if task[1:].isdecimal() else 0, task, folder.name)
