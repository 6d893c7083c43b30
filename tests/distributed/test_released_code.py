"""The preset of the released code's slips: each does what it says, and none depends on the layout."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks, train
from runs import losses, result
from transformers import AutoModelForCausalLM

from megaptune.batches import EpochPlan
from megaptune.config import load_config
from megaptune.errors import ConfigError
from megaptune.methods import METHODS
from megaptune.preparation import prepare_run
from megaptune.run.monitor import Monitor

pytestmark = pytest.mark.dist

PRESET = Path(__file__).resolve().parents[2] / "configs" / "presets" / "ptuning_lama_released.yaml"
# Of the preset, what would make a test of it long or needs a word list.
SHORT = ["train.epochs=1", "run.seeds=[0]", "scoring.evaluate_over=[vocabulary]", "scoring.select_on=vocabulary"]
SHORT += ['prompt.template="[P*2] {city} [P*2] [answer]"', "train.learning_rate=0.01", "methods=[ptuning]"]


@pytest.fixture(scope="module")
def released(tmp_path_factory, tiny, facts):
    """The preset over a tiny GPT-2 with its dropout of 0.1; an encoder without one of its own."""
    from tiny import write_config

    folder = tmp_path_factory.mktemp("released")
    files = {split: str(path) for split, path in facts.items()}
    config = write_config(folder, "gpt2", backbone={"path": str(tiny("gpt2"))}, task=files)
    (folder / "released.yaml").write_text(f"defaults: [{config}, {PRESET}]\n")
    return folder / "released.yaml"


def curve(config: Path, name: str, ranks: int, *overrides: str) -> list[float]:
    run = config.parent / name
    run_ranks(ranks, train, config, *SHORT, "train.micro_batch=2", f"run.directory={run}", *overrides)
    return losses(run)


def test_live_dropout_does_not_depend_on_the_layout(released):
    one = curve(released, "one", 1)
    assert one == pytest.approx(curve(released, "two", 2, "parallel.zero_stage=3"), rel=1e-5)
    without = curve(released, "without", 1, "train.lm_dropout=false")
    assert max(abs(a - b) for a, b in zip(one, without, strict=True)) > 1e-3
    both = [result(released.parent / name, "cities/ptuning-seed0") for name in ("one", "two")]
    assert both[0]["test"]["vocabulary"]["loss"] == pytest.approx(both[1]["test"]["vocabulary"]["loss"], rel=1e-4)


def test_the_label_is_shifted_twice(released, tiny):
    """Against transformers' own loss with the label where the released code writes it: at the last token."""
    methods = "methods=[manual+finetune]", "train.lm_dropout=false"
    found = curve(released, "shifted", 1, *methods)[0]
    sound = load_config(released, [*SHORT, *methods, "train.loss_position=answer"])
    (task,) = prepare_run(sound, Monitor(False)).tasks
    examples = task.encoded(METHODS["manual+finetune"]).train
    model = AutoModelForCausalLM.from_pretrained(tiny("gpt2")).eval()
    expected = []
    for index in EpochPlan(len(examples), 8, True, 0).indices(0):
        slots = torch.tensor([examples[index].slots])
        labels = torch.full_like(slots, -100)
        labels[0, -1] = examples[index].answer
        expected.append(float(model(input_ids=slots, labels=labels).loss.detach()))
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_dropout_is_refused_where_something_would_leave_it_out(released):
    with pytest.raises(ConfigError, match=r"train\.lm_dropout needs speed\.packing: false"):
        load_config(released, [*SHORT, "speed.packing=true"])
    with pytest.raises(ConfigError, match=r"parallel\.tensor_parallel: 1"):
        load_config(released, [*SHORT, "parallel.tensor_parallel=2"])
    with pytest.raises(ConfigError, match="methods without deep_ptuning"):
        load_config(released, [*SHORT, "methods=[deep_ptuning]"])
