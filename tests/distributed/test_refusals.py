"""What cannot run is refused: the same clear message on every rank, exit code 3 or 4, and nobody waits for anybody."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from plain import save_model
from ranks import run_ranks, train
from safetensors.torch import load_file, save_file
from tiny import write_config

from megaptune.errors import BackboneError, MegaptuneError, SetupError

pytestmark = pytest.mark.dist


@pytest.fixture
def config(tiny, facts, tmp_path):
    """A configuration on a backbone that a test may damage."""
    files = {split: str(path) for split, path in facts.items()}
    backbone = shutil.copytree(tiny("llama"), tmp_path / "backbone")
    return write_config(tmp_path, backbone={"path": str(backbone)}, task=files)


def _to_error(config: Path, *overrides: str) -> tuple[str, int, str]:
    try:
        train(config, *overrides)
    except MegaptuneError as error:
        return type(error).__name__, error.exit_code, str(error)
    return "", 0, "no error"


def refusal(ranks: int, config: Path, kind: type[MegaptuneError], *overrides: str) -> str:
    """The message, after a check that all ranks give it."""
    answers = run_ranks(ranks, _to_error, config, *overrides)
    assert answers == [answers[0]] * ranks
    name, code, message = answers[0]
    assert (name, code) == (kind.__name__, kind.exit_code), message
    return message


def rewrite(config: Path, change) -> None:
    file = config.parent / "backbone/model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_heads_that_do_not_divide(config):
    message = refusal(3, config, BackboneError, "parallel.tensor_parallel=3")
    assert "heads" in message
    assert "choose parallel.tensor_parallel from [1, 2, 4]" in message


def test_ranks_that_do_not_divide_into_groups(config):
    message = refusal(3, config, SetupError, "parallel.tensor_parallel=2")
    assert "3 ranks do not divide into tensor-parallel groups of 2" in message
    assert not (config.parent / "run").exists()


def test_group_that_would_span_nodes(config, monkeypatch):
    from megaptune.run.grid import check_grid

    with pytest.raises(SetupError, match=r"would span nodes that have 2 ranks each.*parallel\.across_nodes"):
        check_grid(world_size=8, local_world_size=2, tensor_parallel=4, across_nodes=False)
    check_grid(world_size=8, local_world_size=2, tensor_parallel=4, across_nodes=True)


def test_family_without_a_table(tmp_path):
    folder = save_model("bloom", tmp_path / "bloom", n_layer=2, n_head=4)
    answers = run_ranks(2, _host_to_error, folder)
    assert all("tensor parallelism is not available for 'bloom'" in message for message in answers)


def _host_to_error(folder: Path) -> str:
    from hosting import open_host

    try:
        open_host(folder, tensor_parallel=2)
    except BackboneError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("stage", [0, 3])
def test_tensor_that_is_missing(config, stage):
    rewrite(config, lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight"))
    message = refusal(2, config, BackboneError, f"parallel.zero_stage={stage}")
    assert "the weight files lack model.layers.0.mlp.up_proj.weight" in message


def test_tensor_that_is_left_over(config):
    rewrite(config, lambda weights: weights.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2, 2)}))
    message = refusal(2, config, BackboneError, "parallel.tensor_parallel=2")
    assert "the weight files hold model.layers.2.mlp.up_proj.weight, for which the model has no place" in message


def test_tensor_of_another_shape(config):
    rewrite(config, lambda weights: weights.update({"model.norm.weight": torch.ones(33)}))
    message = refusal(2, config, BackboneError, "parallel.tensor_parallel=2")
    assert "model.norm.weight has shape [33], config.json asks for [32]" in message


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_part_that_is_missing_or_truncated(config, damage):
    folder = config.parent / "backbone"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for part, members in parts.items():
        save_file({name: weights[name] for name in members}, folder / part, metadata={"format": "pt"})
    index = {"weight_map": {name: part for part, members in parts.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refusal_expected = folder / "model-00002-of-00002.safetensors"
    if damage == "missing":
        refusal_expected.unlink()
    else:
        refusal_expected.write_bytes(refusal_expected.read_bytes()[:-100])
    message = refusal(2, config, BackboneError, "parallel.tensor_parallel=2")
    assert refusal_expected.name in message
    assert ("are missing" if damage == "missing" else "truncated") in message
