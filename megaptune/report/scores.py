"""Means, deviations and averages over a run's finished jobs. Nothing here chooses by a test figure."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

from megaptune.report.labels import method_label, ordered
from megaptune.report.runs import JobRecord, Run
from megaptune.results.table import CHOSEN, Spread

OVER_PATTERNS = "mean over patterns"
"""A line of a method with several variants: their mean. Its cell's deviation is over the variants' means, an average's
over seeds."""
Measure = Callable[[JobRecord], float | None]
"""A figure of a job, or None where it has none."""


@dataclass(frozen=True)
class Line:
    """What stands in one row or bar: a method, and its variant in a sweep ("" without one, CHOSEN or OVER_PATTERNS)."""

    method: str
    variant: str = ""

    @property
    def label(self) -> str:
        return method_label(self.method) + (f", {self.variant}" if self.variant else "")


@dataclass(frozen=True)
class Cell:
    """A spread over seeds, and of how many tasks and seeds it could be taken."""

    spread: Spread
    tasks: int
    of_tasks: int
    of_seeds: int

    @property
    def whole(self) -> bool:
        return self.tasks == self.of_tasks and self.spread.seeds == self.of_seeds

    def __str__(self) -> str:
        lacking = [f"{self.tasks} of {self.of_tasks} tasks"] if self.tasks < self.of_tasks else []
        lacking += [f"{self.spread.seeds} of {self.of_seeds} seeds"] if self.spread.seeds < self.of_seeds else []
        return str(self.spread) + (f" ({', '.join(lacking)})" if lacking else "")


class Scores:
    """Of one run, restricted to ``tasks`` (default: all of it)."""

    def __init__(self, run: Run, tasks: list[str] | None = None) -> None:
        self.run = run
        self.tasks = run.tasks if tasks is None else tasks
        self.all = [job for job in run.jobs if job.task in self.tasks]
        self.jobs = [job for job in self.all if job.status == "finished"]

    @property
    def readings(self) -> list[str]:
        """In the order of the configuration."""
        there = dict.fromkeys(reading for job in self.jobs for reading in job.test)
        stated = [name for name in (self.run.setting("scoring.evaluate_over") or []) if name in there]
        return list(dict.fromkeys([*stated, *there]))

    @property
    def headline(self) -> str:
        """The reading that plots show: the one that epochs were chosen by."""
        readings = self.readings
        return self.run.headline if self.run.headline in readings or not readings else readings[0]

    @property
    def lines(self) -> list[Line]:
        """Methods in order; of a swept one its variants, then dev's choice where it has dev figures, and their mean."""
        found = []
        for method in ordered([job.method for job in self.all]):
            variants = self.variants(method)
            swept = len(variants) > 1
            found += [Line(method, variant) for variant in variants if variant or not swept]
            found += [Line(method, CHOSEN)] if swept and self._has_dev(method) else []
            found += [Line(method, OVER_PATTERNS)] if swept else []
        return found

    @property
    def shown(self) -> list[Line]:
        """A line for each method, as plots show it: of a swept one dev's choice, or the mean without dev figures."""
        last = {line.method: line for line in self.lines}
        return [Line(method, CHOSEN) if Line(method, CHOSEN) in self.lines else last[method] for method in last]

    def _has_dev(self, method: str) -> bool:
        return any(job.dev is not None for job in self.jobs if job.method == method)

    def variants(self, method: str) -> list[str]:
        return list(dict.fromkeys(job.variant for job in self.all if job.method == method))

    def of_seeds(self, method: str) -> int:
        """How many jobs a cell of this method has when the run is complete."""
        return max(1, len({job.seed for job in self.all if job.method == method}))

    def dev_choice(self, task: str, method: str) -> str | None:
        """The variant with the best mean dev figure over the seeds, or the only one; None while none has a figure."""
        variants = list(dict.fromkeys(job.variant for job in self.all if (job.task, job.method) == (task, method)))
        if len(variants) == 1:
            return variants[0]
        found: dict[str, list[float]] = {}
        for job in self.jobs:
            if job.task == task and job.method == method and job.dev is not None:
                found.setdefault(job.variant, []).append(job.dev)
        return max(found, key=lambda variant: mean(found[variant])) if found else None

    def by_seed(self, task: str, line: Line, measure: Measure) -> dict[int | None, float]:
        every = line.variant == OVER_PATTERNS
        wanted = self.dev_choice(task, line.method) if line.variant == CHOSEN else line.variant
        values: dict[int | None, list[float]] = {}
        for job in self.jobs:
            if (job.task, job.method) == (task, line.method) and (every or job.variant == wanted):
                value = measure(job)
                if value is not None:
                    values.setdefault(job.seed, []).append(value)
        return {seed: mean(found) for seed, found in values.items()}

    def cell(self, task: str, line: Line, measure: Measure) -> Cell | None:
        if line.variant == OVER_PATTERNS:
            return self._over_patterns(task, line.method, measure)
        spread = Spread.of(list(self.by_seed(task, line, measure).values()))
        return None if spread is None else Cell(spread, 1, 1, self.of_seeds(line.method))

    def _over_patterns(self, task: str, method: str, measure: Measure) -> Cell | None:
        found = [self.by_seed(task, Line(method, variant), measure) for variant in self.variants(method)]
        spread = Spread.of([mean(values.values()) for values in found if values])
        return None if spread is None else Cell(spread, 1, 1, spread.seeds)

    def average(self, tasks: list[str], line: Line, measure: Measure, micro: str | None = None) -> Cell | None:
        """Averaged over tasks per seed first, so that the deviation is that of the average.

        :param micro: the reading by whose number of records tasks weigh; None: all alike.

        Seeds that have all tasks count; where none has, the tasks that every seed begun has. The cell says so.
        """
        by_task = {task: self.by_seed(task, line, measure) for task in tasks}
        seeds = list(dict.fromkeys(seed for values in by_task.values() for seed in values))
        if not seeds:
            return None
        used = tasks
        whole = [seed for seed in seeds if all(seed in by_task[task] for task in tasks)]
        if not whole:
            used = [task for task in tasks if all(seed in by_task[task] for seed in seeds)]
            whole = seeds if used else []
        weights = [1.0 if micro is None else float(self.test_count(task, micro) or 0) for task in used]
        if not whole or not sum(weights):
            return None
        sums = [
            math.fsum(w * by_task[task][seed] for w, task in zip(weights, used, strict=True)) / sum(weights)
            for seed in whole
        ]
        spread = Spread.of(sums)
        assert spread is not None, "there is a seed"
        return Cell(spread, len(used), len(tasks), self.of_seeds(line.method))

    def test_count(self, task: str, reading: str = "") -> int | None:
        counts = (job.test_count(reading) for job in self.jobs if job.task == task)
        return next((count for count in counts if count is not None), None)

    def about(self, task: str, key: str, default: object = "") -> object:
        """What every result of a task states alike: its label, type, baselines."""
        return next((job.result[key] for job in self.jobs if job.task == task and key in job.result), default)


def figure(reading: str, metric: str) -> Measure:
    """``metric`` under ``reading``."""
    return lambda job: job.test.get(reading, {}).get(metric)
