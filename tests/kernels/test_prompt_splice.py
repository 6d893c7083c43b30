"""prompt_splice against an independent statement of it, in plain torch and in Triton.

Forward values must be equal to the bit: every value is one row times one factor, rounded once. A gradient row is a sum
of fp32 terms in position order, so the two implementations must agree to the bit, and both with fp64 to fp32 rounding.

B examples, T tokens, R table rows, D backbone width, V vocabulary.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaptune.kernels import dispatch, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, T, V, R, D): each B of 1, 3, 17 and D of 1, 7, 64, 576; D past one forward block; more positions than one block
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 1, 9, 2, 7),
    (17, 5, 50, 4, 64),
    (3, 11, 50, 6, 576),
    (1, 3, 5, 2, 1100),
    (3, 350, 30, 2, 7),
]


def plain(slots: Tensor, vocab_weight: Tensor, table: Tensor, scale: float) -> Tensor:
    """One list of all rows, vocabulary first and the table's in reverse: slot -1 is then the last, as in Python."""
    every_row = torch.cat([vocab_weight * scale, (table.flip(0) * scale).to(vocab_weight.dtype)])
    return every_row[slots % len(every_row)]


def make(B: int, T: int, V: int, R: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(B * 1000 + D)
    slots = torch.randint(-R, V, (B, T), generator=generator)
    vocab_weight = torch.randn(V, D, generator=generator).to(dtype)
    table = torch.randn(R, D, generator=generator)
    return slots.to(device), vocab_weight.to(device), table.to(device).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 24.1])
def test_values_and_gradient(ops, shape, dtype, scale, device) -> None:
    slots, vocab_weight, table = make(*shape, dtype, device)
    embeds = ops.prompt_splice(slots, vocab_weight, table, scale)
    assert embeds.dtype == dtype
    assert torch.equal(embeds, plain(slots, vocab_weight, table, scale))

    weight = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    (grad,) = torch.autograd.grad(embeds, table, weight)
    assert grad.dtype == torch.float32
    wide = table.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(plain(slots, vocab_weight.double(), wide, scale), wide, weight.double())
    uses = int((slots < 0).sum()) + 1
    torch.testing.assert_close(grad.double(), exact, rtol=0, atol=uses * scale * weight.abs().max().item() * 6e-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_equal_to_the_bit(kernels, dtype, device) -> None:
    slots, vocab_weight, table = make(3, 350, 40, 4, 37, dtype, device)
    weight = torch.randn(3, 350, 37).to(device, dtype)
    inputs = slots, vocab_weight, table, 24.1
    (first,) = torch.autograd.grad(kernels.prompt_splice(*inputs), table, weight)
    (again,) = torch.autograd.grad(kernels.prompt_splice(*inputs), table, weight)
    assert torch.equal(first, again)

    on_cpu = slots.cpu(), vocab_weight.cpu(), table.detach().cpu().requires_grad_(), 24.1
    (expected,) = torch.autograd.grad(reference.prompt_splice(*on_cpu), on_cpu[2], weight.cpu())
    assert torch.equal(first.cpu(), expected)


def test_worked_by_hand(ops, device) -> None:
    slots = torch.tensor([[1, -1], [-2, -1]], device=device)
    vocab_weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
    table = torch.tensor([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]], device=device, requires_grad=True)
    embeds = ops.prompt_splice(slots, vocab_weight, table, 2.0)
    assert embeds.tolist() == [[[6.0, 8.0], [20.0, 40.0]], [[60.0, 80.0], [20.0, 40.0]]]
    # Row 0 stands at two places, weighted 1 and 3; row 1 at one, weighted 2; row 2 nowhere.
    weight = torch.tensor([[[9.0, 9.0], [1.0, 0.0]], [[2.0, 2.0], [3.0, 5.0]]], device=device)
    embeds.backward(weight)
    assert table.grad.tolist() == [[8.0, 10.0], [4.0, 4.0], [0.0, 0.0]]


def test_no_table_is_a_plain_embedding(ops, device) -> None:
    slots, vocab_weight, _ = make(3, 5, 20, 0, 7, torch.float32, device)
    table = torch.empty(0, 7, device=device, requires_grad=True)
    embeds = ops.prompt_splice(slots, vocab_weight, table)
    assert torch.equal(embeds, torch.nn.functional.embedding(slots, vocab_weight))
    embeds.sum().backward()
    assert table.grad.shape == (0, 7)


def test_rows_used_never_always_and_in_order(ops, device) -> None:
    """1e8 + 1 - 1e8 is 0 in fp32 from left to right and 1 in other orders."""
    slots = torch.tensor([[-2, -2, -2]], device=device)
    table = torch.zeros(3, 1, device=device, requires_grad=True)
    embeds = ops.prompt_splice(slots, torch.zeros(1, 1, device=device), table)
    embeds.backward(torch.tensor([[[1e8], [1.0], [-1e8]]], device=device))
    assert table.grad.tolist() == [[0.0], [0.0], [0.0]]


