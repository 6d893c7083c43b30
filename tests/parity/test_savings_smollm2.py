"""The savings on a real backbone: SmolLM2-135M, the shipped facts, with the prompt around the text and after it.

Tolerance: 5e-5 of the gradient's norm; 30 blocks in fp32, and products of other shapes.
"""

import json
from pathlib import Path

import pytest
import torch
from hosting import open_host
from ranks import run_ranks

from megaptune.backbone.description import load_tokenizer
from megaptune.backbone.embedded import embedded_folder
from megaptune.batches import Member, collate
from megaptune.config import SpeedConfig
from megaptune.examples import Example
from megaptune.prompts.template import Template
from megaptune.prompts.tokens import TokenForms
from megaptune.run.topology import connect, disconnect
from megaptune.scoring import Scorer
from megaptune.tasks.records import Record

FACTS = Path(__file__).resolve().parents[2] / "configs/facts/city_continent/train.jsonl"
PLAIN = dict.fromkeys(SpeedConfig.model_fields, False) | {"context_host_gib": 1.0, "context_device_gib": 0.0}
PLAIN |= {"context_disk_gib": 0.0}


def _members(folder, text: str) -> list[Member]:
    forms, template, found = TokenForms(load_tokenizer(folder)), Template(text, "causal"), []
    for line in FACTS.read_text(encoding="utf-8").splitlines()[:24]:
        fact = json.loads(line)
        record = Record({"city": fact["city"]}, fact["continent"], "")
        prompt = template.encode(record, forms)
        (answer,) = forms.after_space(fact["continent"])
        found.append(Member(Example(prompt.slots, prompt.answer_position, answer, record)))
    return found


def _gradients(folder, text):
    """Losses, ranks and the table's gradient: plain, then with every saving."""
    members, topology, found = _members(folder, text), connect(), []
    for speed in (SpeedConfig(**PLAIN), SpeedConfig(context_disk_gib=0.0)):
        host = open_host(folder, topology=topology, speed=speed)
        host.keep_contexts([m.slots for m in members], [0] * len(members), None)
        table = (0.1 * torch.randn(6, host.width, generator=torch.Generator().manual_seed(0))).requires_grad_()
        candidates = torch.tensor(sorted({m.example.answer for m in members}))
        losses, ranks = Scorer(host, candidates).losses(collate(members, host, 0, members[0]), table)
        losses.sum().backward()
        found.append((losses.detach(), ranks, table.grad))
    disconnect()
    return found


@pytest.mark.parametrize("text", ["[P*3] {city} [P*3] [answer]", "The city of {city} [P*6] [answer]"])
def test_all_savings_give_the_gradient_of_none(text):
    plain, saved = run_ranks(1, _gradients, embedded_folder(), text)[0]
    torch.testing.assert_close(saved[0], plain[0], rtol=5e-5, atol=0)
    assert torch.equal(saved[1], plain[1])
    assert (saved[2] - plain[2]).norm() < 5e-5 * plain[2].norm()


def _in_both_dtypes(folder):
    """The table's gradient in fp32 and in bf16, where the prompt starts as six words' vectors."""
    members, topology, found = _members(folder, "[P*3] {city} [P*3] [answer]"), connect(), []
    for dtype in ("fp32", "bf16"):
        host = open_host(folder, dtype, topology=topology)
        table = host.module.vocabulary[504:510].detach().float().clone().requires_grad_()
        losses, _ = Scorer(host, None).losses(collate(members, host, 0, members[0]), table)
        losses.sum().backward()
        found.append(table.grad)
    disconnect()
    return found


def test_bf16_points_the_way_fp32_does():
    """Near words: 0.9997 was seen. A freshly drawn encoder may start where bf16 gives 0.6 (docs/speed.md)."""
    fp32, bf16 = run_ranks(1, _in_both_dtypes, embedded_folder())[0]
    cosine = torch.nn.functional.cosine_similarity(fp32.flatten(), bf16.flatten(), dim=0)
    assert cosine > 0.99
