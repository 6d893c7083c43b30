"""Reading what a run left, without the parts that differ from run to run."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from megaptune.run.monitor import TIMING


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times, throughput and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def losses(run: Path) -> list[float]:
    """The training loss of every step, in order."""
    return [line["loss"] for line in metrics(run) if line["kind"] == "train"]


def prompt(run: Path, task: str = "cities", seed: int = 0, method: str = "ptuning") -> dict[str, Tensor]:
    """The trained prompt: vectors and encoder weights."""
    return load_file(run / "jobs" / task / f"{method}-seed{seed}" / "prompt" / "tensors.safetensors")


def result(run: Path, job: str) -> dict[str, Any]:
    return json.loads((run / "jobs" / job / "result.json").read_text(encoding="utf-8"))
