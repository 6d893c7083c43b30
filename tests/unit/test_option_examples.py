"""Examples with options: what is read, which terms each option has, and losses worked by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from megaptune.option_examples import from_choices, from_classes, from_labels, from_scored
from megaptune.option_scoring import OptionOutcome, option_losses, ranks
from megaptune.tasks.records import Record

RECORD = Record({}, "", "")
HIDDEN = float("-inf")


def test_a_causal_models_choices_are_inputs_of_their_own():
    choices = [
        ([7, -1, 8], [2], [40]),
        ([7, -1, 8, 41, 42], [2, 3, 4], [41, 42, 43]),
        ([7, -1, 8, 44], [2, 3], [44, 45]),
    ]
    one = from_choices(choices, (1,), RECORD)
    assert one.inputs == [[7, -1, 8], [7, -1, 8, 41, 42], [7, -1, 8, 44]]
    assert one.reads == [[2], [2, 3, 4], [2, 3]]
    assert one.options == [[(0, 40)], [(1, 41), (2, 42), (3, 43)], [(4, 44), (5, 45)]]
    assert one.length == 3 + 2 + 1  # the three tokens that all begin with are computed once


def test_a_masked_models_choices_are_one_input_read_at_all_their_places():
    choices = [([7, 4, 4, 9], [1], [40]), ([7, 4, 4, 9], [1, 2], [41, 42])]
    one = from_choices(choices, (), RECORD)
    assert (one.inputs, one.reads, one.length) == ([[7, 4, 4, 9]], [[1, 2]], 4)
    assert one.options == [[(0, 40)], [(0, 41), (1, 42)]]


def test_choices_of_one_token_share_an_input():
    one = from_choices([([7, 8], [1], [40]), ([7, 8], [1], [41])], (0,), RECORD)
    assert (one.inputs, one.reads, one.options) == ([[7, 8]], [[1]], [[(0, 40)], [(0, 41)]])


def test_labels_classes_and_scored_choices():
    assert from_labels([7, 8], 1, [[40, 41], [42]], (0,), RECORD).options == [[(0, 40), (0, 41)], [(0, 42)]]
    assert from_classes([7, 8], 1, 3, (2,), RECORD).options == [[(0, -1)], [(0, -2)], [(0, -3)]]
    scored = from_scored([([7, 8], 1), ([7, 9, 9], 2)], (0,), RECORD)
    assert (scored.reads, scored.options) == ([[1], [2]], [[(0, -1)], [(1, -1)]])


def _batch(goal, soft=False, temperature=1.0):
    goal = torch.tensor(goal)
    there = torch.tensor([[True] * goal.shape[1]] * len(goal))
    return SimpleNamespace(
        goal=goal,
        there=there,
        soft=torch.full((len(goal),), soft),
        temperature=torch.full((len(goal),), temperature),
    )


def test_losses_worked_by_hand():
    scores = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)], [0.0, math.log(3.0)]]).requires_grad_()
    losses = option_losses(scores, _batch([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    assert losses.tolist() == pytest.approx([math.log(4), 0.0, 0.0])  # one of four parts; both right; nothing known
    losses.sum().backward()
    assert scores.grad[0].tolist() == pytest.approx([-0.75, 0.75])
    assert scores.grad[1:].abs().max() < 1e-6  # and no NaN where nothing is known
    soft = option_losses(scores.detach(), _batch([[0.5, 0.5]] * 3, soft=True))
    assert soft.tolist() == pytest.approx([0.5 * math.log(4) + 0.5 * math.log(4 / 3)] * 3)
    warm = option_losses(2 * scores.detach(), _batch([[1.0, 0.0]] * 3, temperature=2.0))
    assert warm.tolist() == pytest.approx([math.log(4)] * 3)


def test_an_option_that_is_not_there_takes_no_part():
    scores = torch.tensor([[0.0, 0.0, HIDDEN]]).requires_grad_()
    batch = _batch([[0.25, 0.75, 0.0]], soft=True)
    batch.there[0, 2] = False
    losses = option_losses(scores, batch)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([math.log(2)])
    assert scores.grad[0].tolist() == pytest.approx([0.25, -0.25, 0.0])


def test_ranks_count_the_others_above_the_best_right_one():
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [3.0, 2.0, 3.0], [1.0, 2.0, HIDDEN]])
    goal = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert ranks(scores, goal).tolist() == [2, 0, 0, 0]


def test_the_first_of_equal_options_is_the_best():
    outcome = OptionOutcome(torch.tensor([[0.0, 1.0, 1.0], [2.0, HIDDEN, HIDDEN]]), torch.tensor([0.5, float("nan")]))
    assert outcome.best == [1, 0]
    assert outcome.mean_loss == 0.5
    assert outcome.log_probabilities[1].exp().tolist() == [1.0, 0.0, 0.0]
