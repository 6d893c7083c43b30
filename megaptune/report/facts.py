"""LAMA and a user's own facts: P@1 by prompt type, by relation and by relation type."""

from collections.abc import Callable, Sequence
from functools import partial

from megaptune.report import plots
from megaptune.report.blocks import Block, CellText, Column, Plot, Section, Table, Text
from megaptune.report.labels import ordered
from megaptune.report.paper import Figure, paper
from megaptune.report.provenance import notes
from megaptune.report.runs import Run
from megaptune.report.scores import OVER_PATTERNS, Cell, Line, Scores, figure
from megaptune.results.table import CHOSEN, Spread

P_AT_1 = "p_at_1"
_HOW_TO_READ = (
    "P@1 in per cent, mean ± sample deviation over seeds. *answers*: only the relation's own answers compete; "
    "*word_list*: the task's word list (LAMA-29k is one); *vocabulary*: every token. Macro: mean over relations; "
    "micro: over test records."
)


def sections(runs: list[Run]) -> list[Section]:
    """One for LAMA and one for a user's own facts, where the runs have them."""
    found = []
    for kind, title in (("lama", "LAMA"), ("custom", "Own facts")):
        scores = [Scores(run) for run in runs if run.setting("task.type") == kind]
        if scores:
            tables = [_paper_table(scores)] if kind == "lama" else []
            relations = [_relation_table(scores, reading) for reading in _readings(scores)]
            found.append(Section(title, [Text([_HOW_TO_READ]), *tables, *relations, *_plots(scores, kind)]))
    return found


def _readings(scores: list[Scores]) -> list[str]:
    return list(dict.fromkeys(reading for one in scores for reading in one.readings))


def _lines(scores: list[Scores]) -> list[Line]:
    """All runs' lines, a method's together and dev's choice last."""
    return _in_order(list(dict.fromkeys(line for one in scores for line in one.lines)))


def _in_order(lines: list[Line]) -> list[Line]:
    methods = ordered([line.method for line in lines])
    return sorted(lines, key=lambda line: (methods.index(line.method), line.variant in (CHOSEN, OVER_PATTERNS)))


# -- the paper's table ---------------------------------------------------------------------------------------------


def _paper_table(scores: list[Scores]) -> Table:
    """A row per prompt type, a column per model: the runs' readings, then the paper's models."""
    settings = paper().lama
    lines = _lines(scores)
    published = [method for table in settings.values() for method in table]
    here = {line.method for line in lines}
    lines = _in_order([*lines, *(Line(method) for method in dict.fromkeys(published) if method not in here)])
    columns = [Column("prompt", words=True)]
    columns += [Column(f"{r}, {kind}", one.run.name) for one in scores for r in one.readings for kind in _KINDS]
    models = [(setting, model) for setting, table in settings.items() for model in _models(table)]
    columns += [Column(model, f"paper, {setting}") for setting, model in models]
    rows: list[list[CellText]] = []
    for line in lines:
        row: list[CellText] = [line.label]
        for one in scores:
            for reading in one.readings:
                measure = figure(reading, P_AT_1)
                row += [_text(one.average(one.tasks, line, measure, _weigh(kind, reading))) for kind in _KINDS]
        swept = any(len(one.variants(line.method)) > 1 for one in scores)
        for setting, model in models:
            theirs = settings[setting].get(line.method, {})
            shown = line.variant == (CHOSEN if swept else "")
            row.append(theirs.get(model, "") if shown else "")
        rows.append(row)
    rows.append(["gain of P-tuning over manual", *_gains(scores), *[""] * len(models)])
    marks = "; ".join(f"*{mark}*: {meaning}" for mark, meaning in paper().marks.items())
    legend = f"The paper's figures (first version) are averages over 41 relations; {marks}."
    counts = [f"*{one.run.name}*: {_size(one)}" for one in scores]
    return Table("LAMA: P@1 by prompt type", columns, rows, [legend, *counts, *notes([s.run for s in scores])])


_KINDS = ("macro", "micro")


def _weigh(kind: str, reading: str) -> str | None:
    """The reading whose numbers of records a micro average weighs by."""
    return reading if kind == "micro" else None


def _models(table: dict[str, dict[str, Figure]]) -> list[str]:
    return list(dict.fromkeys(model for cells in table.values() for model in cells))


def _size(one: Scores) -> str:
    records = sum(one.test_count(task) or 0 for task in one.tasks)
    limits = [
        f"{key} {value}"
        for key in ("limit_train", "limit_dev", "limit_test")
        if (value := one.run.setting(f"task.{key}"))
    ]
    return f"{len(one.tasks)} relations, {records} test records" + (f" ({', '.join(limits)})" if limits else "")


def _gains(scores: list[Scores]) -> list[CellText]:
    return [
        _gain(partial(one.average, one.tasks, measure=figure(reading, P_AT_1), micro=_weigh(kind, reading)), one)
        for one in scores
        for reading in one.readings
        for kind in _KINDS
    ]


def _gain(cell_of: Callable[..., Cell | None], one: Scores) -> str:
    """Of P-tuning (dev's choice of a sweep) over the manual prompt; empty unless both have the same tasks."""
    variants = one.variants("ptuning")
    swept = CHOSEN if len(variants) > 1 else next(iter(variants), "")
    tuned, manual = cell_of(line=Line("ptuning", swept)), cell_of(line=Line("manual"))
    if tuned is None or manual is None or tuned.tasks != manual.tasks:
        return ""
    return f"{100 * (tuned.spread.mean - manual.spread.mean):+.1f}"


