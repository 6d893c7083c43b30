"""Where a report's figures come from: what each run is, in one line under every table, and at length on top."""

from megaptune.report.blocks import Column, Section, Table, Text
from megaptune.report.runs import Run

SELECTION = (
    "Test figures are those of the epoch that was best on dev. No run, variant, pattern or seed is chosen by a test "
    "figure: *dev's choice* is the variant with the best mean dev figure."
)


def note(run: Run) -> str:
    """One line: run, state, seeds, backbone, time, command."""
    lacking = f", {len(run.missing)} of {len(run.jobs)} jobs without a result" if run.missing else ""
    return (
        f"*{run.name}*: {status(run)}{lacking}; seeds {_seeds(run)}; {backbone(run)}; {duration(run)}; "
        f"configuration `{run.path / 'config.yaml'}`; `{command(run)}`"
    )


def notes(runs: list[Run]) -> list[str]:
    return [note(run) for run in runs]


def status(run: Run) -> str:
    stated = str(run.state.get("status", "no state"))
    if stated == "running":
        return "running, or killed"
    code = run.state.get("exit_code")
    return stated + (f" with exit code {code}" if code else "")


def backbone(run: Run) -> str:
    """Name, family, dtype and the first digits of the rows' checksum, as far as they are known."""
    rows = str(run.backbone.get("rows_sha256", ""))[:12]
    about = [str(run.backbone.get("family", "")), str(run.backbone.get("dtype", run.setting("backbone.dtype", "")))]
    about += [f"fingerprint {rows}" if rows else "no fingerprint"]
    return f"{run.backbone_name} ({', '.join(part for part in about if part)})"


def duration(run: Run) -> str:
    """The time that the run has recorded, over all its starts; what a kill took away is not in it."""
    if not run.run_time_s:
        return "time unknown"
    starts = f" over {len(run.commands)} starts" if len(run.commands) > 1 else ""
    seconds = round(run.run_time_s)
    told = f"{seconds} s" if seconds < 600 else f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} h"
    return f"{told}{starts}"


def command(run: Run) -> str:
    """The last start's, without its time."""
    return run.commands[-1].partition(" ")[2].replace("`", "'") if run.commands else "command unknown"


def overview(runs: list[Run]) -> Section:
    columns = [Column("run", words=True), Column("state", words=True), Column("task", words=True)]
    columns += [Column("methods", words=True), Column("seeds"), Column("jobs with a result"), Column("time")]
    columns += [Column("backbone", words=True), Column("versions", words=True)]
    rows: list[list[str]] = []
    for run in runs:
        versions = [f"{name} {run.environment[name]}" for name in ("megaptune", "torch") if name in run.environment]
        rows.append(
            [
                run.name,
                status(run),
                f"{run.setting('task.type', 'unknown')}, {len(run.tasks)} task{'s' * (len(run.tasks) != 1)}",
                ", ".join(run.methods),
                _seeds(run),
                f"{len(run.finished)} of {len(run.jobs)}",
                duration(run),
                backbone(run),
                ", ".join(versions),
            ]
        )
    table = Table("Runs", columns, [list(row) for row in rows], notes(runs))
    return Section("Runs", [table, Text([SELECTION]), *([Text(gaps, bullets=True)] if (gaps := missing(runs)) else [])])


def missing(runs: list[Run]) -> list[str]:
    """What a run lacks: a line for each reason and method."""
    lines = []
    for run in runs:
        for problem in run.problems:
            lines.append(f"*{run.name}*: {problem}")
        told = any(job.status == "diverged" for job in run.jobs)  # with the reason, below
        if run.state.get("reason") and not told:
            lines.append(f"*{run.name}*: {status(run)}: {' '.join(str(run.state['reason']).split())}")
        if not run.state:
            lines.append(f"*{run.name}*: no state.json; the run ended before its first job, or the file was lost")
        together: dict[tuple[str, str], list[str]] = {}
        for job in run.missing:
            if job.status in ("not started", "in training") and not job.note:
                together.setdefault((job.status, job.method), []).append(job.name)
            else:
                note_ = f": {job.note}" if job.note else ""
                lines.append(f"*{run.name}*: {job.name} {job.status}{note_}")
        for (state, method), names in together.items():
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            lines.append(f"*{run.name}*: {method}: {len(names)} jobs {state}: {shown}")
    return lines


def _seeds(run: Run) -> str:
    return ", ".join(map(str, run.seeds)) or "unknown"
