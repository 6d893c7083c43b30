"""Prompt variance: how far a method's figure depends on the words around the task.

A prompt is a template as it was used. Those of all runs on the same backbone and test data stand together, so that a
sweep over templates, patterns of one run and several runs with a manual prompt each are all the same thing here.
"""

from dataclasses import dataclass
from statistics import mean, stdev

from megaptune.report import plots
from megaptune.report.blocks import Block, CellText, Column, Plot, Section, Table, Text
from megaptune.report.labels import method_label, ordered
from megaptune.report.paper import paper
from megaptune.report.provenance import notes
from megaptune.report.runs import JobRecord, Run
from megaptune.report.scores import Scores
from megaptune.report.superglue import task_figure
from megaptune.tasks.superglue.metrics import METRICS


@dataclass(frozen=True)
class Group:
    """One task and method on one backbone. prompts: template -> mean over its seeds (and runs)."""

    task: str
    method: str
    backbone: str
    reading: str
    runs: tuple[str, ...]
    prompts: dict[str, float]


def sections(runs: list[Run]) -> list[Section]:
    """None unless some method was run with several prompts on a task."""
    groups = prompt_groups(runs)
    several = {group.task for group in groups if len(group.prompts) > 1}
    shown = [group for group in groups if group.task in several]
    if not shown:
        return []
    told = (
        "Each method's figure (mean over seeds) under several prompts: patterns, templates of a sweep, or the prompts "
        "of several runs on the same backbone and test data. Learning rates of a sweep are averaged."
    )
    blocks: list[Block] = [Text([told]), _table(shown, runs)]
    blocks.append(Plot("prompt-variance", "Prompt variance: each dot is a prompt", lambda: _dots(shown)))
    return [Section("Prompt variance", blocks)]


def prompt_groups(runs: list[Run]) -> list[Group]:
    """By task in the runs' order, then by method."""
    figures: dict[tuple[str, str, str, str, int | None], dict[str, list[float]]] = {}
    names: dict[tuple[str, str, str, str, int | None], list[str]] = {}
    for run in runs:
        scores = Scores(run)
        reading = scores.headline
        identity = str(run.backbone.get("rows_sha256", run.path))
        for job in scores.jobs:
            value = headline_figure(job, reading)
            template = job.result.get("template")
            if value is None or not isinstance(template, str):
                continue
            key = job.task, job.method, identity, reading, job.test_count(reading)
            figures.setdefault(key, {}).setdefault(template, []).append(value)
            names.setdefault(key, []).append(run.name)
    tasks = list(dict.fromkeys(key[0] for key in figures))
    methods = ordered([key[1] for key in figures])
    keys = sorted(figures, key=lambda key: (tasks.index(key[0]), methods.index(key[1])))
    backbones = {str(run.backbone.get("rows_sha256", run.path)): run.backbone_name for run in runs}
    return [
        Group(
            key[0],
            key[1],
            backbones[key[2]],
            key[3],
            tuple(dict.fromkeys(names[key])),
            {template: mean(values) for template, values in figures[key].items()},
        )
        for key in keys
    ]


def headline_figure(job: JobRecord, reading: str) -> float | None:
    """A task's one figure: P@1, or the mean of a SuperGLUE task's metrics."""
    if job.task in METRICS and "p_at_1" not in job.test.get(reading, {}):
        return task_figure(reading, job.task)(job)
    return job.test.get(reading, {}).get("p_at_1")


def _table(groups: list[Group], runs: list[Run]) -> Table:
    columns = [Column("task", words=True), Column("model", words=True), Column("method", words=True)]
    columns += [Column("prompts"), Column("mean"), Column("sd over prompts"), Column("lowest"), Column("highest")]
    rows: list[list[CellText]] = []
    for group in groups:
        values = [100 * value for value in group.prompts.values()]
        over = group.task if group.task in METRICS else f"{group.task}, {group.reading}"
        row: list[CellText] = [over, group.backbone, method_label(group.method), str(len(values))]
        deviation = f"{stdev(values):.1f}" if len(values) > 1 else ""
        rows.append([*row, f"{mean(values):.1f}", deviation, f"{min(values):.1f}", f"{max(values):.1f}"])
    for entry in paper().prompts:
        figures = [figure for figure in entry.figures if figure.value is not None]
        low = min(figures, key=lambda figure: figure.value or 0.0, default="")
        high = max(figures, key=lambda figure: figure.value or 0.0, default="")
        only = figures[0] if len(figures) == 1 else ""
        head: list[CellText] = [f"paper: {entry.task}", entry.model, method_label(entry.method)]
        rows.append([*head, str(len(figures) or ""), only, entry.deviation or "", low, high])
    used = [run for run in runs if any(run.name in group.runs for group in groups)]
    return Table("Spread over prompts, per cent", columns, rows, notes(used))


def _dots(groups: list[Group]) -> bytes:
    backbones = list(dict.fromkeys(group.backbone for group in groups))
    several = len(backbones) > 1
    listed = [
        plots.Dots(
            group.task,
            method_label(group.method) + (f" ({group.backbone})" if several else ""),
            group.method,
            backbones.index(group.backbone),
            list(group.prompts.values()),
        )
        for group in groups
    ]
    return plots.dots(listed, "test figure, per cent; in brackets the number of prompts")
