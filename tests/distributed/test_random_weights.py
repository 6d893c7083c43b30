"""The control with drawn weights: the same model on every layout, and no trace of the trained one."""

from pathlib import Path

import pytest
import torch
from hosting import open_host
from ranks import run_ranks, train
from runs import result
from transformers import AutoModelForCausalLM

from megaptune.backbone.fingerprint import probe_ids
from megaptune.backbone.random_weights import RandomWeights
from megaptune.errors import ConfigError
from megaptune.run.files import read_json
from megaptune.run.topology import disconnect

pytestmark = pytest.mark.dist

SEED = 7


def hosted(folder: Path, seed: int, parallel: dict) -> tuple[tuple[float, ...], str]:
    """Scores of the probe and the checksum that a prompt remembers."""
    host = open_host(folder, random_seed=seed, **parallel)
    disconnect()
    return host.fingerprint.probe, host.fingerprint.rows_sha256


@pytest.fixture(scope="module")
def plain(tiny) -> tuple[float, ...]:
    """The probe's scores by transformers alone, from the drawn tensors."""
    model, drawn = AutoModelForCausalLM.from_pretrained(tiny("gpt2")), RandomWeights(tiny("gpt2"), SEED)
    model.load_state_dict({name: drawn.whole(name).clone() for name in drawn.entries}, strict=False)
    model.tie_weights()
    size = model.config.vocab_size
    with torch.no_grad():
        scores = model(probe_ids(size)).logits[0, -1]
    return tuple(scores[torch.linspace(0, size - 1, 32).long().unique()].tolist())


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(1, {}), (2, {"zero_stage": 3}), (2, {"tensor_parallel": 2}), (2, {"tensor_parallel": 2, "zero_stage": 3})],
    ids=["plain", "zero3", "tp2", "tp2-zero3"],
)
def test_every_layout_hosts_the_drawn_weights(tiny, plain, ranks, parallel):
    for probe, _ in run_ranks(ranks, hosted, tiny("gpt2"), SEED, parallel):
        assert probe == pytest.approx(plain, rel=1e-4, abs=1e-6)


def test_values_are_those_that_training_begins_with(tiny):
    drawn = RandomWeights(tiny("gpt2"), SEED)
    matrix = drawn.whole("transformer.wte.weight")
    assert float(matrix.std()) == pytest.approx(0.2, rel=0.05)  # config.json's initializer_range
    assert not torch.equal(matrix, RandomWeights(tiny("gpt2"), SEED + 1).whole("transformer.wte.weight"))
    assert torch.equal(drawn.whole("transformer.ln_f.weight"), torch.ones(32))
    assert not drawn.whole("transformer.ln_f.bias").any()


def test_a_prompt_of_the_control_remembers_its_seed(tiny, config_file, tmp_path):
    config = config_file("gpt2", backbone={"random_weights": SEED}, methods=["ptuning"], train={"epochs": 1})
    run_ranks(1, train, config)
    assert result(tmp_path / "run", "cities/ptuning-seed0")["test"]["vocabulary"]["count"] == 8
    stored = read_json(tmp_path / "run" / "backbone.json")["rows_sha256"]
    (seven,), (eight,) = (run_ranks(1, hosted, tiny("gpt2"), seed, {}) for seed in (SEED, SEED + 1))
    assert stored == seven[1] != eight[1]


def test_the_control_is_refused_where_nothing_is_trained(config_file):
    with pytest.raises(ConfigError, match=r"backbone\.random_weights is a control for what is trained"):
        train(config_file("gpt2", backbone={"random_weights": SEED}, methods=["manual"]))
