"""What a user does wrong, from the command line: one clear message, the right exit code, and nothing lost.

Most go through ``megaptune check`` in this process; the last few start ``python -m megaptune``.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import MAX_TOKENS, UNKNOWN_WORD, write_jsonl
from typer.testing import CliRunner

from megaptune.cli import app

ROOT = Path(__file__).resolve().parents[2]
CONFIG, DATA, SETUP, BACKBONE = 2, 2, 3, 4  # exit codes, as in megaptune/errors.py

ConfigFile = Callable[..., Path]


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank above 0 would wait for rank 0 before it speaks."""
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def backbone(tmp_path: Path, tiny: Callable[[str], Path]) -> Path:
    """A backbone to damage."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "backbone"))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refusal(config: Path, code: int, *arguments: str) -> str:
    """The one message that ``megaptune check`` refuses with; what it leaves as it was is checked as well."""
    before = snapshot(config.parent)
    done = CliRunner().invoke(app, ["check", "--config", str(config), *arguments])
    assert done.exit_code == code, done.output
    assert snapshot(config.parent) == before
    return only_message(done.stdout, done.stderr)


def only_message(stdout: str, stderr: str) -> str:
    assert "Traceback" not in stdout + stderr
    assert stderr.count("error: ") == 1
    return stderr[stderr.index("error: ") :].rstrip("\n")


def flip_last_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_sound_configuration_passes(config_file: ConfigFile):
    """So that each refusal below is for the one thing that it changes."""
    done = CliRunner().invoke(app, ["check", "--config", str(config_file())])
    assert done.exit_code == 0, done.output
    assert "the configuration is sound" in done.stdout
    assert done.stderr == ""


# -- configuration ---------------------------------------------------------------------------------------------------


def test_missing_configuration_file(tmp_path: Path):
    message = refusal(tmp_path / "nowhere.yaml", CONFIG)
    assert f"cannot read the configuration file {tmp_path / 'nowhere.yaml'}: No such file or directory" in message


def test_mistyped_key(config_file: ConfigFile):
    message = refusal(config_file(train={"learning_rat": 0.1}), CONFIG)
    assert "unknown key `train.learning_rat`, did you mean `train.learning_rate`?" in message


def test_mistyped_key_of_set(config_file: ConfigFile):
    assert "did you mean `train.epochs`?" in refusal(config_file(), CONFIG, "--set", "train.epoch=3")


def test_wrong_type(config_file: ConfigFile):
    message = refusal(config_file(train={"epochs": "many"}), CONFIG)
    assert "`train.epochs`: input should be a valid integer" in message
    assert "found 'many'" in message


def test_several_mistakes_are_one_message(config_file: ConfigFile):
    message = refusal(config_file(train={"epochs": 0, "lr": 1}, backbone={"dtype": "fp8"}), CONFIG)
    assert "3 problems in the configuration" in message
    assert len(message.splitlines()) == 4


def test_yaml_that_cannot_be_parsed(config_file: ConfigFile):
    config = config_file()
    config.write_text("train: [1, 2\n")
    assert "config.yaml:2: not valid YAML" in refusal(config, CONFIG)


# -- data ------------------------------------------------------------------------------------------------------------


def test_missing_data_file(config_file: ConfigFile, tmp_path: Path):
    message = refusal(config_file(task={"dev": "gone.jsonl"}), DATA)
    assert message == f"error: data file not found: {tmp_path / 'gone.jsonl'}"


def test_malformed_line(config_file: ConfigFile, tmp_path: Path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"city": "Paris", "country": "France"}])
    path.write_text(path.read_text() + '{"city": "Rome", "country"\n')
    message = refusal(config_file(task={"train": str(path)}), DATA)
    assert message.startswith(f"error: {path}:2: not valid JSON: ")


def test_record_without_the_answers_field(config_file: ConfigFile, tmp_path: Path):
    path = write_jsonl(tmp_path / "test.jsonl", [{"city": "Rome", "country": "Italy"}, {"city": "Paris"}])
    message = refusal(config_file(task={"test": str(path)}), DATA)
    assert message == f"error: {path}:2: the record has no text field 'country' (it has: city)"


def test_answer_of_several_tokens(config_file: ConfigFile, tmp_path: Path):
    path = write_jsonl(tmp_path / "test.jsonl", [{"city": "Paris", "country": UNKNOWN_WORD}])
    message = refusal(config_file(task={"test": str(path)}), DATA)
    assert f"'{UNKNOWN_WORD}' = " in message
    assert f"({path}:1)" in message
    assert "set task.multi_token_answers: drop" in message


def test_empty_split(config_file: ConfigFile, tmp_path: Path):
    path = write_jsonl(tmp_path / "dev.jsonl", [])
    message = refusal(config_file(task={"dev": str(path)}), DATA)
    assert message == "error: cities: no dev records are left (dropped: its file is empty)"


def test_split_that_the_word_list_empties(config_file: ConfigFile, tmp_path: Path):
    root = tmp_path / "LAMA"
    write_jsonl(root / "relations.jsonl", [{"relation": "P17", "template": "[X] is in [Y] ."}])
    for split, country in (("train", "France"), ("dev", "Italy"), ("test", "France")):
        rows = [{"sub_label": "Paris", "obj_label": country}]
        write_jsonl(root / "fact-retrieval" / "original" / "P17" / f"{split}.jsonl", rows)
    (tmp_path / "words.txt").write_text("France\nPeru\n")
    config = config_file(prompt={"template": "[P*3] {subject} [answer]", "manual": None})
    settings = yaml.safe_load(config.read_text())
    settings["task"] = {"type": "lama", "root": str(root), "word_list": str(tmp_path / "words.txt")}
    config.write_text(yaml.safe_dump(settings))
    message = refusal(config, DATA)
    assert message == "error: P17: no dev records are left (dropped: 1 answer outside task.word_list)"


# -- templates -------------------------------------------------------------------------------------------------------


def test_template_without_an_answer(config_file: ConfigFile):
    message = refusal(config_file(prompt={"template": "[P*3] {city} is in"}), DATA)
    assert message == "error: template '[P*3] {city} is in': expected one [answer], it has none"


def test_template_with_lamas_placeholders(config_file: ConfigFile):
    message = refusal(config_file(prompt={"manual": "[X] is in [answer]"}), DATA)
    assert "'[X]' is no tag; write [P] or [P*3] for pseudo tokens, [answer] for the answer" in message
    assert "{name} for a field" in message


def test_template_with_a_field_that_the_task_lacks(config_file: ConfigFile, facts: dict[str, Path]):
    message = refusal(config_file(prompt={"template": "[P*3] {town} [answer]"}), DATA)
    assert f"{facts['train']}:1: the template names the field {{town}}" in message
    assert "(it has: city)" in message


def test_prompt_longer_than_the_context(config_file: ConfigFile, tmp_path: Path):
    long = {"city": " ".join(["Paris"] * MAX_TOKENS), "country": "France"}
    path = write_jsonl(tmp_path / "test.jsonl", [{"city": "Rome", "country": "Italy"}, long])
    message = refusal(config_file(task={"test": str(path)}), DATA)
    assert f"{path}:2: the prompt is {MAX_TOKENS + 3} tokens long" in message
    assert f"the backbone's context holds {MAX_TOKENS}; shorten the record or the template" in message


# -- backbone --------------------------------------------------------------------------------------------------------


def test_backbone_folder_that_is_not_there(config_file: ConfigFile, tmp_path: Path):
    message = refusal(config_file(backbone={"path": "gone"}), BACKBONE)
    assert message == f"error: backbone.path: folder not found: {tmp_path / 'gone'}"


def test_backbone_without_weights(config_file: ConfigFile, backbone: Path):
    (backbone / "model.safetensors").unlink()
    message = refusal(config_file(backbone={"path": str(backbone)}), BACKBONE)
    assert f"{backbone} has no weights: expected model.safetensors or model.safetensors.index.json" in message


def test_backbone_cut_short(config_file: ConfigFile, backbone: Path):
    file = backbone / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    message = refusal(config_file(backbone={"path": str(backbone)}), BACKBONE)
    assert message.startswith(f"error: {file}: truncated or damaged safetensors file")
    assert message.endswith("copy or convert it again")


@pytest.mark.parametrize(
    ("family", "architecture"), [("t5", "T5ForConditionalGeneration"), ("vit", "ViTForImageClassification")]
)
def test_backbone_of_an_unsupported_architecture(
    config_file: ConfigFile, backbone: Path, family: str, architecture: str
):
    (backbone / "config.json").write_text(json.dumps({"model_type": family, "architectures": [architecture]}))
    message = refusal(config_file(backbone={"path": str(backbone)}), BACKBONE)
    assert f"{backbone}: unsupported architecture: '{family}' ({architecture})" in message


def test_checksum_of_a_damaged_backbone_is_not_recorded(backbone: Path):
    file = backbone / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    done = CliRunner().invoke(app, ["checksum", str(backbone)])
    assert done.exit_code == BACKBONE
    assert "truncated or damaged" in only_message(done.stdout, done.stderr)
    assert not (backbone / "SHA256SUMS").exists()


# -- real processes --------------------------------------------------------------------------------------------------


def megaptune(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """``python -m megaptune`` as a user starts it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megaptune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


