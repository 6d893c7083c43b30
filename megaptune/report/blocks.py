"""The parts of a report: text, tables, plots; each as Markdown and as HTML."""

import base64
import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from megaptune.report.paper import Figure

CellText = str | Figure


@dataclass(frozen=True)
class Column:
    """group: a heading over neighbouring columns, or ""."""

    name: str
    group: str = ""
    words: bool = False

    @property
    def flat(self) -> str:
        return f"{self.group}: {self.name}" if self.group else self.name


@dataclass
class Table:
    """notes: lines below it, among them the runs that it was made from."""

    title: str
    columns: list[Column]
    rows: list[list[CellText]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        rule = "| " + " | ".join("---" if column.words else "---:" for column in self.columns) + " |"
        lines = [f"**{self.title}**", "", _row([column.flat for column in self.columns]), rule]
        lines += [_row([_plain(cell) for cell in row]) for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]).rstrip()

    def html(self) -> str:
        groups = [(name, len(list(members))) for name, members in groupby(self.columns, key=lambda c: c.group)]
        head = ""
        if any(name for name, _ in groups):
            head = "".join(
                f'<th colspan="{span}" scope="colgroup">{html.escape(name)}</th>'
                if name
                else f'<td colspan="{span}"></td>'
                for name, span in groups
            )
            head = f"<tr>{head}</tr>"
        names = "".join(f'<th scope="col"{_css(c)}>{html.escape(c.name)}</th>' for c in self.columns)
        body = "".join(
            "<tr>" + "".join(self._cell(cell, c) for cell, c in zip(row, self.columns, strict=True)) + "</tr>\n"
            for row in self.rows
        )
        notes = "".join(f"<li>{inline(note)}</li>" for note in self.notes)
        return (
            f'<figure><div class="wide"><table><caption>{html.escape(self.title)}</caption>\n'
            f"<thead>{head}<tr>{names}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
            + (f"<figcaption><ul>{notes}</ul></figcaption>" if notes else "")
            + "</figure>"
        )

    @staticmethod
    def _cell(cell: CellText, column: Column) -> str:
        if isinstance(cell, Figure):
            return f'<td class="paper">{html.escape(cell.text)} <small class="{cell.mark}">{cell.mark}</small></td>'
        return f"<td{_css(column)}>{html.escape(cell)}</td>"


@dataclass
class Plot:
    """name: of its PNG file, without the ending. draw: the PNG's bytes; called once, when an image is wanted."""

    name: str
    title: str
    draw: Callable[[], bytes]

    def markdown(self) -> str:
        return f"![{self.title}]({self.name}.png)"

    def html(self, png: bytes) -> str:
        data = base64.b64encode(png).decode()
        title = html.escape(self.title, quote=True)
        return (
            f'<figure><img alt="{title}" src="data:image/png;base64,{data}"/><figcaption>{title}</figcaption></figure>'
        )


@dataclass
class Text:
    """A paragraph with ``code`` and *words* marked as in Markdown, or a list of such lines."""

    lines: Sequence[str]
    bullets: bool = False

    def markdown(self) -> str:
        return "\n".join(f"- {line}" for line in self.lines) if self.bullets else "\n\n".join(self.lines)

    def html(self) -> str:
        if self.bullets:
            return "<ul>" + "".join(f"<li>{inline(line)}</li>" for line in self.lines) + "</ul>"
        return "".join(f"<p>{inline(line)}</p>" for line in self.lines)


Block = Text | Table | Plot


@dataclass
class Section:
    title: str
    blocks: list[Block]


def inline(text: str) -> str:
    """A line of text as HTML: `code` and *words*; all else stays as it is written."""
    escaped = html.escape(text, quote=False)
    parts = re.split(r"(`[^`]+`)", escaped)
    return "".join(
        f"<code>{part[1:-1]}</code>"
        if part.startswith("`") and len(part) > 1
        else re.sub(r"(?<!\w)\*([^*]+)\*(?!\w)", r"<em>\1</em>", part)
        for part in parts
    )


def _css(column: Column) -> str:
    return ' class="words"' if column.words else ""


def _plain(cell: CellText) -> str:
    return f"{cell.text} *{cell.mark}*" if isinstance(cell, Figure) else cell


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
