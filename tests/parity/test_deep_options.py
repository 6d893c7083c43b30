"""Options scored behind deep prompts against transformers' own past keys and values (attention written out, of masked
models): label words and choices of several tokens; scores, losses and the gradient of the table.

Tolerance: 2e-5 of the largest element, fp32.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hosting import open_host
from plain import VOCABULARY, save_model
from plain_deep import option_scores, plain_logits
from ranks import run_ranks
from torch import Tensor

from megaptune.batches import Member
from megaptune.config import SpeedConfig
from megaptune.option_examples import OptionExample, from_choices, from_labels
from megaptune.option_scoring import OptionScorer, collate_options, evaluate_options
from megaptune.run.topology import connect, disconnect
from megaptune.scoring import Scorer
from megaptune.tasks.records import Record

pytestmark = pytest.mark.dist

TOLERANCE = 2e-5
LENGTH, PROMPTS, LAYERS, KV_HEADS, HEAD_WIDTH = 5, 2, 2, {"llama": 2, "bert": 4}, 8
SAVINGS = ("packing", "share_leading_tokens", "cut_last_block", "context_cache")
RECORD = Record({}, "", "")


def examples(masked: bool) -> list[OptionExample]:
    """A verbalizer's labels, one of them of two words, and choices of one to four tokens; two are right in one."""
    generator = torch.Generator().manual_seed(6)

    def words(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    found = []
    for number in range(8):
        start, end = [7, *words(3 + number)], [4, *words(1)] if masked else []
        place = len(start) if masked else len(start) - 1
        if number % 2:
            found.append(from_labels([*start, *end], place, [[5, 9], [6], [7]], (number % 3,), RECORD))
            continue
        targets = [words(1 + (number + k) % 4) for k in range(3)]
        masks = [4] * max(map(len, targets))
        slots = [[*start, *masks, *end[1:]] if masked else [*start, *ids[:-1]] for ids in targets]
        choices = [(s, list(range(place, place + len(ids))), ids) for s, ids in zip(slots, targets, strict=True)]
        found.append(from_choices(choices, (0, 2) if number == 2 else (1,), RECORD, mean=number == 4))
    return found


def prompt_of(number: int) -> int:
    return number // 2 % PROMPTS  # both kinds of examples have both prompts


def table_of(family: str) -> Tensor:
    rows, width = PROMPTS * LENGTH * 2 * LAYERS, KV_HEADS[family] * HEAD_WIDTH
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


def plainly(folder: Path, family: str) -> dict[str, Any]:
    masked = family == "bert"
    logits, leaf = plain_logits(folder, masked), table_of(family).requires_grad_()
    prompts = leaf.view(PROMPTS, LENGTH, LAYERS, 2, -1, HEAD_WIDTH).permute(0, 2, 3, 1, 4, 5)
    scores = [option_scores(logits, prompts[prompt_of(n)], one) for n, one in enumerate(examples(masked))]
    pairs = zip(scores, examples(masked), strict=True)
    losses = torch.stack([-found.log_softmax(dim=0)[list(one.right)].logsumexp(dim=0) for found, one in pairs])
    losses.sum().backward()
    return {"scores": [found.detach() for found in scores], "losses": losses.detach(), "gradient": leaf.grad}


def hosted(folder: Path, family: str, layouts: list[dict[str, Any]], speeds: list[SpeedConfig]) -> list[dict[str, Any]]:
    """In a rank: the same for each layout and setting of the savings; leads: whether leading tokens were shared."""
    found, topology = [], connect()
    for parallel, speed in itertools.product(layouts, speeds):
        host = open_host(folder, topology=topology, speed=speed, **parallel)
        rows = LENGTH * host.deep.rows
        members = [
            Member(example, rows * prompt_of(n), prompt_of(n), LENGTH)
            for n, example in enumerate(examples(host.kind == "masked"))
        ]
        leaf, scorer = table_of(family).requires_grad_(), OptionScorer(host, Scorer(host, [None]))
        batch = collate_options(members, host, 0, members[0])
        losses, _ = scorer.losses(batch, leaf)
        losses.sum().backward()
        scores = evaluate_options(host, members, leaf.detach(), scorer, 3, 0).scores
        leads = batch.inputs.leads is not None
        found.append({"scores": scores, "losses": losses.detach(), "gradient": leaf.grad, "leads": leads})
    disconnect()
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for mine, scores in zip(found["scores"], expected["scores"], strict=True):
        limit = TOLERANCE * float(scores.abs().max())
        torch.testing.assert_close(mine[: len(scores)], scores, rtol=0, atol=limit)
    for name in ("losses", "gradient"):
        limit = TOLERANCE * float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=limit)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_options_behind_deep_prompts_are_those_of_the_plain_statement(family: str, tmp_path: Path):
    folder = save_model(family, tmp_path / "model")
    expected = plainly(folder, family)
    assert all(float(rows.abs().max()) > 1e-4 for rows in expected["gradient"].split(1)[: 2 * LAYERS])
    layouts = [{}, {"activation_checkpointing": True}]
    speeds = [SpeedConfig(), SpeedConfig(**dict.fromkeys(SAVINGS, False))]
    (found,) = run_ranks(1, hosted, folder, family, layouts, speeds)
    for mine in found:
        assert_same(mine, expected)
    assert [mine["leads"] for mine in found] == [family == "llama", False] * 2
    assert torch.equal(found[0]["gradient"], found[2]["gradient"])  # what is computed again has the same bits


def test_two_ranks_score_options_behind_deep_prompts_alike(tmp_path: Path):
    folder = save_model("llama", tmp_path / "model")
    expected = plainly(folder, "llama")
    layouts = [{"tensor_parallel": 2}, {"tensor_parallel": 2, "zero_stage": 3}]
    for found in run_ranks(2, hosted, folder, "llama", layouts, [SpeedConfig()]):
        for mine in found:
            assert_same(mine, expected)
