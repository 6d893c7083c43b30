"""Options scored in packed, shared, divided and tuned ways against a plain statement: transformers' logits of one input
at a time, a Python sum over an option's tokens, torch's softmax over the options.

Tolerance: 2e-5 of the largest entry in fp32; where an option is minus infinity both must be.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hosting import open_host
from plain import VOCABULARY, save_model
from ranks import run_ranks
from torch import Tensor, nn

from megaptune.backbone.description import describe_backbone
from megaptune.backbone.tuned_host import TunedHost
from megaptune.batches import Member
from megaptune.config import ParallelConfig, SpeedConfig, TrainConfig
from megaptune.option_examples import OptionExample, from_choices, from_classes, from_labels, from_scored
from megaptune.option_scoring import OptionScorer, collate_options, evaluate_options
from megaptune.run.grid import build_grid
from megaptune.run.topology import connect, disconnect
from megaptune.scoring import Scorer
from megaptune.tasks.records import Record

pytestmark = pytest.mark.dist

TOLERANCE = 2e-5
JOBS = ((0, 0), (2, 1))  # first rows of two jobs in the table
ROWS, RATE = 5, 0.05
PLAIN = SpeedConfig(
    answers_only=False,
    candidates_only=False,
    packing=False,
    share_leading_tokens=False,
    cut_last_block=False,
    context_cache=False,
)
RECORD = Record({}, "", "")


def examples(masked: bool, heads: bool = False) -> list[tuple[OptionExample, int]]:
    """Label words, one and two a label, and choices of one to four tokens, or classes and scored choices; each with its
    job. Several are right in one, none is known in another, one learns probabilities."""
    generator = torch.Generator().manual_seed(4)

    def words(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    found: list[tuple[OptionExample, int]] = []
    for number in range(10):
        start = [*words(3 + number % 4), -1, *words(2), -2]
        end = [4, *words(1)] if masked else []
        place = len(start) if masked else len(start) - 1
        right = [(0,), (1,), (0, 2), ()][number % 4]
        if number % 2:
            tokens = [[5], [6], [7]] if number % 3 else [[5, 9], [6], [7, 11]]
            one = from_labels([*start, *end], place, tokens, right, RECORD)
            if heads:
                one = from_classes([*start, *end], place, 3, right, RECORD)
        elif heads:
            one = from_scored([([*start, *words(k), *end], place + k) for k in (1, 3, 2)], right, RECORD)
        else:
            targets = [words(1 + (number + k) % 4) for k in range(3 + number % 2)]
            longest = max(map(len, targets))
            slots = [[*start, *([4] * longest), *end[1:]] if masked else [*start, *ids[:-1]] for ids in targets]
            places = [list(range(place, place + len(ids))) for ids in targets]
            one = from_choices(list(zip(slots, places, targets, strict=True)), right, RECORD, mean=number == 4)
        if number == 7:
            one = replace(one, soft=(0.2, 0.5, 0.3), temperature=2.0)
        found.append((one, number % 2))
    return found


def plain_scores(model: nn.Module, example: OptionExample, table: Tensor) -> Tensor:
    """The options' scores, one input after the other."""
    embedding = model.get_input_embeddings()
    features, log_p = [], []
    for slots, places in zip(example.inputs, example.reads, strict=True):
        rows = [table[-1 - slot] if slot < 0 else embedding(torch.tensor(slot)) for slot in slots]
        captured: list[Tensor] = []
        hook = model.get_output_embeddings().register_forward_pre_hook(
            lambda _, inputs, into=captured: into.append(inputs[0])
        )
        logits = model(inputs_embeds=torch.stack(rows)[None]).logits[0]
        hook.remove()
        log_p += [logits[place].log_softmax(dim=0) for place in places]
        features += [captured[0][0, place] for place in places]
    scores = []
    for terms in example.options:
        values = [log_p[read][t] if t >= 0 else features[read] @ table[-1 - t] for read, t in terms]
        scores.append(torch.stack(values).sum() / (len(terms) if example.mean else 1))
    return torch.stack(scores)


def plain_loss(scores: Tensor, example: OptionExample) -> Tensor:
    likelihood = torch.log_softmax(scores / example.temperature, dim=0)
    if example.soft is not None:
        return -(torch.tensor(example.soft) * likelihood).sum()
    return -likelihood[list(example.right)].exp().sum().log() if example.right else scores.sum() * 0


