"""Deep prompts in front of SuperGLUE's patterns, from configuration to predictions: label words and choices, causal and
masked; killed on two ranks and continued, they end with the bits of one; what is handed out predicts the same in
transformers."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_deep import option_scores, plain_logits
from ranks import RankFailed, run_ranks, train
from runs import metrics, prompt, result
from tiny import HEADS, LAYERS, WIDTH
from tiny_superglue import save_backbone, write_config, write_superglue

from megaptune.config import load_config
from megaptune.planning.workload import Workload
from megaptune.preparation import prepare_run
from megaptune.run.monitor import Monitor
from megaptune.superglue_examples import PreparedSuperGlue

pytestmark = pytest.mark.dist

LENGTH, METHOD = 4, "deep_ptuning"
TASKS = {"llama": ["CB", "COPA", "ReCoRD"], "bert": ["RTE", "WSC"]}
STEPS = 4  # of each job: two epochs of two


@pytest.fixture(scope="module", params=TASKS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def config(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    root = write_superglue(folder / "data", train=8, dev=4, val=6, test=2)
    sections: dict[str, Any] = {
        "methods": [METHOD],
        "task": {"tasks": TASKS[kind], "splits": {"dev": "dev32"}},
        "prompt": {"deep": {"length": LENGTH, "input": "manual" if kind == "bert" else "bare"}},
        "train": {"epochs": 2, "global_batch": 4, "micro_batch": 2, "learning_rate": 0.1},
        "checkpoint": {"every_steps": 1},
    }
    return write_config(folder, root, save_backbone(kind, folder / "backbone"), **sections)


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    """On one rank."""
    run_ranks(1, train, config)
    return config.parent / "run"


def _train_and_die(config: Path, run: Path) -> None:
    """Right after the third step, the first of the second epoch."""
    from megaptune.training_report import TrainingReport

    report = TrainingReport.step

    def dying(self: Any, number: int, *rest: Any) -> None:
        report(self, number, *rest)
        if number == STEPS - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    TrainingReport.step = dying
    train(config, f"run.directory={run}")


def test_killed_on_two_ranks_and_continued_it_ends_with_the_bits_of_one(kind: str, config: Path, run: Path):
    other = config.parent / "killed"
    with pytest.raises(RankFailed, match="died with exit code -9"):
        run_ranks(2, _train_and_die, config, other)
    assert any((other / "deep-checkpoints").iterdir())
    run_ranks(2, train, config, f"run.directory={other}")
    assert metrics(other) == metrics(run)
    for task in TASKS[kind]:
        ours, theirs = (prompt(place, task, method=METHOD) for place in (other, run))
        assert ours["vectors"].shape == (LAYERS, 2, LENGTH, 2 if kind == "llama" else HEADS, WIDTH // HEADS)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert result(other, f"{task}/{METHOD}-seed0") == result(run, f"{task}/{METHOD}-seed0")


def test_the_memory_plan_counts_the_prompt_of_every_choice(kind: str, config: Path):
    """Two choices and what they share, of a causal backbone; a masked one reads one input for all."""
    work = Workload.prepared(prepare_run(load_config(config), Monitor(False)))
    assert (work.sequences, work.encoder) == (3 if kind == "llama" else 1, "none")
    assert work.deep is not None
    assert (work.deep.length, work.jobs) == (LENGTH, len(TASKS[kind]))


def test_the_prompt_folder_predicts_the_same_in_transformers(kind: str, config: Path, run: Path):
    prepared = prepare_run(load_config(config), Monitor(False))
    logits = plain_logits(prepared.backbone.folder, kind == "bert")
    for task in prepared.tasks:
        assert isinstance(task, PreparedSuperGlue)
        folder = run / "jobs" / task.name / f"{METHOD}-seed0"
        ((_, encoded),) = task.found.items()
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        vectors = prompt(run, task.name, method=METHOD)["vectors"]
        for line, example in zip(lines, encoded.test, strict=True):
            with torch.no_grad():
                expected = option_scores(logits, vectors, example).softmax(dim=0)
            assert list(line["options"].values()) == pytest.approx(expected.tolist(), abs=1e-4)
            assert line["predicted"] == encoded.prediction(example.record, int(expected.argmax()))
        steps = [line for line in metrics(run) if line["kind"] == "train" and line["job"].startswith(task.name)]
        assert len(steps) == result(run, f"{task.name}/{METHOD}-seed0")["steps"] == STEPS
