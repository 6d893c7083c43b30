"""The report as a whole: its sections as one Markdown text or one HTML file, and its plots."""

import html
from dataclasses import dataclass, field
from pathlib import Path

from megaptune import __version__
from megaptune.report import facts, learning, provenance, superglue, variance
from megaptune.report.blocks import Block, Plot, Section
from megaptune.report.runs import Run


@dataclass
class Document:
    title: str
    sections: list[Section]
    _drawn: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: list[Run]) -> "Document":
        sections = [provenance.overview(runs)]
        for part in (facts, superglue, variance, learning):
            sections += part.sections(runs)
        return cls("Report on " + ", ".join(run.name for run in runs), sections)

    @property
    def plots(self) -> list[Plot]:
        return [block for section in self.sections for block in section.blocks if isinstance(block, Plot)]

    def png(self, plot: Plot) -> bytes:
        """Drawn once, however many formats show it."""
        if plot.name not in self._drawn:
            self._drawn[plot.name] = plot.draw()
        return self._drawn[plot.name]

    def markdown(self, with_plots: bool) -> str:
        """with_plots: whether the PNG files lie beside it."""
        parts = [f"# {self.title}"]
        for section in self.sections:
            parts.append(f"## {section.title}")
            parts += [block.markdown() for block in section.blocks if with_plots or not isinstance(block, Plot)]
        return "\n\n".join([*parts, f"megaptune {__version__}"]) + "\n"

    def html(self) -> str:
        """One file with everything in it: no script, no link to anywhere else; well-formed as XML too."""
        title = html.escape(self.title)
        style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
        links = "".join(f'<a href="#part-{n}">{html.escape(s.title)}</a>' for n, s in enumerate(self.sections))
        body = "\n".join(
            f'<section id="part-{number}"><h2>{html.escape(section.title)}</h2>\n'
            + "\n".join(self._block(block) for block in section.blocks)
            + "</section>"
            for number, section in enumerate(self.sections)
        )
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{title}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"/><style>\n{style}</style></head>\n'
            f"<body><h1>{title}</h1><nav>{links}</nav>\n{body}\n"
            f"<footer><p>megaptune {__version__}</p></footer></body></html>\n"
        )

    def _block(self, block: Block) -> str:
        return block.html(self.png(block)) if isinstance(block, Plot) else block.html()
