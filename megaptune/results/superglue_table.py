"""SuperGLUE's table at the end of a run: a row for each task and metric, a column for each method.

A task's score is the mean of its metrics, the last row is the mean of the scores. A cell is a mean over seeds and,
where a task is read under several patterns, over those; then a table of the patterns follows. Built from the jobs'
result files, so it can be made again at any time, also of an unfinished run.
"""

from pathlib import Path
from statistics import mean
from typing import Any

from rich import box
from rich.table import Table

from megaptune.config import Config
from megaptune.methods import METHODS, MethodName
from megaptune.patterns import LABELS
from megaptune.results.table import Spread
from megaptune.run.files import read_json, write_json, write_whole
from megaptune.tasks.superglue.metrics import METRICS

SCORE = "score"


class SuperGlueTable:
    """Figures in per cent, between 0 and 1 in JSON."""

    def __init__(self, results: list[dict[str, Any]], seeds: list[int]) -> None:
        self.results, self.seeds = results, seeds
        methods = {result["method"] for result in results}
        self.methods: list[MethodName] = [name for name in METHODS if name in methods]
        self.tasks = [task for task in LABELS if any(result["task"] == task for result in results)]
        self.columns = ["task", "metric", "test", "majority", *(METHODS[name].label for name in self.methods)]
        self.rows = [row for task in self.tasks for row in self._rows(task)]
        if len(self.tasks) > 1:
            self.rows.append(self._mean())
        self.patterns = [row for task in self.tasks for row in self._patterns(task)]

    @classmethod
    def read(cls, run: Path, config: Config) -> "SuperGlueTable":
        files = sorted((run / "jobs").glob("*/*/result.json"))
        return cls([read_json(file) for file in files], config.run.seeds)

    def _jobs(self, task: str, method: str) -> list[dict[str, Any]]:
        """Of several learning rates, a pattern's jobs at the one that dev prefers, by the mean over seeds."""
        found = [result for result in self.results if result["task"] == task and result["method"] == method]
        kept = []
        for pattern in dict.fromkeys(job["pattern"] for job in found):
            jobs = [job for job in found if job["pattern"] == pattern]
            by_rate = {rate: [j for j in jobs if _rate(j) == rate] for rate in map(_rate, jobs)}
            kept += max(by_rate.values(), key=lambda alike: mean(job.get("best_dev_score", 0.0) for job in alike))
        return kept

    def _rows(self, task: str) -> list[dict[str, Any]]:
        """One for each metric; where there are several, their mean too."""
        names = METRICS[task]  # type: ignore[index]
        any_job = next(result for result in self.results if result["task"] == task)
        rows = []
        for name in (*names, *([SCORE] if len(names) > 1 else [])):
            cells = {
                method: Spread.of([_figure(job, name) for job in self._jobs(task, method)]) for method in self.methods
            }
            head = len(names) == 1 or name == SCORE
            row: dict[str, Any] = {"task": task, "metric": name, "test": any_job["counts"]["test"]}
            row["majority"] = any_job["majority"] if head else None
            rows.append(row | {method: None if cell is None else cell.as_json() for method, cell in cells.items()})
        return rows

    def _mean(self) -> dict[str, Any]:
        """The mean of the tasks' scores, for every seed first, so that the deviation is that of the mean."""
        row: dict[str, Any] = {"task": f"mean of {len(self.tasks)}", "metric": SCORE, "test": None, "majority": None}
        for method in self.methods:
            per_seed = []
            for seed in self.seeds if METHODS[method].trains else [None]:
                scores = {
                    task: [job["score"] for job in self._jobs(task, method) if job["seed"] == seed]
                    for task in self.tasks
                }
                if all(scores.values()):
                    per_seed.append(sum(sum(found) / len(found) for found in scores.values()) / len(self.tasks))
            spread = Spread.of(per_seed)
            row[method] = None if spread is None else spread.as_json()
        return row

    def _patterns(self, task: str) -> list[dict[str, Any]]:
        """Every pattern of a method that reads the task under several."""
        rows = []
        for method in self.methods:
            jobs = self._jobs(task, method)
            names = list(dict.fromkeys(job["pattern"] for job in jobs))
            for name in names if len(names) > 1 else []:
                found = [job for job in jobs if job["pattern"] == name]
                spread = Spread.of([job["score"] for job in found])
                dev = Spread.of([job["best_dev_score"] for job in found if "best_dev_score" in job])
                rows.append(
                    {
                        "task": task,
                        "method": method,
                        "pattern": name,
                        "template": found[0]["template"],
                        "score": None if spread is None else spread.as_json(),
                        "dev": None if dev is None else dev.as_json(),
                    }
                )
        return rows

    # -- words -------------------------------------------------------------------------------------------------------

    def _cells(self, row: dict[str, Any]) -> list[str]:
        return [
            row["task"],
            row["metric"],
            "" if row["test"] is None else str(row["test"]),
            "" if row["majority"] is None else f"{100 * row['majority']:.1f}",
            *(_told(row[method]) for method in self.methods),
        ]

    def console(self) -> Table:
        table = Table(title="SuperGLUE, test figures in per cent", box=box.SIMPLE_HEAD, padding=(0, 1))
        for index, name in enumerate(self.columns):
            table.add_column(name.replace(" + ", "\n+ "), justify="left" if index < 2 else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*self._cells(row))
        return table

    def markdown(self) -> str:
        rule = "| --- | --- |" + " ---: |" * (len(self.columns) - 2)
        lines = [_line(self.columns), rule, *(_line(self._cells(row)) for row in self.rows)]
        notes = (
            "Per cent, mean ± sample deviation over seeds (and patterns, where a task has several), at the epoch that "
            "was best on dev; nothing was chosen on the records reported. *score*: the mean of a task's metrics. "
            "*majority*: the score of always answering train's commonest label. *FT*: the LM itself is tuned, alone "
            "under a classification head."
        )
        if any(METHODS[method].ensemble for method in self.methods):
            notes += (
                " *PET*, *iPET*: such a head learned labels that models of several patterns gave unlabelled records."
            )
        lines += ["", notes]
        if self.patterns:
            lines += [
                "",
                "| task | method | pattern | score | dev | template |",
                "| --- | --- | --- | ---: | ---: | --- |",
            ]
            lines += [
                _line(
                    [
                        row["task"],
                        METHODS[row["method"]].label,
                        row["pattern"],
                        _told(row["score"]),
                        _told(row["dev"]),
                        f"`{row['template']}`",
                    ]
                )
                for row in self.patterns
            ]
        return "\n".join([*lines, ""])

    def as_json(self) -> list[dict[str, Any]]:
        return self.rows

    def write(self, folder: Path) -> None:
        """results.json, results.md and the full figures of every job beside each other."""
        write_json(folder / "results.json", {"table": self.rows, "patterns": self.patterns, "jobs": self.results})
        write_whole(folder / "results.md", self.markdown())


def _rate(job: dict[str, Any]) -> float | None:
    return job.get("learning_rate")


def _figure(job: dict[str, Any], name: str) -> float:
    return float(job["score"] if name == SCORE else job["metrics"][name])


def _told(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    return f"{100 * cell['mean']:.1f}" + ("" if cell["sd"] is None else f" ± {100 * cell['sd']:.1f}")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
