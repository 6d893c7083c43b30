"""Which examples make up which step: a pure function of seed and step that knows nothing of ranks."""

import pytest
import torch

from megaptune.batches import EpochPlan, Member, micro_batches, rounds
from megaptune.examples import Example
from megaptune.tasks.records import Record

CPU = torch.device("cpu")
RECORD = Record({}, "France", "facts.jsonl:1")
LENGTHS = [5, 9, 3, 9, 7, 5, 4, 8, 6, 5, 11, 2]


def epoch_of(plan: EpochPlan, epoch: int) -> list[int]:
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [index for step in steps for index in plan.indices(step)]


# -- epochs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("examples", "batch"), [(24, 8), (25, 8), (7, 8), (8, 1), (1, 1)])
def test_an_epoch_visits_every_example_once(examples: int, batch: int):
    plan = EpochPlan(examples, batch, drop_last=False, seed=0)
    for epoch in range(3):
        assert sorted(epoch_of(plan, epoch)) == list(range(examples))


@pytest.mark.parametrize(
    ("examples", "batch", "drop_last", "steps"),
    [(24, 8, False, 3), (25, 8, False, 4), (25, 8, True, 3), (7, 8, False, 1), (7, 8, True, 1)],
)
def test_steps_of_an_epoch(examples: int, batch: int, drop_last: bool, steps: int):
    assert EpochPlan(examples, batch, drop_last, seed=0).steps_per_epoch == steps


def test_drop_last_leaves_only_whole_batches():
    plan = EpochPlan(25, 8, drop_last=True, seed=0)
    assert [len(plan.indices(step)) for step in range(6)] == [8] * 6
    assert len(set(epoch_of(plan, 0))) == 24


def test_a_step_is_computed_not_replayed():
    plan = EpochPlan(100, 8, drop_last=False, seed=5)
    forwards = [plan.indices(step) for step in range(30)]
    backwards = [EpochPlan(100, 8, drop_last=False, seed=5).indices(step) for step in reversed(range(30))]
    assert forwards == backwards[::-1]


def test_order_does_not_hang_on_the_global_random_state():
    torch.manual_seed(1)
    before = EpochPlan(50, 8, False, seed=0).indices(3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert EpochPlan(50, 8, False, seed=0).indices(3) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_every_epoch_and_every_seed_has_its_own_order():
    orders = [tuple(epoch_of(EpochPlan(50, 8, False, seed), epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_order_is_this_one_for_ever():
    """A checkpoint remembers a step only; the examples behind it must not change from one version to the next."""
    assert EpochPlan(10, 4, drop_last=False, seed=0).indices(0) == [4, 1, 7, 5]


# -- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5, 12, 50])
def test_pieces_cover_the_batch_exactly(size: int):
    indices = [10, 3, 0, 7, 11, 5, 2]
    pieces = micro_batches(LENGTHS, indices, size)
    assert sorted(index for piece in pieces for index in piece) == sorted(indices)
    assert all(len(piece) == size for piece in pieces[:-1])
    assert 1 <= len(pieces[-1]) <= size


def test_pieces_go_from_long_to_short():
    pieces = micro_batches(LENGTHS, range(12), 4)
    assert [[LENGTHS[index] for index in piece] for piece in pieces] == [[11, 9, 9, 8], [7, 6, 5, 5], [5, 4, 3, 2]]


def test_pieces_depend_on_what_is_in_the_batch_not_on_its_order():
    assert micro_batches(LENGTHS, [0, 5, 9, 3], 2) == micro_batches(LENGTHS, [9, 3, 5, 0], 2) == [[3, 0], [5, 9]]


def test_pieces_hold_no_more_tokens_than_asked_for():
    pieces = micro_batches(LENGTHS, range(12), 4, tokens=20)
    assert sorted(index for piece in pieces for index in piece) == list(range(12))
    shapes = [(max(LENGTHS[index] for index in piece), len(piece)) for piece in pieces]
    assert shapes == [(11, 1), (9, 2), (8, 2), (6, 3), (5, 4)]
    assert micro_batches(LENGTHS, [1, 2], 4, tokens=1) == [[1], [2]]  # longer than that, but it must be somewhere


def test_pieces_in_the_order_of_the_batch():
    assert micro_batches(LENGTHS, [2, 1, 0], 2, by_length=False) == [[2, 1], [0]]


# -- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 16])
def test_ranks_share_the_pieces_without_gap_or_overlap(world_size: int):
    pieces = micro_batches(LENGTHS, range(12), 2)
    shares = [rounds(pieces, rank, world_size) for rank in range(world_size)]
    taken = [piece for share in shares for piece in share if piece]
    assert sorted(taken) == sorted(pieces)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 16])
def test_every_rank_takes_equally_many_pieces(world_size: int):
    """Under ZeRO-3 a forward gathers weights from all ranks: one that runs fewer would hang the others."""
    pieces = micro_batches(LENGTHS, range(12), 2)
    counts = {len(rounds(pieces, rank, world_size)) for rank in range(world_size)}
    assert counts == {-(-len(pieces) // world_size)}


def test_stand_in_pieces_come_last():
    assert rounds([[0], [1], [2]], rank=1, world_size=2) == [[1], []]


# -- tensors ---------------------------------------------------------------------------------------------------------


def test_a_jobs_rows_begin_where_the_table_has_them():
    example = Example([7, -1, 8, -2], 2, 41, RECORD)
    assert Member(example, first_row=6, job=2).slots == [7, -7, 8, -8]
    assert Member(example).slots == example.slots
