"""Compiled blocks against plain ones, and one compilation for all blocks and every number of tokens.

Tolerance: 1e-5 of the largest element in fp32 on these small models, whose sums Inductor forms in another order.
"""

import os
from dataclasses import replace

import pytest
import torch
from hosting import open_host
from plain import ROWS, VOCABULARY, save_model
from ranks import RankFailed, run_ranks

from megaptune.backbone import compiled
from megaptune.batches import Member, collate
from megaptune.config import SpeedConfig
from megaptune.errors import BackboneError, ConfigError, SetupError
from megaptune.examples import Example
from megaptune.run.topology import connect, disconnect
from megaptune.scoring import Scorer
from megaptune.tasks.records import Record

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5
CPU = torch.device("cpu")


def _members(masked: bool, count: int, text_first: bool) -> list[Member]:
    generator = torch.Generator().manual_seed(count)
    found = []
    for number in range(count):
        words = torch.randint(3, VOCABULARY, (3 + number % 5,), generator=generator).tolist()
        slots = [*words, -1, -2, -3] if text_first else [-1, -2, *words, -3]
        slots += [4, 9] if masked else []
        found.append(Member(Example(slots, len(slots) - (2 if masked else 1), 5 + number, Record({}, "", ""))))
    return found


def _figures(folder, parallel, compiles):
    """Of batches of several sizes: losses, ranks and the table's gradient, and without one; graphs compiled."""
    found, topology = [], connect()
    host = open_host(folder, topology=topology, speed=SpeedConfig(compile_blocks=compiles), **parallel)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    scorer = Scorer(host, [None])
    graphs = []
    for text_first in (False, True) if host.kind == "causal" else (False,):
        for count in (6, 9, 12):
            members = _members(host.kind == "masked", count, text_first)
            if text_first:
                host.keep_contexts([m.slots for m in members], [0] * count, None)
            table = torch.randn(ROWS, host.width, generator=torch.Generator().manual_seed(1)).requires_grad_()
            batch = collate(members, host, 0, members[0])
            losses, ranks = scorer.losses(batch, table)
            losses.sum().backward()
            found.append((losses.detach(), ranks, table.grad))
            if not text_first:
                with torch.no_grad():
                    found.append(scorer.losses(batch, table))
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    disconnect()
    return found, graphs


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.mark.parametrize(("family", "shards"), [("llama", 2), ("bert", 1)])
def test_compiled_blocks_compute_the_same(family, shards, tmp_path, cache):
    folder = save_model(family, tmp_path / "model", num_hidden_layers=4)
    parallel = {"tensor_parallel": shards}
    plain = run_ranks(shards, _figures, folder, parallel, False)
    ours = run_ranks(shards, _figures, folder, parallel, True, timeout_s=300)
    for (expected, none), (found, graphs) in zip(plain, ours, strict=True):
        assert set(none) == {0}
        for mine, theirs in zip(found, expected, strict=True):
            for one, other in zip(mine, theirs, strict=True):
                limit = TOLERANCE * float(other.abs().max()) if one.is_floating_point() else 0
                torch.testing.assert_close(one, other, rtol=0, atol=limit)
        assert graphs[0] > 0
        assert graphs[2] == graphs[0]  # neither blocks nor sizes are compiled apart
        assert graphs[-1] == graphs[3 % len(graphs)]
    for found, _ in ours:  # ranks stay in step to the bit
        for mine, first in zip(found, ours[0][0], strict=True):
            assert all(torch.equal(one, other) for one, other in zip(mine, first, strict=True))


def _deep_figures(folder, compiles):
    """Behind a deep prompt, of batches of several sizes, whose examples share a token: losses and the table's gradient;
    graphs compiled."""
    host = open_host(folder, speed=SpeedConfig(compile_blocks=compiles))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    scorer, found, graphs, length = Scorer(host, [None]), [], [], 3
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(length * host.deep.rows, host.deep.width, generator=generator)
    for count in (6, 9, 12):
        plain = [member.example for member in _members(False, count, text_first=False)]
        shown = [replace(example, slots=[7, *(max(slot, 8) for slot in example.slots[1:])]) for example in plain]
        members = [Member(example, 0, 0, length) for example in shown]
        batch, leaf = collate(members, host, 0, members[0]), table.clone().requires_grad_()
        assert batch.inputs.leads is not None
        losses, _ = scorer.losses(batch, leaf)
        losses.sum().backward()
        found += [losses.detach(), leaf.grad]
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    disconnect()
    return found, graphs


def test_compiled_blocks_read_deep_prompts(tmp_path, cache):
    folder = save_model("llama", tmp_path / "model")
    ((plain, none),) = run_ranks(1, _deep_figures, folder, False)
    ((found, graphs),) = run_ranks(1, _deep_figures, folder, True, timeout_s=300)
    assert set(none) == {0}
    for mine, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE * float(theirs.abs().max()))
    assert graphs[0] > 0
    assert graphs[2] == graphs[0]


def test_what_cannot_be_compiled_is_refused_with_what_to_change(monkeypatch):
    def require(family="llama", packs=True, stage=0, trained=False):
        compiled.require_compilable(family, packs, stage, trained, CPU)

    require()
    with pytest.raises(BackboneError, match="the backbone is 'bloom'"):
        require(family="bloom")
    with pytest.raises(ConfigError, match=r"parallel\.zero_stage: 0"):
        require(stage=3)
    with pytest.raises(ConfigError, match="for a frozen LM"):
        require(stage=1, trained=True)
    with pytest.raises(ConfigError, match="one of packing"):
        require(packs=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SetupError, match="no 'no-such-compiler'"):
        require()
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(compiled.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    with pytest.raises(SetupError, match=r"there is no /nowhere/Python\.h"):
        require()


def test_a_host_refuses_what_it_cannot_compile(tmp_path):
    folder = save_model("llama", tmp_path / "model")
    with pytest.raises(RankFailed, match=r"ConfigError: speed\.compile_blocks needs the weights in place"):
        run_ranks(1, _figures, folder, {"zero_stage": 3}, True)


@pytest.mark.parametrize(("given", "kept"), [(None, True), ("torchinductor_user", True), ("mine", False)])
def test_compilations_are_kept_where_the_user_says_or_in_the_cache(given, kept, tmp_path, monkeypatch):
    """torch's own choice, which its import leaves in the environment, is not the user's."""
    monkeypatch.setattr(compiled.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("MEGAPTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / (given or "")))
    if given is None:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compiled.compile_blocks([])
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / ("cache/inductor" if kept else "mine"))
