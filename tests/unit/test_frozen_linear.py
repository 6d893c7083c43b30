"""The linear layer of frozen weights: torch's bits, and nothing kept but the weight."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from megaptune.backbone.frozen_linear import frozen_linear, keep_no_inputs


@pytest.mark.parametrize("shape", [(7, 12), (3, 5, 12), (2, 1, 3, 12)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_have_torchs_bits(shape, with_bias, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.randn(9, 12, generator=generator).to(dtype)
    bias = torch.randn(9, generator=generator).to(dtype) if with_bias else None
    upstream = torch.randn(*shape[:-1], 9, generator=generator).to(dtype)
    found = []
    for linear in (frozen_linear, F.linear):
        leaf = x.clone().requires_grad_()
        y = linear(leaf, weight, bias)
        y.backward(upstream)
        found.append((y.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_frozen_stack_keeps_its_weights_alone():
    layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8, bias=False)).requires_grad_(False)
    keep_no_inputs(layers)
    kept = []
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layers(x)
    assert {tensor.data_ptr() for tensor in kept} == {layer.weight.data_ptr() for layer in layers}
