"""PET and iPET from data to table on two ranks and on one, interrupted between their stages, and what they refuse."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from ranks import RankFailed, run_ranks, train
from runs import result
from tiny_superglue import save_backbone, settings, write_config, write_superglue

from megaptune.config import load_config, validate
from megaptune.errors import ConfigError, DataError
from megaptune.preparation import prepare_run
from megaptune.run.monitor import Monitor
from megaptune.soft_labels import combined, most_confident, softened
from megaptune.superglue_data import load_superglue

pytestmark = pytest.mark.dist

PET = {"patterns": {"RTE": ["question_answer", "is_it_so"]}, "limit": 16, "generations": 2, "growth": 1.5, "epochs": 3}
MODELS = [
    f"{method}-seed0-g{generation}-{pattern}"
    for method, generation in (("pet", 0), ("ipet", 1))
    for pattern in ("question_answer", "is_it_so")
]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pet")
    root = write_superglue(folder / "data", unlabeled=20)
    sections = {"task": {"tasks": ["RTE"]}, "methods": ["ipet", "pet"], "pet": {**PET, "head_learning_rate": 1e-2}}
    sections |= {"train": {"epochs": 2, "lm_learning_rate": 1e-3}, "parallel": {"zero_stage": 2}}
    task = {"type": "superglue", "root": str(root), "splits": {"dev": "dev32"}, **sections.pop("task")}
    return write_config(folder, root, save_backbone("llama", folder / "llama"), task=task, **sections)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> dict[int, Path]:
    """By number of ranks."""
    runs = {count: tmp_path_factory.mktemp("runs") / f"ranks{count}" for count in (1, 2)}
    for count, run in runs.items():
        run_ranks(count, train, config, f"run.directory={run}")
    return runs


def lines(folder: Path, file: str) -> list[dict]:
    """The rows of a file about RTE, after the line that tells of them."""
    return [json.loads(line) for line in (folder / "RTE" / file).read_text().splitlines()[1:]]


def test_both_leave_their_stages_and_stand_in_the_table(finished):
    run = finished[1]
    assert {row["task"] for row in json.loads((run / "results.json").read_text())["table"]} == {"RTE"}
    assert "| PET | iPET |" in (run / "results.md").read_text()
    for method in ("pet", "ipet"):
        found = result(run, f"RTE/{method}-seed0")
        rows = lines(run / "jobs", f"{method}-seed0/soft_labels.jsonl")
        assert found["trained_on"] == found["ensemble"]["labelled"] == len(rows) == 16
        assert found["counts"] == {"train": 12, "dev": 6, "test": 8, "to_label": 16}
        assert all(sum(row["probabilities"]) == pytest.approx(1) for row in rows)
        assert found["steps"] == 3 * 2
    assert {file.parent.name for file in (run / "models" / "RTE").glob("*/scores.jsonl")} == set(MODELS)
    assert sorted(path.name for path in (run / "jobs" / "RTE").iterdir()) == ["ipet-seed0", "pet-seed0"]
    models = {model["name"]: model for method in ("pet", "ipet") for model in _models(run, method)}
    assert list(models) == MODELS
    assert [model["trained_on"] for model in models.values()][:2] == [12, 12]
    assert all(12 < models[name]["trained_on"] <= 18 for name in MODELS[2:])
    for pattern in ("question_answer", "is_it_so"):  # the LM's that nobody has tuned: the same in all generations
        assert len({model["weight"] for model in models.values() if model["pattern"] == pattern}) == 1


def test_labels_are_what_the_rules_make_of_the_models_scores(finished):
    run = finished[1]
    scores = {name: _scores(run, name) for name in MODELS}
    models = {model["name"]: model for method in ("pet", "ipet") for model in _models(run, method)}
    for method, names in (("pet", MODELS[:2]), ("ipet", MODELS[2:])):
        together = combined([scores[name] for name in names], [models[name]["weight"] for name in names])
        found = torch.tensor([row["probabilities"] for row in lines(run / "jobs", f"{method}-seed0/soft_labels.jsonl")])
        assert torch.allclose(found, softened(together, 2.0).float())
    for name, other in zip(MODELS[2:], MODELS[1::-1], strict=True):  # of two models the other one
        assert models[name]["labelled_by"] == [other]
        new = most_confident(softened(scores[other]), [6, 6], 6)
        assert models[name]["trained_on"] == 12 + len(new)


def _scores(run: Path, model: str) -> torch.Tensor:
    rows = lines(run / "models", f"{model}/scores.jsonl")
    return torch.tensor([row["scores"] for row in rows if row["split"] == "to_label"])


def _models(run: Path, method: str) -> list[dict]:
    return result(run, f"RTE/{method}-seed0")["ensemble"]["models"]


def test_one_rank_and_two_agree(finished):
    """Within what the order of fp32 sums makes of Adam's steps: 1e-3 of a probability."""
    for method in ("pet", "ipet"):
        one, two = (lines(run / "jobs", f"{method}-seed0/soft_labels.jsonl") for run in finished.values())
        for mine, theirs in zip(one, two, strict=True):
            assert mine["idx"] == theirs["idx"]
            assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-3)
        one, two = (result(run, f"RTE/{method}-seed0") for run in finished.values())
        assert one["score"] == two["score"]
        assert one["test"]["options"]["loss"] == pytest.approx(two["test"]["options"]["loss"], abs=1e-3)