def test_empty_batch(ops, device) -> None:
    table = torch.ones(2, 3, device=device, requires_grad=True)
    embeds = ops.prompt_splice(torch.empty(0, 4, dtype=torch.int64, device=device), torch.ones(5, 3).to(device), table)
    assert embeds.shape == (0, 4, 3)
    embeds.sum().backward()
    assert table.grad.tolist() == [[0.0] * 3] * 2


def test_inputs_need_not_be_contiguous(ops, device) -> None:
    slots, vocab_weight, table = make(5, 4, 12, 6, 14, torch.float32, device)
    slots, vocab_weight, view = slots.T, vocab_weight.T.contiguous().T[:, ::2], table[::2, 7:]
    slots = slots.clamp(min=-3)
    embeds = ops.prompt_splice(slots, vocab_weight, view)
    assert torch.equal(embeds, plain(slots, vocab_weight, view, 1.0))

    weight = torch.randn(7, 5, 4).to(device).permute(2, 1, 0)
    (grad,) = torch.autograd.grad(embeds, table, weight, retain_graph=True)
    (expected,) = torch.autograd.grad(plain(slots, vocab_weight, view, 1.0), table, weight)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6)
    (ones,) = torch.autograd.grad(embeds.sum(), table)  # a gradient with strides of 0
    assert ones[0, 7] == (slots == -1).sum()


def test_offsets_beyond_32_bits(ops, device) -> None:
    """Row 2 starts past element 2**31. Only the pages that are touched take memory."""
    stride = 2**30 + 64
    vocab_weight = torch.empty(2 * stride + 4, dtype=torch.bfloat16, device=device).as_strided((3, 4), (stride, 1))
    vocab_weight[2] = torch.arange(4.0)
    embeds = ops.prompt_splice(torch.tensor([[2]], device=device), vocab_weight, torch.zeros(0, 4, device=device))
    assert embeds.tolist() == [[[0.0, 1.0, 2.0, 3.0]]]


def test_only_the_table_gets_a_gradient(ops, device) -> None:
    slots, vocab_weight, table = make(3, 5, 9, 2, 7, torch.float32, device)
    vocab_weight.requires_grad_()
    ops.prompt_splice(slots, vocab_weight, table, 3.0).sum().backward()
    assert table.grad is not None
    assert vocab_weight.grad is None
    assert not ops.prompt_splice(slots, vocab_weight, table.detach()).requires_grad
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            embeds = ops.prompt_splice(slots, vocab_weight, table, 3.0)
        assert not embeds.requires_grad
        assert torch.equal(embeds, plain(slots, vocab_weight, table, 3.0))


@pytest.mark.parametrize("slot", [5, 1000, -3, -1000])
def test_a_slot_outside_is_seen(kernels, slot, device) -> None:
    slots, vocab_weight, table = torch.tensor([[slot, -2, 4]]), torch.ones(5, 7), torch.ones(2, 7)
    with pytest.raises(IndexError):
        reference.prompt_splice(slots, vocab_weight, table)
    embeds = kernels.prompt_splice(slots.to(device), vocab_weight.to(device), table.to(device))
    assert embeds[0, 0].isnan().all()
    assert (embeds[0, 1:] == 1).all()


def test_reference_passes_gradcheck() -> None:
    slots = torch.tensor([[1, -1, -3], [-1, 0, -1]])
    vocab_weight, table = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda t: reference.prompt_splice(slots, vocab_weight, t, 1.7), table.requires_grad_()
    )


def test_is_a_well_formed_custom_op(ops, device) -> None:
    slots, vocab_weight, table = make(3, 5, 9, 2, 7, torch.float32, device)
    forward = getattr(torch.ops.megaptune, f"{ops.implementation}_prompt_splice")
    backward = getattr(torch.ops.megaptune, f"{ops.implementation}_prompt_splice_backward")
    torch.library.opcheck(forward, (slots, vocab_weight, table, 2.0))
    torch.library.opcheck(backward, (slots, torch.randn(3, 5, 7).to(device), 2, 2.0))


def test_passes_through_compile_whole(choose, device) -> None:
    slots, vocab_weight, table = make(3, 5, 9, 2, 7, torch.float32, device)

    def loss(slots: Tensor, table: Tensor) -> Tensor:
        return (dispatch.prompt_splice(slots, vocab_weight, table, 2.0) ** 2).sum()

    (expected,) = torch.autograd.grad(loss(slots, table), table)
    (grad,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(slots, table), table)
    torch.testing.assert_close(grad, expected)


def test_a_second_import_registers_nothing(device) -> None:
    spec = importlib.util.spec_from_file_location("megaptune.kernels.second_name", Path(reference.__file__))
    second = importlib.util.module_from_spec(spec)
    before = torch.ops.megaptune.reference_prompt_splice.default
    spec.loader.exec_module(second)
    assert torch.ops.megaptune.reference_prompt_splice.default is before
    slots, vocab_weight, table = (tensor.cpu() for tensor in make(1, 2, 3, 1, 4, torch.float32, device))
    assert torch.equal(second.prompt_splice(slots, vocab_weight, table), plain(slots, vocab_weight, table, 1.0))