def test_mistyped_key_in_a_process_of_its_own(config_file: ConfigFile, tmp_path: Path):
    done = megaptune("train", "--config", config_file(), "--set", "train.epoch=3")
    assert done.returncode == CONFIG
    assert "did you mean `train.epochs`?" in only_message(done.stdout, done.stderr)
    assert not (tmp_path / "run").exists()


def test_run_directory_of_another_configuration(config_file: ConfigFile, tmp_path: Path):
    from megaptune.config import load_config
    from megaptune.run.directory import RunDirectory

    config = config_file()
    run = RunDirectory(tmp_path / "run")
    run.claim(load_config(config))
    (run.job("cities", "manual") / "result.json").write_text('{"precious": true}')
    before = snapshot(tmp_path)
    done = megaptune("train", "--config", config, "--set", "train.learning_rate=0.5")
    assert done.returncode == CONFIG
    message = only_message(done.stdout, done.stderr)
    assert f"run.directory {run.path} belongs to a different configuration" in message
    assert "train.learning_rate: 0.01 there, 0.5 now" in message
    assert "name another run.directory" in message
    assert snapshot(tmp_path) == before


def test_bit_flipped_backbone_whose_checksum_was_recorded(config_file: ConfigFile, backbone: Path, tmp_path: Path):
    recorded = CliRunner().invoke(app, ["checksum", str(backbone)])
    assert recorded.exit_code == 0, recorded.output
    flip_last_bit(backbone / "model.safetensors")
    before = snapshot(backbone)
    done = megaptune("train", "--config", config_file(backbone={"path": str(backbone)}))
    assert done.returncode == BACKBONE
    message = only_message(done.stdout, done.stderr)
    assert f"{backbone / 'model.safetensors'}: its bytes changed: SHA-256 " in message
    assert "copy or convert it again" in message
    assert snapshot(backbone) == before
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["status"], state["exit_code"]) == ("failed", BACKBONE)
