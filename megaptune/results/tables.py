"""The table that a run's task calls for."""

from pathlib import Path

from megaptune.config import Config
from megaptune.results.superglue_table import SuperGlueTable
from megaptune.results.table import ResultsTable
from megaptune.superglue_config import SuperGlueTask


def read_table(run: Path, config: Config) -> ResultsTable | SuperGlueTable:
    """From the results that a run directory holds so far."""
    table = SuperGlueTable if isinstance(config.task, SuperGlueTask) else ResultsTable
    return table.read(run, config)
