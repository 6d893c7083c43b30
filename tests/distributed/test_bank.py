"""Three relations with two seeds in one bank give what six separate runs give; one that diverges leaves the others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import run_ranks, train
from runs import metrics, prompt, result
from tiny import CAPITALS, write_config, write_jsonl

from megaptune.errors import DivergedError

pytestmark = pytest.mark.dist

RELATIONS = {"P17": 16, "P30": 12, "P36": 9}  # training records: epochs of 4, 3 and 3 steps
SGD = {"optimizer": "sgd", "learning_rate": 0.5, "weight_decay": 0.01}


def lama(root: Path) -> Path:
    rows = [{"relation": name, "template": "[X] is in [Y] .", "type": "N-1"} for name in RELATIONS]
    write_jsonl(root / "relations.jsonl", rows)
    facts = [{"sub_label": city, "obj_label": country} for city, country in CAPITALS.items()]
    for place, (name, count) in enumerate(RELATIONS.items()):
        turned = facts[place:] + facts[:place]
        for split, members in (("train", turned[:count]), ("dev", turned[-4:]), ("test", turned[-6:])):
            write_jsonl(root / "fact-retrieval" / "original" / name / f"{split}.jsonl", members)
    return root


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    config = write_config(
        folder,
        backbone={"path": str(tiny("llama"))},
        run={"seeds": [0, 1]},
        prompt={"template": "[P*2] {subject} [P] [answer]"},
        methods=["ptuning"],
        scoring={"train_over": "answers", "evaluate_over": ["answers", "vocabulary"], "select_on": "answers"},
        train={"epochs": 4, "global_batch": 4, "micro_batch": 8, "patience": 1},
    )
    raw = yaml.safe_load(config.read_text())
    raw["task"] = {"type": "lama", "root": str(lama(folder / "LAMA"))}
    del raw["prompt"]["manual"]
    config.write_text(yaml.safe_dump(raw))
    return config


def overrides(settings: dict[str, Any]) -> list[str]:
    return [f"train.{key}={value}" for key, value in settings.items()]


def curves(run: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for line in metrics(run):
        if line["kind"] == "train":
            found.setdefault(line["job"], []).append(line["loss"])
    return found


def assert_close(run: Path, expected: Path, relative: float) -> None:
    ours, theirs = curves(run), curves(expected)
    assert ours.keys() == theirs.keys()
    for job, losses in theirs.items():
        assert ours[job] == pytest.approx(losses, rel=relative)
        task, name = job.split("/")
        one, other = result(run, job), result(expected, job)
        assert (one["best_epoch"], one["steps"]) == (other["best_epoch"], other["steps"])
        for reading, figures in one["test"].items():
            assert figures["p_at_1"] == other["test"][reading]["p_at_1"]
        seed = int(name.removeprefix("ptuning-seed"))
        found, vectors = prompt(run, task, seed)["vectors"], prompt(expected, task, seed)["vectors"]
        torch.testing.assert_close(found, vectors, rtol=0, atol=relative * float(vectors.abs().max()))


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """Six separate runs by the optimizer's settings, gathered as one."""
    runs: dict[str, Path] = {}

    def of(name: str, settings: dict[str, Any]) -> Path:
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp(name)
            (runs[name] / "jobs").mkdir()
            record = b""
            for relation in RELATIONS:
                for seed in (0, 1):
                    run = tmp_path_factory.mktemp("run") / "run"
                    only = f"task.relations=[{relation}]", f"run.seeds=[{seed}]"
                    run_ranks(1, train, base, f"run.directory={run}", *only, *overrides(settings))
                    record += (run / "metrics.jsonl").read_bytes()
                    target = runs[name] / "jobs" / relation / f"ptuning-seed{seed}"
                    target.parent.mkdir(exist_ok=True)
                    (run / "jobs" / relation / f"ptuning-seed{seed}").rename(target)
            (runs[name] / "metrics.jsonl").write_bytes(record)
        return runs[name]

    return of


@pytest.mark.parametrize("at_once", [6, 2])
def test_a_bank_gives_what_separate_runs_give(base, alone, tmp_path, at_once):
    expected = alone("sgd", SGD)
    steps = {job: len(losses) for job, losses in curves(expected).items()}
    assert len(set(steps.values())) > 1  # jobs end at different steps, of different reasons
    run = tmp_path / "run"
    run_ranks(1, train, base, f"run.directory={run}", f"jobs.at_once={at_once}", *overrides(SGD))
    assert_close(run, expected, 1e-5)
    assert not (run / "checkpoints").exists()


