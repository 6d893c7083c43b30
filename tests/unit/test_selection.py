"""Early stopping on dev P@1."""

import pytest

from megaptune.jobs import Selection


def run(patience: int, scores: list[float]) -> tuple[Selection, int]:
    """Feed dev scores epoch by epoch until patience ends; the selection and the epochs that were run."""
    selection = Selection(patience)
    for epoch, score in enumerate(scores, start=1):
        selection.improves(epoch, score)
        if selection.exhausted:
            return selection, epoch
    return selection, len(scores)


def test_first_epoch_is_the_best_so_far_even_without_a_hit():
    selection = Selection(patience=3)
    assert selection.improves(1, 0.0)
    assert (selection.best, selection.best_epoch) == (0.0, 1)


def test_tie_replaces_the_earlier_epoch_and_counts_as_a_gain():
    selection, _ = run(3, [0.5, 0.4, 0.5])
    assert (selection.best, selection.best_epoch, selection.misses) == (0.5, 3, 0)


def test_worse_epoch_is_a_miss_and_leaves_the_best():
    selection = Selection(patience=3)
    selection.improves(1, 0.5)
    assert not selection.improves(2, 0.4)
    assert (selection.best, selection.best_epoch, selection.misses) == (0.5, 1, 1)


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 4), (5, 7)])
def test_training_ends_after_so_many_misses_in_a_row(patience: int, epochs: int):
    assert run(patience, [0.1, 0.9, *[0.5] * 50])[1] == epochs


def test_a_gain_forgives_earlier_misses():
    assert run(2, [0.5, 0.4, 0.6, 0.4, 0.6, 0.4, 0.3, 0.2])[1] == 7


def test_patience_of_zero_never_ends():
    assert run(0, [0.5, *[0.1] * 200])[1] == 201
