"""Every saving, alone and all together, against the plain path: loss, hits and gradient of the table.

Tolerance: 1e-5 of the largest element in fp32 on these small models; packed products have other shapes and round
otherwise, by some 1e-7 a layer.
"""

import itertools

import pytest
import torch
from hosting import open_host
from plain import ROWS, VOCABULARY, save_model
from ranks import run_ranks

from megaptune.batches import Member, collate
from megaptune.config import SpeedConfig
from megaptune.examples import Example
from megaptune.run.topology import connect, disconnect
from megaptune.scoring import Scorer
from megaptune.tasks.records import Record

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5
SWITCHES = ("answers_only", "candidates_only", "packing", "share_leading_tokens", "cut_last_block", "context_cache")
ALONE = [{name: name in ("answers_only", on) for name in SWITCHES} for on in SWITCHES]
PLAIN = dict.fromkeys(SWITCHES, False)
FAMILIES = ["gpt2", "llama", "gpt_neox", "opt", "xglm", "bert", "roberta"]


def examples(masked: bool) -> list[Example]:
    """Three kinds: a prompt in front, text in front of the prompt, and text that several examples begin with."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(12):
        words = torch.randint(3, VOCABULARY, (3 + number % 5,), generator=generator).tolist()
        kind = number % 3
        slots = {0: [-1, -2, *words, -3], 1: [*words, -1, -2, -3], 2: [7, 8, *words[1:], -1, 9, -2, -3]}[kind]
        answer = int(torch.randint(3, VOCABULARY, (1,), generator=generator))
        if masked:
            slots = [*slots, 4, 9]
        found.append(Example(slots, len(slots) - (2 if masked else 1), answer, Record({}, "", "")))
    return found


def figures(folder, parallel, settings):
    """For each setting of the switches: losses, ranks and the table's gradient."""
    found, topology = [], connect()
    for switches in settings:
        host = open_host(folder, topology=topology, speed=SpeedConfig(**switches), **parallel)
        data = examples(host.kind == "masked")
        members = [Member(example, 0, number % 3) for number, example in enumerate(data)]
        host.keep_contexts([m.slots for m in members], [m.job for m in members], None)
        candidates = torch.tensor(sorted({example.answer for example in data} | {5, 50}))
        scorer = Scorer(host, candidates)
        table = torch.randn(ROWS, host.width, generator=torch.Generator().manual_seed(1)).requires_grad_()
        losses, ranks = scorer.losses(collate(members, host, 0, members[0]), table)
        losses.sum().backward()
        kept = 0 if host.contexts is None else len(host.contexts.places)
        found.append((losses.detach(), ranks, table.grad, kept))
    disconnect()
    return found


def assert_same(found, expected) -> None:
    for mine, theirs in zip(found[:3], expected[:3], strict=True):
        limit = TOLERANCE * float(theirs.abs().max())
        torch.testing.assert_close(mine, theirs, rtol=0, atol=limit if mine.is_floating_point() else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_savings_alone_and_together(family, tmp_path):
    sizes = {"num_attention_heads": 4, "intermediate_size": 64} if family == "roberta" else {}
    folder = save_model(family, tmp_path / "model", **sizes)
    settings = [PLAIN, *ALONE, dict.fromkeys(SWITCHES, True)]
    expected, *found = run_ranks(1, figures, folder, {}, settings)[0]
    for mine in found:
        assert_same(mine, expected)
    causal = family not in ("bert", "roberta")
    assert found[-1][3] == found[ALONE.index({**PLAIN, "answers_only": True, "context_cache": True})][3]
    assert (found[-1][3] > 0) == causal


LAYOUTS = [
    (shards, replicas, stage)
    for shards, replicas, stage in itertools.product((1, 2), (1, 2), (0, 3))
    if shards * replicas > 1
]


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize(("shards", "replicas", "stage"), LAYOUTS)
def test_savings_in_every_layout(family, shards, replicas, stage, tmp_path):
    folder = save_model(family, tmp_path / "model")
    every = dict.fromkeys(SWITCHES, True)
    expected = run_ranks(1, figures, folder, {}, [PLAIN])[0][0]
    parallel = {"tensor_parallel": shards, "zero_stage": stage}
    for found in run_ranks(shards * replicas, figures, folder, parallel, [PLAIN, every]):
        for mine in found:
            assert_same(mine, expected)