def test_with_adam_to_what_it_makes_of_rounding(base, alone, tmp_path):
    """Adam divides a gradient by its own size, so rounding of nearly nothing becomes a part of a step: 1e-3."""
    settings = {"learning_rate": 1e-3}
    run_ranks(1, train, base, f"run.directory={tmp_path / 'run'}", *overrides(settings))
    assert_close(tmp_path / "run", alone("adam", settings), 1e-3)


@pytest.mark.parametrize(("ranks", "stage"), [(2, 0), (3, 3)])
def test_a_sharded_bank_gives_the_same_bits(base, tmp_path, ranks, stage):
    runs = tmp_path / "one", tmp_path / "several"
    run_ranks(1, train, base, f"run.directory={runs[0]}")
    run_ranks(ranks, train, base, f"run.directory={runs[1]}", f"parallel.zero_stage={stage}")
    assert metrics(runs[1]) == metrics(runs[0])
    for relation in RELATIONS:
        ours, theirs = prompt(runs[1], relation, 1), prompt(runs[0], relation, 1)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _train_to_divergence(config: Path, run: Path) -> str:
    """The encoder of one job has a weight that is not finite after its second step."""
    import megaptune.prompts.bank as bank

    step = bank.PromptBank.step

    def poisoned(self, gradient):
        norms = step(self, gradient)
        for member in self.prompts:
            if member.name == "P17/ptuning-seed1" and member.step == 2:
                self.stacks[member.rows].views("weight", member.place)["mlp.2.bias"][3] = float("inf")
        return norms

    bank.PromptBank.step = poisoned
    try:
        train(config, f"run.directory={run}", *overrides(SGD))
    except DivergedError as error:
        return f"{error.exit_code} {error}"
    return "no error"


def _train_with_a_broken_loss(config: Path, run: Path) -> str:
    """One job's examples have a loss that is not finite in its third step, and its neighbours' in the batch too."""
    from megaptune.scoring import Scorer

    losses = Scorer.losses

    def broken(self, batch, table):
        found, ranks = losses(self, batch, table)
        if (batch.jobs == 1).any():
            broken.calls += 1
        if broken.calls > 2 and (batch.jobs == 1).any():
            found = found * float("nan")
        return found, ranks

    broken.calls = 0
    Scorer.losses = broken
    try:
        train(config, f"run.directory={run}", *overrides(SGD))
    except DivergedError as error:
        return f"{error.exit_code} {error}"
    return "no error"


@pytest.mark.parametrize("how", [_train_to_divergence, _train_with_a_broken_loss])
def test_a_job_that_diverges_leaves_the_others_alone(base, alone, tmp_path, how):
    """It has no result; the others have theirs; the run ends naming it."""
    run = tmp_path / "run"
    (said,) = run_ranks(1, how, base, run)
    assert said.startswith("5 P17/ptuning-seed1: ")
    assert said.count("/ptuning-seed") == 1
    assert '"status": "failed"' in (run / "state.json").read_text()
    assert not (run / "jobs/P17/ptuning-seed1/result.json").exists()
    expected = curves(alone("sgd", SGD))
    found = curves(run)
    for job, losses in expected.items():
        if job != "P17/ptuning-seed1":
            assert found[job] == pytest.approx(losses, rel=1e-5)
            assert (run / "jobs" / job / "result.json").is_file()


def test_a_sweep_has_its_folders_and_its_rows(base, tmp_path):
    run = tmp_path / "run"
    sweep = (
        "jobs.learning_rates=[0.1,0.5]",
        'jobs.templates=["[P*2] {subject} [P] [answer]","{subject} [P*2] [answer]"]',
    )
    only = "task.relations=[P17,P30]", "run.seeds=[0]", "train.optimizer=sgd", "train.epochs=1"
    run_ranks(2, train, base, f"run.directory={run}", *sweep, *only)
    folders = {folder.name for folder in (run / "jobs" / "P17").iterdir()}
    assert folders == {f"ptuning-seed0-lr{rate}-template{place}" for rate in ("0.1", "0.5") for place in (1, 2)}
    job = result(run, "P17/ptuning-seed0-lr0.5-template2")
    assert (job["learning_rate"], job["template"]) == (0.5, "{subject} [P*2] [answer]")
    table = json.loads((run / "results.json").read_text())["table"]
    variants = {row["variant"] for row in table if row["relation"] == "P17"}
    assert variants == {f"lr{rate}-template{place}" for rate in ("0.1", "0.5") for place in (1, 2)}
    assert sum(row["dev_choice"] for row in table if row["relation"] == "P17" and row["reading"] == "answers") == 1
