"""Plots as PNG bytes. Figures in [0, 1] are drawn in per cent; a method has the same colour in every plot."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megaptune.report.labels import LABELS
from megaptune.results.table import Spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110
PALETTE = (
    *("#999999", "#f0e442", "#666666"),  # manual prompts
    *("#56b4e9", "#0072b2", "#004c77"),  # trained ones
    *("#e69f00", "#cc79a7", "#d55e00"),  # tuned LMs
    *("#009e73", "#7a5195", "#000000"),  # pattern ensembles; all others
)
"""In the order of LABELS; mostly Okabe and Ito's, told apart also by people who do not see all colours."""
HATCHES, DASHES, MARKERS = ("", "//", "..", "xx", "\\\\"), ("-", "--", ":", "-."), "osD^vP"
"""Of the first, second, ... run, or variant of a method."""


@dataclass(frozen=True)
class Series:
    """values: one per group of bars; None leaves a gap. run: its place in the report."""

    label: str
    method: str
    run: int
    values: Sequence[Spread | None]


@dataclass(frozen=True)
class Track:
    """A curve: mean and deviation (NaN of one seed) at each x. place: of the variant among its method's."""

    label: str
    method: str
    place: int
    points: Sequence[tuple[float, Spread]]


@dataclass(frozen=True)
class Panel:
    """percent: the values are shares."""

    title: str
    x: str
    y: str
    tracks: Sequence[Track]
    percent: bool


@dataclass(frozen=True)
class Dots:
    """The figures of one method under several prompts; one place on the axis."""

    group: str
    label: str
    method: str
    run: int
    values: Sequence[float]


def colour(method: str) -> str:
    """By the method's place in LABELS; all others share the last one."""
    known = list(LABELS)
    return PALETTE[known.index(method) if method in known[: len(PALETTE)] else -1]


def bars(groups: Sequence[str], series: Sequence[Series], axis: str) -> bytes:
    """Horizontal bars, a group of them for each name, with deviations."""
    thick = 0.22
    figure = _figure(8.0, 1.2 + max(1.0, len(groups) * (len(series) + 0.7) * thick * 0.75 + 0.22 * len(series)))
    axes = figure.add_subplot()
    height = 0.85 / max(1, len(series))
    for place, one in enumerate(series):
        at = [index + (place - (len(series) - 1) / 2) * height for index in range(len(groups))]
        there = [(y, spread) for y, spread in zip(at, one.values, strict=True) if spread is not None]
        if not there:
            continue
        axes.barh(
            [y for y, _ in there],
            [100 * spread.mean for _, spread in there],
            height,
            xerr=[100 * spread.deviation for _, spread in there],
            label=one.label,
            color=colour(one.method),
            hatch=HATCHES[one.run % len(HATCHES)],
            edgecolor="white",
            error_kw={"elinewidth": 1, "capsize": 2},
        )
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel(axis)
    axes.grid(axis="x", alpha=0.3)
    _legend(figure, axes)
    return _png(figure)


def panels(listed: Sequence[Panel], across: int = 2) -> bytes:
    """Curves side by side, with a band of one deviation."""
    down = math.ceil(len(listed) / across)
    figure = _figure(4.2 * across, 2.7 * down + 0.7)
    grid = figure.subplots(down, across, squeeze=False)
    for axes, panel in zip(grid.flat, listed, strict=False):
        factor = 100 if panel.percent else 1
        for track in panel.tracks:
            xs = [x for x, _ in track.points]
            means = [factor * spread.mean for _, spread in track.points]
            sd = [0.0 if math.isnan(s.deviation) else factor * s.deviation for _, s in track.points]
            look: dict[str, Any] = {"color": colour(track.method), "linestyle": DASHES[track.place % len(DASHES)]}
            axes.plot(
                xs,
                means,
                label=track.label,
                marker=MARKERS[track.place % len(MARKERS)] if len(xs) < 30 else "",
                markersize=3,
                **look,
            )
            low, high = (
                [m - d for m, d in zip(means, sd, strict=True)],
                [m + d for m, d in zip(means, sd, strict=True)],
            )
            axes.fill_between(xs, low, high, color=look["color"], alpha=0.18, linewidth=0)
        axes.set_xlim(left=0)
        if panel.percent:
            axes.set_ylim(0, max(5.0, axes.get_ylim()[1]))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(panel.title, fontsize=9)
        axes.set_xlabel(panel.x, fontsize=8)
        axes.set_ylabel(panel.y, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(listed) :]:
        axes.set_visible(False)
    _legend(figure, *grid.flat)
    return _png(figure)


def dots(listed: Sequence[Dots], axis: str) -> bytes:
    """A dot per prompt and a bar from the worst to the best."""
    groups = list(dict.fromkeys(one.group for one in listed))
    figure = _figure(8.0, 1.4 + 0.34 * len(listed) + 0.12 * len(groups))
    axes = figure.add_subplot()
    ticks: list[tuple[float, str]] = []
    y = 0.0
    told: set[str] = set()
    for group in groups:
        for one in [one for one in listed if one.group == group]:
            values = [100 * value for value in one.values]
            marker = MARKERS[one.run % len(MARKERS)]
            axes.plot([min(values), max(values)], [y, y], color=colour(one.method), linewidth=5, alpha=0.25)
            label = "_" + one.label if one.label in told else one.label
            axes.plot(values, [y] * len(values), marker, color=colour(one.method), label=label)
            told.add(one.label)
            ticks.append((y, f"{group} ({len(values)})"))
            y += 1
        y += 0.5
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.set_ylim(y - 0.8, -0.7)
    axes.set_xlim(-2, 102)
    axes.set_xlabel(axis)
    axes.grid(axis="x", alpha=0.3)
    _legend(figure, axes)
    return _png(figure)


def _figure(width: float, height: float) -> "Figure":
    """In inches; laid out without pyplot, which would keep figures and want a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, min(height, 200.0)), dpi=DPI, layout="constrained")


def _legend(figure: "Figure", *axes: Any) -> None:
    """One for all axes, above them."""
    found = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    if found:
        columns = min(3, len(found))
        figure.legend(list(found.values()), list(found), loc="outside upper center", ncols=columns, fontsize=8)


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
