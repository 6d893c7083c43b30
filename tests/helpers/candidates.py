"""Made-up answers and candidates; the tolerances are explained in tests/kernels/test_verbalizer_softmax.py."""

import math

import torch
from torch import Tensor

GRADIENT_TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 3e-3, torch.float16: 1e-3}
DTYPES = list(GRADIENT_TOLERANCE)


def make(B: int, C: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """features [B, D] that want a gradient, rows [C, D], labels [B], bias [C]."""
    generator = torch.Generator().manual_seed(B + 10 * C + 1000 * D)
    features = torch.randn(B, D, generator=generator).to(device, dtype).requires_grad_()
    rows = (torch.randn(C, D, generator=generator) * 3 / math.sqrt(D)).to(device, dtype)
    labels = torch.randint(0, C, (B,), generator=generator).to(device)
    return features, rows, labels, torch.randn(C, generator=generator).to(device)
