"""A run directory as a report reads it: what is there, finished or not, and what is missing.

Nothing here needs the run's data or backbone, and no later change of the configuration's keys makes a run unreadable:
config.yaml is read as plain YAML.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megaptune.errors import ConfigError
from megaptune.report.labels import split_folder
from megaptune.run.files import read_json

Metrics = dict[str, float]


@dataclass(frozen=True)
class Point:
    """A line of metrics.jsonl. epoch: of a pass over dev, else None."""

    step: int
    epoch: int | None
    values: Metrics


@dataclass
class Curve:
    """What a job recorded, by step."""

    train: list[Point] = field(default_factory=list)
    dev: list[Point] = field(default_factory=list)

    @property
    def steps_per_epoch(self) -> float | None:
        """None before the first pass over dev."""
        return next((point.step / point.epoch for point in self.dev if point.epoch), None)

    @property
    def last_step(self) -> int:
        return max((point.step for point in (*self.train, *self.dev)), default=0)


@dataclass(frozen=True)
class JobRecord:
    """One job: task, method, seed (None: nothing is trained), variant of a sweep or pattern (else empty).

    status: finished | diverged | in training | not started | damaged. test: reading -> metric -> figure, with the
    reading "" where a task has none.
    """

    task: str
    method: str
    seed: int | None
    variant: str
    status: str
    note: str
    result: dict[str, Any]
    test: dict[str, Metrics]

    @property
    def name(self) -> str:
        """As the run calls it: the job's folder below `jobs/`."""
        seed = "" if self.seed is None else f"-seed{self.seed}"
        return f"{self.task}/{self.method}{seed}" + (f"-{self.variant}" if self.variant else "")

    @property
    def dev(self) -> float | None:
        """The dev figure that its epoch was chosen by."""
        found = [value for key, value in self.result.items() if key.startswith("best_dev") and _is_number(value)]
        return float(found[0]) if found else None

    def test_count(self, reading: str = "") -> int | None:
        """Records that count under ``reading``: a word list leaves some out, answers of several tokens bring some."""
        count = self.test.get(reading, {}).get("count")
        return self.result.get("counts", {}).get("test") if count is None else int(count)


@dataclass
class Run:
    """name: unique among the runs of a report. problems: what could not be read, in words."""

    name: str
    path: Path
    config: dict[str, Any]
    state: dict[str, Any]
    commands: list[str]
    environment: dict[str, Any]
    backbone: dict[str, Any]
    jobs: list[JobRecord]
    curves: dict[str, Curve]
    run_time_s: float
    problems: list[str]

    @property
    def finished(self) -> list[JobRecord]:
        return [job for job in self.jobs if job.status == "finished"]

    @property
    def missing(self) -> list[JobRecord]:
        return [job for job in self.jobs if job.status != "finished"]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(job.task for job in self.jobs))

    @property
    def seeds(self) -> list[int]:
        return list(self.setting("run.seeds") or [])

    @property
    def methods(self) -> list[str]:
        return list(self.setting("methods") or [])

    @property
    def backbone_name(self) -> str:
        return Path(str(self.setting("backbone.path", "unknown"))).name

    @property
    def headline(self) -> str:
        """The reading that epochs were chosen by."""
        return str(self.setting("scoring.select_on", ""))

    def setting(self, key: str, default: Any = None) -> Any:
        """``scoring.select_on``, say, of the stored configuration."""
        found: Any = self.config
        for name in key.split("."):
            if not isinstance(found, dict) or name not in found:
                return default
            found = found[name]
        return found


def read_runs(paths: list[Path]) -> list[Run]:
    """:raises ConfigError: a path is no run directory."""
    runs = [_read_run(path) for path in dict.fromkeys(path.resolve() for path in paths)]
    for name_of in (lambda run: f"{run.path.parent.name}/{run.path.name}", lambda run: str(run.path)):
        names = [run.name for run in runs]
        for run in runs:
            if names.count(run.name) > 1:
                run.name = name_of(run)
    return runs


def _read_run(path: Path) -> Run:
    file = path / "config.yaml"
    if not file.is_file():
        what = "holds no config.yaml" if path.is_dir() else "is not there" if not path.exists() else "is no folder"
        raise ConfigError(f"{path} is no run directory: it {what}. Give a folder that `megaptune train` wrote to")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        config = None
    if not isinstance(config, dict) or "backbone" not in config:
        raise ConfigError(f"{path} is no run directory: {file.name} is no configuration that a run has stored")
    problems: list[str] = []
    state = _json_object(path / "state.json", problems)
    backbone = _json_object(path / "backbone.json", problems)
    environment = _json_object(path / "environment.json", problems)
    command_file = path / "command.txt"
    text = command_file.read_text(encoding="utf-8", errors="replace") if command_file.is_file() else ""
    curves, run_time_s = _read_metrics(path / "metrics.jsonl", problems)
    run = Run(
        path.name, path, config, state, text.splitlines(), environment, backbone, [], curves, run_time_s, problems
    )
    run.jobs = list(_jobs(run))
    return run