def _train_and_die(config: Path, run: Path, survives: int) -> list[str]:
    """Killed where the model after so many would be tuned; the names of those that were."""
    from megaptune.pet import PatternEnsemble

    tuned, names = PatternEnsemble.tuned, []

    def counted(self, job, *rest):
        if len(names) == survives:
            os.kill(os.getpid(), signal.SIGKILL)
        names.append(job.folder.name)
        return tuned(self, job, *rest)

    PatternEnsemble.tuned = counted
    train(config, f"run.directory={run}")
    return names


def test_a_run_killed_between_stages_goes_on_where_it_was(config, finished, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(RankFailed, match="died"):
        run_ranks(1, _train_and_die, config, run, 3)
    assert (run / "jobs/RTE/pet-seed0/result.json").is_file()
    assert not (run / "jobs/RTE/ipet-seed0/soft_labels.jsonl").exists()
    assert run_ranks(1, _train_and_die, config, run, 9) == [MODELS[3:]]
    for method in ("pet", "ipet"):
        assert result(run, f"RTE/{method}-seed0") == result(finished[1], f"RTE/{method}-seed0")
    (run / "jobs/RTE/ipet-seed0/result.json").unlink()  # as if killed while the classifier was trained
    assert run_ranks(1, _train_and_die, config, run, 0) == [[]]
    assert result(run, "RTE/ipet-seed0") == result(finished[1], "RTE/ipet-seed0")


# -- what is refused ---------------------------------------------------------------------------------------------------


def _settings(tmp_path: Path, tasks: list[str] | str, pet: dict | None = None, unlabeled: int = 4):
    root = write_superglue(tmp_path / "data", unlabeled=unlabeled)
    task = {"type": "superglue", "root": str(root), "splits": {"dev": "dev32"}, "tasks": tasks}
    from megaptune import config_files

    raw = settings(root, Path("nowhere"), tmp_path / "run", task=task, methods=["ipet"], pet=pet or {})
    patterns = config_files.read_layers(Path(raw.pop("defaults")[0]), lambda raw, base: None)
    return {**raw, **patterns}


def test_tasks_whose_options_are_phrases_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="method ipet cannot label WSC: its examples have phrases of their own"):
        validate(_settings(tmp_path, ["RTE", "WSC"]), "config.yaml")


def test_all_tasks_are_those_that_can_be_labelled(config):
    run = prepare_run(load_config(config, ["task.tasks=all", "pet.patterns={}"]), Monitor(speaks=False))
    for task in run.tasks:
        named = task.name in ("WSC", "ReCoRD")
        assert ("ipet" in task.left_out) == named == (not task.ensemble)
        assert ("left out ipet: its examples have phrases of their own" in task.summary(0)) == named


def test_one_model_alone_cannot_be_helped_by_others(config):
    alone = load_config(config, ["pet.patterns={RTE: [is_it_so]}"])
    with pytest.raises(DataError, match="ipet lets the other models label for each, and there is one model"):
        prepare_run(alone, Monitor(speaks=False))


def test_a_pattern_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"pet\.patterns\.RTE names the pattern 'nonesuch'"):
        validate(_settings(tmp_path, ["RTE"], {"patterns": {"RTE": ["nonesuch"]}}), "config.yaml")


def test_what_is_labelled_has_no_label_and_is_nowhere_else(tmp_path):
    """train.jsonl, whose labels stand there; of two folders the one that pet.root names."""
    few = write_superglue(tmp_path / "few", unlabeled=4)  # the same rows
    file = few / "RTE" / "train.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:8]))  # of the 12 that the other folder has
    raw = _settings(tmp_path, ["RTE"], {"file": "train", "root": str(tmp_path / "data")})
    raw["task"]["root"] = str(few)
    (data,) = load_superglue(validate(raw, "config.yaml"))
    found = data.splits["to_label"]
    assert len(found.records) == 4
    assert not found.labels()
    texts = [record.fields for split in ("train", "dev", "test") for record in data.splits[split].records]
    assert not [record for record in found.records if record.fields in texts]
    raw["pet"].pop("root")
    with pytest.raises(DataError, match="every example of its train file is also one of train, dev or test"):
        load_superglue(validate(raw, "config.yaml"))


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"RTE has no unlabeled file: .*unlabeled\.jsonl"):
        load_superglue(validate(_settings(tmp_path, ["RTE"], unlabeled=0), "config.yaml"))
