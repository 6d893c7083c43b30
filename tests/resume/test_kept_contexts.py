"""A prompt behind the text: contexts are kept in a run, found again by a resumed one, and change nothing.

SGD, and 1e-5: a kept key was multiplied in another batch than one that is computed on the spot.
"""

import os
import signal
from pathlib import Path

import pytest
import torch
from ranks import RankFailed, run_ranks, train
from runs import losses, prompt
from tiny import write_config

from megaptune.backbone.context_cache import ContextCache

pytestmark = pytest.mark.dist

SGD = ("train.optimizer=sgd", "train.learning_rate=0.5", "train.schedule=constant", "checkpoint.every_steps=1")


@pytest.fixture(scope="module")
def config(tiny, facts, tmp_path_factory):
    files = {split: str(path) for split, path in facts.items()}
    template = {"template": "the city of {city} is in [P*3] [answer]"}
    folder = tmp_path_factory.mktemp("contexts")
    return write_config(folder, "llama", backbone={"path": str(tiny("llama"))}, task=files, prompt=template)


def _train_and_die(config: Path, run: Path) -> None:
    import megaptune.trainer as trainer

    step = trainer.Trainer.train_step

    def step_or_die(self):
        if self.step == 2:
            assert self.host.contexts.places
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    trainer.Trainer.train_step = step_or_die
    train(config, f"run.directory={run}", *SGD)


def _train_with_what_is_kept(config: Path, run: Path) -> int:
    """Chunks that had to be computed."""
    computed = []
    share = ContextCache._share

    def counting(self, *arguments):
        computed.append(arguments)
        return share(self, *arguments)

    ContextCache._share = counting
    train(config, f"run.directory={run}", *SGD)
    return len(computed)


def test_a_resumed_run_finds_its_contexts(config, tmp_path):
    plain, run = tmp_path / "plain", tmp_path / "run"
    run_ranks(2, train, config, f"run.directory={plain}", *SGD, "speed.context_cache=false")
    with pytest.raises(RankFailed, match="-9"):
        run_ranks(2, _train_and_die, config, run)
    assert list((run / "contexts").rglob("*.safetensors"))
    assert run_ranks(2, _train_with_what_is_kept, config, run) == [0, 0]
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)
    ours, theirs = prompt(run)["vectors"], prompt(plain)["vectors"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    assert not (run / "contexts").exists()
