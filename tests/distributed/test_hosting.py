"""What DeepSpeed does with a frozen backbone: partitions it at ZeRO 3, leaves its weights alone, sends no gradients."""

from pathlib import Path

import pytest
import torch
from hosting import open_host
from ranks import run_ranks

from megaptune.backbone.inputs import Padded
from megaptune.run.topology import disconnect

pytestmark = pytest.mark.dist


def _held_elements(folder: Path, stage: int) -> tuple[int, int]:
    """Elements of the backbone in this rank's memory between two steps, and in all."""
    host = open_host(folder, zero_stage=stage)
    held = 0
    for parameter in host.module.parameters():
        partition = getattr(parameter, "ds_tensor", None)
        held += partition.numel() if partition is not None else parameter.numel()
    disconnect()
    return held, sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in host.module.parameters())


def _one_step(folder: Path, stage: int) -> tuple[bool, torch.Tensor]:
    """Whether any weight changed or collected a gradient in a step, and the gradient of the table."""
    host = open_host(folder, zero_stage=stage)
    before = host.output_rows().weight.clone()
    table = torch.randn(3, host.width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    slots = torch.tensor([[-1, 5, -2, -3], [-1, 9, -2, -3]])
    mask = torch.ones_like(slots) if host.kind == "masked" else None
    features = host.features(Padded(slots, mask, torch.tensor([3, 2])), table)
    features[:, 0].sum().backward()  # not all of them: a final LayerNorm's outputs add up to a constant
    touched = any(parameter.grad is not None for parameter in host.module.parameters())
    changed = touched or not torch.equal(before, host.output_rows().weight)
    assert table.grad is not None
    disconnect()
    return changed, table.grad.clone()


def test_zero_3_holds_its_share_of_the_backbone(tiny):
    for held, total in run_ranks(2, _held_elements, tiny("llama"), 3):
        assert held == pytest.approx(total / 2, rel=0.05)  # partitions are padded to equal length


def test_zero_0_holds_all_of_it(tiny):
    assert all(held == total for held, total in run_ranks(2, _held_elements, tiny("llama"), 0))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_step_leaves_the_backbone_alone(tiny, kind, stage):
    for changed, gradient in run_ranks(2, _one_step, tiny(kind), stage):
        assert not changed
        assert gradient.abs().max() > 0
