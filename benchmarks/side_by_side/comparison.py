"""One comparison: the same work done by every way in turn, checked, counted and timed.

R table rows, D backbone width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megaptune.batches import Member
from megaptune.examples import Example

from .arithmetic import Arithmetic, Peak, count, peak
from .banks import Jobs
from .timing import Spread, Turn, seconds, speedup, take_turns, timed
from .ways import Megaptune, Released, Way

TOLERANCE = 1e-4  # of the loss, and of the gradient's largest entry: fp32, and other orders of sums
BANK_TOLERANCE = 5e-4  # at freshly drawn LSTM prompts eager fp32 is itself 1.5e-4 away from fp64
PREPARATIONS = 3  # of which the median counts
ONE_BY_ONE = "one by one"


@dataclass
class Row:
    """What one way did in one comparison. Rates and ratios by wall clock; ``_cpu`` by process time.

    ``share``: operations with the blocks' weights per second, of the machine's measured rate at the same shapes
    (``share_cpu``: per second of process time); ``share_all``: with attention and output embedding.
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
    over_one_by_one: Spread | None
    blocks_gflop: float
    attention_gflop: float
    head_gflop: float
    peak_gflop_per_s: float
    share: float
    share_cpu: float
    share_all: float
    preparation_s: float = 0.0
    over_peft_ten_epochs: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None


@dataclass
class Comparison:
    """``pieces``: what is handed to ``act`` in round 0, 1, ..., again from the start when they are used up."""

    scenario: str
    data: str
    pieces: Sequence[list[Any]]
    ways: Sequence[Any]
    act: Callable[[Any, list[Any]], Any]
    turns: list[Turn] = field(default_factory=list)

    def run(self, rounds: int, say: Callable[[str], None]) -> list[Row]:
        counts: dict[str, list[Arithmetic]] = {}
        preparation: dict[str, float] = {}
        everything = [example for piece in self.pieces for example in piece]
        for way in self.ways:  # also the warm-up
            say(f"{self.scenario}: {way.name}")
            once = [timed(lambda way=way: way.prepare(everything))[0] for _ in range(PREPARATIONS)]
            preparation[way.name] = Spread.of(once).median / len(everything)
            counts[way.name] = [
                count(lambda way=way, piece=piece: self.act(way, piece), way.weights()) for piece in self.pieces
            ]
        peaks: dict[str, list[Peak]] = {way.name: [] for way in self.ways}

        def measure_peak(name: str, number: int) -> None:
            peaks[name].append(peak(counts[name][number % len(self.pieces)].products))

        def turn(way: Any) -> Callable[[int], Any]:
            return lambda number: self.act(way, self.pieces[number % len(self.pieces)])

        self.turns = take_turns({way.name: turn(way) for way in self.ways}, rounds, measure_peak)
        names = [way.name for way in self.ways]
        rows = [
            self._row(name, names[index - 1] if index else None, names, counts[name], peaks[name])
            for index, name in enumerate(names)
        ]
        for row in rows:
            row.preparation_s = preparation[row.way]
            if row.over_peft is not None:
                ten = 10 / row.examples_per_s
                row.over_peft_ten_epochs = row.over_peft.median * ten / (ten + row.preparation_s)
        return rows

    def _row(
        self, name: str, previous: str | None, names: list[str], counts: list[Arithmetic], peaks: list[Peak]
    ) -> Row:
        wall, cpu = seconds(self.turns, name), seconds(self.turns, name, "cpu_s")
        done = [counts[number % len(counts)] for number in range(len(wall))]
        examples = len(self.pieces[0])

        def over(other: str | None, clock: str = "wall_s") -> Spread | None:
            return speedup(self.turns, other, name, clock) if other in names and other is not None else None

        def mean(kind: str) -> float:
            return sum(found.operations[kind] for found in counts) / len(counts) / 1e9

        def share(operations: list[int], taken: list[float], rates: list[float]) -> float:
            return Spread.of([o / s / r for o, s, r in zip(operations, taken, rates, strict=True)]).median

        blocks, total = [found.blocks for found in done], [found.total for found in done]
        peak_wall, peak_cpu = [found.wall for found in peaks], [found.cpu for found in peaks]

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
            over_one_by_one=over(ONE_BY_ONE),
            blocks_gflop=mean("blocks"),
            attention_gflop=mean("attention"),
            head_gflop=mean("head"),
            peak_gflop_per_s=Spread.of(peak_wall).median / 1e9,
            share=share(blocks, wall, peak_wall),
            share_cpu=share(blocks, cpu, peak_cpu),
            share_all=share(total, wall, peak_wall),
        )


