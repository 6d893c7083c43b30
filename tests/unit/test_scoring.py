"""From features to losses, ranks and figures, against figures worked by hand and a plain sorted list."""

import math

import pytest
import torch

from megaptune.backbone.output_rows import OutputEmbedding, OutputRows
from megaptune.config import SpeedConfig
from megaptune.run.grid import ProcessGrid
from megaptune.scoring import Figures, Scorer

VOCABULARY, WIDTH = 50, 6


class Head:
    """As much of a host as a scorer asks for: the output embedding of a made-up model."""

    def __init__(self, with_bias: bool, candidates_only: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
        self.bias = torch.randn(VOCABULARY, generator=generator) if with_bias else None
        self.vocabulary_size, self.device, self.grid = VOCABULARY, torch.device("cpu"), ProcessGrid()
        self.speed, self.trained = SpeedConfig(candidates_only=candidates_only), False

    def output_rows(self, ids: torch.Tensor | None) -> OutputRows:
        return OutputEmbedding(self, VOCABULARY, [], self.grid).rows(ids)


def oracle(head: Head, features: torch.Tensor, answer: int, candidates: list[int]) -> tuple[float, int, int]:
    """Loss, rank and prediction by sorting a Python list."""
    bias = head.bias if head.bias is not None else torch.zeros(VOCABULARY)
    scores = {token: float(head.weight[token].double() @ features.double() + bias[token]) for token in candidates}
    order = sorted(candidates, key=lambda token: -scores[token])
    loss = math.log(sum(math.exp(score) for score in scores.values())) - scores[answer]
    return loss, order.index(answer), order[0]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("candidates", [None, [3, 4, 9, 17, 30, 31, 49]])
def test_loss_rank_and_prediction_are_those_of_a_sorted_list(with_bias: bool, candidates: list[int] | None):
    head = Head(with_bias)
    scorer = Scorer(head, [None if candidates is None else torch.tensor(candidates)])
    features = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(5))
    answers = torch.tensor(candidates or [0, 3, 9, 17, 30, 31, 49])
    losses, ranks, predictions = scorer(features, answers)
    for row, answer in enumerate(answers.tolist()):
        loss, rank, prediction = oracle(head, features[row], answer, candidates or list(range(VOCABULARY)))
        assert losses[row].item() == pytest.approx(loss, abs=1e-5)
        assert (int(ranks[row]), int(predictions[row])) == (rank, prediction)


def test_predictions_are_token_ids_not_places_among_the_candidates():
    scorer = Scorer(Head(with_bias=False), [torch.tensor([41, 42])])
    _, _, predictions = scorer(torch.randn(20, WIDTH), torch.full((20,), 41))
    assert set(predictions.tolist()) <= {41, 42}


def test_only_candidates_compete():
    head = Head(with_bias=False)
    features = head.weight[7:8]
    best = int(Scorer(head, [None])(features, torch.tensor([8]))[2])
    assert best != 8
    loss, rank, prediction = Scorer(head, [torch.tensor([8])])(features, torch.tensor([8]))
    assert (loss.tolist(), rank.tolist(), prediction.tolist()) == ([0.0], [0], [8])


@pytest.mark.parametrize("candidates_only", [True, False])
def test_each_job_is_scored_among_its_own_candidates(candidates_only: bool):
    """Three tasks, two with equal sets, by five jobs; also over all rows with the others out of the running."""
    head = Head(True, candidates_only)
    sets = [torch.tensor([3, 4, 9]), torch.tensor([4, 17, 30, 49]), torch.tensor([3, 4, 9])]
    set_of = [0, 1, 2, 1, 0]
    scorer = Scorer(head, sets, set_of)
    features = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(6)).requires_grad_()
    jobs, answers = torch.tensor([0, 1, 2, 3, 4, 1, 3, 0, 2]), torch.tensor([4, 4, 9, 49, 3, 17, 30, 9, 3])
    losses, ranks, predictions = scorer(features, answers, jobs)
    losses.sum().backward()
    for row, (job, answer) in enumerate(zip(jobs.tolist(), answers.tolist(), strict=True)):
        candidates = sets[set_of[job]]
        loss, rank, prediction = oracle(head, features.detach()[row], answer, candidates.tolist())
        assert losses[row].item() == pytest.approx(loss, abs=1e-5)
        assert (int(ranks[row]), int(predictions[row])) == (rank, prediction)
        one = features.detach()[row : row + 1].clone().requires_grad_()
        Scorer(Head(True), [candidates])(one, answers[row : row + 1])[0].sum().backward()
        torch.testing.assert_close(features.grad[row], one.grad[0])


def test_figures_of_hand_worked_ranks():
    # Ranks 0, 1, 4, 9, 99: one hit at 1, three within 5, four within 10.
    figures = Figures.of(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([0, 1, 4, 9, 99]))
    assert figures.loss == 3.0
    assert (figures.p_at_1, figures.p_at_5, figures.p_at_10) == (0.2, 0.6, 0.8)
    assert figures.mrr == pytest.approx((1 + 1 / 2 + 1 / 5 + 1 / 10 + 1 / 100) / 5)
    assert figures.count == 5


@pytest.mark.parametrize(("rank", "expected"), [(0, 1.0), (9, 0.0)])
def test_figures_of_a_single_record(rank: int, expected: float):
    figures = Figures.of(torch.tensor([0.5]), torch.tensor([rank]))
    assert (figures.p_at_1, figures.mrr, figures.count) == (expected, 1 / (rank + 1), 1)


def test_figures_are_those_of_a_sorted_list_on_many_records():
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(0, 30, (997,), generator=generator)
    figures = Figures.of(torch.zeros(997), ranks)
    in_order = sorted(ranks.tolist())
    for k, share in ((1, figures.p_at_1), (5, figures.p_at_5), (10, figures.p_at_10)):
        assert share == pytest.approx(sum(rank < k for rank in in_order) / 997)
    assert figures.mrr == pytest.approx(math.fsum(1 / (rank + 1) for rank in in_order) / 997)
