"""A range of candidates for each example: as if each were scored alone among its own rows.

Tolerances as in test_verbalizer_softmax.py; a sum that starts in the middle of a split rounds otherwise than one that
starts at its beginning, so losses are compared at 2e-6 (their size is about 5) and not as bits.
"""

import pytest
import torch
from candidates import DTYPES, GRADIENT_TOLERANCE, make

from megaptune.kernels import dispatch, reference


def check_one_by_one(ops, features, rows, labels, bias, ranges) -> None:
    """Every example against itself alone, with its own rows only; labels are drawn by this."""
    loss, rank, prediction = ops.verbalizer_softmax(features, rows, labels, bias, ranges)
    (grad,) = torch.autograd.grad(loss.sum(), features)
    for b, (start, stop) in enumerate(ranges.tolist()):
        mine = features[b : b + 1].detach().requires_grad_()
        own_bias = None if bias is None else bias[start:stop]
        expected = reference.verbalizer_softmax(mine, rows[start:stop], labels[b : b + 1], own_bias)
        torch.testing.assert_close(loss[b : b + 1], expected[0], rtol=2e-6, atol=2e-6)
        assert (rank[b], prediction[b]) == (expected[1].item(), expected[2].item())
        (own,) = torch.autograd.grad(expected[0].sum(), mine)
        size = rows[start:stop].abs().max().item() * 2
        torch.testing.assert_close(grad[b : b + 1], own, rtol=0, atol=GRADIENT_TOLERANCE[features.dtype] * size)


def draw_labels(ranges: torch.Tensor) -> torch.Tensor:
    share = torch.rand(len(ranges), generator=torch.Generator().manual_seed(7)).to(ranges.device)
    return (share * (ranges[:, 1] - ranges[:, 0])).long()


@pytest.mark.parametrize("dtype", DTYPES)
def test_jobs_with_their_own_answers_in_one_call(ops, dtype, device) -> None:
    """Edges of tiles, of splits and of the rows; one candidate, all candidates; overlaps; more examples than a block
    holds, in no order."""
    features, rows, _, bias = make(19, 1100, 33, dtype, device)
    distinct = [[0, 1], [0, 1100], [1, 64], [64, 128], [500, 513], [511, 1025], [512, 1024], [1099, 1100], [700, 701]]
    ranges = torch.tensor([distinct[(5 * b) % len(distinct)] for b in range(19)], device=device)
    check_one_by_one(ops, features, rows, draw_labels(ranges), bias, ranges)
    check_one_by_one(ops, features, rows, draw_labels(ranges), None, ranges)


def test_ranges_beyond_the_first_wave(ops, device) -> None:
    features, rows, _, _ = make(3, 8300, 3, torch.float32, device)
    ranges = torch.tensor([[8100, 8290], [8200, 8300], [3, 9]], device=device)
    check_one_by_one(ops, features, rows, draw_labels(ranges), None, ranges)


def test_ranges_of_everything_change_nothing(ops, device) -> None:
    features, rows, labels, bias = make(17, 600, 7, torch.float32, device)
    ranges = torch.tensor([0, 600], device=device).expand(17, 2)  # not contiguous either
    with_ranges = ops.verbalizer_softmax(features, rows, labels, bias, ranges)
    without = ops.verbalizer_softmax(features, rows, labels, bias)
    assert all(torch.equal(a, b) for a, b in zip(with_ranges, without, strict=True))
    grads = (torch.autograd.grad(loss.sum(), features)[0] for loss in (with_ranges[0], without[0]))
    assert torch.equal(*grads)


def test_inputs_with_ranges_need_not_be_contiguous(ops, device) -> None:
    features, rows, _, bias = make(6, 140, 14, torch.float32, device)
    ranges = torch.tensor([[0, 70, 9], [9, 20, 9], [69, 70, 9]], device=device)[:, :2]
    labels = draw_labels(ranges).repeat_interleave(2)[::2]
    view = features[::2, ::2].detach().requires_grad_()
    check_one_by_one(ops, view, rows.T.contiguous().T[::2, ::2], labels, bias[::2], ranges)


def test_what_lies_outside_a_range_does_not_count(ops, device) -> None:
    """Neither a better row nor an equal one."""
    rows = torch.tensor([[9.0], [1.0], [2.0], [1.0], [2.0], [9.0]], device=device)
    features = torch.ones(2, 1, device=device, requires_grad=True)
    ranges = torch.tensor([[1, 4], [3, 5]], device=device)
    loss, rank, prediction = ops.verbalizer_softmax(features, rows, torch.tensor([2, 1], device=device), None, ranges)
    assert rank.tolist() == [2, 0]  # beaten by 2 and, at a lower index, by its equal
    assert prediction.tolist() == [1, 1]
    scores = torch.tensor([1.0, 2.0, 1.0])
    expected = torch.tensor([torch.logsumexp(scores, 0) - 1, torch.logsumexp(scores[:2], 0) - 2])
    torch.testing.assert_close(loss.cpu(), expected)
    (grad,) = torch.autograd.grad(loss.sum(), features)
    means = scores.softmax(0) @ scores, scores[:2].softmax(0) @ scores[:2]
    torch.testing.assert_close(grad.cpu(), torch.stack([means[0] - 1, means[1] - 2])[:, None])


@pytest.mark.parametrize(
    ("span", "label"),
    [([5, 5], 0), ([0, 0], 0), ([70, 70], 0), ([5, 9], 4), ([5, 9], -1), ([66, 71], 0), ([-1, 5], 0), ([9, 5], 0)],
)
def test_no_candidates_or_wrong_ones(kernels, span, label, device) -> None:
    """An example without candidates has no right answer, as one whose label is none of them: plain torch refuses, the
    kernels give a NaN that the trainer stops at, and no hit. The other examples are not touched."""
    features, rows, labels, _ = make(3, 70, 7, torch.float32, device)
    ranges = torch.tensor([[0, 70], span, [0, 70]], device=device)
    labels[1] = label
    with pytest.raises(IndexError, match=r"is none of its example's|lies outside the 70 candidate rows"):
        reference.verbalizer_softmax(features, rows, labels, None, ranges)
    alone = reference.verbalizer_softmax(features[::2], rows, labels[::2])
    loss, rank, prediction = kernels.verbalizer_softmax(features, rows, labels, None, ranges)
    assert loss.isnan().tolist() == [False, True, False]
    assert rank[1] > 0
    torch.testing.assert_close(loss[::2], alone[0])
    assert torch.equal(rank[::2], alone[1])
    assert torch.equal(prediction[::2], alone[2])


def test_passes_through_compile_whole(choose, device) -> None:
    features, rows, labels, bias = make(3, 70, 7, torch.float32, device)
    ranges = torch.tensor([[0, 70], [3, 70], [0, 69]], device=device)

    def loss(features: torch.Tensor) -> torch.Tensor:
        return dispatch.verbalizer_softmax(features * 2, rows, labels % 60, bias, ranges)[0].sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    grads = (torch.autograd.grad(value(features), features)[0] for value in (loss, compiled))
    torch.testing.assert_close(*grads)
