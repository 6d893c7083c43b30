"""SuperGLUE, full and few-shot: every task's metrics by method, beside the paper's table of the same protocol."""

import math
from functools import partial
from statistics import mean

from megaptune.report import plots
from megaptune.report.blocks import Block, CellText, Column, Plot, Section, Table, Text
from megaptune.report.labels import method_label
from megaptune.report.paper import TWO_METRICS, paper
from megaptune.report.provenance import notes
from megaptune.report.runs import JobRecord, Run
from megaptune.report.scores import OVER_PATTERNS, Cell, Line, Measure, Scores, figure
from megaptune.tasks.superglue.metrics import METRICS

FEW_SHOT_RECORDS = 100
"""Up to so many training examples a run counts as few-shot; FewGLUE's tasks have 32."""
_ORDER = ("BoolQ", "CB", "WiC", "RTE", "MultiRC", "WSC", "COPA")
"""The paper's columns; ReCoRD stands behind them, outside the average."""
_NAMES = {"accuracy": "acc", "f1": "F1", "f1a": "F1a", "em": "EM"}
_TITLES = {"full": "SuperGLUE, full training sets", "fewshot": "SuperGLUE, few-shot"}


def sections(runs: list[Run]) -> list[Section]:
    found = []
    for protocol, title in _TITLES.items():
        scores = [Scores(run, tasks) for run in runs if (tasks := _tasks(run)) and protocol_of(run) == protocol]
        if scores:
            blocks: list[Block] = [Text([_how_to_read(protocol)]), _table(scores, protocol)]
            if any(one.jobs for one in scores):
                blocks.append(Plot(f"superglue-{protocol}", f"{title}: score by task", partial(_bars, scores)))
            found.append(Section(title, blocks))
    return found


def _tasks(run: Run) -> list[str]:
    known: tuple[str, ...] = tuple(METRICS)
    return [task for task in run.tasks if task in known]


def protocol_of(run: Run) -> str:
    """Few-shot: selected on dev32, or trained on a file of few examples; a limit does not make a file small."""
    if run.setting("task.splits.dev") == "dev32":
        return "fewshot"
    sizes = [job.result.get("counts", {}).get("train", 0) for job in run.finished]
    few = bool(sizes) and max(sizes) <= FEW_SHOT_RECORDS and run.setting("task.limit_train") is None
    return "fewshot" if few else "full"


def task_figure(reading: str, task: str) -> Measure:
    """SuperGLUE's one figure of a task: the mean of its metrics."""

    def measure(job: JobRecord) -> float | None:
        found = [job.test.get(reading, {}).get(metric) for metric in METRICS[task]]  # type: ignore[index]
        known = [value for value in found if value is not None]
        return mean(known) if len(known) == len(found) else None

    return measure


def _how_to_read(protocol: str) -> str:
    told = (
        "In per cent, on the runs' test split, which should be SuperGLUE's dev set (val): mean ± sample deviation over "
        f"seeds. The paper's P-tuning tunes the LM too. *{OVER_PATTERNS}*: mean ± deviation over the patterns' means, "
        "in Avg over seeds. Avg: over the seven tasks, two metrics of a task averaged first; ReCoRD, which the paper "
        "leaves out, is not in it."
    )
    return told if protocol == "full" else told + " Few-shot: the epoch should be chosen on dev32."


def _columns(scores: list[Scores]) -> list[tuple[str, str]]:
    """(task, metric) in the paper's order; ReCoRD where a run has it."""
    columns = [(task, metric) for task in _ORDER for metric in TWO_METRICS.get(task, ("accuracy",))]
    if any("ReCoRD" in one.tasks for one in scores):
        columns += [("ReCoRD", "em"), ("ReCoRD", "f1")]
    return columns


def _table(scores: list[Scores], protocol: str) -> Table:
    wanted = _columns(scores)
    columns = [Column("from", words=True), Column("model", words=True), Column("method", words=True)]
    read_over = len({reading for one in scores for reading in one.readings}) > 1
    columns += [Column("over", words=True)] if read_over else []
    columns += [Column(_NAMES[metric], task) for task, metric in wanted] + [Column("Avg")]
    rows: list[list[CellText]] = []
    for one in scores:
        for reading in one.readings or [""]:
            over: list[CellText] = [reading] if read_over else []
            for line in one.lines:
                cells: list[CellText] = [_text(one.cell(task, line, figure(reading, m))) for task, m in wanted]
                head: list[CellText] = [one.run.name, one.run.backbone_name, line.label, *over]
                rows.append([*head, *cells, _text(_average(one, line, reading))])
        if any(one.about(task, "majority", None) is not None for task in one.tasks):
            cells = [_majority(one, task) for task, _ in wanted]
            rows.append([one.run.name, "", "commonest label", *([""] if read_over else []), *cells, ""])
    for model, methods in paper().superglue[protocol].items():
        for method, figures in methods.items():
            cells_: list[CellText] = [figures.get(column, "") for column in [*wanted, ("Avg", "")]]
            rows.append(["paper", model, method_label(method), *([""] if read_over else []), *cells_])
    marks = "; ".join(f"*{mark}*: {meaning}" for mark, meaning in paper().marks.items())
    sizes = [f"*{one.run.name}*: {_sizes(one)}" for one in scores if one.jobs]
    return Table(
        f"{_TITLES[protocol]}: dev scores",
        columns,
        rows,
        [f"The paper's figures: {marks}.", *sizes, *notes([s.run for s in scores])],
    )


def _average(one: Scores, line: Line, reading: str) -> Cell | None:
    """Over the paper's seven tasks, per seed first; fewer tasks are told in the cell."""
    tasks = [task for task in _ORDER if task in one.tasks]
    measures = {task: task_figure(reading, task) for task in tasks}
    found = one.average(tasks, line, lambda job: measures[job.task](job)) if tasks else None
    return None if found is None else Cell(found.spread, found.tasks, len(_ORDER), found.of_seeds)


def _majority(one: Scores, task: str) -> str:
    """Always answering train's commonest label: known as the task's score, so of tasks with one metric alone."""
    found = one.about(task, "majority", None)
    return f"{100 * found:.1f}" if isinstance(found, float) and task not in TWO_METRICS else ""


def _sizes(one: Scores) -> str:
    """Examples of each split, and the files they are from where they are known."""
    told = []
    for task in one.tasks:
        counts, files = one.about(task, "counts", {}), one.about(task, "splits", {})
        if isinstance(counts, dict) and isinstance(files, dict):
            parts = [f"{counts.get(split, '?')} {files.get(split, split)}" for split in ("train", "dev", "test")]
            told.append(f"{task} {' / '.join(parts)}")
    return "examples for training / dev / test: " + ", ".join(told)


def _text(cell: Cell | None) -> str:
    return "–" if cell is None else str(cell)


def _bars(scores: list[Scores]) -> bytes:
    tasks = [task for task in (*_ORDER, "ReCoRD") if any(task in one.tasks for one in scores)]
    series = []
    for place, one in enumerate(scores):
        for line in one.shown:
            cells = [one.cell(task, line, task_figure(one.headline, task)) for task in tasks]
            spreads = [None if cell is None else cell.spread for cell in cells]
            label = f"{line.label} ({one.run.name})" if len(scores) > 1 else line.label
            if not all(spread is None or math.isnan(spread.mean) for spread in spreads):
                series.append(plots.Series(label, line.method, place, spreads))
    return plots.bars(tasks, series, "the task's score, per cent")
