"""PET's and iPET's rules, against numbers worked out by hand."""

from math import log

import pytest
import torch

from megaptune.soft_labels import apportioned, combined, drawn, most_confident, softened

FIRST, SECOND = torch.tensor([[log(16), 0.0]]), torch.tensor([[0.0, log(16)]])


@pytest.mark.parametrize(
    ("weights", "temperature", "expected"),
    [
        ([3.0, 1.0], 1.0, [4 / 5, 1 / 5]),  # 3/4 log 16 = log 8, 1/4 log 16 = log 2
        ([3.0, 1.0], 2.0, [2 / 3, 1 / 3]),  # their halves: the roots of 8 and 2
        ([0.2, 0.6], 1.0, [1 / 5, 4 / 5]),
        ([0.0, 1.0], 4.0, [1 / 3, 2 / 3]),  # the fourth root of 16
        ([0.0, 0.0], 1.0, [1 / 2, 1 / 2]),  # nobody is right: all count alike
    ],
)
def test_scores_are_weighted_then_softened(weights, temperature, expected):
    found = softened(combined([FIRST, SECOND], weights), temperature)
    assert found.tolist()[0] == pytest.approx(expected, rel=1e-6)


def test_what_an_examples_options_have_in_common_does_not_matter():
    """Log-probabilities are as good as logits."""
    scores = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]])
    normalised = torch.log_softmax(scores, dim=1)
    one, other = (softened(combined([kind, FIRST.new_ones(2, 3)], [0.7, 0.3]), 2.0) for kind in (scores, normalised))
    assert torch.allclose(one, other)


@pytest.mark.parametrize(
    ("total", "counts", "expected"),
    [(128, [16, 13, 3], [64, 52, 12]), (5, [3, 1], [4, 1]), (10, [1, 1, 1], [4, 3, 3]), (3, [0, 2], [0, 3])],
)
def test_new_examples_have_the_labels_shares_of_train(total, counts, expected):
    assert apportioned(total, counts) == expected


PROBABILITIES = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6], [0.2, 0.8]])


@pytest.mark.parametrize(
    ("counts", "total", "expected"),
    [
        ([2, 1], 3, [(0, 0), (2, 0), (5, 1)]),
        ([1, 1], 4, [(0, 0), (2, 0), (3, 1), (5, 1)]),
        ([2, 1], 9, [(0, 0), (1, 0), (2, 0), (5, 1)]),  # wanted 6 and 3; 3 and 3 are there: half of both, rounded down
        ([1, 0], 2, [(0, 0), (2, 0)]),
        ([1, 1], 0, []),
    ],
)
def test_the_surest_predictions_of_each_label_are_taken(counts, total, expected):
    assert most_confident(PROBABILITIES, counts, total) == expected


def test_a_label_that_is_never_predicted_lets_nothing_grow():
    assert most_confident(PROBABILITIES[:3], [1, 1], 4) == []


def test_models_are_drawn_for_each_anew_and_alike_every_time():
    models = list("abcdefgh")
    assert drawn(models, 1.0, "any") == models
    sets = [drawn(models, 0.25, f"0/1/{place}") for place in range(20)]
    assert sets == [drawn(models, 0.25, f"0/1/{place}") for place in range(20)]
    assert {len(found) for found in sets} == {2}
    assert len({tuple(found) for found in sets}) > 5
    assert len(drawn(models[:1], 0.25, "one at least")) == 1
