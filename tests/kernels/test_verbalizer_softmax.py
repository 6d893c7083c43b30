"""verbalizer_softmax against torch's cross-entropy in fp64, in plain torch and in Triton.

Tolerances. Inputs are rounded to their dtype first and then given to both sides, so that only the arithmetic differs.
Logits and their logsumexp, of about 10, are rounded at 1e-6: 2e-5 for the loss is ample. A gradient is a sum of terms
p[c] * rows[c] that may cancel, so its error is measured against the terms. Summing 8200 of them one after the other, as
torch does for narrow rows, was seen to cost 1.6e-5. In bf16 or fp16 the result is rounded once more (2**-9, 2**-12),
and on a GPU p was rounded to tf32 (2**-11). Ranks and predictions must be equal; where ties are meant, inputs are small
integers, whose logits are exact in any order.

B examples, C candidates, D backbone width.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from candidates import DTYPES, GRADIENT_TOLERANCE, make
from torch import Tensor

from megaptune.kernels import dispatch, reference

LOSS_TOLERANCE = 2e-5
# (B, C, D, bias?): every B of 1, 3, 17, C of 1, 2, 5, 1000 and D of 1, 7, 64, 576, and then two waves of candidates
SHAPES = [(1, 1, 1, False), (3, 2, 7, True), (17, 5, 64, False), (3, 5, 576, True)]
SHAPES += [(17, 1000, 7, True), (1, 1000, 576, False), (3, 8200, 3, True)]


def plain(features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in fp64; ranks and predictions from Python's stable sort, best first and then lowest index first."""
    logits = features.double() @ rows.double().T
    if bias is not None:
        logits = logits + bias.double()
    orders = [sorted(range(len(row)), key=lambda c, row=row: -row[c]) for row in logits.tolist()]
    rank = torch.tensor([order.index(label) for order, label in zip(orders, labels.tolist(), strict=True)])
    prediction = torch.tensor([order[0] for order in orders])
    return F.cross_entropy(logits, labels, reduction="none"), rank.to(labels.device), prediction.to(labels.device)


