"""Where kept contexts lie: in memory, in files, or nowhere; and what becomes of files that are damaged."""

import pytest
import torch

from megaptune.backbone import context_cache
from megaptune.backbone.context_cache import ContextCache, context_of, worth_keeping
from megaptune.config import SpeedConfig
from megaptune.run.grid import ProcessGrid

CPU = torch.device("cpu")
LAYERS, HEADS, WIDTH = 2, 1, 3
TOKEN_BYTES = LAYERS * 2 * HEADS * WIDTH * 4
CONTEXTS = [(5, 6, 7, 8), (5, 6), (9, 9, 9)]


class Backbone:
    """Keys and values that say which token they are of; counts the tokens that it computes."""

    def __init__(self) -> None:
        self.computed = 0

    def __call__(self, packed) -> torch.Tensor:
        self.computed += packed.slots.numel()
        ids = packed.slots[0].float() + 0.1 * packed.positions[0]
        return ids[:, None].expand(LAYERS, 2, HEADS, -1, WIDTH).contiguous()


def cache(folder=None, host_tokens=100, disk_tokens=100) -> ContextCache:
    sizes = {"host": host_tokens * TOKEN_BYTES / 2**30, "disk": disk_tokens * TOKEN_BYTES / 2**30}
    speed = SpeedConfig(context_host_gib=sizes["host"], context_disk_gib=sizes["disk"])
    return ContextCache(Backbone(), TOKEN_BYTES, CPU, ProcessGrid(), speed, folder)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A chunk a context, but for the two shortest together."""
    monkeypatch.setattr(context_cache, "CHUNK_TOKENS", 5)


def assert_gathers(kept: ContextCache, contexts) -> None:
    found = kept.gather([(), *contexts])
    longest = max(len(context) for context in contexts)
    assert found.shape == (LAYERS, 2, 1 + len(contexts), HEADS, longest, WIDTH)
    assert not found[:, :, 0].any()
    for number, context in enumerate(contexts, start=1):
        expected = torch.tensor([token + 0.1 * place for place, token in enumerate(context)])
        torch.testing.assert_close(found[1, 0, number, 0, : len(context), 0], expected)
        assert not found[:, :, number, :, len(context) :].any()


def test_batches_share_the_memory_and_none_is_overwritten_under_a_backward_pass():
    kept = cache()
    kept.keep(CONTEXTS)
    queries = torch.ones(WIDTH, requires_grad=True)
    first = kept.gather(CONTEXTS[:1])
    scores = first @ queries
    assert kept.gather(CONTEXTS[2:]).data_ptr() == first.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


def test_a_context_is_what_precedes_the_first_pseudo_token():
    assert context_of([5, 6, -1, 7]) == (5, 6)
    assert context_of([-1, 5]) == context_of([5, 6]) == ()


def test_what_a_whole_group_begins_with_is_not_worth_keeping():
    slots = [[1, -1, 4], [1, -1, 5], [1, 8, -3], [1, 9, -3]]
    assert sorted(worth_keeping(slots, [0, 0, 1, 1])) == [(1, 8), (1, 9)]


def test_contexts_are_computed_once():
    kept = cache()
    kept.keep(CONTEXTS)
    kept.keep([*CONTEXTS, (5, 6)])
    assert kept.compute.computed == 9
    assert kept.lengths([[5, 6, -1], [5, 6, 7, -1], [9, 9, 9, -2, 4]]) == [2, 0, 3]
    assert_gathers(kept, CONTEXTS)


@pytest.mark.parametrize(("host", "disk", "held"), [(4, 100, 3), (4, 0, 1), (0, 5, 1), (0, 0, 0)])
def test_budgets_are_kept_to(tmp_path, host, disk, held):
    kept = cache(tmp_path / "files", host, disk)
    kept.keep(CONTEXTS)
    fitting = [context for context in CONTEXTS if context in kept.places]
    assert len(fitting) == held
    if fitting:
        assert_gathers(kept, fitting)


def test_files_save_a_second_process_the_work(tmp_path):
    cache(tmp_path / "files").keep(CONTEXTS)
    again = cache(tmp_path / "files")
    again.keep(CONTEXTS)
    assert again.compute.computed == 0
    assert_gathers(again, CONTEXTS)


@pytest.mark.parametrize("damage", ["a bit", "half of it"])
def test_a_damaged_file_is_computed_again(tmp_path, damage):
    cache(tmp_path / "files").keep(CONTEXTS)
    (first, _) = sorted((tmp_path / "files").iterdir())
    whole = first.read_bytes()
    first.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage == "a bit" else whole[: len(whole) // 2])
    again = cache(tmp_path / "files")
    again.keep(CONTEXTS)
    assert again.compute.computed in (4, 5)  # one of the two chunks
    assert first.read_bytes() == whole
    assert_gathers(again, CONTEXTS)


def test_files_that_cannot_be_written_cost_memory_and_not_the_run(tmp_path):
    (tmp_path / "files").write_text("in the way")
    kept = cache(tmp_path / "files", host_tokens=0)
    kept.keep(CONTEXTS)
    assert str(tmp_path / "files") in kept.problem
    assert_gathers(kept, CONTEXTS)
