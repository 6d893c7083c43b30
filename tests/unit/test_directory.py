"""The run directory: whose it is, what may change when it is continued, and that nothing of another run is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaptune.backbone.fingerprint import Fingerprint
from megaptune.config import Config, load_config, validate
from megaptune.errors import BackboneError, ConfigError, SetupError
from megaptune.run.directory import RunDirectory

TASK = {"type": "custom", "train": "/d/a.jsonl", "dev": "/d/b.jsonl", "test": "/d/c.jsonl", "answer": "x"}


def config(**sections: Any) -> Config:
    return validate({"backbone": {"path": "/b"}, "task": TASK, "methods": ["ptuning"], **sections}, "config.yaml")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "one")


@pytest.fixture
def begun(directory: RunDirectory) -> RunDirectory:
    """Claimed for ``config()``, and a job has left something."""
    directory.claim(config())
    (directory.job("custom", "ptuning", 0) / "result.json").write_text("{}")
    return directory


# -- claiming --------------------------------------------------------------------------------------------------------


def test_new_directory_is_created_with_what_is_needed_to_repeat_the_run(directory: RunDirectory):
    assert directory.claim(config()) is False
    assert load_config(directory.config_file) == config()
    assert "megaptune" in json.loads((directory.path / "environment.json").read_text())
    assert len((directory.path / "command.txt").read_text().splitlines()) == 1


def test_same_configuration_continues(begun: RunDirectory):
    assert begun.claim(config()) is True
    assert len((begun.path / "command.txt").read_text().splitlines()) == 2


def test_other_configuration_is_refused_with_the_keys_that_differ(begun: RunDirectory):
    other = config(train={"learning_rate": 0.1, "patience": 3}, run={"seeds": [5]})
    with pytest.raises(ConfigError) as caught:
        begun.claim(other)
    message = str(caught.value)
    assert "  - train.learning_rate: 1e-05 there, 0.1 now" in message
    assert "  - train.patience: 20 there, 3 now" in message
    assert "  - run.seeds: [0] there, [5] now" in message
    assert message.count("\n  - ") == 3
    assert "name another run.directory, or remove that one to start over" in message


def test_other_task_is_refused(begun: RunDirectory):
    with pytest.raises(ConfigError, match=r"task\.test: '/d/c\.jsonl' there, '/e/c\.jsonl' now"):
        begun.claim(config(task={**TASK, "test": "/e/c.jsonl"}))


def test_refused_claim_changes_no_file(begun: RunDirectory):
    before = snapshot(begun.path)
    with pytest.raises(ConfigError):
        begun.claim(config(train={"learning_rate": 0.1}))
    assert snapshot(begun.path) == before


@pytest.mark.parametrize(
    "layout",
    [
        {"parallel": {"zero_stage": 3}},
        {"checkpoint": {"every_steps": 5, "keep": 4}},
        {"monitor": {"log_every": 1, "tensorboard": False}},
        {"kernels": {"implementation": "reference"}},
        {"evaluation": {"batch": 1}},
    ],
    ids=lambda layout: next(iter(layout)),
)
def test_layout_and_logging_may_change(begun: RunDirectory, layout: dict[str, Any]):
    assert begun.claim(config(**layout)) is True
    assert load_config(begun.config_file) == config(**layout)


def test_directory_of_a_start_that_did_nothing_may_change_hands(directory: RunDirectory):
    directory.claim(config())
    assert directory.claim(config(train={"learning_rate": 0.1})) is True
    assert load_config(directory.config_file).train.learning_rate == 0.1


def test_directory_with_other_files_is_refused_and_left_alone(directory: RunDirectory):
    directory.path.mkdir(parents=True)
    (directory.path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds other files and no run; name a new directory"):
        directory.claim(config())
    assert snapshot(directory.path) == {"thesis.tex": b"years of work"}


def test_hand_written_configuration_beside_a_run_is_never_overwritten(directory: RunDirectory):
    """As with ``run.directory: .`` in the folder that holds the user's own config.yaml."""
    directory.path.mkdir(parents=True)
    directory.config_file.write_text("# mine\ndefaults: [site.yaml]\n")
    with pytest.raises(ConfigError, match="name a new directory"):
        directory.claim(config())
    assert directory.config_file.read_text() == "# mine\ndefaults: [site.yaml]\n"


