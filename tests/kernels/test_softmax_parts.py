"""softmax_partials and softmax_finish: rows cut into the parts of several ranks give what one rank with all rows gives.

The ranks are played one after the other and their results put together as parallel_softmax does over a group; that it
does is tests/distributed's.
"""

import itertools

import pytest
import torch
from candidates import DTYPES, GRADIENT_TOLERANCE, make
from torch import Tensor

from megaptune.kernels import dispatch, reference


def over_parts(ops, features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor, ranges: Tensor | None, cuts) -> tuple:
    """loss, rank, prediction and gradient, from parts rows[a:b] between neighbouring ``cuts``."""
    start = 0 if ranges is None else ranges[:, 0]
    label, found = labels + start, []
    parts = []
    for a, b in itertools.pairwise(cuts):
        here = (label >= a) & (label < b)
        signed = torch.where(here, label - a, -1 - (label - a).clamp(0, b - a))
        local = None if ranges is None else (ranges - a).clamp(0, b - a)
        parts.append((a, (features.detach(), rows[a:b], signed), (bias[a:b], local)))
        found.append(ops.softmax_partials(*parts[-1][1], *parts[-1][2]))
    best, total, at_label, place = (torch.stack(values) for values in list(zip(*found, strict=True))[:4])
    top = best.amax(dim=0)
    lse = top + (total * torch.where(total == 0, 0.0, torch.exp(best - top))).sum(dim=0).log()
    at_label = at_label.sum(dim=0)
    better, slope = 0, 0
    for (_, inputs, more), kept in zip(parts, found, strict=True):
        counted, part = ops.softmax_finish(*inputs, lse, at_label, kept[4], *more, True)
        without, nothing = ops.softmax_finish(*inputs, lse, at_label, kept[4], *more, False)
        assert nothing.numel() == 0
        assert torch.equal(without, counted)
        better, slope = better + counted, slope + part
    first = torch.tensor(cuts[:-1], device=features.device)[:, None]
    places = torch.where((place >= 0) & (best == top), place + first, len(rows))
    return lse - at_label, better, places.amin(dim=0) - start, slope


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_ranges", [False, True])
@pytest.mark.parametrize("cuts", [[0, 600], [0, 1, 300, 300, 600], [0, 0, 513, 600]])
def test_parts_agree_with_the_whole(ops, cuts, with_ranges, dtype, device) -> None:
    """Parts of no rows, of one row, and such as hold no candidate of some examples."""
    features, rows, labels, bias = make(17, 600, 33, dtype, device)
    ranges = None
    if with_ranges:
        pairs = [[0, 600], [0, 2], [1, 5], [290, 310], [599, 600], [500, 520]]
        ranges = torch.tensor([pairs[b % len(pairs)] for b in range(17)], device=device)
        labels = labels % (ranges[:, 1] - ranges[:, 0])
    loss, rank, prediction = reference.verbalizer_softmax(features, rows, labels, bias, ranges)
    (grad,) = torch.autograd.grad(loss.sum(), features)
    found = over_parts(ops, features, rows, labels, bias, ranges, cuts)
    torch.testing.assert_close(found[0], loss, rtol=2e-6, atol=2e-6)
    assert torch.equal(found[1], rank)
    assert torch.equal(found[2], prediction)
    atol = GRADIENT_TOLERANCE[dtype] * rows.abs().max().item() * 2
    torch.testing.assert_close(found[3], grad.float(), rtol=0, atol=atol)


def test_ties_across_parts_go_to_the_lower_place(ops, device) -> None:
    features, rows = torch.ones(4, 3, device=device), torch.ones(9, 3, device=device)
    labels = torch.tensor([0, 3, 4, 8], device=device)
    found = over_parts(ops, features, rows, labels, torch.zeros(9, device=device), None, [0, 4, 9])
    assert found[1].tolist() == [0, 3, 4, 8]
    assert found[2].tolist() == [0] * 4


def test_a_part_without_rows_says_nothing(ops, device) -> None:
    features, rows = torch.ones(2, 3, device=device), torch.ones(0, 3, device=device)
    labels = torch.tensor([-1, -1], device=device)
    best, total, at_label, place, kept = ops.softmax_partials(features, rows, labels, None, None)
    assert (best.tolist(), total.tolist()) == ([float("-inf")] * 2, [0.0] * 2)
    assert (at_label.tolist(), place.tolist()) == ([0.0] * 2, [-1] * 2)
    better, slope = ops.softmax_finish(features, rows, labels, best, at_label, kept, None, None, True)
    assert better.tolist() == [0, 0]
    assert torch.equal(slope, torch.zeros(2, 3, device=device))
    features = torch.ones(0, 3, device=device)
    assert [len(tensor) for tensor in ops.softmax_partials(features, rows, labels[:0], None, None)] == [0] * 5


@pytest.mark.parametrize("with_ranges", [False, True])
def test_are_well_formed_custom_ops(ops, with_ranges, device) -> None:
    features, rows, _, bias = make(3, 70, 7, torch.float32, device)
    ranges = torch.tensor([[0, 70], [3, 70], [9, 9]], device=device) if with_ranges else None
    inputs = features.detach(), rows, torch.tensor([3, -4, -70], device=device)
    best, total, at_label, _, kept = ops.softmax_partials(*inputs, bias, ranges)
    tests = "test_schema", "test_faketensor"
    op = getattr(torch.ops.megaptune, f"{ops.implementation}_softmax_partials")
    torch.library.opcheck(op, (*inputs, bias, ranges), test_utils=tests)
    op = getattr(torch.ops.megaptune, f"{ops.implementation}_softmax_finish")
    for wanted in (False, True):
        torch.library.opcheck(op, (*inputs, best + total.log(), at_label, kept, bias, ranges, wanted), test_utils=tests)


@pytest.mark.parametrize("with_ranges", [False, True])
def test_pass_through_compile_whole(choose, with_ranges, device) -> None:
    """With ranges, plain torch keeps as many scores as they say, which torch.compile must be allowed."""
    features, rows, _, bias = make(3, 70, 7, torch.float32, device)
    ranges = torch.tensor([[0, 70], [3, 70], [9, 9]], device=device) if with_ranges else None
    signed = torch.tensor([3, -4, -70], device=device)

    def both(features: Tensor) -> tuple[Tensor, ...]:
        best, total, at_label, place, kept = dispatch.softmax_partials(features * 2, rows, signed, bias, ranges)
        lse = torch.logaddexp(best + total.log(), torch.zeros_like(best))
        return lse, place, *dispatch.softmax_finish(features * 2, rows, signed, lse, at_label, kept, bias, ranges)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=choose == "reference" and with_ranges):
        found = torch.compile(both, backend="aot_eager", fullgraph=True)(features.detach())
    for mine, expected in zip(found, both(features.detach()), strict=True):
        torch.testing.assert_close(mine, expected)
