"""Every op in every implementation on this machine's GPU, side by side in one run.

    python kernels/bench/run.py [--check] [--only verbalizer_softmax] [--rounds 20]

Appends one row per measurement to kernels/bench/results.csv. Implementations take turns, each call finds a cold L2
cache, and the median over the rounds counts. A result that differs from plain torch's stops the run: no time is written
for a wrong answer. ``--check`` runs tests/kernels on the GPU first and measures only if they pass.

Bytes are those that the op must move, whatever an implementation makes of it: every input and output once; the
candidates' rows once for the loss and once more for the gradient, whose weights need the whole sum first. So GB/s
compares implementations and, against the copy of a large tensor measured in the same run, says how far from the
memory's limit they are. With many examples per row the limit is arithmetic instead: see the column tflops.

Without a GPU nothing is measured and nothing written: exit code 3.
"""

import argparse
import csv
import datetime
import functools
import importlib.metadata
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaptune.kernels import cuda_extension, reference
from megaptune.kernels.registration import Ops

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = [
    "date", "device", "torch", "triton", "op", "pass", "implementation", "dtype", "B", "T", "C", "D", "jobs", "rounds",
    "median_ms", "fastest_ms", "bytes", "gb_per_s", "copy_gb_per_s", "ratio_to_copy", "tflops",
]  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EXAMPLES = [8, 32, 128, 512]
CANDIDATES = [100, 16_342, 49_152, 151_936]  # a relation's answers, LAMA's common words, two vocabularies
WIDTHS = [576, 1024, 3072]
BANK = {"B": 280, "C": 49_152, "jobs": 35}  # 35 relations of 8 examples, each with its own part of the rows
VOCABULARY, PSEUDO_TOKENS = 49_152, 6
LENGTHS = [16, 256]  # a LAMA input, a passage


