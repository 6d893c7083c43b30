"""SuperGLUE runs from start to table: the shipped few-shot configuration over all tasks and methods, on made-up data
and a tiny backbone."""

import json
import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, train
from runs import metrics, result
from safetensors.torch import load_file
from tiny_superglue import ROOT, TASKS, save_backbone, write_config, write_superglue

from megaptune.methods import METHODS
from megaptune.patterns import LABELS
from megaptune.tasks.superglue.loading import load_split
from megaptune.tasks.superglue.metrics import METRICS, score, task_score
from megaptune.tasks.superglue.records import Idx
from megaptune.tasks.superglue.submission import read_predictions

pytestmark = pytest.mark.dist

TRAINED = ("finetune", "prompt_tuning", "ptuning", "ptuning+finetune")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Where MEGAPTUNE_DATA points: both folders, the same files in them."""
    root = tmp_path_factory.mktemp("data")
    for name in ("FewGLUE_32dev", "SuperGLUE"):
        write_superglue(root / name, train=8, dev=4, val=6, test=2)
    return root


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return save_backbone("llama", tmp_path_factory.mktemp("backbone") / "llama")


def _few_shot(config: Path, data: Path, *overrides: str) -> None:
    os.environ["MEGAPTUNE_DATA"] = str(data)
    train(config, *overrides)


@pytest.fixture(scope="module")
def run(data, backbone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    overrides = [f"run.directory={folder}", f"backbone.path={backbone}", "train.epochs=2", "monitor.tensorboard=false"]
    overrides += [f"methods=[manual,{','.join(TRAINED)}]", "task.predict_test=true", "task.manual={CB: all}"]
    run_ranks(2, _few_shot, ROOT / "configs" / "fewshot" / "all.yaml", data, *overrides, timeout_s=300)
    return folder


def test_every_task_and_method_is_in_the_table(run):
    found = json.loads((run / "results.json").read_text())
    rows = {(row["task"], row["metric"]): row for row in found["table"]}
    assert {task for task, _ in rows} == {*TASKS, "mean of 8"}
    for task in TASKS:
        names = METRICS[task]
        for method in ("manual", *TRAINED):
            assert 0 <= rows[task, names[0]][method]["mean"] <= 1
    for method in TRAINED:
        scores = [result(run, f"{task}/{method}-seed0")["score"] for task in TASKS]
        assert rows["mean of 8", "score"][method]["mean"] == pytest.approx(sum(scores) / 8)
    lines = [line for line in (run / "results.md").read_text().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows) + 2 + len(found["patterns"])


def test_several_patterns_of_a_task_are_jobs_of_their_own(run):
    found = json.loads((run / "results.json").read_text())
    shown = {row["pattern"]: row["score"]["mean"] for row in found["patterns"]}
    assert set(shown) == {"question_answer", "true_false_or_neither", "is_it_so"}  # those for causal models
    for name, mean in shown.items():
        assert result(run, f"CB/manual-{name}")["score"] == mean
    cell = next(row for row in found["table"] if (row["task"], row["metric"]) == ("CB", "score"))["manual"]
    assert cell["mean"] == pytest.approx(sum(shown.values()) / 3)


def test_figures_are_those_of_the_predictions(run, data):
    for job in json.loads((run / "results.json").read_text())["jobs"]:
        task, name = job["task"], job["method"] + ("" if job["seed"] is None else "-seed0")
        name += f"-{job['pattern']}" if (task, job["method"]) == ("CB", "manual") else ""
        split = "dev32" if task == "ReCoRD" else "val"
        gold = load_split(data / "SuperGLUE", task, split).gold
        lines = [
            json.loads(line) for line in (run / "jobs" / task / name / "predictions.jsonl").read_text().splitlines()
        ]
        said: dict[Idx, str] = {tuple(line["idx"]): line["predicted"] for line in lines}
        assert said.keys() == gold.keys()
        assert job["score"] == pytest.approx(task_score(task, score(task, gold, said)))
        for line in lines:
            assert sum(line["options"].values()) == pytest.approx(1, abs=1e-4)
            best = max(line["options"], key=line["options"].get)
            assert task in ("COPA", "WSC") or line["predicted"] == best


def test_the_servers_test_set_is_predicted_whole(run, data):
    for name in ("manual", *(f"{method}-seed0" for method in TRAINED)):
        for task in TASKS if name != "manual" else set(TASKS) - {"CB"}:
            records = load_split(data / "SuperGLUE", task, "test").records
            found = read_predictions(run / "submission" / name, task)
            assert found.keys() == {record.idx for record in records}
            assert not LABELS[task] or set(found.values()) <= set(LABELS[task])


def test_what_is_reported_is_scored_once_and_chooses_nothing(run):
    tested = [line["job"] for line in metrics(run) if line["kind"] == "test"]
    assert len(tested) == len(set(tested)) == 8 * len(TRAINED) + 7 + 3
    for job in json.loads((run / "results.json").read_text())["jobs"]:
        used = job["splits"]
        assert used["test"] == ("dev32" if job["task"] == "ReCoRD" else "val")
        assert used["dev"] == ("held out of train" if job["task"] == "ReCoRD" else "dev32")
        if METHODS[job["method"]].trains:
            name = f"{job['task']}/{job['method']}-seed0"
            dev = [line for line in metrics(run) if line["kind"] == "dev" and line["job"] == name]
            assert job["best_dev_score"] == max(line["score"] for line in dev)
            last_best = [line["epoch"] for line in dev if line["score"] == job["best_dev_score"]][-1]
            assert job["best_epoch"] == last_best


def test_prompt_tuning_trains_plain_vectors_beside_an_lstm(run):
    plain = load_file(run / "jobs/RTE/prompt_tuning-seed0/prompt/tensors.safetensors")
    lstm = load_file(run / "jobs/RTE/ptuning-seed0/prompt/tensors.safetensors")
    assert set(plain) == {"vectors", "encoder.embedding.weight"}
    assert torch.equal(plain["vectors"], plain["encoder.embedding.weight"])
    assert {"vectors", "encoder.lstm.weight_ih_l0"} < set(lstm)
    parameters = {method: result(run, f"RTE/{method}-seed0")["parameters"] for method in ("prompt_tuning", "ptuning")}
    assert parameters["prompt_tuning"] == plain["vectors"].numel() < parameters["ptuning"]


def test_the_same_command_runs_what_is_missing_and_gives_the_same(run, data, backbone):
    """A head and a prompt, from nothing."""
    jobs = ("COPA/finetune-seed0", "COPA/ptuning+finetune-seed0")
    before = {job: result(run, job) for job in jobs}
    for job in jobs:
        (run / "jobs" / job / "result.json").unlink()
    run_ranks(2, train, run / "config.yaml", timeout_s=200)
    for job in jobs:
        assert result(run, job) == before[job]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_results_do_not_depend_on_the_number_of_ranks(kind, data, tmp_path):
    """1, 2 and 4 ranks at the same global batch, fp32: a frozen LM's losses and prompts agree bit by bit; those of a
    tuned LM, whose gradient DeepSpeed sums, to 1e-5 of their size with SGD; what is predicted is the same."""
    folder = save_backbone(kind, tmp_path / "backbone")
    train_settings = {"epochs": 2, "optimizer": "sgd", "learning_rate": 0.1, "lm_learning_rate": 0.02}
    methods = ["ptuning", "ptuning+finetune", "finetune"]
    tasks = {"tasks": ["CB", "COPA"], "splits": {"dev": "dev32"}}
    config = write_config(tmp_path, data / "FewGLUE_32dev", folder, train=train_settings, task=tasks, methods=methods)
    runs = {}
    for ranks in (1, 2, 4):
        runs[ranks] = tmp_path / f"ranks{ranks}"
        overrides = (f"run.directory={runs[ranks]}", "train.micro_batch=2", "jobs.shard_encoders=true")
        run_ranks(ranks, train, config, *overrides, timeout_s=240)
    losses = {ranks: _losses(run) for ranks, run in runs.items()}
    for ranks in (2, 4):
        for job, curve in losses[1].items():
            if "finetune" in job:
                assert losses[ranks][job] == pytest.approx(curve, rel=1e-5)
            else:
                assert losses[ranks][job] == curve
            predictions = [(runs[n] / "jobs" / job / "predictions.jsonl").read_text() for n in (1, ranks)]
            said = [[json.loads(line)["predicted"] for line in text.splitlines()] for text in predictions]
            assert said[0] == said[1]
        one, more = (load_file(runs[n] / "jobs/CB/ptuning-seed0/prompt/tensors.safetensors") for n in (1, ranks))
        assert all(torch.equal(one[name], more[name]) for name in one)


def _losses(run: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for line in metrics(run):
        if line["kind"] == "train":
            found.setdefault(line["job"], []).append(line["loss"])
    return found
