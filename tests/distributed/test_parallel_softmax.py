"""parallel_softmax over ranks that hold parts of the rows, against plain torch with all rows.

Tolerance: 2e-6 for losses of about 5 and gradients of about 1: sums are divided, so they round otherwise.
"""

import pytest
import torch
from candidates import make
from ranks import run_ranks

from megaptune.backbone.tensor_parallel import parallel_softmax
from megaptune.kernels import reference

pytestmark = pytest.mark.dist
CUTS = {1: [0, 60], 3: [0, 41, 41, 60]}  # the second of three ranks holds no rows


def inputs(with_ranges: bool) -> tuple[torch.Tensor, ...]:
    features, rows, labels, bias = make(9, 60, 7, torch.float32, torch.device("cpu"))
    rows[50] = rows[3]  # a tie between ranks
    bias[50] = bias[3]
    ranges = None
    if with_ranges:
        spans = [[0, 60], [0, 41], [41, 60], [40, 42], [3, 51]]
        ranges = torch.tensor([spans[b % len(spans)] for b in range(9)])
        labels = labels % (ranges[:, 1] - ranges[:, 0])
    return features, rows, labels, bias, ranges


def score(shards: int, with_ranges: bool, wanted: bool, wrong: int | None = None) -> tuple:
    """In a rank: what parallel_softmax returns there."""
    torch.distributed.init_process_group("gloo")
    features, rows, labels, bias, ranges = inputs(with_ranges)
    if wrong is not None:
        labels[4] = wrong
    first, stop = CUTS[shards][torch.distributed.get_rank() :][:2]
    index = torch.arange(first, stop)
    try:
        return parallel_softmax(
            features.detach(), rows[index], index, labels, bias[index], torch.distributed.group.WORLD, ranges, wanted
        )
    except IndexError as error:
        return (str(error),)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("with_ranges", [False, True])
@pytest.mark.parametrize("shards", list(CUTS))
def test_ranks_agree_with_one(shards, with_ranges):
    features, rows, labels, bias, ranges = inputs(with_ranges)
    expected = reference.verbalizer_softmax(features, rows, labels, bias, ranges)
    (gradient,) = torch.autograd.grad(expected[0].sum(), features)
    for loss, rank, prediction, found in run_ranks(shards, score, shards, with_ranges, True):
        torch.testing.assert_close(loss, expected[0].detach(), rtol=2e-6, atol=2e-6)
        assert torch.equal(rank, expected[1])
        assert torch.equal(prediction, expected[2])
        torch.testing.assert_close(found, gradient, rtol=0, atol=2e-6)


def test_without_a_gradient_the_rest_is_the_same():
    whole, without = (run_ranks(3, score, 3, True, wanted)[0] for wanted in (True, False))
    assert without[3] is None
    assert all(torch.equal(a, b) for a, b in zip(whole[:3], without[:3], strict=True))


@pytest.mark.parametrize(("with_ranges", "wrong"), [(False, 60), (False, -1), (True, 48), (True, -1)])
def test_a_label_that_is_no_candidate(with_ranges, wrong):
    """Example 4 has the candidates 3 to 50 where there are ranges, so that 48 would be another's."""
    for (message,) in run_ranks(3, score, 3, with_ranges, True, wrong):
        assert message == f"label {wrong} is none of its example's candidates"
