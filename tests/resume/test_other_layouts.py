"""A prompt's checkpoint knows nothing of the layout: it is continued on another one, and the curve goes on."""

import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, train
from runs import losses, prompt
from tiny import save_tiny, write_config

from megaptune.errors import BackboneError, StoppedEarly

pytestmark = pytest.mark.dist

# Adam would amplify the rounding by which layouts differ (see tests/distributed/test_parallel_matrix.py).
SGD = {"optimizer": "sgd", "learning_rate": 0.5, "weight_decay": 0.01, "epochs": 4}


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert"])
def undisturbed(request, tiny, facts, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    files = {split: str(path) for split, path in facts.items()}
    config = write_config(folder, request.param, backbone={"path": str(tiny(request.param))}, task=files, train=SGD)
    run = folder / "one"
    run_ranks(1, train, config, f"run.directory={run}")
    return config, run


def _train_steps(config: Path, run: Path, last_step: int, *overrides: str) -> bool:
    """Train until ``last_step`` and be stopped there; whether the run ended before."""
    import megaptune.trainer as trainer

    step = trainer.Trainer.train_step

    def step_and_ask(self):
        if self.step == last_step - 1 and os.environ["RANK"] == "0":
            (run / "stop").touch()
        return step(self)

    trainer.Trainer.train_step = step_and_ask
    try:
        train(config, f"run.directory={run}", *overrides)
    except StoppedEarly:
        return False
    return True


def layout(tensor_parallel: int, zero_stage: int) -> tuple[str, str]:
    return f"parallel.tensor_parallel={tensor_parallel}", f"parallel.zero_stage={zero_stage}"


@pytest.mark.parametrize(
    "chain",
    [
        [(1, 1, 0), (2, 2, 0), (1, 1, 0)],  # tensor parallel 1 -> 2 -> 1
        [(2, 1, 0), (1, 1, 0)],  # data parallel 2 -> 1
        [(2, 1, 0), (2, 1, 3), (1, 1, 0)],  # ZeRO 0 -> 3 -> 0
        [(4, 2, 3), (1, 1, 0), (2, 2, 3)],  # all at once
    ],
    ids=["tensor", "data", "zero", "all"],
)
def test_layouts_take_turns(undisturbed, chain, tmp_path):
    config, expected = undisturbed
    run = tmp_path / "run"
    for place, (ranks, tensor_parallel, stage) in enumerate(chain):
        last = 5 * (place + 1) if place < len(chain) - 1 else 1000
        run_ranks(ranks, _train_steps, config, run, last, *layout(tensor_parallel, stage))
    assert losses(run) == pytest.approx(losses(expected), rel=2e-5)
    ours, theirs = prompt(run)["vectors"], prompt(expected)["vectors"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


def _resume_to_error(config: Path, run: Path, *overrides: str) -> tuple[str, int]:
    try:
        train(config, f"run.directory={run}", *overrides)
    except BackboneError as error:
        return str(error), error.exit_code
    return "no error", 0


def test_another_backbone_is_refused_on_every_rank_before_it_is_read(facts, tmp_path):
    """Same configuration, same path, other weights."""
    files = {split: str(path) for split, path in facts.items()}
    place = save_tiny("llama", tmp_path / "llama")
    config = write_config(tmp_path, backbone={"path": str(place)}, task=files, train=SGD)
    run = tmp_path / "run"
    run_ranks(2, _train_steps, config, run, 4, *layout(2, 0))
    from safetensors.torch import load_file, save_file

    weights = load_file(place / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0] += 0.01
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    for message, code in run_ranks(2, _resume_to_error, config, run, *layout(2, 0)):
        assert "was started on another backbone (rows' SHA-256" in message
        assert code == 4
    assert '"status": "failed"' in (run / "state.json").read_text()


def test_a_checkpoint_of_another_backbone_is_refused_too(facts, tmp_path):
    """A job's folder copied into another run: backbone.json does not know it, the checkpoint does."""
    files = {split: str(path) for split, path in facts.items()}
    config = write_config(
        tmp_path, backbone={"path": str(save_tiny("llama", tmp_path / "llama"))}, task=files, train=SGD
    )
    run = tmp_path / "run"
    run_ranks(1, _train_steps, config, run, 4, *layout(1, 0))
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "llama/model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, tmp_path / "llama/model.safetensors", metadata={"format": "pt"})
    (run / "backbone.json").unlink()
    for message, code in run_ranks(2, _resume_to_error, config, run, *layout(1, 0)):
        assert "step-" in message
        assert "belongs to another backbone" in message
        assert code == 4
