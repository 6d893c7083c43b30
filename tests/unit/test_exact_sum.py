"""Sums that do not depend on who adds what, within what fp32 can tell."""

import math

import pytest
import torch
from ranks import run_ranks

from megaptune.run.exact_sum import sum_exactly

FIGURES = torch.tensor([1.5, 2.0], dtype=torch.float64)


def pieces(count: int, rows: int = 4, width: int = 33) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    scales = torch.tensor([1e-20, 1.0, 3e7, 1e-3])[:rows, None]
    return [torch.randn(rows, width, generator=generator) * scales for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 13])
def test_sum_is_that_of_fp64_to_a_few_bits_of_the_row(count):
    members = pieces(count)
    total, figures = sum_exactly(members, count, FIGURES, True)
    exact = torch.stack(members).double().sum(dim=0)
    largest = torch.stack(members).abs().amax(dim=(0, 2)).double()[:, None]
    bits = 30 - math.ceil(math.log2(count)) - 1  # a power of two lies within a factor of two above the largest
    assert ((total.double() - exact).abs() <= largest * count * 2.0**-bits + exact.abs() * 2.0**-24).all()
    assert figures.tolist() == [1.5, 2.0, 0.0]


def test_order_and_grouping_do_not_matter():
    members = pieces(7)
    total, _ = sum_exactly(members, 7, FIGURES, True)
    again, _ = sum_exactly(members[::-1], 7, FIGURES, True)
    assert torch.equal(total, again)


def test_the_largest_values_do_not_overflow():
    members = [torch.full((1, 3), 3e38) for _ in range(1)] + [torch.full((1, 3), -3e38)]
    assert sum_exactly(members, 2, FIGURES, True)[0].tolist() == [[0.0, 0.0, 0.0]]
    same_sign = [torch.full((2, 3), 1.9999) for _ in range(8)]
    torch.testing.assert_close(sum_exactly(same_sign, 8, FIGURES, True)[0], torch.full((2, 3), 8 * 1.9999))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_its_row_alone(bad):
    members = pieces(2)
    members[1][2, 5] = bad
    total, _ = sum_exactly(members, 2, FIGURES, True)
    assert total[2].isnan().all()
    others = [0, 1, 3]
    assert torch.equal(total[others], sum_exactly(pieces(2), 2, FIGURES, True)[0][others])


def test_nothing_and_no_rows():
    zero, _ = sum_exactly([torch.zeros(2, 3)], 1, FIGURES, True)
    assert torch.equal(zero, torch.zeros(2, 3))
    assert sum_exactly([torch.zeros(0, 3)], 1, FIGURES, True)[0].shape == (0, 3)


def _shared(world: int, peers: int) -> tuple[torch.Tensor, list[float], list[tuple[str, int]]]:
    """Six pieces dealt to replicas of ``peers`` ranks; with the bytes that collectives of a step carry."""
    from megaptune.run.topology import connect, disconnect

    topology = connect()
    replica, replicas = topology.rank // peers, world // peers
    sent = []
    for name in ("all_reduce", "all_gather_into_tensor"):
        original = getattr(torch.distributed, name)

        def counted(*arguments, name=name, original=original, **named):
            sent.append((name, arguments[-1].numel() * arguments[-1].itemsize))
            return original(*arguments, **named)

        setattr(torch.distributed, name, counted)
    mine = pieces(6)[replica::replicas]
    flag = float(topology.rank == world - 1)
    total, figures = sum_exactly(mine, 6, len(mine) * FIGURES, topology.rank % peers == 0, flag)
    disconnect()
    return total, figures.tolist(), sent


@pytest.mark.dist
@pytest.mark.parametrize(("world", "peers"), [(2, 1), (3, 1), (2, 2), (4, 2)])
def test_any_number_of_ranks_gives_the_bits_of_one_for_the_bytes_of_the_table(world, peers):
    alone, _ = sum_exactly(pieces(6), 6, FIGURES, True)
    for total, figures, sent in run_ranks(world, _shared, world, peers):
        assert torch.equal(total, alone)
        assert figures == [9.0, 12.0, 1.0]  # the peers' figures count once, the last rank's flag is heard
        assert dict(sent)["all_reduce"] == alone.numel() * 4  # the table's own bytes
        assert dict(sent)["all_gather_into_tensor"] == 8 * (3 + len(alone))
        assert len(sent) == 2
