"""The same configuration through the real launchers: DeepSpeed's, torchrun, and none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import losses, metrics

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def start(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run from the checkout with this interpreter's scripts first on the path; one thread a process."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    settings = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def config(tiny, facts, tmp_path_factory):
    from tiny import write_config

    files = {split: str(path) for split, path in facts.items()}
    return write_config(tmp_path_factory.mktemp("launch"), backbone={"path": str(tiny("llama"))}, task=files)


@pytest.fixture(scope="module")
def one_rank(config):
    run = config.parent / "one"
    done = start(sys.executable, "-m", "megaptune", "train", "--config", str(config), "--set", f"run.directory={run}")
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize("stage", [0, 3])
def test_deepspeed_with_two_ranks_gives_the_losses_of_one_process(config, one_rank, tmp_path, stage):
    run = tmp_path / "run"
    done = start(
        *("deepspeed", "--num_gpus", "2", "--master_port", "29711", "megaptune/train.py", "--config", str(config)),
        *("--set", f"run.directory={run}", "--set", f"parallel.zero_stage={stage}"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run) == pytest.approx(losses(one_rank), rel=1e-5)
    assert f"2 ranks (torch) = 2 replicas x 1 tensor parallel, ZeRO {stage}" in done.stdout
    assert done.stdout.count("test P@1, per cent") == 1  # rank 0 alone speaks
    assert json.loads((run / "state.json").read_text())["status"] == "finished"


def test_torchrun(config, one_rank, tmp_path):
    run = tmp_path / "run"
    done = start(
        *("torchrun", "--nproc-per-node", "2", "--master-port", "29712", "megaptune/train.py"),
        *("--config", str(config), "--set", f"run.directory={run}"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run) == pytest.approx(losses(one_rank), rel=1e-5)


def test_a_mistake_is_told_once_and_its_exit_code_reaches_the_shell(config, tmp_path):
    done = start(
        *("deepspeed", "--num_gpus", "2", "--master_port", "29713", "megaptune/train.py", "--config", str(config)),
        *("--set", "train.learning_rat=1", "--set", f"run.directory={tmp_path / 'run'}"),
    )
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("did you mean `train.learning_rate`") == 1
    assert not (tmp_path / "run").exists()


def test_the_second_start_of_a_finished_run_only_prints_its_table(config, one_rank):
    before = metrics(one_rank)
    done = start(sys.executable, "megaptune/train.py", "--config", str(config), "--set", f"run.directory={one_rank}")
    assert done.returncode == 0, done.stderr
    assert "done before" in done.stdout
    assert "test P@1, per cent" in done.stdout
    assert metrics(one_rank) == before
