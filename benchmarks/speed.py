"""P-tuning's ways, side by side in one run: PEFT's, the released code's, and this project's with each saving in turn.

    MEGAPTUNE_DATA=... python benchmarks/speed.py [--scenarios short passages ...] [--rounds 5] [--threads 2]
    python benchmarks/speed.py --quick                      # small batches, two rounds, nothing compiled: a minute
    python benchmarks/speed.py --save docs/speed            # speed.csv, speed_rounds.csv, speed.svg

Scenarios: LAMA's short inputs; passages of 200 tokens in a large and a small batch; passes over a split; banks of 8 and
35 relations, with the paper's 8 and with 2 rows of each a step, against one relation after the other.

All ways compute on the same backbone (the embedded SmolLM2-135M unless --backbone names a causal LM's folder), the same
examples, the same threads. In a round each has one turn, and ratios are taken within rounds. Before they are timed, the
ways must agree in loss and table gradient with a plain statement. The machine's matrix products are timed in the same
rounds, in the shapes that the way multiplied.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from rich.console import Console
from side_by_side.banks import Jobs
from side_by_side.comparison import ONE_BY_ONE, Row, compare_banks, compare_evaluations, compare_steps
from side_by_side.report import save, show
from side_by_side.timing import Turn
from side_by_side.ways import Hosts, Megaptune, Peft, Released, Way
from side_by_side.workloads import ROWS, Data, Workload

from megaptune.backbone.description import load_tokenizer
from megaptune.backbone.embedded import embedded_folder
from megaptune.batches import Member
from megaptune.run.topology import connect, disconnect

SHORT_LADDER = ("answers_only", "length_buckets", "packing", "share_leading_tokens", "cut_last_block")
LONG_LADDER = ("answers_only", "packing", "cut_last_block", "context_cache")


@dataclass(frozen=True)
class Size:
    """Examples a step, steps with different examples, and tokens of a passage; relations and rows of each in a bank."""

    short: int = 32
    passages: int = 16
    few_passages: int = 4
    batches: int = 4
    long_batches: int = 2
    tokens: int = 200
    bucket: int = 8
    banks: tuple[tuple[int, int], ...] = ((8, 8), (8, 2), (35, 8), (35, 2))
    bank_tokens: int = 1024
    compiled: bool = True


QUICK = Size(8, 2, 1, 1, 1, 40, 4, ((3, 2),), 1024, False)


class Bench:
    def __init__(self, folder: Path, data: Data, size: Size, rounds: int, say: Callable[[str], None]) -> None:
        self.folder, self.data, self.size, self.rounds, self.say = folder, data, size, rounds, say
        tokenizer = data.tokenizer
        self.pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        self.hosts = Hosts(folder)
        self.rows: list[Row] = []
        self.turns: list[tuple[str, Turn]] = []

    def ladder(self, work: Workload, savings: tuple[str, ...]) -> list[Way]:
        """PEFT, the released way, plain, and plain with the savings up to each; candidates alone and compiling last."""
        ways: list[Way] = [Peft(self.folder, ROWS, self.pad_id), Released(self.folder, ROWS, self.pad_id)]
        batch = len(work.batches[0])
        for count in range(len(savings) + 1):
            on = savings[:count]
            size = self.size.bucket if on and on[-1] == "length_buckets" else batch
            ways.append(self.megaptune(f"+ {on[-1]}" if on else "plain", on, size))
        restricted = (*savings, "candidates_only")
        ways.append(self.megaptune("+ candidates_only", restricted, batch, work.candidates))
        if self.size.compiled:
            ways.append(self.megaptune("+ compile_blocks", (*restricted, "compile_blocks"), batch, work.candidates))
        return ways

    def megaptune(
        self, name: str, savings: tuple[str, ...], micro_batch: int, candidates: torch.Tensor | None = None
    ) -> Megaptune:
        return Megaptune(name, self.hosts.get(savings), ROWS, self.pad_id, micro_batch, candidates)

    def short(self) -> None:
        work = self.data.short(self.size.short, self.size.batches)
        self._steps("short", work, SHORT_LADDER)

    def passages(self) -> None:
        work = self.data.passages(self.size.passages, self.size.long_batches, self.size.tokens)
        self._steps("passages", work, LONG_LADDER)

    def few_passages(self) -> None:
        work = self.data.passages(self.size.few_passages, self.size.long_batches, self.size.tokens)
        self._steps("passages, small batch", work, LONG_LADDER)

    def evaluation(self) -> None:
        """A pass over all batches' examples at once."""
        short = self.data.short(self.size.short, self.size.batches)
        long = self.data.passages(self.size.passages, self.size.long_batches, self.size.tokens)
        for work, savings in ((short, SHORT_LADDER), (long, LONG_LADDER)):
            name, ways = f"evaluation, {work.name}", self.ladder(work, savings)
            ways = [*ways[:3], *ways[len(savings) + 2 :]]
            batch = len(work.batches[0])
            found = compare_evaluations(name, self._data(work), work.examples, batch, ways, self.rounds, self.say)
            self._keep(name, *found)

    def bank(self) -> None:
        for relations, rows in self.size.banks:
            works = self.data.bank(relations, rows, 2)
            batches = [
                [Member(example, 0, job) for job, work in enumerate(works) for example in work.batches[number]]
                for number in range(2)
            ]
            host = self.hosts.get(SHORT_LADDER)
            ways = [
                Jobs(name, host, len(works), at_once, self.pad_id, self.size.bank_tokens)
                for name, at_once in ((ONE_BY_ONE, 1), ("together", len(works)))
            ]
            name, data = f"bank of {len(works)}, {rows} rows each", works[0].source
            self._keep(name, *compare_banks(name, data, batches, ways, self.rounds, self.say))

    def _steps(self, name: str, work: Workload, savings: tuple[str, ...]) -> None:
        ways = self.ladder(work, savings)
        found = compare_steps(name, self._data(work), work.batches, ways, self.rounds, self.say)
        self._keep(name, *found)

    def _data(self, work: Workload) -> str:
        return f"{work.source}, {work.tokens_per_example:.1f} tokens an example"

    def _keep(self, name: str, rows: list[Row], turns: list[Turn]) -> None:
        self.rows += rows
        self.turns += [(name, turn) for turn in turns]


SCENARIOS = ("short", "passages", "few_passages", "evaluation", "bank")


def main(words: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--rounds", type=int, help="turns of every way (5; quick: 2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small batches and two rounds")
    parser.add_argument("--backbone", type=Path, help="a causal LM's folder instead of the embedded one")
    parser.add_argument("--facts", type=Path, help="JSON lines of subject and answer instead of LAMA and BoolQ")
    parser.add_argument("--save", type=Path, help="the folder for CSV files and the plot")
    arguments = parser.parse_args(words)
    console = Console(width=170)
    folder = arguments.backbone or embedded_folder(console.print)
    root = os.environ.get("MEGAPTUNE_DATA")
    data = Data(Path(root) if root else None, arguments.facts, load_tokenizer(folder))
    connect()
    torch.set_num_threads(arguments.threads)
    size, rounds = (QUICK, 2) if arguments.quick else (Size(), 5)
    bench = Bench(folder, data, size, arguments.rounds or rounds, lambda text: console.print(f"[dim]{text}[/dim]"))
    shown: list[Row] = []
    for scenario in arguments.scenarios:
        getattr(bench, scenario)()
        show([row for row in bench.rows if row not in shown], console)
        shown = list(bench.rows)
    if arguments.save:
        save(bench.rows, bench.turns, arguments.threads, arguments.save)
    disconnect()
    return bench.rows


if __name__ == "__main__":
    main()