def check_parity(ways: Sequence[Way], members: list[Example]) -> dict[str, tuple[float, float]]:
    """Relative error of loss and table gradient [R, D] of every way on a table, against the plain statement.

    :raises SystemExit: above the tolerance.
    """
    reference = _reference(ways)
    table, found = reference.table().detach(), {}
    for alike in _by_candidates(ways).values():
        reference.candidates = alike[0].candidates
        loss, gradient = reference.gradient(members, table)
        for way in alike:
            way.prepare(members)
            own_loss, own_gradient = way.gradient(members, table)
            errors = abs(own_loss - loss) / abs(loss), _relative(own_gradient, gradient)
            found[way.name] = errors
            _require(way.name, loss=errors[0], gradient=errors[1])
    reference.candidates = None
    return found


def check_losses(ways: Sequence[Way], members: list[Example], batch: int) -> dict[str, float]:
    """The largest error of an evaluation's losses, all ways under the same prompt.

    :raises SystemExit: above the tolerance.
    """
    reference, found = _reference(ways), {}
    for alike in _by_candidates(ways).values():
        reference.candidates = alike[0].candidates
        table = reference.table().detach()
        plain = reference.evaluate(members, batch, table)
        for way in alike:
            way.prepare(members)
            found[way.name] = _relative(way.evaluate(members, batch, table), plain)
            _require(way.name, losses=found[way.name])
    reference.candidates = None
    return found


def compare_steps(
    scenario: str, data: str, batches: Sequence[list[Example]], ways: Sequence[Way], rounds: int, say: Any
) -> tuple[list[Row], list[Turn]]:
    """Training steps; parity before them, and each way's loss on the first batch before and after."""
    errors = check_parity(ways, batches[0])

    def losses() -> list[float]:
        return [float(way.evaluate(batches[0], len(batches[0])).mean()) for way in ways]

    before = losses()
    comparison = Comparison(scenario, data, batches, ways, lambda way, members: way.step(members))
    rows = comparison.run(rounds, say)
    for row, first, last in zip(rows, before, losses(), strict=True):
        row.loss_error, row.gradient_error = errors.get(row.way, (None, None))
        row.loss_before, row.loss_after = first, last
    return rows, comparison.turns


def compare_evaluations(
    scenario: str, data: str, members: list[Example], batch: int, ways: Sequence[Way], rounds: int, say: Any
) -> tuple[list[Row], list[Turn]]:
    """Passes over a split without gradients, each way with its own prompt."""
    errors = check_losses(ways, members, batch)
    comparison = Comparison(scenario, data, [members], ways, lambda way, rows: way.evaluate(rows, batch))
    rows = comparison.run(rounds, say)
    for row in rows:
        row.loss_error = errors.get(row.way)
    return rows, comparison.turns


def compare_banks(
    scenario: str, data: str, batches: Sequence[list[Member]], ways: Sequence[Jobs], rounds: int, say: Any
) -> tuple[list[Row], list[Turn]]:
    """Steps of many prompts; before them, all ways must give the first one's gradients.

    :raises SystemExit: above the tolerance.
    """
    first, *others = ways
    expected = first.gradients(batches[0])
    errors = {way.name: _relative(way.gradients(batches[0]), expected) for way in others}
    for name, error in errors.items():
        _require(name, BANK_TOLERANCE, gradient=error)
    comparison = Comparison(scenario, data, batches, ways, lambda way, members: way.step(members))
    rows = comparison.run(rounds, say)
    for row in rows:
        row.gradient_error = errors.get(row.way)
    return rows, comparison.turns


def _reference(ways: Sequence[Way]) -> Released:
    return next(way for way in ways if isinstance(way, Released))


def _by_candidates(ways: Sequence[Way]) -> dict[int, list[Megaptune]]:
    """This project's ways, by the softmax that they compute."""
    found: dict[int, list[Megaptune]] = {}
    for way in ways:
        if isinstance(way, Megaptune):
            found.setdefault(0 if way.candidates is None else len(way.candidates), []).append(way)
    return found


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _require(name: str, tolerance: float = TOLERANCE, **errors: float) -> None:
    if not max(errors.values()) <= tolerance:
        shown = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
        raise SystemExit(f"{name} differs from the plain statement by more than {tolerance:.0e}: {shown}")
