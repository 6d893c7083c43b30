"""A SuperGLUE run that is killed -9 within a job, under every method that trains, ends with the same bits."""

import os
import signal
from itertools import count
from pathlib import Path

import pytest
from ranks import RankFailed, run_ranks, train
from runs import metrics, result
from tiny_superglue import save_backbone, write_config, write_superglue

pytestmark = pytest.mark.dist

METHODS = ("ptuning", "ptuning+finetune", "finetune")
TASKS = ("CB", "COPA")
STEPS = 4  # of a job: two epochs of two steps


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("superglue")
    write_superglue(folder / "data", train=8, dev=4, val=6, test=2)
    settings = {"epochs": 2, "global_batch": 4, "micro_batch": 2, "learning_rate": 0.01, "lm_learning_rate": 0.001}
    task = {"tasks": list(TASKS), "splits": {"dev": "dev32"}}
    backbone = save_backbone("llama", folder / "backbone")
    return write_config(folder, folder / "data", backbone, train=settings, task=task, methods=list(METHODS))


@pytest.fixture(scope="module")
def untouched(config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("untouched") / "run"
    run_ranks(2, train, config, f"run.directory={run}", "checkpoint.every_steps=1")
    return run


def _train_and_die(config: Path, run: Path, at_step: int) -> None:
    """Rank 1 dies before the ``at_step``-th step of the run."""
    import megaptune.trainer as trainer

    steps, step = count(1), trainer.Trainer.train_step

    def step_or_die(self):
        if next(steps) == at_step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    trainer.Trainer.train_step = step_or_die
    train(config, f"run.directory={run}", "checkpoint.every_steps=1")


# P-tuning trains both tasks together; then each method and task has steps of its own.
@pytest.mark.parametrize("at_step", [3, 2 * STEPS, 3 * STEPS + 2])
def test_killed_within_a_job(config, untouched, tmp_path, at_step):
    run = tmp_path / "run"
    with pytest.raises(RankFailed):
        run_ranks(2, _train_and_die, config, run, at_step)
    assert any(run.rglob("checkpoints/step-*/manifest.json"))
    assert not (run / "results.json").exists()
    run_ranks(2, train, config, f"run.directory={run}", "checkpoint.every_steps=1")
    assert metrics(run) == metrics(untouched)
    for task in TASKS:
        for method in METHODS:
            job = f"{task}/{method}-seed0"
            assert result(run, job) == result(untouched, job)
            files = [folder / "jobs" / job / "predictions.jsonl" for folder in (run, untouched)]
            assert files[0].read_text() == files[1].read_text()
