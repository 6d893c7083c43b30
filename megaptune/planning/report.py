"""A memory plan as tables for people and as one mapping for programs."""

from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table

from megaptune.config import Config
from megaptune.planning.choice import Candidate, candidate, recommend, weigh
from megaptune.planning.communication import Communication
from megaptune.planning.layout import Layout, Machines, gibibytes
from megaptune.planning.source import Source
from megaptune.planning.workload import Shapes, Workload

SHOWN = 12  # rows of the table of layouts
_KINDS = {
    "tensor_parallel": "tensor-parallel sums",
    "zero_3": "weights fetched from replicas",
    "table": "gradient of the prompt table",
    "tuned_lm": "gradients and weights of the tuned LM",
    "host_link": "weights copied from host or disk",
}


class PlanReport:
    """A configuration's layouts on some machines, weighed.

    :raises SetupError: when no layout fits.
    """

    def __init__(self, config: Config, source: Source, shapes: Shapes, work: Workload, machines: Machines) -> None:
        self.source, self.shapes, self.work, self.machines = source, shapes, work, machines
        self.candidates = weigh(shapes, work, machines, config.parallel)
        self.best, self.reason = recommend(self.candidates, work)
        self.stated: Candidate | None = None
        parallel = config.parallel
        if parallel.layout == "stated" and machines.world_size % parallel.tensor_parallel == 0:
            layout = Layout.stated(parallel, machines.world_size)
            self.stated = candidate(shapes, work, layout, machines) if layout != self.best.layout else None

    def as_dict(self) -> dict[str, Any]:
        """Bytes and layouts under the names that the tables show."""
        return {
            "backbone": {
                "name": self.source.name,
                "family": self.shapes.family,
                "parameters": self.shapes.num_parameters,
                "dtype": self.shapes.dtype,
            },
            "machines": asdict(self.machines),
            "workload": asdict(self.work),
            "recommended": {**self._row(self.best), "reason": self.reason},
            "stated": self._row(self.stated) if self.stated else None,
            "layouts": [self._row(found) for found in self.candidates],
        }

    def _row(self, found: Candidate) -> dict[str, Any]:
        return {
            "layout": asdict(found.layout),
            "fits": found.fits,
            "problem": found.problem,
            "idle_ranks": found.idle_ranks,
            "device_bytes": found.memory.device if found.memory else None,
            "peak": found.memory.peak if found.memory else None,
            "host_bytes": found.memory.host if found.memory else None,
            "sent_bytes_per_step": asdict(found.communication) if found.communication else None,
        }

    def console(self) -> Group:
        """The tables and the recommendation."""
        work, shapes = self.work, self.shapes
        where = "" if self.source.weights else f" (its weights are not here; shapes from {self.source.folder})"
        words = (
            f"backbone   {self.source.name}: {shapes.family}, {shapes.kind}, {shapes.dtype}, "
            f"{shapes.num_parameters:,} parameters{where}\n"
            f"machines   {self.machines}\n"
            f"step       {work.global_batch} examples = {work.pieces} micro-batches of {work.micro_batch}; "
            f"{work.tokens} tokens ({work.basis})"
        )
        return Group(words, "", self._components(), self._traffic(), self._layouts(), f"take       {self._advice()}")

    def _columns(self) -> list[tuple[str, Candidate]]:
        columns = [("recommended", self.best)]
        return [*columns, ("stated", self.stated)] if self.stated else columns

    def _components(self) -> Table:
        table = _table("bytes of a rank", ["component", *(f"{name}\n{c.layout}" for name, c in self._columns())])
        columns = [found.memory for _, found in self._columns()]
        for part in ("device", "host"):
            names = dict.fromkeys(name for memory in columns if memory for name in getattr(memory, part))
            for name in names:
                sizes = [getattr(memory, part).get(name, 0) if memory else 0 for memory in columns]
                if any(sizes):
                    table.add_row(f"{name} (host)" if part == "host" else name, *map(gibibytes, sizes))
        table.add_section()
        table.add_row("on the device", *(gibibytes(memory.device_bytes if memory else 0) for memory in columns))
        table.add_row("at the peak of", *(memory.peak if memory else "" for memory in columns))
        return table

    def _traffic(self) -> Table:
        table = _table("bytes that a rank sends in a step", ["kind", *(name for name, _ in self._columns())])
        columns = [found.communication for _, found in self._columns()]
        for key, name in _KINDS.items():
            sizes = [getattr(found, key) if found else 0 for found in columns]
            if any(sizes):
                table.add_row(name, *map(gibibytes, sizes))
        return table

    def _layouts(self) -> Table:
        table = _table("layouts, best first", ["layout", "a rank", "sent a step", "idle", ""])
        for found in self.candidates[:SHOWN]:
            verdict = found.problem or ("recommended" if found is self.best else found.beaten_by(self.best))
            memory = gibibytes(found.memory.device_bytes) if found.memory else ""
            table.add_row(str(found.layout), memory, _sent(found.communication), str(found.idle_ranks), verdict)
        if len(self.candidates) > SHOWN:
            table.add_row(f"and {len(self.candidates) - SHOWN} more", "", "", "", "")
        return table

    def _advice(self) -> str:
        layout = self.best.layout
        keys = (
            f"parallel.tensor_parallel: {layout.tensor_parallel}, zero_stage: {layout.zero_stage}, "
            f"offload: {layout.offload}, activation_checkpointing: {str(layout.activation_checkpointing).lower()}"
        )
        return f"{layout}: {self.reason}\n           {keys}; or parallel: auto"


def _sent(communication: Communication | None) -> str:
    return gibibytes(communication.moved_bytes) if communication else ""


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        right = 0 < number < len(columns) - (columns[-1] == "")
        table.add_column(column, justify="right" if right else "left")
    return table