def check(ops, features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None = None) -> None:
    """Values, ranks and the gradient, each example weighing differently in it, the first not at all."""
    loss, rank, prediction = ops.verbalizer_softmax(features, rows, labels, bias)
    exact_loss, exact_rank, exact_prediction = plain(features, rows, labels, bias)
    assert (loss.dtype, rank.dtype, prediction.dtype) == (torch.float32, torch.int64, torch.int64)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=LOSS_TOLERANCE, atol=LOSS_TOLERANCE)
    assert torch.equal(rank, exact_rank)
    assert torch.equal(prediction, exact_prediction)
    assert torch.equal(rank == 0, prediction == labels)

    weight = torch.arange(len(loss), device=loss.device) - (0.0 if len(loss) > 1 else 1.5)
    (grad,) = torch.autograd.grad(loss, features, weight)
    wide = features.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(plain(wide, rows, labels, bias)[0], wide, weight.double())
    assert grad.dtype == features.dtype
    sizes = rows.double().abs()
    logits = features.detach().double() @ rows.double().T + (0.0 if bias is None else bias.double())
    terms = weight.abs()[:, None] * (logits.softmax(dim=1) @ sizes + sizes[labels])
    atol = GRADIENT_TOLERANCE[features.dtype] * terms.max().item()
    torch.testing.assert_close(grad.double(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradient(ops, shape, dtype, device) -> None:
    *sizes, has_bias = shape
    features, rows, labels, bias = make(*sizes, dtype, device)
    check(ops, features, rows, labels, bias if has_bias else None)


@pytest.mark.parametrize("B", [1, 3, 17])
@pytest.mark.parametrize("C", [1, 2, 5, 1000, 5000])
@pytest.mark.parametrize("D", [1, 7, 64, 576])
def test_reference_at_every_shape(B, C, D, device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(reference, *make(B, C, D, dtype, device))


def test_worked_by_hand(ops, device) -> None:
    # Logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8.
    features = torch.tensor([[1.0], [1.0], [1.0]], device=device, requires_grad=True)
    rows = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], device=device)
    labels = torch.tensor([0, 1, 2], device=device)
    loss, rank, prediction = ops.verbalizer_softmax(features, rows, labels)
    torch.testing.assert_close(loss.cpu(), torch.tensor([math.log(8), math.log(4), math.log(8 / 5)]))
    assert rank.tolist() == [2, 1, 0]
    assert prediction.tolist() == [2, 2, 2]
    mean = (2 * math.log(2) + 5 * math.log(5)) / 8
    (grad,) = torch.autograd.grad(loss.sum(), features)
    torch.testing.assert_close(grad.cpu(), torch.tensor([[mean], [mean - math.log(2)], [mean - math.log(5)]]))


def test_label_at_every_place(ops, device) -> None:
    features, rows, _, bias = make(70, 70, 7, torch.float32, device)
    check(ops, features, rows, torch.arange(70, device=device), bias)


def test_label_at_the_edges_of_blocks_and_splits(ops, device) -> None:
    places = [0, 63, 64, 511, 512, 513, 575, 576, 599]
    features, rows, _, bias = make(len(places), 600, 7, torch.float32, device)
    check(ops, features, rows, torch.tensor(places, device=device), bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_candidates_tie(ops, dtype, device) -> None:
    places = [0, 1, 63, 64, 300, 511, 512, 599]
    features, rows = (
        torch.ones(len(places), 7, device=device, dtype=dtype),
        torch.ones(600, 7, device=device, dtype=dtype),
    )
    labels = torch.tensor(places, device=device)
    loss, rank, prediction = ops.verbalizer_softmax(features, rows, labels)
    assert rank.tolist() == places
    assert prediction.tolist() == [0] * len(places)
    torch.testing.assert_close(loss.cpu(), torch.full((len(places),), math.log(600)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_ties(ops, dtype, device) -> None:
    """Logits are integers between -12 and 12, so that 600 candidates hold every value many times over."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(-1, 2, (9, 6), generator=generator).to(device, dtype).requires_grad_()
    rows = torch.randint(-2, 3, (600, 6), generator=generator).to(device, dtype)
    check(ops, features, rows, torch.randint(0, 600, (9,), generator=generator).to(device))


def test_equal_rows_tie_although_logits_are_rounded(kernels, device) -> None:
    """Triton compares the label with a logit computed elsewhere: candidates 64 or 512 apart must still be equal."""
    features, rows, _, _ = make(3, 64, 100, torch.float32, device)
    rows = rows.repeat(10, 1)
    best = plain(features, rows, torch.zeros(3, dtype=torch.int64, device=device), None)[2]
    for copy in range(10):
        _, rank, prediction = kernels.verbalizer_softmax(features, rows, best + 64 * copy)
        assert rank.tolist() == [copy] * 3
        assert torch.equal(prediction, best)


def test_large_and_masked_logits(ops, device) -> None:
    """Logits of 30000 need the maximum taken out; a bias of -inf, as for vocabulary padding, removes a candidate."""
    features, rows, labels, bias = make(3, 600, 7, torch.float32, device)
    bias[:70] = bias[512:] = float("-inf")
    labels = torch.tensor([70, 511, 300], device=device)
    features = (features.detach() * 1e4).requires_grad_()
    check(ops, features, rows, labels, bias)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")  # numpy, in the interpreter
@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_logits_far_from_zero(ops, shift, device) -> None:
    """Lanes of a block outside [B, C] hold logits of 0, whose exp(0 - lse) overflows: they must weigh nothing."""
    features, rows, labels, bias = make(3, 70, 7, torch.float32, device)
    check(ops, features, rows, labels, bias.round() + shift)


def test_everything_masked_but_the_end(ops, device) -> None:
    features, rows, _, bias = make(1, 600, 7, torch.float32, device)
    bias[:599] = float("-inf")
    loss, rank, prediction = ops.verbalizer_softmax(features, rows, torch.tensor([599], device=device), bias)
    assert (loss.item(), rank.item(), prediction.item()) == (0.0, 0, 599)
    loss, rank, prediction = ops.verbalizer_softmax(features, rows, torch.tensor([3], device=device), bias)
    assert (loss.item(), rank.item(), prediction.item()) == (math.inf, 4, 599)  # 599 is better, 0, 1 and 2 tie


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy
def test_nan_never_scores_a_hit(ops, device) -> None:
    features, rows, labels, _ = make(3, 70, 7, torch.float32, device)
    with torch.no_grad():
        features[1, 2] = float("nan")
    loss, rank, prediction = ops.verbalizer_softmax(features, rows, labels)
    assert loss.isnan().tolist() == [False, True, False]
    assert rank[1] == 69
    assert 0 <= prediction[1] < 70


@pytest.mark.parametrize("label", [-1, 70, 10**9])
def test_a_label_outside_is_seen(kernels, label, device) -> None:
    features, rows, labels, _ = make(3, 70, 7, torch.float32, device)
    labels[1] = label
    with pytest.raises(IndexError):
        reference.verbalizer_softmax(features.cpu(), rows.cpu(), labels.cpu())
    loss, rank, _ = kernels.verbalizer_softmax(features, rows, labels)
    assert loss.isnan().tolist() == [False, True, False]
    assert rank[1] == 70


def test_empty_batch(ops, device) -> None:
    features, rows, labels, bias = make(0, 70, 7, torch.float32, device)
    outputs = ops.verbalizer_softmax(features, rows, labels, bias)
    assert [tensor.shape for tensor in outputs] == [(0,)] * 3
    outputs[0].sum().backward()
    assert features.grad.shape == (0, 7)


def test_inputs_need_not_be_contiguous(ops, device) -> None:
    features, rows, labels, bias = make(6, 140, 14, torch.float32, device)
    every_other = rows.T.contiguous().T[::2, ::2]
    check(ops, features[::2, ::2], every_other, labels[::2] // 2, bias[::2])
    check(ops, features[:, :1].expand(6, 14), rows, labels, bias[:1].expand(140))
    loss, _, _ = ops.verbalizer_softmax(features, rows, labels)
    (ones,) = torch.autograd.grad(loss.sum(), features, retain_graph=True)  # a gradient with a stride of 0
    (expected,) = torch.autograd.grad(loss, features, torch.ones(6, device=device))
    assert torch.equal(ones, expected)


@pytest.mark.parametrize("features_dtype", DTYPES)
@pytest.mark.parametrize("rows_dtype", DTYPES)
def test_dtypes_may_differ(ops, features_dtype, rows_dtype, device) -> None:
    features, rows, labels, bias = make(3, 70, 64, torch.float32, device)
    features = features.detach().to(features_dtype).requires_grad_()
    check(ops, features, rows.to(rows_dtype), labels, bias.to(rows_dtype))


def test_offsets_beyond_32_bits(ops, device) -> None:
    """Candidate 2, then dimension 2, starts past element 2**31. Only the pages that are touched take memory."""
    stride, length = 2**30 + 64, 2**31 + 256
    features, labels = torch.ones(1, 3, device=device, requires_grad=True), torch.tensor([2], device=device)
    for strides in ((stride, 1), (1, stride)):
        rows = torch.empty(length, dtype=torch.bfloat16, device=device).as_strided((3, 3), strides)
        rows.copy_(torch.arange(9.0).view(3, 3) / 4)
        check(ops, features, rows, labels)


def test_only_the_features_get_a_gradient(ops, device) -> None:
    features, rows, labels, bias = make(3, 70, 7, torch.float32, device)
    rows.requires_grad_()
    bias.requires_grad_()
    loss, rank, prediction = ops.verbalizer_softmax(features, rows, labels, bias)
    assert (loss.requires_grad, rank.requires_grad, prediction.requires_grad) == (True, False, False)
    loss.sum().backward()
    assert features.grad is not None
    assert rows.grad is None
    assert bias.grad is None
    assert not ops.verbalizer_softmax(features.detach(), rows, labels, bias)[0].requires_grad
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            without = ops.verbalizer_softmax(features, rows, labels, bias)
        assert all(torch.equal(a, b) for a, b in zip(without, (loss, rank, prediction), strict=True))


def test_an_example_does_not_depend_on_its_batch(kernels, device) -> None:
    features, rows, labels, bias = make(17, 600, 64, torch.float32, device)
    together = kernels.verbalizer_softmax(features, rows, labels, bias)
    alone = kernels.verbalizer_softmax(features[16:], rows, labels[16:], bias)
    assert all(torch.equal(a[16:], b) for a, b in zip(together, alone, strict=True))


def test_logits_are_not_kept_for_backward(kernels, device) -> None:
    features, rows, labels, _ = make(3, 1000, 7, torch.float32, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        kernels.verbalizer_softmax(features, rows, labels)
    assert [tuple(tensor.shape) for tensor in kept] == [(3, 7)]  # the gradient itself


def test_reference_passes_gradcheck() -> None:
    features, rows = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    labels, bias = torch.tensor([0, 4, 2]), torch.randn(5, dtype=torch.float64)

    def loss(features: Tensor) -> Tensor:
        return reference.verbalizer_softmax(features, rows, labels, bias)[0]

    assert torch.autograd.gradcheck(loss, features.requires_grad_())


@pytest.mark.parametrize("wanted", [False, True])
def test_is_a_well_formed_custom_op(ops, wanted, device) -> None:
    features, rows, labels, bias = make(3, 5, 7, torch.float32, device)
    op = getattr(torch.ops.megaptune, f"{ops.implementation}_verbalizer_softmax")
    if not wanted:
        torch.library.opcheck(op, (features.detach(), rows, labels, bias, None, False))
    ranges = torch.tensor([[0, 5], [3, 5], [1, 4]], device=device)
    torch.library.opcheck(op, (features, rows, labels % 2, None, ranges, True))


def test_passes_through_compile_whole(choose, device) -> None:
    features, rows, labels, bias = make(3, 70, 7, torch.float32, device)

    def loss(features: Tensor) -> tuple[Tensor, Tensor]:
        loss, rank, _ = dispatch.verbalizer_softmax(features * 2, rows, labels, bias)
        return loss.sum(), rank

    (expected, rank), (compiled, compiled_rank) = (
        loss(features),
        torch.compile(loss, backend="aot_eager", fullgraph=True)(features),
    )
    assert torch.equal(rank, compiled_rank)
    grads = (torch.autograd.grad(value, features)[0] for value in (expected, compiled))
    torch.testing.assert_close(*grads)
