"""The layout never changes the result: ranks, ZeRO stage and threads, against one process at ZeRO 0."""

import pytest
import torch
from ranks import run_ranks, train
from runs import losses, metrics, prompt

pytestmark = pytest.mark.dist

KINDS = ["llama", "gpt2", "bert", "roberta"]


@pytest.fixture(scope="module", params=KINDS)
def reference(request, tiny, facts, tmp_path_factory):
    """A backbone kind, its configuration, and the run of one rank at ZeRO 0."""
    from tiny import write_config

    folder = tmp_path_factory.mktemp(request.param)
    files = {split: str(path) for split, path in facts.items()}
    # 22 examples in batches of 8: the last batch is short, and 3 ranks share 2 micro-batches, so one has none.
    task = {**files, "limit_train": 22}
    config = write_config(folder, request.param, backbone={"path": str(tiny(request.param))}, task=task)
    run = folder / "one"
    run_ranks(1, train, config, f"run.directory={run}")
    return request.param, config, run


def assert_same_run(run, expected):
    assert metrics(run) == metrics(expected)
    ours, theirs = prompt(run), prompt(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("ranks", [2, 3])
def test_data_parallel_ranks_give_the_same_bits(reference, ranks, tmp_path):
    _, config, expected = reference
    run_ranks(ranks, train, config, f"run.directory={tmp_path / 'run'}")
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.parametrize("ranks", [1, 2])
def test_zero_3_gives_the_same_bits(reference, ranks, tmp_path):
    _, config, expected = reference
    run = tmp_path / "run"
    run_ranks(ranks, train, config, f"run.directory={run}", "parallel.zero_stage=3")
    assert_same_run(run, expected)


def test_the_size_of_micro_batches_changes_only_the_rounding(reference, tmp_path):
    _, config, expected = reference
    for size in (1, 3, 8):
        run = tmp_path / f"micro{size}"
        run_ranks(1, train, config, f"run.directory={run}", f"train.micro_batch={size}")
        assert losses(run) == pytest.approx(losses(expected), rel=1e-5)


def test_bf16_backbone_trains_alike_at_zero_0_and_3(reference, tmp_path):
    """bf16 keeps 8 bits of mantissa: losses stay within 2 % of fp32's over the first epoch."""
    _, config, expected = reference
    fp32 = losses(expected)[:3]
    for stage in (0, 3):
        run = tmp_path / f"zero{stage}"
        run_ranks(2, train, config, f"run.directory={run}", f"parallel.zero_stage={stage}", "backbone.dtype=bf16")
        assert losses(run)[:3] == pytest.approx(fp32, rel=0.02)
        assert all(weight.dtype == torch.float32 for weight in prompt(run).values())
