"""`megaptune report`: read the runs, write the files that were asked for, say what is missing."""

from collections.abc import Callable
from pathlib import Path

from megaptune.errors import ConfigError, SetupError
from megaptune.report.document import Document
from megaptune.report.long_form import csv_text
from megaptune.report.provenance import missing
from megaptune.report.runs import read_runs
from megaptune.run.files import write_bytes, write_whole

FORMATS = ("md", "html", "csv", "png")


def parse_formats(text: str) -> list[str]:
    """:raises ConfigError: a name that is none of FORMATS."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise ConfigError(f"--format {text!r}: give one or more of {', '.join(FORMATS)}, with commas between them")
    return [name for name in FORMATS if name in names]


def write_report(paths: list[Path], output: Path | None, formats: str, say: Callable[[str], None]) -> list[Path]:
    """Write report.md, report.html, report.csv and the plots; the files that were written.

    :param output: default: `report` in the first run directory.
    :raises ConfigError: a path is no run directory, or a format is unknown.
    :raises SetupError: the output folder cannot be written.
    """
    wanted = parse_formats(formats)
    runs = read_runs(paths)
    folder = output if output is not None else runs[0].path / "report"
    document = Document.of(runs)
    texts = {
        "md": lambda: document.markdown(with_plots="png" in wanted),
        "html": document.html,
        "csv": lambda: csv_text(runs),
    }
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in wanted:
            if name == "png":
                for plot in document.plots:
                    written.append(folder / f"{plot.name}.png")
                    write_bytes(written[-1], document.png(plot))
            else:
                written.append(folder / f"report.{name}")
                write_whole(written[-1], texts[name]())
    except OSError as error:
        raise SetupError(f"--output {folder} cannot be written: {error.strerror}; name another folder") from None
    for line in missing(runs):
        say(line.replace("*", ""))
    for file in written:
        say(f"wrote {file}")
    return written
