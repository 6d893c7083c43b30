"""Runs with methods that tune the LM: what they leave, that no tuned weight reaches another job, and how they fail."""

import json

import pytest
import torch
import yaml
from ranks import run_ranks, train
from runs import losses, metrics, prompt, result

from megaptune.errors import DivergedError
from megaptune.methods import METHODS as ALL_METHODS
from megaptune.methods import PROMPT_SETS

pytestmark = pytest.mark.dist

METHODS = {
    name: method for name, method in ALL_METHODS.items() if name not in PROMPT_SETS.values() and not method.ensemble
}
"""Those of a custom task, which has no prompts of LPAQA or AutoPrompt; PET is for SuperGLUE."""
TUNED = [name for name, method in METHODS.items() if method.tunes_lm]


def config_of(config_file, kind="llama", methods=tuple(METHODS), **train_settings):
    train_settings = {"lm_learning_rate": 3e-3, "learning_rate": 1e-2, "epochs": 6, **train_settings}
    return config_file(kind, methods=list(methods), train=train_settings)


def test_all_methods_in_one_run(config_file, tmp_path):
    """Frozen ones first, whatever the order in the configuration; every tuned job learns; the table has them all."""
    config, run = config_of(config_file, methods=list(METHODS)[::-1]), tmp_path / "run"
    run_ranks(2, train, config, f"run.directory={run}", "parallel.zero_stage=3")
    jobs = list(dict.fromkeys(line["job"] for line in metrics(run)))
    assert [job.rpartition("/")[2].removesuffix("-seed0") for job in jobs] == [
        *("manual", "prompt_tuning", "ptuning", "deep_ptuning", "finetune", "manual+finetune", "ptuning+finetune")
    ]
    for name in TUNED:
        job = f"cities/{name}-seed0"
        curve = [line["loss"] for line in metrics(run) if line["kind"] == "train" and line["job"] == job]
        assert curve[-1] < 0.8 * curve[0]
        found = result(run, job)
        assert found["parameters"] > 45_664 - 1  # the tiny llama's, and the encoder's with ptuning
        assert (run / "jobs" / job / "prompt").exists() == METHODS[name].trains_prompt
        assert not (run / "jobs" / job / "lm").exists()
    assert result(run, "cities/finetune-seed0")["template"] == "{city} [answer] ."
    manifest = json.loads((run / "jobs/cities/ptuning+finetune-seed0/prompt/manifest.json").read_text())
    assert manifest["state"]["lm_tuned"] is True
    row = json.loads((run / "results.json").read_text())["table"][0]
    assert {name for name in METHODS if row.get(name)} == set(METHODS)


def test_methods_that_tune_leave_frozen_ones_alone(config_file, tmp_path):
    """The same bits with and without tuned jobs in the run; also where those were done first."""
    methods = [name for name in METHODS if METHODS[name].encoder is None]
    config = config_of(config_file, methods=methods, epochs=2)
    alone, together, after = tmp_path / "alone", tmp_path / "together", tmp_path / "after"
    run_ranks(2, train, config, f"run.directory={alone}", "methods=[manual,ptuning]")
    run_ranks(2, train, config, f"run.directory={together}", "parallel.zero_stage=2")
    run_ranks(2, train, config, f"run.directory={after}", "parallel.zero_stage=2")
    # As if all but the frozen jobs had been done before a kill: a tuned job of every kind has its result.
    for name in ("manual", "ptuning-seed0"):
        (after / "jobs/cities" / name / "result.json").unlink()
    run_ranks(2, train, config, f"run.directory={after}", "parallel.zero_stage=2")
    for run in (together, after):
        assert all(torch.equal(value, prompt(alone)[name]) for name, value in prompt(run).items())
        for job in ("cities/manual", "cities/ptuning-seed0"):
            assert result(run, job) == result(alone, job)


