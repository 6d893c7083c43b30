"""Rounds in which all ways take turns, and what follows from them: medians, and ratios within a round."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Turn:
    """One way's turn in one round: seconds of wall clock, and of all this process's threads."""

    way: str
    round: int
    wall_s: float
    cpu_s: float


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and process seconds of ``work``."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def take_turns(
    ways: Mapping[str, Callable[[int], Any]], rounds: int, between: Callable[[str, int], Any] = lambda way, number: None
) -> list[Turn]:
    """Each round calls every way once, with the round's number; who goes first moves on by one.

    :param between: called after each turn, untimed.
    """
    turns, names = [], list(ways)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            turns.append(Turn(name, number, *timed(lambda name=name, number=number: ways[name](number))))
            between(name, number)
    return turns


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def seconds(turns: list[Turn], way: str, clock: str = "wall_s") -> list[float]:
    """A way's seconds, round by round."""
    return [getattr(turn, clock) for turn in sorted(turns, key=lambda turn: turn.round) if turn.way == way]


def speedup(turns: list[Turn], over: str, way: str, clock: str = "wall_s") -> Spread:
    """How many times as fast as ``over``: the ratio within each round, then the median."""
    pairs = zip(seconds(turns, over, clock), seconds(turns, way, clock), strict=True)
    return Spread.of([slow / fast for slow, fast in pairs])