def plainly(folder: Path, masked: bool, heads: bool, steps: int) -> dict[str, Any]:
    """Scores, losses and the table's gradient; with ``steps``, the scores after a step of SGD of all weights."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    model = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_pretrained(folder).eval()
    data = examples(masked, heads)
    table = _table(model.get_input_embeddings().weight.shape[1]).requires_grad_()

    def scored() -> list[Tensor]:
        firsts = [JOBS[job][0] for _, job in data]
        return [plain_scores(model, one, table[first:]) for (one, _), first in zip(data, firsts, strict=True)]

    scores = scored()
    losses = torch.stack([plain_loss(found, one) for found, (one, _) in zip(scores, data, strict=True)])
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses.sum().backward()
    answer = {"scores": [s.detach() for s in scores], "losses": losses.detach(), "gradient": table.grad}
    for _ in range(steps):
        optimizer.step()
    with torch.no_grad():
        return {**answer, "after": scored()}


def _table(width: int) -> Tensor:
    return 0.3 * torch.randn(ROWS, width, generator=torch.Generator().manual_seed(1))


def members(masked: bool, heads: bool) -> list[Member]:
    return [Member(one, *JOBS[job]) for one, job in examples(masked, heads)]


def frozen(folder: Path, parallel: dict[str, Any], speeds: list[SpeedConfig], heads: bool) -> list[dict[str, Any]]:
    """In a rank: as :func:`plainly`, for every setting of the savings."""
    topology, found = connect(), []
    for speed in speeds:
        host = open_host(folder, topology=topology, speed=speed, **parallel)
        data = members(host.kind == "masked", heads)
        if speed.context_cache:
            alone = [m for m in data if len(m.inputs) == 1]
            host.keep_contexts([m.slots for m in alone], [m.job for m in alone], None)
        found.append(_scored(host, data, OptionScorer(host, Scorer(host, [None]))))
    disconnect()
    return found


def tuned(folder: Path, parallel: dict[str, Any], heads: bool) -> dict[str, Any]:
    """In a rank: the same with a step of the LM."""
    topology, settings = connect(), ParallelConfig(**parallel)
    grid = build_grid(topology, settings.tensor_parallel)
    train = TrainConfig(optimizer="sgd", lm_learning_rate=RATE, weight_decay=0)
    host = TunedHost(describe_backbone(folder, "auto"), "fp32", settings, grid, topology.device, train)
    data = members(host.kind == "masked", heads)
    answer = _scored(host, data, OptionScorer(host, Scorer(host, [None])))
    disconnect()
    return answer


def _scored(host: Any, data: list[Member], scorer: OptionScorer) -> dict[str, Any]:
    table = _table(host.width).requires_grad_()
    outcome = evaluate_options(host, data, table.detach(), scorer, 4, 0)
    mine = data if host.grid.replica == 0 else []
    batch = collate_options(mine, host, 0, data[0])
    losses, _ = scorer.losses(batch, table)
    host.weights.backward((losses * batch.weights).sum())
    gradient = table.grad
    if host.grid.replicas > 1:
        torch.distributed.all_reduce(gradient, group=host.grid.data_group)
    if host.trained:
        host.weights.step(1.0)
    after = evaluate_options(host, data, table.detach(), scorer, 4, 0)
    return {"scores": outcome.scores, "losses": losses.detach(), "gradient": gradient, "after": after.scores}


def assert_same(found: dict[str, Any], expected: dict[str, Any], replica_has_all: bool = True) -> None:
    for name in ("scores", "after"):
        for row, scores in zip(found[name], expected[name], strict=True):
            count = len(scores)
            torch.testing.assert_close(row[:count], scores, rtol=0, atol=TOLERANCE * float(scores.abs().max()))
            assert torch.isneginf(row[count:]).all()
    if replica_has_all:
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=TOLERANCE, atol=TOLERANCE)
    limit = TOLERANCE * float(expected["gradient"].abs().max())
    torch.testing.assert_close(found["gradient"], expected["gradient"], rtol=0, atol=limit)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_frozen_options_are_those_of_the_plain_statement(family: str, tmp_path: Path):
    folder = save_model(family, tmp_path / "model")
    speeds = [SpeedConfig(), PLAIN, SpeedConfig(packing=False), SpeedConfig(context_cache=False)]
    expected = plainly(folder, family == "bert", heads=False, steps=0)
    for found in run_ranks(1, frozen, folder, {}, speeds, False)[0]:
        assert_same(found, expected)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("parallel", [{"tensor_parallel": 2}, {"zero_stage": 3}])
def test_two_ranks_score_options_alike(family: str, parallel: dict[str, Any], tmp_path: Path):
    folder = save_model(family, tmp_path / "model")
    expected = plainly(folder, family == "bert", heads=False, steps=0)
    for rank, found in enumerate(run_ranks(2, frozen, folder, parallel, [SpeedConfig()], False)):
        assert_same(found[0], expected, replica_has_all=rank == 0 or "tensor_parallel" in parallel)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(
    ("family", "ranks", "parallel"),
    [
        ("llama", 1, {"zero_stage": 1}),
        ("llama", 2, {"zero_stage": 3}),
        ("llama", 2, {"tensor_parallel": 2, "zero_stage": 1}),
    ],
)
def test_a_tuned_lm_learns_from_options(family: str, ranks: int, parallel: dict[str, Any], heads: bool, tmp_path: Path):
    folder = save_model(family, tmp_path / "model")
    expected = plainly(folder, family == "bert", heads, steps=1)
    moved = max(float((a - b).abs().max()) for a, b in zip(expected["after"], expected["scores"], strict=True))
    assert moved > 0.01  # so that a step that is left out would be seen
    for rank, found in enumerate(run_ranks(ranks, tuned, folder, parallel, heads)):
        assert_same(found, expected, replica_has_all=rank == 0 or "tensor_parallel" in parallel)
