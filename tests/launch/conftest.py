"""One tiny configuration for every launcher, and its run in a single process to compare with."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import TRAIN, start
from tiny import write_config


@pytest.fixture(scope="session")
def config(tiny: Callable[[str], Path], facts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {split: str(path) for split, path in facts.items()}
    folder = tmp_path_factory.mktemp("launch")
    return write_config(folder, backbone={"path": str(tiny("llama"))}, task=files, train=TRAIN)


@pytest.fixture(scope="session")
def one_rank(config: Path) -> Path:
    run = config.parent / "one"
    done = start(sys.executable, "-m", "megaptune", "train", "--config", str(config), "--set", f"run.directory={run}")
    assert done.returncode == 0, done.stderr
    return run