def test_empty_directory_is_taken(directory: RunDirectory):
    directory.path.mkdir(parents=True)
    assert directory.claim(config()) is False


@pytest.mark.parametrize("text", ["{", "", "just words", "train: {epochs: many}"])
def test_damaged_stored_configuration_is_refused(begun: RunDirectory, text: str):
    begun.config_file.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        begun.claim(config())


def test_place_that_cannot_be_a_directory_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"run\.directory .* cannot be written"):
        RunDirectory(tmp_path / "file" / "run").claim(config())


def test_stored_configuration_is_plain_yaml(directory: RunDirectory):
    directory.claim(config(run={"directory": "runs/Málaga"}))
    text = directory.config_file.read_text(encoding="utf-8")
    assert "!!" not in text
    assert yaml.safe_load(text)["run"]["directory"] == "runs/Málaga"


# -- backbone and state ----------------------------------------------------------------------------------------------


ONE = Fingerprint("a" * 64, (1.0, -2.0), "fp32")


def test_same_backbone_is_known_again(begun: RunDirectory):
    begun.check_backbone(ONE.rows_sha256)
    begun.remember_backbone(ONE, "llama")
    begun.check_backbone(ONE.rows_sha256)
    begun.remember_backbone(Fingerprint(ONE.rows_sha256, (1.001, -2.0), "fp32"), "llama")
    stored = json.loads((begun.path / "backbone.json").read_text())
    assert stored == {"rows_sha256": "a" * 64, "probe": [1.0, -2.0], "dtype": "fp32", "family": "llama"}


def test_other_backbone_is_refused_and_the_first_stays_on_record(begun: RunDirectory):
    begun.remember_backbone(ONE, "llama")
    with pytest.raises(BackboneError, match=r"another backbone \(rows' SHA-256 aaaaaaaaaaaa\.\.\., now bbbbbbbbbbbb"):
        begun.check_backbone("b" * 64)
    assert json.loads((begun.path / "backbone.json").read_text())["rows_sha256"] == "a" * 64


@pytest.mark.parametrize("probe", [(1.1, -2.0), (float("nan"), -2.0)])
def test_same_files_that_score_otherwise_are_refused(begun: RunDirectory, probe: tuple[float, ...]):
    begun.remember_backbone(ONE, "llama")
    with pytest.raises(BackboneError, match="a probe input scores otherwise now"):
        begun.remember_backbone(Fingerprint(ONE.rows_sha256, probe, "fp32"), "llama")


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [("running", None, ""), ("finished", 0, ""), ("stopped", 75, "same command"), ("failed", 5, "mend the cause")],
)
def test_state_says_how_the_run_stands_and_what_to_do(begun: RunDirectory, status: str, code: int | None, told: str):
    begun.set_state(status, code, "why")
    state = json.loads((begun.path / "state.json").read_text())
    assert (state["status"], state["exit_code"], state["reason"]) == (status, code, "why")
    assert told in state["next"]


def test_jobs_have_folders_of_their_own(begun: RunDirectory):
    folders = [begun.job("P17", "manual"), begun.job("P17", "ptuning", 0), begun.job("P17", "ptuning", 1)]
    assert len(set(folders)) == 3
    assert all(folder.is_dir() and begun.path in folder.parents for folder in folders)


@pytest.mark.parametrize("name", ["a/b", "", ".", ".."])
def test_task_name_that_is_no_folder_name_is_refused(name: str):
    with pytest.raises(ConfigError, match=r"task\.name"):
        config(task={**TASK, "name": name})
