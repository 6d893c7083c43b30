"""Kill -9 at any moment; the same command continues and ends with the same bits as a run that nobody touched."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from ranks import RankFailed, run_ranks, train
from runs import metrics, prompt, result

from megaptune.errors import CheckpointError, StoppedEarly

pytestmark = pytest.mark.dist

SETTINGS = ("train.epochs=4", "checkpoint.every_steps=2", "run.seeds=[0,1]")


@pytest.fixture(scope="module")
def config(tiny, facts, tmp_path_factory):
    from tiny import write_config

    files = {split: str(path) for split, path in facts.items()}
    folder = tmp_path_factory.mktemp("resume")
    return write_config(folder, "llama", backbone={"path": str(tiny("llama"))}, task=files)


@pytest.fixture(scope="module")
def untouched(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("untouched") / "run"
    run_ranks(2, train, config, f"run.directory={run}", *SETTINGS)
    return run


def assert_same_end(run: Path, expected: Path) -> None:
    assert metrics(run) == metrics(expected)
    for seed in (0, 1):
        ours, theirs = prompt(run, seed=seed), prompt(expected, seed=seed)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert result(run, f"cities/ptuning-seed{seed}") == result(expected, f"cities/ptuning-seed{seed}")


def _train_and_kill_all_ranks(config: Path, run: Path, after_lines: int) -> None:
    """Rank 0 watches metrics.jsonl from a thread and kills itself once it is long enough; the other rank follows."""

    def watch() -> None:
        while True:
            lines = (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0
            if lines >= after_lines:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.001)

    if os.environ["RANK"] == "0":
        import megaptune.run.monitor as monitor

        record = monitor.Monitor.record

        def record_and_flush(self, *arguments):
            record(self, *arguments)
            if self._metrics is not None:
                self._metrics.flush()

        monitor.Monitor.record = record_and_flush
        threading.Thread(target=watch, daemon=True).start()
    train(config, f"run.directory={run}", *SETTINGS)


def _train_and_die_while_saving(config: Path, run: Path, at_save: int, written: str) -> None:
    """Rank 0 dies in its ``at_save``-th save: before the tensors, in the middle of them, or before the rename."""
    import megaptune.run.checkpoint as checkpoint

    saves = iter(range(1, 1000))
    save_file, write_json = checkpoint.save_file, checkpoint.write_json

    def dying_save(tensors, path):
        if next(saves) < at_save:
            return save_file(tensors, path)
        elif written == "nothing":
            os.kill(os.getpid(), signal.SIGKILL)
        elif written == "half the tensors":
            save_file(tensors, path)
            with path.open("r+b") as handle:
                handle.truncate(path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            checkpoint.write_json = dying_write
            return save_file(tensors, path)

    def dying_write(path, value):
        write_json(path, value)
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = dying_save
    train(config, f"run.directory={run}", *SETTINGS)


@pytest.mark.parametrize("after_lines", [1, 4, 9, 18, 24])
def test_killed_while_training(config, untouched, tmp_path, after_lines):
    run = tmp_path / "run"
    with pytest.raises(RankFailed, match=r"died with exit code -9|rank 1"):
        run_ranks(2, _train_and_kill_all_ranks, config, run, after_lines)
    assert not (run / "results.json").exists()
    run_ranks(2, train, config, f"run.directory={run}", *SETTINGS)
    assert_same_end(run, untouched)


@pytest.mark.parametrize("written", ["nothing", "half the tensors", "all but the rename"])
@pytest.mark.parametrize("at_save", [1, 4])
def test_killed_while_saving(config, untouched, tmp_path, at_save, written):
    run = tmp_path / "run"
    with pytest.raises(RankFailed, match=r"died with exit code -9|rank 1"):
        run_ranks(2, _train_and_die_while_saving, config, run, at_save, written)
    run_ranks(2, train, config, f"run.directory={run}", *SETTINGS)
    assert_same_end(run, untouched)


def test_resumes_on_another_number_of_ranks_and_another_zero_stage(config, untouched, tmp_path):
    """The checkpoint knows nothing of the layout; llama's bits are the same on all of them."""
    run = tmp_path / "run"
    with pytest.raises(RankFailed):
        run_ranks(2, _train_and_kill_all_ranks, config, run, 8)
    run_ranks(1, train, config, f"run.directory={run}", *SETTINGS, "parallel.zero_stage=3")
    assert_same_end(run, untouched)


def _train_until_stopped(config: Path, run: Path, how: str) -> str:
    """Ask for a stop after some steps: a signal to rank 1 alone, or the stop file."""
    import megaptune.trainer as trainer

    step = trainer.Trainer.train_step

    def step_and_ask(self):
        if self.step == 4:
            if how == "signal" and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            elif how == "file" and os.environ["RANK"] == "0":
                (run / "stop").touch()
        return step(self)

    trainer.Trainer.train_step = step_and_ask
    try:
        train(config, f"run.directory={run}", *SETTINGS)
    except StoppedEarly as stop:
        return str(stop)
    return "not stopped"


@pytest.mark.parametrize("how", ["signal", "file"])
def test_a_stop_asked_of_one_rank_stops_all_and_continues(config, untouched, tmp_path, how):
    run = tmp_path / "run"
    reasons = run_ranks(2, _train_until_stopped, config, run, how)
    assert all(reason.startswith("stopped on request") for reason in reasons)
    assert '"status": "stopped"' in (run / "state.json").read_text()
    assert '"exit_code": 75' in (run / "state.json").read_text()
    assert not (run / "stop").exists()
    run_ranks(2, train, config, f"run.directory={run}", *SETTINGS)
    assert_same_end(run, untouched)


def _damaged_run(config: Path, run: Path, count: int) -> list[Path]:
    """A killed run whose newest ``count`` checkpoints have a flipped bit."""
    with pytest.raises(RankFailed):
        run_ranks(2, _train_and_kill_all_ranks, config, run, 16)
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 2
    for folder in checkpoints[len(checkpoints) - count :]:
        tensors = folder / "prompts-rank-00000.safetensors"
        damaged = bytearray(tensors.read_bytes())
        damaged[-5] ^= 1
        tensors.write_bytes(damaged)
    return checkpoints


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(config, untouched, tmp_path, capfd):
    run = tmp_path / "run"
    newest = _damaged_run(config, run, 1)[-1]
    capfd.readouterr()
    run_ranks(2, train, config, f"run.directory={run}", *SETTINGS)
    said = capfd.readouterr().out
    assert "falling back to the one before" in said
    assert newest.name in said
    assert_same_end(run, untouched)


def _train_to_error(config: Path, run: Path) -> str:
    try:
        train(config, f"run.directory={run}", *SETTINGS)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_when_all_checkpoints_are_damaged_every_rank_says_so_and_nothing_is_removed(config, tmp_path):
    run = tmp_path / "run"
    checkpoints = _damaged_run(config, run, 2)
    errors = run_ranks(2, _train_to_error, config, run)
    assert all("all 2 checkpoints" in error for error in errors)
    assert all(folder.is_dir() for folder in checkpoints)
