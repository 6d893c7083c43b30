"""The paper's tables, every figure with its mark: whether it was seen in a source or is recalled."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

TWO_METRICS = {"CB": ("accuracy", "f1"), "MultiRC": ("em", "f1a")}
"""Tasks whose cells hold two figures, in the paper's order."""


@dataclass(frozen=True)
class Figure:
    """A figure of the paper in per cent, or a word in its place. mark: seen or recalled."""

    text: str
    mark: str

    @property
    def value(self) -> float | None:
        """The figure as a number; None where the paper has a word."""
        found = re.match(r"[\d.]+", self.text)
        return float(found[0]) if found else None


def _read(cell: Any, default: str) -> Figure | None:
    text, _, mark = str(cell).partition(" ")
    return Figure(text.replace("±", " ± "), mark or default) if text else None


@dataclass(frozen=True)
class Prompts:
    """What the paper says about one task under several prompts. deviation: over prompts, where it alone is known."""

    task: str
    model: str
    method: str
    figures: list[Figure]
    deviation: Figure | None


@dataclass(frozen=True)
class Paper:
    marks: dict[str, str]
    lama: dict[str, dict[str, dict[str, Figure]]]
    """Setting -> method -> model -> figure."""
    superglue: dict[str, dict[str, dict[str, dict[tuple[str, str], Figure]]]]
    """full or fewshot -> model -> method -> (task, metric) -> figure; the average is ("Avg", "")."""
    prompts: list[Prompts]


@cache
def paper() -> Paper:
    file = Path(__file__).with_name("paper.yaml")
    stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    default = stored["mark"]
    lama: dict[str, dict[str, dict[str, Figure]]] = {}
    for setting, table in stored["lama"].items():
        lama[setting] = {}
        for method, cells in table["methods"].items():
            read = [(model, _read(cell, default)) for model, cell in zip(table["models"], cells, strict=True)]
            lama[setting][method] = {model: figure for model, figure in read if figure}
    superglue = {
        protocol: {
            model: {method: _row(table["columns"], cells, default) for method, cells in methods.items()}
            for model, methods in table["models"].items()
        }
        for protocol, table in (("full", stored["superglue_full"]), ("fewshot", stored["superglue_fewshot"]))
    }
    prompts = []
    for entry in stored["prompt_variance"]:
        figures = [figure for cell in entry.get("prompts", []) if (figure := _read(cell, default))]
        deviation = _read(entry.get("deviation", ""), default)
        prompts.append(Prompts(entry["task"], entry["model"], entry["method"], figures, deviation))
    return Paper(stored["marks"], lama, superglue, prompts)


def _row(tasks: list[str], cells: list[Any], default: str) -> dict[tuple[str, str], Figure]:
    row = {}
    for task, cell in zip(tasks, cells, strict=True):
        figure = _read(cell, default)
        if figure is None:
            continue
        metrics = TWO_METRICS.get(task, ("" if task == "Avg" else "accuracy",))
        for metric, text in zip(metrics, figure.text.split("/"), strict=True):
            row[task, metric] = Figure(text, figure.mark)
    return row