# -- by relation ---------------------------------------------------------------------------------------------------


def _relation_table(scores: list[Scores], reading: str) -> Table:
    measure = figure(reading, P_AT_1)
    tasks = list(dict.fromkeys(task for one in scores for task in one.tasks))
    types = _types(scores, tasks)
    lama = any(types.values())
    columns = [Column("relation", words=True)]
    columns += [Column("label", words=True), Column("type", words=True)] if lama else []
    columns += [Column("test"), Column("candidates"), Column("majority")]
    for one in scores:
        columns += [Column(line.label, one.run.name) for line in one.lines] + [Column("gain", one.run.name)]
    rows: list[list[CellText]] = []
    for task in tasks:
        row: list[CellText] = [task]
        row += [str(_about(scores, task, "label")), types[task]] if lama else []
        row += [_merged([one.test_count(task, reading) for one in scores]), _candidates(scores, task, reading)]
        row.append(_majority(scores, task, reading))
        for one in scores:
            row += [_text(one.cell(task, line, measure)) for line in one.lines]
            row.append(_gain(partial(one.cell, task, measure=measure), one))
        rows.append(row)
    groups = [("", tasks)] if len(tasks) > 1 else []
    groups += [(f", type {name}", members) for name, members in _by_type(types).items()]
    for label, members in groups:
        for kind in _KINDS:
            mine = {one.run.name: [task for task in members if task in one.tasks] for one in scores}
            row = [f"{kind} average{label}", *([""] * 2 if lama else [])]
            records = (sum(one.test_count(task, reading) or 0 for task in mine[one.run.name]) for one in scores)
            row += [_merged([*records]), "", ""]
            for one in scores:
                average = partial(one.average, mine[one.run.name], measure=measure, micro=_weigh(kind, reading))
                row += [_text(average(line=line)) for line in one.lines]
                row.append(_gain(average, one))
            rows.append(row)
    told = "*majority*: always the commonest training answer. *gain*: of P-tuning over manual."
    return Table(f"P@1 over: {reading or 'the task'}", columns, rows, [told, *notes([s.run for s in scores])])


def _types(scores: list[Scores], tasks: list[str]) -> dict[str, str]:
    return {task: str(_about(scores, task, "type") or "") for task in tasks}


def _by_type(types: dict[str, str]) -> dict[str, list[str]]:
    """Relations by type, where there are several types."""
    names = sorted({name for name in types.values() if name})
    return {name: [task for task in types if types[task] == name] for name in names} if len(names) > 1 else {}


def _about(scores: list[Scores], task: str, key: str) -> object:
    return next((found for one in scores if (found := one.about(task, key, None)) is not None), "")


def _majority(scores: list[Scores], task: str, reading: str) -> str:
    """Of the records that count under this reading."""
    others = _about(scores, task, "baselines_of")
    baselines = others.get(reading) if isinstance(others, dict) else None
    baselines = _about(scores, task, "baselines") if baselines is None else baselines
    return f"{100 * baselines['majority']:.1f}" if isinstance(baselines, dict) and "majority" in baselines else ""


def _candidates(scores: list[Scores], task: str, reading: str) -> str:
    stated = [one.about(task, "candidates", {}) for one in scores]
    return _merged([found.get(reading) for found in stated if isinstance(found, dict)])


def _merged(numbers: Sequence[int | None]) -> str:
    """One number where the runs agree, else all of them."""
    return " / ".join(dict.fromkeys(str(number) for number in numbers if number is not None))


def _text(cell: Cell | None) -> str:
    return "–" if cell is None else str(cell)


# -- plots ---------------------------------------------------------------------------------------------------------


def _plots(scores: list[Scores], kind: str) -> list[Block]:
    tasks = list(dict.fromkeys(task for one in scores for task in one.tasks))
    types = _types(scores, tasks)
    labels = [f"{task} {_about(scores, task, 'label')}".strip() for task in tasks]

    def spread(cell: Cell | None) -> Spread | None:
        return None if cell is None else cell.spread

    def by_relation() -> bytes:
        series = [
            plots.Series(
                f"{line.label} ({one.run.name})" if len(scores) > 1 else line.label,
                line.method,
                place,
                [spread(one.cell(task, line, figure(one.headline, P_AT_1))) for task in tasks],
            )
            for place, one in enumerate(scores)
            for line in one.shown
        ]
        return plots.bars(labels, series, f"test P@1, per cent, {_headline(scores)}")

    by_type = _by_type(types)

    def types_of_relations() -> bytes:
        groups = {**by_type, "all": tasks}
        series = []
        for place, one in enumerate(scores):
            for line in one.shown:
                members = [[task for task in group if task in one.tasks] for group in groups.values()]
                cells = [one.average(mine, line, figure(one.headline, P_AT_1)) for mine in members]
                label = f"{line.label} ({one.run.name})" if len(scores) > 1 else line.label
                series.append(plots.Series(label, line.method, place, [spread(cell) for cell in cells]))
        return plots.bars(list(groups), series, f"macro-averaged test P@1, per cent, {_headline(scores)}")

    if not any(one.jobs for one in scores):
        return []
    found: list[Block] = [Plot(f"{kind}-relations", "Test P@1 by relation", by_relation)]
    if by_type:
        found.append(Plot(f"{kind}-types", "Macro-averaged test P@1 by relation type", types_of_relations))
    return found


def _headline(scores: list[Scores]) -> str:
    return "over " + " / ".join(dict.fromkeys(one.headline or "the task" for one in scores))
