"""Frozen weights that wait in host memory or on disk: five steps give the losses of a run that keeps them.

NVMe needs two C++ ops of DeepSpeed's, which are compiled once into the environment (minutes); without libaio's headers
that part is skipped. Tensors whose share is under 1 MiB stay in memory, so the model here has larger ones, and the test
looks for the swap files.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from plain import Trained, save_model, settings, trained
from ranks import RankFailed, run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]

WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = save_model("llama", tmp_path_factory.mktemp("wide") / "model", **WIDE)
    return folder, _trained(folder, folder.parent / "kept", tensor_parallel=1)


def _trained(folder: Path, run: Path, ranks: int = 2, **parallel) -> Trained:
    config = settings(folder, run, parallel={"zero_stage": 3, **parallel})
    return run_ranks(ranks, trained, config, timeout_s=300)[0]


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_host_memory(wide, tensor_parallel, tmp_path):
    folder, kept = wide
    found = _trained(folder, tmp_path / "run", offload="cpu", tensor_parallel=tensor_parallel)
    assert found.losses == (kept.losses if tensor_parallel == 1 else pytest.approx(kept.losses, rel=1e-3))


@pytest.fixture(scope="module")
def ops():
    """The compiled ops, in a folder of this environment's own: a killed build elsewhere cannot hold the tests up."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")
    try:
        run_ranks(1, _build, timeout_s=1500)
    except RankFailed as failure:
        if "needs libaio" in str(failure):
            pytest.skip("libaio's headers are not installed: offload to NVMe was NOT tested (install libaio-dev)")
        raise


def _build() -> None:
    from megaptune.backbone.nvme import build_ops

    build_ops(print)


@pytest.mark.usefixtures("ops")
def test_nvme(wide, tmp_path):
    folder, kept = wide
    swap = tmp_path / "swap"
    swap.mkdir()
    found = _trained(folder, tmp_path / "run", offload="nvme", offload_folder=swap)
    assert found.losses == kept.losses
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found.gradients, kept.gradients, strict=True))
    files = [file for file in swap.rglob("*.swp") if file.stat().st_size >= 1 << 20]
    # seven matrices of two layers, of which the attention's are exactly at the limit; every rank has its own files
    assert len({file.name for file in files}) >= 6
    assert len(files) >= 12


def test_nvme_folder_that_cannot_be_written_or_has_no_room(tmp_path):
    from megaptune.backbone.nvme import check_folder
    from megaptune.errors import SetupError

    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"offload_folder .*file/swap cannot be written to"):
        check_folder(tmp_path / "file" / "swap", 1)
    with pytest.raises(SetupError, match=r"GiB free; this host's share of the weights takes"):
        check_folder(tmp_path, 1 << 60)
