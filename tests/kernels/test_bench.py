"""kernels/bench/run.py as far as it goes without a GPU: what it says there, the bytes it counts, the rows it writes."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megaptune.kernels import reference

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "kernels" / "bench" / "run.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernels_bench_run", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("arguments", [[], ["--check"]])
def test_without_a_gpu_it_says_so_and_writes_nothing(arguments) -> None:
    results = PROGRAM.with_name("results.csv")
    before = results.read_bytes() if results.exists() else None
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(PROGRAM), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (3, "")
    assert "no CUDA device was found" in done.stderr
    assert "nothing was measured, nothing was written" in done.stderr
    assert (results.read_bytes() if results.exists() else None) == before


def test_bytes_and_flops_of_the_softmax_by_hand(bench) -> None:
    """Rows 10 x 4 and features 2 x 4 of two bytes; a label of 8 bytes in, 4 + 8 + 8 bytes out, for two examples."""
    forward = bench.Case("verbalizer_softmax", False, "bf16", B=2, D=4, C=10)
    assert forward.bytes == 80 + 16 + 16 + 40
    assert forward.flops == 2 * 2 * 10 * 4
    both = bench.Case("verbalizer_softmax", True, "bf16", B=2, D=4, C=10)
    assert both.bytes == forward.bytes + 80 + 16 + 16  # rows and features again, the gradient out
    assert both.flops == 2 * forward.flops
    bank = bench.Case("verbalizer_softmax", False, "fp32", B=2, D=4, C=10, jobs=2)
    assert bank.bytes == 160 + 32 + 16 + 32 + 40  # and a range of 16 bytes for each
    assert bank.flops == 2 * 2 * 5 * 4


def test_bytes_of_the_splice_by_hand(bench) -> None:
    """One example of 16 positions, 6 of them of the table (fp32), width 2; slots of 8 bytes."""
    forward = bench.Case("prompt_splice", False, "bf16", B=1, D=2, T=16)
    assert forward.bytes == 16 * 8 + 10 * 2 * 2 + 6 * 2 * 4 + 16 * 2 * 2
    both = bench.Case("prompt_splice", True, "bf16", B=1, D=2, T=16)
    assert both.bytes == forward.bytes + 16 * 8 + 6 * 2 * 2 + 6 * 2 * 4  # slots, used gradients in, table's out


def test_every_shape_of_the_project_is_measured(bench) -> None:
    softmax = [case for case in bench.cases() if case.op == "verbalizer_softmax"]
    assert {(case.B, case.C, case.D) for case in softmax} >= {
        (B, C, D) for B in (8, 512) for C in (100, 16342, 49152, 151936) for D in (576, 3072)
    }
    assert {case.dtype for case in softmax} == {"bf16", "fp32"}
    assert {case.jobs for case in softmax} == {1, 35}
    assert len(set(bench.cases())) == len(list(bench.cases()))


@pytest.mark.parametrize("op", ["prompt_splice", "verbalizer_softmax"])
@pytest.mark.parametrize("backward", [False, True])
def test_its_calls_run_and_wrong_results_are_caught(bench, op, backward) -> None:
    sizes = {"T": 9} if op == "prompt_splice" else {"C": 12}
    case = bench.Case(op, backward, "fp32", B=4, D=3, jobs=2, **sizes)
    call = bench.prepare(case, torch.device("cpu"))
    found = call(reference.ops)
    assert len(found) == (1 if op == "prompt_splice" else 3) + backward
    bench.assert_agrees(case, found, call(reference.ops))
    with pytest.raises(AssertionError, match=op):
        bench.assert_agrees(case, (found[0] + 1, *found[1:]), found)


def test_a_row_of_made_up_times(bench, tmp_path) -> None:
    """3 MB in 2 ms are 1.5 GB/s, half of a copy at 3 GB/s."""
    case = bench.Case("verbalizer_softmax", False, "fp32", B=8, D=64, C=11_710)
    machine = {"date": "2000-01-01", "device": "none", "torch": "0", "triton": "0"}
    line = bench.row(case, "triton", [2.0, 1.0, 3.0], case.bytes / 1e6, machine)
    assert (line["median_ms"], line["fastest_ms"], line["rounds"]) == (2.0, 1.0, 3)
    assert line["gb_per_s"] == round(case.bytes / 2e6, 1)
    assert line["ratio_to_copy"] == 0.5
    file = tmp_path / "results.csv"
    bench.append(file, line)
    bench.append(file, line)
    with file.open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 2
    assert list(rows[0]) == bench.COLUMNS
    assert rows[0] == {name: str(value) for name, value in line.items()}
