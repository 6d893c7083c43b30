"""What came out: a table on the console, CSV files, and a plot."""

import csv
import datetime
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .comparison import Row
from .timing import Spread, Turn

VERSIONS = ("torch", "transformers", "peft", "deepspeed")
COLOURS = {"peft": "#8c8c8c", "released": "#c2a878"}
OURS = "#2f6f9f"
COLUMNS = [
    "way",
    "examples/s",
    "x PEFT",
    "x PEFT (cpu)",
    "ten epochs",
    "x released",
    "x previous",
    "GFLOP",
    "of peak",
    "of peak (cpu)",
    "loss",
    "gradient",
]


def machine(threads: int) -> dict[str, str]:
    """What the figures depend on beside the code."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    cpu = f"{len(models)} cores, {models[0]}" if models else platform.processor()
    return {"machine": cpu, "threads": str(threads), **versions, "date": datetime.date.today().isoformat()}


def show(rows: Sequence[Row], console: Console) -> None:
    """One table a scenario: ratios with their lowest and highest round, by wall clock and by process time (cpu)."""
    for scenario in dict.fromkeys(row.scenario for row in rows):
        chosen = [row for row in rows if row.scenario == scenario]
        head = chosen[0]
        table = Table(title=f"{scenario}: {head.data}, {head.examples} examples, {head.rounds} rounds")
        for name in COLUMNS:
            table.add_column(
                name, justify="left" if name == "way" else "right", no_wrap=name in ("way", "x PEFT", "x released")
            )
        for row in chosen:
            work = row.blocks_gflop + row.attention_gflop + row.head_gflop
            table.add_row(
                row.way,
                f"{row.examples_per_s:.2f}",
                _shown(row.over_peft),
                _median(row.over_peft_cpu),
                "-" if row.over_peft_ten_epochs is None else f"{row.over_peft_ten_epochs:.2f}",
                _shown(row.over_released),
                _median(row.over_previous),
                f"{work:.1f}",
                f"{100 * row.share:.0f} %",
                f"{100 * row.share_cpu:.0f} %",
                *("-" if error is None else f"{error:.0e}" for error in (row.loss_error, row.gradient_error)),
            )
        console.print(table)


def _shown(ratio: Spread | None) -> str:
    return "-" if ratio is None else str(ratio)


def _median(ratio: Spread | None) -> str:
    return "-" if ratio is None else f"{ratio.median:.2f}"


def save(rows: Sequence[Row], turns: Sequence[tuple[str, Turn]], threads: int, folder: Path) -> None:
    """``speed.csv`` (a line a way), ``speed_rounds.csv`` (a line a turn) and ``speed.svg`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    place = machine(threads)
    _write(folder / "speed.csv", [{**_flat(row), **place} for row in rows])
    every = [
        {"scenario": scenario, "way": turn.way, "round": turn.round, "wall_s": turn.wall_s, "cpu_s": turn.cpu_s}
        for scenario, turn in turns
    ]
    _write(folder / "speed_rounds.csv", every)
    plot(rows, place, folder / "speed.svg")


def plot(rows: Sequence[Row], place: dict[str, str], path: Path) -> None:
    """Bars of the speed over PEFT's, a bank's over one by one; the thin line is the spread of rounds."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "speed"  # equal figures give equal files
    from matplotlib import pyplot

    scenarios = list(dict.fromkeys(row.scenario for row in rows))
    counts = [sum(row.scenario == name for row in rows) for name in scenarios]
    height = 1.2 + 0.32 * sum(counts) + 0.5 * len(counts)
    figure, panels = pyplot.subplots(len(scenarios), 1, figsize=(8, height), height_ratios=counts, squeeze=False)
    for scenario, panel in zip(scenarios, panels[:, 0], strict=True):
        chosen = [row for row in rows if row.scenario == scenario]
        ratios: list[Any] = [row.over_peft or row.over_one_by_one for row in chosen]
        medians = [ratio.median for ratio in ratios]
        spread = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
        colours = [COLOURS.get(row.way, OURS) for row in chosen]
        panel.barh([row.way for row in chosen], medians, xerr=spread, color=colours, error_kw={"linewidth": 0.8})
        for number, value in enumerate(medians):
            panel.annotate(f" {value:.1f}", (ratios[number].high, number), va="center", fontsize=8)
        panel.invert_yaxis()
        over = "PEFT" if chosen[0].over_peft else "one by one"
        panel.set_title(f"{scenario}, over {over}: {chosen[0].data}", loc="left", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.1)
    panels[-1, 0].set_xlabel(f"speed over the first way's ({place['machine']}, {place['threads']} threads)", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _flat(row: Row) -> dict[str, Any]:
    """Spreads as three columns, figures in four digits."""
    flat: dict[str, Any] = {}
    for entry in fields(row):
        value = getattr(row, entry.name)
        if entry.type in (Spread | None, "Spread | None"):
            parts = (value.median, value.low, value.high) if value is not None else ("", "", "")
            flat |= dict(zip((entry.name, f"{entry.name}_low", f"{entry.name}_high"), map(_digits, parts), strict=True))
        else:
            flat[entry.name] = _digits(value)
    return flat


def _digits(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else value


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