def test_best_epoch_is_what_is_evaluated(config_file, tmp_path):
    """At this rate dev falls again after the second epoch; the test figures (of the same records) are that one's."""
    config, run = config_of(config_file, methods=["manual+finetune"], epochs=3), tmp_path / "run"
    same = f"task.test={yaml.safe_load(config.read_text())['task']['dev']}"
    rate = "train.lm_learning_rate=0.03"
    run_ranks(2, train, config, f"run.directory={run}", same, rate, "parallel.zero_stage=2", "train.patience=0")
    dev = [line for line in metrics(run) if line["kind"] == "dev"]
    job = result(run, "cities/manual+finetune-seed0")
    best = next(line for line in dev if line["epoch"] == job["best_epoch"])
    assert job["best_epoch"] < dev[-1]["epoch"]
    assert job["test"]["vocabulary"]["loss"] == pytest.approx(best["loss"], rel=1e-6)
    assert best["loss"] != pytest.approx(dev[-1]["loss"], rel=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_the_saved_lm_is_a_backbone_that_scores_as_the_job_did(kind, config_file, tmp_path):
    """Put together from two shards, GPT-2's fused heads among them, and read by one rank."""
    config = config_of(config_file, kind, methods=["manual+finetune"], epochs=2)
    layout = ("parallel.zero_stage=3", "parallel.tensor_parallel=2", "checkpoint.save_tuned_lm=true")
    run_ranks(2, train, config, f"run.directory={tmp_path / 'tuned'}", *layout)
    job = "cities/manual+finetune-seed0"
    lm = tmp_path / "tuned" / "jobs" / job / "lm"
    zero_shot = ("methods=[manual]", f"backbone.path={lm}", f"run.directory={tmp_path / 'manual'}")
    run_ranks(1, train, config, *zero_shot)
    tuned, again = result(tmp_path / "tuned", job), result(tmp_path / "manual", "cities/manual")
    for reading, figures in tuned["test"].items():
        assert again["test"][reading] == pytest.approx(figures, rel=1e-5)


def _train_to_error(config, run, *overrides: str) -> str:
    try:
        train(config, f"run.directory={run}", *overrides)
    except DivergedError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("stage", [1, 3])
def test_divergence_is_told_on_every_rank(config_file, tmp_path, stage):
    config = config_of(config_file, methods=["manual+finetune"], optimizer="sgd", lm_learning_rate=1e30)
    errors = run_ranks(2, _train_to_error, config, tmp_path / "run", f"parallel.zero_stage={stage}")
    assert all("is not finite" in error for error in errors)
    assert json.loads((tmp_path / "run" / "state.json").read_text())["exit_code"] == 5


def test_a_family_without_a_table_is_tuned_too(tmp_path, tiny, facts):
    """ALBERT is read whole, and its layers share their weights."""
    from tiny import write_config
    from transformers import AlbertConfig, AlbertForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny("bert"))
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "embedding_size": 16}
    settings = AlbertConfig(vocab_size=len(tokenizer), num_hidden_layers=2, initializer_range=0.2, **shape)
    torch.manual_seed(0)
    AlbertForMaskedLM(settings).save_pretrained(tmp_path / "albert")
    tokenizer.save_pretrained(tmp_path / "albert")
    files = {split: str(path) for split, path in facts.items()}
    train_settings = {"lm_learning_rate": 3e-3, "epochs": 4}
    place = {"path": str(tmp_path / "albert")}
    config = write_config(tmp_path, "bert", backbone=place, task=files, methods=[TUNED[2]], train=train_settings)
    curves = []
    for stage in (1, 3):
        run = tmp_path / f"zero{stage}"
        run_ranks(2, train, config, f"run.directory={run}", f"parallel.zero_stage={stage}")
        curves.append(losses(run))
        dev = [line["loss"] for line in metrics(run) if line["kind"] == "dev"]
        assert dev[-1] < 0.85 * dev[0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)  # Adam enlarges the rounding of gradients near zero
