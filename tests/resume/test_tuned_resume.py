"""A tuned LM killed at any moment ends with the bits of one that nobody touched; on another layout, within rounding."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from ranks import RankFailed, run_ranks, train
from runs import losses, metrics, prompt, result
from safetensors.torch import load_file

from megaptune.errors import CheckpointError, StoppedEarly

pytestmark = pytest.mark.dist

METHOD = "ptuning+finetune"
SETTINGS = ("checkpoint.every_steps=2", "run.seeds=[0,1]", "checkpoint.save_tuned_lm=true")
STAGE = {stage: f"parallel.zero_stage={stage}" for stage in (1, 2, 3)}


@pytest.fixture(scope="module")
def config(tiny, facts, tmp_path_factory):
    from tiny import write_config

    files = {split: str(path) for split, path in facts.items()}
    folder = tmp_path_factory.mktemp("tuned")
    train_settings = {"epochs": 2, "lm_learning_rate": 1e-3}
    place = {"path": str(tiny("llama"))}
    return write_config(folder, "llama", backbone=place, task=files, methods=[METHOD], train=train_settings)


@pytest.fixture(scope="module")
def untouched(config, tmp_path_factory):
    """By stage: the run of two ranks."""
    runs: dict[int, Path] = {}

    def run_of(stage: int) -> Path:
        if stage not in runs:
            runs[stage] = tmp_path_factory.mktemp("untouched") / "run"
            run_ranks(2, train, config, f"run.directory={runs[stage]}", *SETTINGS, STAGE[stage])
        return runs[stage]

    return run_of


def tuned_lm(run: Path, seed: int) -> dict[str, torch.Tensor]:
    folder = run / "jobs" / "cities" / f"{METHOD}-seed{seed}" / "lm"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    return {name: weight for file in files for name, weight in load_file(folder / file).items()}


def assert_same_job(run: Path, expected: Path, seed: int) -> None:
    job = f"cities/{METHOD}-seed{seed}"
    assert result(run, job) == result(expected, job)
    for ours, theirs in (
        (tuned_lm(run, seed), tuned_lm(expected, seed)),
        (prompt(run, seed=seed, method=METHOD), prompt(expected, seed=seed, method=METHOD)),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def assert_same_end(run: Path, expected: Path) -> None:
    assert metrics(run) == metrics(expected)
    for seed in (0, 1):
        assert_same_job(run, expected, seed)
        assert not (run / "jobs/cities" / f"{METHOD}-seed{seed}" / "checkpoints").exists()


def _train_and_die(config: Path, run: Path, stage: int, rank: int, where: str, count: int, *more: str) -> None:
    """Rank ``rank`` kills itself at its ``count``-th step, or within its ``count``-th save."""
    import megaptune.backbone.tuned_weights as tuned_weights
    import megaptune.run.checkpoint as checkpoint
    from megaptune.trainer import Trainer

    times = iter(range(1, 1000))
    step, write, write_json = Trainer.train_step, tuned_weights.write_tensors, checkpoint.write_json

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def dying_step(self):
        if next(times) == count:
            die()
        return step(self)

    def dying_piece(file, tensors, places):
        checksum = write(file, tensors, places)
        if next(times) == count:
            os.truncate(file, file.stat().st_size // 2)
            die()
        return checksum

    def dying_manifest(path, value):
        write_json(path, value)
        if next(times) == count:
            die()

    if os.environ["RANK"] == str(rank):
        if where == "step":
            Trainer.train_step = dying_step
        elif where == "half a piece":
            tuned_weights.write_tensors = dying_piece
        else:
            checkpoint.write_json = dying_manifest
    train(config, f"run.directory={run}", *SETTINGS, STAGE[stage], *more)


@pytest.mark.parametrize(
    ("stage", "rank", "where", "count"),
    [
        (1, 0, "step", 6),
        (2, 1, "half a piece", 2),
        (2, 0, "all but the rename", 3),
        (3, 1, "step", 11),
        (3, 0, "half a piece", 4),
    ],
)
def test_killed_and_continued(config, untouched, tmp_path, stage, rank, where, count):
    run = tmp_path / "run"
    with pytest.raises(RankFailed, match=r"died with exit code -9|rank"):
        run_ranks(2, _train_and_die, config, run, stage, rank, where, count)
    assert not (run / "results.json").exists()
    run_ranks(2, train, config, f"run.directory={run}", *SETTINGS, STAGE[stage])
    assert_same_end(run, untouched(stage))


def test_killed_and_continued_without_a_prompt(config, tmp_path):
    """Then a checkpoint holds the LM alone."""
    method, expected, run = "methods=[finetune]", tmp_path / "expected", tmp_path / "run"
    run_ranks(2, train, config, f"run.directory={expected}", *SETTINGS, STAGE[2], method)
    with pytest.raises(RankFailed):
        run_ranks(2, _train_and_die, config, run, 2, 1, "step", 9, method)
    run_ranks(2, train, config, f"run.directory={run}", *SETTINGS, STAGE[2], method)
    assert metrics(run) == metrics(expected)
    for seed in (0, 1):
        assert result(run, f"cities/finetune-seed{seed}") == result(expected, f"cities/finetune-seed{seed}")


def test_every_job_starts_from_the_original_weights(config, untouched, tmp_path):
    """Seed 1 after seed 0 is seed 1 alone."""
    run_ranks(2, train, config, f"run.directory={tmp_path / 'run'}", *SETTINGS, STAGE[2], "run.seeds=[1]")
    assert_same_job(tmp_path / "run", untouched(2), 1)


SGD = (
    "train.optimizer=sgd",
    "train.learning_rate=0.05",
    "train.lm_learning_rate=0.005",
    "run.seeds=[0]",
    "train.epochs=3",
)


def _train_sgd_and_die(config: Path, run: Path, layout: list[str], count: int) -> None:
    from megaptune.trainer import Trainer

    times, step = iter(range(1, 1000)), Trainer.train_step

    def dying_step(self):
        if next(times) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    if os.environ["RANK"] == "0":
        Trainer.train_step = dying_step
    train(config, f"run.directory={run}", *SETTINGS, *SGD, *layout)


TP_2 = "parallel.tensor_parallel=2"


def test_continues_on_other_layouts(config, tmp_path):
    """Two shards at ZeRO 3, then two replicas at ZeRO 2, then one rank at ZeRO 1, then two by two: one curve, to fp32
    rounding. SGD, because Adam enlarges the rounding of gradients that are nearly zero."""
    expected, run = tmp_path / "expected", tmp_path / "run"
    run_ranks(2, train, config, f"run.directory={expected}", *SETTINGS, *SGD, STAGE[2])
    for ranks, layout in ((2, [TP_2, STAGE[3]]), (2, [STAGE[2]]), (1, [STAGE[1]])):
        with pytest.raises(RankFailed):
            # Each gets two steps further: to the next checkpoint, and dies in the step after it.
            run_ranks(ranks, _train_sgd_and_die, config, run, layout, 3)
    run_ranks(4, train, config, f"run.directory={run}", *SETTINGS, *SGD, TP_2, STAGE[3])
    assert losses(run) == pytest.approx(losses(expected), rel=2e-5)
    for name, weight in tuned_lm(expected, 0).items():
        torch.testing.assert_close(tuned_lm(run, 0)[name], weight, rtol=0, atol=2e-5 * float(weight.abs().max()))


def test_adams_moments_survive_a_change_of_layout(config, untouched, tmp_path):
    """Without them the first steps after the change would be many times too large."""
    run = tmp_path / "run"
    with pytest.raises(RankFailed):
        run_ranks(2, _train_and_die, config, run, 2, 0, "step", 4)
    run_ranks(4, train, config, f"run.directory={run}", *SETTINGS, TP_2, STAGE[3], "run.seeds=[0,1]")
    assert losses(run) == pytest.approx(losses(untouched(2)), rel=1e-3)


def _train_until_stopped(config: Path, run: Path) -> str:
    from megaptune.trainer import Trainer

    step = Trainer.train_step

    def step_and_ask(self):
        if self.step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    Trainer.train_step = step_and_ask
    try:
        train(config, f"run.directory={run}", *SETTINGS, STAGE[3])
    except StoppedEarly as stop:
        return str(stop)
    return "not stopped"


def test_a_stop_asked_of_one_rank_stops_all_and_continues(config, untouched, tmp_path):
    run = tmp_path / "run"
    reasons = run_ranks(2, _train_until_stopped, config, run)
    assert all(reason.startswith("stopped on request") for reason in reasons)
    run_ranks(2, train, config, f"run.directory={run}", *SETTINGS, STAGE[3])
    assert_same_end(run, untouched(3))


def _train_to_error(config: Path, run: Path) -> str:
    try:
        train(config, f"run.directory={run}", *SETTINGS, STAGE[2])
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_damaged_piece_falls_back_and_a_missing_one_everywhere_is_told_on_every_rank(
    config, untouched, tmp_path, capfd
):
    run = tmp_path / "run"
    with pytest.raises(RankFailed):
        run_ranks(2, _train_and_die, config, run, 2, 1, "step", 6)
    checkpoints = sorted((run / f"jobs/cities/{METHOD}-seed0/checkpoints").glob("step-*"))
    assert len(checkpoints) == 2
    piece = checkpoints[1] / "lm-rank-00001.safetensors"
    damaged = bytearray(piece.read_bytes())
    damaged[-5] ^= 1
    piece.write_bytes(damaged)
    kept = (checkpoints[0] / piece.name).read_bytes()
    (checkpoints[0] / piece.name).unlink()
    errors = run_ranks(2, _train_to_error, config, run)
    assert all("all 2 checkpoints" in error for error in errors)
    (checkpoints[0] / piece.name).write_bytes(kept)
    capfd.readouterr()
    run_ranks(2, train, config, f"run.directory={run}", *SETTINGS, STAGE[2])
    assert "falling back to the one before" in capfd.readouterr().out
    assert_same_end(run, untouched(2))


def test_the_saved_lm_is_one_that_transformers_loads_and_scores_alike(config, untouched):
    """The predictions in the job's folder, made again from its ``lm`` and its prompt by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = untouched(3) / "jobs" / "cities" / f"{METHOD}-seed0"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(job / "lm").eval(),
        AutoTokenizer.from_pretrained(job / "lm"),
    )
    vectors = load_file(job / "prompt" / "tensors.safetensors")["vectors"]
    embed = model.get_input_embeddings()
    for line in (job / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        expected = json.loads(line)
        city = tokenizer(" " + expected["subject"], add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        start = embed(torch.tensor([tokenizer.bos_token_id]))
        inputs = torch.cat([start, vectors[:2], embed(city), vectors[2:]])
        with torch.no_grad():
            scores = model(inputs_embeds=inputs[None]).logits[0, -1]
        assert tokenizer.decode([int(scores.argmax())]).strip() == expected["predicted"]