def _json_object(file: Path, problems: list[str]) -> dict[str, Any]:
    """Empty where the file is not there, or is damaged, which is a problem."""
    if not file.is_file():
        return {}
    try:
        value = read_json(file)
    except (ValueError, OSError):
        value = None
    if not isinstance(value, dict):
        problems.append(f"{file.name} is damaged and left out")
        return {}
    return value


def _read_metrics(file: Path, problems: list[str]) -> tuple[dict[str, Curve], float]:
    """Each job's curve, and the seconds of all starts, as far as their lines go."""
    curves: dict[str, Curve] = {}
    total_s = before_s = 0.0
    damaged = 0
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    for raw in lines:
        if not raw.endswith(b"\n"):
            continue  # torn by a kill
        try:
            line = json.loads(raw)
            kind, job, step = str(line["kind"]), str(line["job"]), int(line["step"])
            time_s = float(line.get("time_s", before_s))
        except (ValueError, KeyError, TypeError):
            damaged += 1
            continue
        total_s += before_s if time_s < before_s else 0.0
        before_s = time_s
        if kind in ("train", "dev"):
            values = {name: float(value) for name, value in line.items() if _is_number(value)}
            epoch = line.get("epoch")
            point = Point(step, int(epoch) if _is_number(epoch) else None, values)
            getattr(curves.setdefault(job, Curve()), kind).append(point)
    if damaged:
        problems.append(f"{damaged} of {len(lines)} lines of {file.name} are damaged and left out")
    return curves, total_s + before_s


def _jobs(run: Run) -> Iterable[JobRecord]:
    """Those with a folder, then those of methods that have not begun."""
    folders = sorted((run.path / "jobs").glob("*/*/"), key=_natural)
    begun = set()
    for folder in folders:
        method, seed, variant = split_folder(folder.name)
        begun.add(method)
        yield _job(run, folder, method, seed, variant)
    tasks = list(dict.fromkeys(folder.parent.name for folder in folders)) or _configured_tasks(run)
    for method in run.methods:
        if method not in begun:
            for task in tasks:
                for seed in [None] if method.split("_")[0] == "manual" else run.seeds:
                    yield JobRecord(task, method, seed, "", "not started", "", {}, {})


# Of a result, left out where they are something else.
_MAPPINGS = ("counts", "candidates", "baselines", "baselines_of", "splits")


def _job(run: Run, folder: Path, method: str, seed: int | None, variant: str) -> JobRecord:
    task = folder.parent.name
    common = task, method, seed, variant
    file = folder / "result.json"
    if file.is_file():
        stored = _json_object(file, [])
        result = {key: value for key, value in stored.items() if key not in _MAPPINGS or isinstance(value, dict)}
        test = _test_figures(result.get("test"))
        if not test:
            return JobRecord(*common, "damaged", "result.json is damaged", {}, {})
        return JobRecord(*common, "finished", "", result, test)
    name = f"{task}/{folder.name}"
    why = re.search(rf"(?:^|; ){re.escape(name)}: (.*?)(?:; |\. All other jobs|$)", str(run.state.get("reason", "")))
    if why:
        return JobRecord(*common, "diverged", why[1], {}, {})
    curve = run.curves.get(name)
    if curve is None:
        return JobRecord(*common, "not started", "", {}, {})
    epochs = max((point.epoch or 0 for point in curve.dev), default=0)
    return JobRecord(*common, "in training", f"step {curve.last_step}, epoch {epochs} complete", {}, {})


def _configured_tasks(run: Run) -> list[str]:
    """Those that the configuration names; where it says "all", one line stands for them."""
    for key in ("task.relations", "task.tasks"):
        if isinstance(named := run.setting(key), list):
            return [str(name) for name in named]
    return [str(run.setting("task.name", "all tasks"))]


def _test_figures(test: Any) -> dict[str, Metrics]:
    """Readings with their metrics, or metrics alone, which then have the reading ""."""
    if not isinstance(test, dict):
        return {}
    plain = {name: float(value) for name, value in test.items() if _is_number(value)}
    nested = {
        reading: {name: float(value) for name, value in metrics.items() if _is_number(value)}
        for reading, metrics in test.items()
        if isinstance(metrics, dict)
    }
    return {**({"": plain} if plain else {}), **{reading: metrics for reading, metrics in nested.items() if metrics}}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _natural(folder: Path) -> tuple[int, str, str]:
    task = folder.parent.name
    return (int(task[1:]) if task[1:].isdecimal() else 0, task, folder.name)
