"""Starting the program as a user does, from the checkout and with this interpreter's scripts first on the path."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from runs import losses

TRAIN = {"optimizer": "sgd", "learning_rate": 0.5}
"""SGD, because Adam would amplify the rounding by which tensor-parallel sums differ from whole ones."""

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def environment(**changed: str) -> dict[str, str]:
    """One thread a process; the checkout wins over an installed megaptune."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changed}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(*command: str, timeout_s: float = 300, **changed: str) -> subprocess.CompletedProcess[str]:
    """Run to the end and capture what it says."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(**changed), capture_output=True, text=True, timeout=timeout_s, check=False
    )


def assert_finished_with_losses_of(run: Path, one: Path, output: str) -> None:
    """``run`` ended well, with the training losses of the run ``one``."""
    state = run / "state.json"
    assert state.is_file(), output
    assert json.loads(state.read_text(encoding="utf-8"))["status"] == "finished", output
    assert losses(run) == pytest.approx(losses(one), rel=2e-5)
