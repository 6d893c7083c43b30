"""DeepSpeed's own tensor parallelism (AutoTP) as an independent oracle, for the families that it supports."""

from pathlib import Path

import pytest
import torch
from plain import examples, plain_loss, save_model, settings, trained
from ranks import run_ranks
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from megaptune.prompts.encoder import build_encoder

pytestmark = pytest.mark.dist

SGD = {"optimizer": "sgd", "learning_rate": 0.5, "weight_decay": 0.0, "schedule": "constant"}


class Prompted(nn.Module):
    """A model that AutoTP may divide, and a table beside it."""

    def __init__(self, model: nn.Module, table: Tensor) -> None:
        super().__init__()
        self.model = model
        self.table = nn.Parameter(table)


def _divided_by_autotp(folder: Path, family: str, indices: list[int]) -> tuple[float, Tensor]:
    """Loss of one batch and the gradient of the table, under AutoTP over two ranks."""
    import deepspeed

    from megaptune.run.topology import connect, disconnect

    connect()
    masked = family == "bert"
    model = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_pretrained(folder).eval()
    model.requires_grad_(False)
    table = build_encoder("lstm", 3, model.get_input_embeddings().weight.shape[1], 0.0, 0)().detach()
    module = Prompted(model, table)
    module.forward = lambda members: plain_loss(module.model, members, module.table, masked)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 0},
        "tensor_parallel": {"autotp_size": 2},
    }
    optimizer = torch.optim.SGD([module.table], lr=0.1)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    layers = [layer for layer in engine.module.model.modules() if "LinearLayer" in type(layer).__name__]
    assert layers or any("Allreduce" in type(m).__name__ for m in engine.module.modules())  # it did divide something
    data = examples(masked)
    loss = engine([data[index] for index in indices])
    engine.backward(loss)
    gradient = engine.module.table.grad.clone()
    disconnect()
    return float(loss.detach()), gradient


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "xglm", "bert"])
def test_autotp_gives_our_loss_and_gradient(family, tmp_path):
    from megaptune.batches import EpochPlan

    folder = save_model(family, tmp_path / "model", vocab_size=122)
    config = settings(folder, tmp_path / "run", train=SGD, parallel={"tensor_parallel": 2})
    ours = run_ranks(2, trained, config, 1)[0]
    indices = EpochPlan(len(examples(family == "bert")), config.train.global_batch, False, 0).indices(0)
    loss, gradient = run_ranks(2, _divided_by_autotp, folder, family, indices)[0]
    assert ours.losses[0] == pytest.approx(loss, rel=2e-5)
    torch.testing.assert_close(ours.gradients[0], gradient, rtol=0, atol=2e-5 * float(gradient.abs().max()))
