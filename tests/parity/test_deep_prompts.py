"""Deep prompts against transformers' own past keys and values, for causal models; against attention written out, for
masked ones, which take none: losses, and the gradient of the table.

Tolerance: 1e-5 of the largest element, fp32.
"""

import itertools

import pytest
import torch
from hosting import open_host
from plain import VOCABULARY, save_model
from plain_deep import plain_logits
from ranks import run_ranks
from torch import nn

from megaptune.batches import Member, collate
from megaptune.config import DeepConfig, SpeedConfig
from megaptune.examples import Example
from megaptune.prompts.encoder import build_encoder
from megaptune.run.topology import connect, disconnect
from megaptune.scoring import Scorer
from megaptune.tasks.records import Record

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5
LENGTH, PROMPTS, LAYERS, HEAD_WIDTH = 5, 2, 2, 8
SAVINGS = ("packing", "share_leading_tokens", "cut_last_block", "context_cache")
SPEEDS = [{}, dict.fromkeys(SAVINGS, False)]


def examples(masked: bool) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(8):
        slots = torch.randint(3, VOCABULARY, (3 + number % 5,), generator=generator).tolist()
        answer = int(torch.randint(3, VOCABULARY, (1,), generator=generator))
        place = len(slots) - (2 if masked else 1)
        found.append(Example([7, *slots], place + 1, answer, Record({}, "", "", "")))
    return found


def table_of(kv_heads: int) -> torch.Tensor:
    """Of two prompts, one after the other."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(PROMPTS * LENGTH * 2 * LAYERS, kv_heads * HEAD_WIDTH, generator=generator)


def figures(folder, layouts, table, speeds):
    """For each layout and setting of the savings: losses and the table's gradient."""
    found, topology = [], connect()
    for parallel, speed in itertools.product(layouts, speeds):
        host = open_host(folder, topology=topology, speed=SpeedConfig(**speed), **parallel)
        data = examples(host.kind == "masked")
        rows = LENGTH * host.deep.rows
        members = [Member(example, rows * (n % PROMPTS), n % PROMPTS, LENGTH) for n, example in enumerate(data)]
        leaf = table.clone().requires_grad_()
        losses, _ = Scorer(host, [None]).losses(collate(members, host, 0, members[0]), leaf)
        losses.sum().backward()
        found.append((losses.detach(), leaf.grad))
    disconnect()
    return found


def plainly(folder, table, kv_heads, masked=False):
    """The same by transformers' model, every example alone."""
    logits, leaf, losses = plain_logits(folder, masked), table.clone().requires_grad_(), []
    prompts = leaf.view(PROMPTS, LENGTH, LAYERS, 2, kv_heads, HEAD_WIDTH).permute(0, 2, 3, 1, 4, 5)
    for number, example in enumerate(examples(masked)):
        found = logits(prompts[number % PROMPTS], example.slots)[example.answer_position]
        losses.append(nn.functional.cross_entropy(found, torch.tensor(example.answer)))
    torch.stack(losses).sum().backward()
    return torch.stack(losses).detach(), leaf.grad


def assert_same(found, expected) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE * float(theirs.abs().max()))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt", "xglm", "bert", "roberta"])
def test_losses_and_gradients_match_a_plain_restatement(family, tmp_path):
    """Packed, packed in form only, and with blocks computed again in backward."""
    sizes = {"num_attention_heads": 4, "intermediate_size": 64} if family == "roberta" else {}
    folder, kv_heads = save_model(family, tmp_path / "model", **sizes), 2 if family == "llama" else 4
    table = table_of(kv_heads)
    expected = plainly(folder, table, kv_heads, masked=family in ("bert", "roberta"))
    assert all(float(gradient.abs().max()) > 1e-4 for gradient in expected[1].split(1)[:4])  # first token's, each layer
    layouts = [{}, {"activation_checkpointing": True}]
    (found,) = run_ranks(1, figures, folder, layouts, table, SPEEDS)
    for mine in found:
        assert_same(mine, expected)
    assert torch.equal(found[0][1], found[2][1])  # what is computed again has the same bits


@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 2), ("llama", 1), ("bert", 4)])
def test_layouts_agree(family, kv_heads, tmp_path):
    """Two ranks: tensor parallel, also where both hold the one key-value head; ZeRO 3; and both."""
    sizes = {"num_key_value_heads": kv_heads} if family == "llama" else {}
    folder, table = save_model(family, tmp_path / "model", **sizes), table_of(kv_heads)
    expected = plainly(folder, table, kv_heads, masked=family == "bert")
    divided = [{"tensor_parallel": 2}, {"tensor_parallel": 2, "zero_stage": 3, "activation_checkpointing": True}]
    for layouts in divided, [{}, {"zero_stage": 3}]:
        for found in run_ranks(2, figures, folder, layouts, table, [{}]):
            for mine in found:
                assert_same(mine, expected)
            # ZeRO's stage does not change a bit, nor does computing blocks again.
            assert torch.equal(found[0][1], found[1][1])


def _read_both_ways(folder, ids):
    """Features of examples behind words, and behind the deep prompt that the model makes of the words."""
    host = open_host(folder, tensor_parallel=2)
    table, found = host.deep_prompt_of(ids), []
    for first, virtual_tokens in ((ids, 0), ([], len(ids))):
        members = [
            Member(Example(first + e.slots, len(first) + e.answer_position, e.answer, e.record), 0, 0, virtual_tokens)
            for e in examples(masked=False)
        ]
        with torch.no_grad():
            inputs = collate(members, host, 0, members[0]).inputs
            found.append(host.features(inputs, table if virtual_tokens else torch.zeros(0, host.width)))
    disconnect()
    return found


@pytest.mark.parametrize(("family", "sizes"), [("gpt2", {}), ("llama", {"num_key_value_heads": 1})])
def test_a_prompt_made_of_words_is_read_like_the_words(family, sizes, tmp_path):
    folder = save_model(family, tmp_path / "model", **sizes)
    for words, prompt in run_ranks(2, _read_both_ways, folder, [9, 4, 30, 31]):
        assert_same([prompt], [words])


def test_mlp_gives_the_keys_and_values_of_pefts_prefix_encoder():
    """PEFT's order of a token's values is ours: layer by layer, keys before values."""
    from peft import PrefixEncoder, PrefixTuningConfig

    width, rows = 16, LENGTH * 2 * LAYERS
    theirs = PrefixEncoder(
        PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=LENGTH,
            num_transformer_submodules=1,
            token_dim=width,
            num_attention_heads=2,
            num_layers=LAYERS,
            encoder_hidden_size=24,
            prefix_projection=True,
        )
    )
    ours = build_encoder("deep_mlp", rows, width, 0.0, 3, DeepConfig(length=LENGTH, encoder="mlp", hidden_size=24))
    theirs.load_state_dict({name.replace("mlp.", "transform."): value for name, value in ours.state_dict().items()})
    expected = theirs(torch.arange(LENGTH)).view(rows, width)
    torch.testing.assert_close(ours(), expected, rtol=1e-6, atol=1e-7)