@dataclass(frozen=True)
class Case:
    """One op at one size. ``backward``: with the gradient too."""

    op: str
    backward: bool
    dtype: str
    B: int
    D: int
    T: int = 0  # prompt_splice
    C: int = 0  # verbalizer_softmax: rows in all
    jobs: int = 1

    @property
    def element_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        """What must be moved."""
        if self.op == "prompt_splice":
            positions, spliced = self.B * self.T, self.B * PSEUDO_TOKENS
            rows = positions * self.D
            forward = positions * 8 + (rows - spliced * self.D) * self.element_bytes + spliced * self.D * 4
            forward += rows * self.element_bytes
            table = self.jobs * PSEUDO_TOKENS * self.D * 4
            return forward + (positions * 8 + spliced * self.D * self.element_bytes + table) * self.backward
        rows, features = self.C * self.D * self.element_bytes, self.B * self.D * self.element_bytes
        answers = self.B * (8 + 16 * (self.jobs > 1))  # labels and ranges in
        results = self.B * (4 + 8 + 8)  # loss, rank, prediction out
        gradient = rows + 2 * features  # rows and features again; the gradient out
        return rows + features + answers + results + gradient * self.backward

    @property
    def flops(self) -> int:
        """Products and sums of the plain statement, each candidate of each example: scores, and the gradient's sum."""
        if self.op == "prompt_splice":
            return 0
        return 2 * self.B * (self.C // self.jobs) * self.D * (2 if self.backward else 1)


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for D in WIDTHS:
            for backward in (False, True):
                for B in EXAMPLES:
                    yield from (Case("prompt_splice", backward, dtype, B, D, T=T, jobs=max(1, B // 8)) for T in LENGTHS)
                    yield from (Case("verbalizer_softmax", backward, dtype, B, D, C=C) for C in CANDIDATES)
                yield Case("verbalizer_softmax", backward, dtype, D=D, **BANK)


def prepare(case: Case, device: torch.device) -> Callable[[Ops], tuple[Tensor, ...]]:
    """The call to measure, on inputs that are the same whenever they are made."""
    generator = torch.Generator(device=device).manual_seed(1)
    dtype = DTYPES[case.dtype]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    if case.op == "prompt_splice":
        slots = torch.randint(VOCABULARY, (case.B, case.T), generator=generator, device=device)
        job = torch.arange(case.B, device=device) % case.jobs
        slots[:, :PSEUDO_TOKENS] = -1 - job[:, None] * PSEUDO_TOKENS - torch.arange(PSEUDO_TOKENS, device=device)
        words = random(VOCABULARY, case.D).to(dtype)
        table = random(case.jobs * PSEUDO_TOKENS, case.D).requires_grad_(case.backward)
        gradient = random(case.B, case.T, case.D).to(dtype)

        def splice(ops: Ops) -> tuple[Tensor, ...]:
            embeds = ops.prompt_splice(slots, words, table)
            return (embeds, *torch.autograd.grad(embeds, table, gradient)) if case.backward else (embeds,)

        return splice

    features = random(case.B, case.D).to(dtype).requires_grad_(case.backward)
    rows = (random(case.C, case.D) * case.D**-0.5).to(dtype)
    width = case.C // case.jobs
    labels = torch.randint(width, (case.B,), generator=generator, device=device)
    ranges = None
    if case.jobs > 1:
        start = torch.arange(case.B, device=device) % case.jobs * width
        ranges = torch.stack([start, start + width], dim=1)
    ones = torch.ones(case.B, device=device)

    def softmax(ops: Ops) -> tuple[Tensor, ...]:
        loss, rank, prediction = ops.verbalizer_softmax(features, rows, labels, None, ranges)
        found = loss.detach(), rank, prediction
        return (*found, *torch.autograd.grad(loss, features, ones)) if case.backward else found

    return softmax


def assert_agrees(case: Case, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Coarse, and at real sizes; tests/kernels is exact. Ranks may differ where scores do in their last bits."""
    for mine, theirs in zip(found, expected, strict=True):
        if mine.is_floating_point():
            atol = 2e-2 if case.dtype == "bf16" else 1e-3
            torch.testing.assert_close(mine.float(), theirs.float(), rtol=1e-2, atol=atol, msg=lambda m: f"{case}: {m}")
        else:
            same = (mine - theirs).abs() <= max(2, case.C // 1000)
            assert same.float().mean() > 0.98, f"{case}: ranks or predictions differ"


def measure(calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, in turns, with what L2 holds overwritten before each."""
    cache = torch.empty(torch.cuda.get_device_properties(device).L2_cache_size * 2, dtype=torch.int8, device=device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round in range(rounds + 3):
        for name, call in calls.items():
            cache.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            if round >= 3:
                times[name].append(begin.elapsed_time(end))
    return times


def copy_ceiling(rounds: int, device: torch.device) -> float:
    """GB/s of copying 1 GiB, read and written."""
    source = torch.empty(2**30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = measure({"copy": lambda: target.copy_(source)}, rounds, device)["copy"]
    return 2 * source.numel() / (statistics.median(times) / 1e3) / 1e9


def row(
    case: Case, implementation: str, times_ms: list[float], ceiling: float, machine: dict[str, str]
) -> dict[str, Any]:
    """A line of results.csv."""
    median = statistics.median(times_ms)
    rate = case.bytes / (median / 1e3) / 1e9
    return {
        **machine,
        "op": case.op,
        "pass": "forward+gradient" if case.backward else "forward",
        "implementation": implementation,
        "dtype": case.dtype,
        **{name: getattr(case, name) for name in ("B", "T", "C", "D", "jobs")},
        "rounds": len(times_ms),
        "median_ms": round(median, 5),
        "fastest_ms": round(min(times_ms), 5),
        "bytes": case.bytes,
        "gb_per_s": round(rate, 1),
        "copy_gb_per_s": round(ceiling, 1),
        "ratio_to_copy": round(rate / ceiling, 4),
        "tflops": round(case.flops / (median / 1e3) / 1e12, 2),
    }


def append(file: Path, line: dict[str, Any]) -> None:
    is_new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(line)


def implementations() -> dict[str, Ops]:
    found = {"reference": reference.ops}
    from megaptune.kernels import triton_ops

    found["triton"] = triton_ops.ops
    problem = cuda_extension.why_not()
    if problem:
        print(f"the CUDA C++ kernels are not measured: {problem}", file=sys.stderr)
    else:
        from megaptune.kernels import cuda_ops

        found["cuda"] = cuda_ops.implemented()
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="run tests/kernels on the GPU first")
    parser.add_argument("--only", choices=["prompt_splice", "verbalizer_softmax"], help="one op alone")
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each call (default: 20)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "kernels/bench: no CUDA device was found. Only GPUs are measured here: nothing was measured, nothing was "
            "written. On a CPU the kernels' results are tested with: python -m pytest tests/kernels",
            file=sys.stderr,
        )
        return 3
    if options.check:
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/kernels"], cwd=ROOT, check=False)
        if tests.returncode:
            print("kernels/bench: the tests failed on this GPU, so nothing was measured", file=sys.stderr)
            return 1
    device = torch.device("cuda")
    machine = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
    }
    every = implementations()
    ceiling = copy_ceiling(options.rounds, device)
    print(f"{machine['device']}: copies {ceiling:.0f} GB/s")
    for case in cases():
        if options.only not in (None, case.op):
            continue
        call = prepare(case, device)
        expected = call(every["reference"])
        for ops in every.values():
            assert_agrees(case, call(ops), expected)
        del expected
        times = measure({name: functools.partial(call, ops) for name, ops in every.items()}, options.rounds, device)
        for name, times_ms in times.items():
            line = row(case, name, times_ms, ceiling, machine)
            append(RESULTS, line)
            print(*(f"{line[column]}" for column in COLUMNS[4:]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
