"""Runs with deep prompts: two in a bank are what each is alone, on any layout; killed and resumed; refused."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from ranks import RankFailed, run_ranks, train
from runs import metrics, prompt, result
from tiny import HEADS, LAYERS, MAX_TOKENS, WIDTH

from megaptune.errors import BackboneError, ConfigError, DataError

pytestmark = pytest.mark.dist

LENGTH = 4
SETTINGS = {
    "methods": ["deep_ptuning"],
    "run": {"seeds": [0, 1]},
    "train": {"epochs": 1, "optimizer": "sgd", "learning_rate": 0.5, "weight_decay": 0.01},
}


def deep(encoder: str = "table", length: int = LENGTH) -> dict:
    return {"deep": {"length": length, "encoder": encoder, "hidden_size": 16, "init_std": 0.5}}


def curves(run) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for line in metrics(run):
        if line["kind"] == "train":
            found.setdefault(line["job"], []).append(line["loss"])
    return found


@pytest.mark.parametrize("encoder", ["table", "mlp"])
def test_two_in_a_bank_are_what_each_is_alone(encoder, config_file, tmp_path):
    config = config_file("llama", prompt=deep(encoder), **SETTINGS)
    runs = [tmp_path / name for name in ("together", "alone", "sharded")]
    run_ranks(1, train, config, f"run.directory={runs[0]}")
    run_ranks(1, train, config, f"run.directory={runs[1]}", "jobs.at_once=1")
    run_ranks(2, train, config, f"run.directory={runs[2]}", "parallel.zero_stage=3")
    assert metrics(runs[2]) == metrics(runs[0])
    losses, alone = curves(runs[0]), curves(runs[1])
    assert len(alone) == 2
    for job, expected in alone.items():
        assert losses[job] == pytest.approx(expected, rel=1e-5)
    for seed in (0, 1):
        tensors, theirs, sharded = (prompt(run, seed=seed, method="deep_ptuning") for run in runs)
        assert tensors["vectors"].shape == (LAYERS, 2, LENGTH, 2, WIDTH // HEADS)  # two key-value heads
        limit = 1e-5 * float(theirs["vectors"].abs().max())
        torch.testing.assert_close(tensors["vectors"], theirs["vectors"], rtol=0, atol=limit)
        assert all(torch.equal(tensors[name], sharded[name]) for name in tensors)
    assert not torch.equal(tensors["vectors"], prompt(runs[0], seed=0, method="deep_ptuning")["vectors"])
    about = json.loads((runs[0] / "jobs/cities/deep_ptuning-seed0/prompt/manifest.json").read_text())["state"]
    assert about["deep"] == {"virtual_tokens": LENGTH, "layers": LAYERS, "kv_heads": 2, "head_width": WIDTH // HEADS}
    assert (about["encoder"], about["template"]) == (f"deep_{encoder}", "{city} [answer] .")
    # The folder's encoder makes the folder's vectors: rows by token, then layer, then key before value.
    if encoder == "table":
        rows = tensors["encoder.embedding.weight"].view(LENGTH, LAYERS, 2, 2, WIDTH // HEADS)
        assert torch.equal(rows.permute(1, 2, 0, 3, 4), tensors["vectors"])


def _train_and_die(config, run, task: str, step: int) -> None:
    """Both ranks, right after ``step`` steps of the jobs of a method."""
    from megaptune.training_report import TrainingReport

    report = TrainingReport.step

    def dying(self, number, active, *rest):
        report(self, number, active, *rest)
        if number == step and active[0].job.method_name == task:
            os.kill(os.getpid(), signal.SIGKILL)

    TrainingReport.step = dying
    train(config, f"run.directory={run}")


def test_a_killed_run_ends_with_the_same_bits(config_file, tmp_path):
    """Beside ordinary prompts, whose bank is another: it is done when that of the deep ones is killed."""
    settings = {**SETTINGS, "methods": ["ptuning", "deep_ptuning"], "checkpoint": {"every_steps": 2}}
    config = config_file("gpt2", prompt=deep(), **{**settings, "train": {"epochs": 2}})
    run, untouched = tmp_path / "killed", tmp_path / "untouched"
    run_ranks(2, train, config, f"run.directory={untouched}")
    with pytest.raises(RankFailed, match="died with exit code -9"):
        run_ranks(2, _train_and_die, config, run, "deep_ptuning", 5)  # a step after the checkpoint of the fourth
    assert (run / "jobs/cities/ptuning-seed1/result.json").is_file()
    run_ranks(2, train, config, f"run.directory={run}")
    assert metrics(run) == metrics(untouched)
    for seed in (0, 1):
        ours, theirs = (prompt(place, seed=seed, method="deep_ptuning") for place in (run, untouched))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        name = f"cities/deep_ptuning-seed{seed}"
        assert result(run, name) == result(untouched, name)
    assert not (run / "deep-checkpoints").exists()


def test_a_masked_model_learns_from_its_manual_prompt_too(config_file, tmp_path):
    """Adam, 8 epochs of three steps on two tensor-parallel ranks: an epoch's loss falls by a quarter and more."""
    settings = {"methods": ["deep_ptuning"], "train": {"epochs": 8, "learning_rate": 0.2, "patience": 0}}
    config = config_file("bert", prompt={"deep": {"length": 8, "input": "manual"}}, **settings)
    run_ranks(2, train, config, "parallel.tensor_parallel=2")
    run = tmp_path / "run"
    (losses,) = curves(run).values()
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])
    assert result(run, "cities/deep_ptuning-seed0")["template"] == "{city} is in [answer] ."


@pytest.mark.slow
def test_the_shipped_configuration_learns_the_shipped_facts(tmp_path):
    """SmolLM2-135M, the first eight steps: the loss falls to less than a half."""
    from megaptune.backbone.embedded import embedded_folder

    config = Path(__file__).resolve().parents[2] / "configs" / "quickstart_deep.yaml"
    sizes = "task.limit_train=64", "task.limit_dev=4", "task.limit_test=4", "train.global_batch=8", "train.epochs=1"
    rate = "train.warmup_steps=2", "train.final_fraction=1"
    settings = f"run.directory={tmp_path / 'run'}", f"backbone.path={embedded_folder()}", "run.seeds=[0]"
    run_ranks(1, train, config, *settings, "methods=[deep_ptuning]", *sizes, *rate)
    (losses,) = curves(tmp_path / "run").values()
    assert sum(losses[-2:]) < sum(losses[:2]) / 2


def _prepare(config, *overrides):
    from megaptune.config import load_config
    from megaptune.preparation import prepare_run
    from megaptune.run.monitor import Monitor

    return prepare_run(load_config(config, list(overrides)), Monitor(False))


def test_what_cannot_be_is_refused_before_weights_are_read(config_file, tmp_path, tiny):
    config = config_file("llama", prompt=deep(length=MAX_TOKENS - 4), methods=["deep_ptuning"])
    with pytest.raises(DataError, match=f"tokens long and a deep prompt of {MAX_TOKENS - 4} comes before it"):
        _prepare(config)
    with pytest.raises(ConfigError, match=r"deep_ptuning reads packed batches.*set speed.answers_only"):
        _prepare(config, "speed.answers_only=false")
    folder = tmp_path / "other"
    folder.mkdir()
    for file in tiny("gpt2").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "codegen"}))
    with pytest.raises(BackboneError, match=r"deep_ptuning puts keys and values.*the backbone is 'codegen'"):
        _prepare(config, f"backbone.path={folder}")
