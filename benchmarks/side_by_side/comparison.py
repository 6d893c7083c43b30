"""One comparison: the same work done by every way in turn, checked, counted and timed.

R table rows, D backbone width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


from megaptune.examples import Example

from .arithmetic import Arithmetic, count, peak
from .timing import Spread, Turn, seconds, speedup, take_turns
from .ways import Megaptune, OnATable, Released, Way

TOLERANCE = 1e-4  # of the loss, and of the gradient's largest entry: fp32, and other orders of sums


@dataclass
class Row:
    """What one way did in one comparison. Rates and ratios by wall clock; ``_cpu`` by process time.

    ``share``: operations with the blocks' weights per second, of the machine's measured rate at the same shapes;
    ``share_all``: with attention and output embedding.
    """

    scenario: str
    way: str
    data: str
    examples: int
    rounds: int
    examples_per_s: float
    examples_per_cpu_s: float
    over_peft: Spread | None
    over_peft_cpu: Spread | None
    over_released: Spread | None
    over_previous: Spread | None
    blocks_gflop: float
    attention_gflop: float
    head_gflop: float
    peak_gflop_per_s: float
    share: float
    share_all: float
    loss_error: float | None = None
    gradient_error: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None


@dataclass
class Comparison:
    """``pieces``: what is handed to ``act`` in round 0, 1, ..., again from the start when they are used up."""

    scenario: str
    data: str
    pieces: Sequence[list[Example]]
    ways: Sequence[Way]
    act: Callable[[Way, list[Example]], Any]
    turns: list[Turn] = field(default_factory=list)

    def run(self, rounds: int, say: Callable[[str], None]) -> list[Row]:
        counts: dict[str, list[Arithmetic]] = {}
        for way in self.ways:  # also the warm-up
            say(f"{self.scenario}: {way.name}")
            counts[way.name] = [
                count(lambda way=way, piece=piece: self.act(way, piece), way.weights()) for piece in self.pieces
            ]
        peaks: dict[str, list[float]] = {way.name: [] for way in self.ways}

        def measure_peak(name: str, number: int) -> None:
            peaks[name].append(peak(counts[name][number % len(self.pieces)].products))

        def turn(way: Way) -> Callable[[int], Any]:
            return lambda number: self.act(way, self.pieces[number % len(self.pieces)])

        self.turns = take_turns({way.name: turn(way) for way in self.ways}, rounds, measure_peak)
        names = [way.name for way in self.ways]
        return [
            self._row(name, names[index - 1] if index else None, names, counts[name], peaks[name])
            for index, name in enumerate(names)
        ]

    def _row(
        self, name: str, previous: str | None, names: list[str], counts: list[Arithmetic], peaks: list[float]
    ) -> Row:
        wall, cpu = seconds(self.turns, name), seconds(self.turns, name, "cpu_s")
        done = [counts[number % len(counts)] for number in range(len(wall))]
        examples = len(self.pieces[0])

        def over(other: str | None, clock: str = "wall_s") -> Spread | None:
            return speedup(self.turns, other, name, clock) if other in names and other is not None else None

        def mean(kind: str) -> float:
            return sum(found.operations[kind] for found in counts) / len(counts) / 1e9

        def share(operations: list[int]) -> float:
            rates = [op / s / p for op, s, p in zip(operations, wall, peaks, strict=True)]
            return Spread.of(rates).median

        return Row(
            scenario=self.scenario,
            way=name,
            data=self.data,
            examples=examples,
            rounds=len(wall),
            examples_per_s=examples / Spread.of(wall).median,
            examples_per_cpu_s=examples / Spread.of(cpu).median,
            over_peft=over("peft"),
            over_peft_cpu=over("peft", "cpu_s"),
            over_released=over("released"),
            over_previous=over(previous),
            blocks_gflop=mean("blocks"),
            attention_gflop=mean("attention"),
            head_gflop=mean("head"),
            peak_gflop_per_s=Spread.of(peaks).median / 1e9,
            share=share([found.blocks for found in done]),
            share_all=share([found.total for found in done]),
        )


def check_parity(ways: Sequence[Way], members: list[Example]) -> dict[str, tuple[float, float]]:
    """Relative error of loss and table gradient of every way on a table, against the plain statement.

    :raises SystemExit: above the tolerance.
    """
    reference = next(way for way in ways if isinstance(way, Released))
    table, found = reference.prompt.vectors(), {}
    for way in ways:
        if not isinstance(way, OnATable) or way is reference:
            continue
        reference.candidates = way.candidates if isinstance(way, Megaptune) else None
        loss, gradient = reference.gradient(members, table)
        own_loss, own_gradient = way.gradient(members, table)
        errors = abs(own_loss - loss) / abs(loss), float((own_gradient - gradient).abs().max() / gradient.abs().max())
        if not max(errors) <= TOLERANCE:
            raise SystemExit(f"{way.name} differs from the plain statement: loss {errors[0]:.1e}, gradient {errors[1]:.1e}")
        found[way.name] = errors
    reference.candidates = None
    return found


def compare_steps(
    scenario: str, data: str, batches: Sequence[list[Example]], ways: Sequence[Way], rounds: int, say: Any
) -> tuple[list[Row], list[Turn]]:
    """Training steps; parity before them, and each way's loss on the first batch before and after."""
    errors = check_parity(ways, batches[0])
    before = [way.loss(batches[0]) for way in ways]
    comparison = Comparison(scenario, data, batches, ways, lambda way, members: way.step(members))
    rows = comparison.run(rounds, say)
    for row, way, loss in zip(rows, ways, before, strict=True):
        row.loss_error, row.gradient_error = errors.get(way.name, (None, None))
        row.loss_before, row.loss_after = loss, way.loss(batches[0])
    return rows, comparison.turns


def compare_evaluations(
    scenario: str, data: str, members: list[Example], batch: int, ways: Sequence[Way], rounds: int, say: Any
) -> tuple[list[Row], list[Turn]]:
    """Passes over a split without gradients, each way with its own prompt."""
    reference = next(way for way in ways if isinstance(way, Released))
    errors: dict[str, float] = {}
    for way in ways:
        if isinstance(way, Megaptune):
            reference.candidates = way.candidates
            way.prompt, own = reference.prompt, way.prompt
            plain, found = reference.evaluate(members, batch), way.evaluate(members, batch)
            way.prompt = own
            errors[way.name] = float((found - plain).abs().max() / plain.abs().max())
            if not errors[way.name] <= TOLERANCE:
                raise SystemExit(f"{way.name} differs from the plain statement: losses {errors[way.name]:.1e}")
    reference.candidates = None
    comparison = Comparison(scenario, data, [members], ways, lambda way, rows: way.evaluate(rows, batch))
    rows = comparison.run(rounds, say)
    for row in rows:
        row.loss_error = errors.get(row.way)
    return rows, comparison.turns
