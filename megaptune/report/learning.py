"""Learning curves: training loss and the dev figure by epoch, mean and deviation over seeds."""

import math
from collections.abc import Callable
from statistics import mean

from megaptune.report import plots
from megaptune.report.blocks import Block, Plot, Section, Text
from megaptune.report.labels import ordered
from megaptune.report.provenance import notes
from megaptune.report.runs import Curve, JobRecord, Run
from megaptune.report.scores import Line
from megaptune.results.table import Spread

MOST_TASKS = 42
"""Panels of one image; a run of more tasks shows the first ones and says so."""

Points = dict[float, float]


def sections(runs: list[Run]) -> list[Section]:
    """None where no run has recorded a training step."""
    blocks: list[Block] = []
    for place, run in enumerate(runs):
        trained = [job for job in run.jobs if job.name in run.curves]
        if trained:
            blocks += _of_run(run, trained, f"curves-{place + 1}")
    if not blocks:
        return []
    told = (
        "Mean over the seeds that have come so far; the band is one sample deviation. Training losses are means over "
        "a quarter of an epoch."
    )
    return [Section("Learning curves", [Text([told]), *blocks])]


def _of_run(run: Run, jobs: list[JobRecord], name: str) -> list[Block]:
    tasks = list(dict.fromkeys(job.task for job in jobs))
    metric = dev_metric(run)
    share = metric != "loss"
    called = "dev " + {"p_at_1": "P@1"}.get(metric, metric)
    shown = f"{called}, per cent" if share else called
    by_epoch = all(run.curves[job.name].steps_per_epoch for job in jobs)

    def tracks(mine: list[JobRecord], points_of: Callable[[Curve], Points]) -> list[plots.Track]:
        found = [_track(run, mine, line, points_of) for line in _lines(mine)]
        return [track for track in found if track.points]

    def overall() -> bytes:
        over = "mean over tasks" if len(tasks) > 1 else tasks[0]
        loss = tracks(jobs, lambda curve: _loss(curve, by_epoch))
        dev = tracks(jobs, lambda curve: _dev(curve, metric))
        return plots.panels(
            [
                plots.Panel(f"training loss, {over}", "epoch" if by_epoch else "step", "loss", loss, percent=False),
                plots.Panel(f"{called}, {over}", "epoch", shown, dev, percent=share),
            ]
        )

    def by_task() -> bytes:
        listed = []
        for task in tasks[:MOST_TASKS]:
            mine = [job for job in jobs if job.task == task]
            listed.append(plots.Panel(task, "epoch", shown, tracks(mine, lambda curve: _dev(curve, metric)), share))
        return plots.panels(listed, across=3)

    found: list[Block] = [Plot(name, f"Learning curves of {run.name}", overall)]
    if len(tasks) > 1 and any(run.curves[job.name].dev for job in jobs):
        more = f", the first {MOST_TASKS} of {len(tasks)}" if len(tasks) > MOST_TASKS else ""
        found.append(Plot(f"{name}-tasks", f"Dev curves of {run.name} by task{more}", by_task))
    return [*found, Text(notes([run]), bullets=True)]


def dev_metric(run: Run) -> str:
    """What the epoch was chosen by: P@1, or a SuperGLUE task's score; else the first figure that is no loss."""
    names = dict.fromkeys(name for curve in run.curves.values() for point in curve.dev for name in point.values)
    figures = [name for name in names if name not in ("step", "epoch", "loss", "time_s")]
    chosen_by = [name for name in ("p_at_1", "score") if name in figures]
    return next(iter([*chosen_by, *figures]), "loss")


def _lines(jobs: list[JobRecord]) -> list[Line]:
    methods = ordered([job.method for job in jobs])
    there = dict.fromkeys(Line(job.method, job.variant) for job in jobs)
    return sorted(there, key=lambda line: methods.index(line.method))


def _track(run: Run, jobs: list[JobRecord], line: Line, points_of: Callable[[Curve], Points]) -> plots.Track:
    """Averaged over tasks per seed, then over seeds, at the places that all tasks of a seed have."""
    seeds: dict[int | None, list[Points]] = {}
    for job in jobs:
        if (job.method, job.variant) == (line.method, line.variant):
            seeds.setdefault(job.seed, []).append(points_of(run.curves[job.name]))
    averaged = []
    for curves in seeds.values():
        shared = set.intersection(*(set(points) for points in curves))
        averaged.append({x: mean(points[x] for points in curves) for x in shared})
    spreads = {x: Spread.of([points[x] for points in averaged if x in points]) for points in averaged for x in points}
    listed = [(x, spread) for x, spread in sorted(spreads.items()) if spread is not None]
    variants = list(dict.fromkeys(job.variant for job in run.jobs if job.method == line.method))
    return plots.Track(line.label, line.method, variants.index(line.variant), listed)


def _dev(curve: Curve, metric: str) -> Points:
    passes = [point for point in curve.dev if metric in point.values]
    return {float(point.epoch): point.values[metric] for point in passes if point.epoch is not None}


def _loss(curve: Curve, by_epoch: bool) -> Points:
    """Means over each quarter of an epoch, at its end; by step where an epoch's length is not known yet."""
    length = curve.steps_per_epoch if by_epoch else None
    bins: dict[float, list[float]] = {}
    for point in curve.train:
        if "loss" in point.values:
            x = float(point.step) if length is None else math.ceil(4 * point.step / length) / 4
            bins.setdefault(x, []).append(point.values["loss"])
    return {x: mean(losses) for x, losses in bins.items()}
