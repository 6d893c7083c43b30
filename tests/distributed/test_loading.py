"""What loading holds and reads: a rank's peak memory, its bytes of the file, and weights that ranks of a host share."""

import gc
from pathlib import Path

import pytest
import torch
from hosting import open_host
from plain import save_model
from ranks import run_ranks

from megaptune.run.topology import connect, disconnect

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SLACK = 48 << 20  # the engine's hooks, the process group, and the window of the file that is being copied
BIG = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 6,
}
LAYER_BYTES = 4 * (4 * 1024 * 1024 + 3 * 1024 * 4096)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """0.4 GB, so that a share differs from the whole by more than the slack."""
    return save_model("llama", tmp_path_factory.mktemp("big") / "model", **BIG)


def _memory(*names: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(tuple(f"{name}:" for name in names)))


def _load(small: Path, folder: Path, parallel: dict) -> dict[str, int]:
    topology = connect()
    open_host(small, topology=topology, **parallel)  # what DeepSpeed and torch import and set up on the way
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _memory("VmRSS")
    host = open_host(folder, topology=topology, **parallel)
    grown = host.load_report.peak_host_bytes - before
    held = sum(getattr(p, "ds_tensor", p).numel() * p.itemsize for p in host.module.parameters())
    in_file = [p for p in host.module.parameters() if p.numel() and not _owns_memory(p)]
    answer = {
        "grown": grown,
        "held": held,
        "read": host.load_report.bytes_read,
        "anonymous": _memory("RssAnon"),
        "in_file": sum(p.numel() * p.itemsize for p in in_file),
        "parameters": host.num_parameters,
    }
    disconnect()
    return answer


def _owns_memory(parameter: torch.Tensor) -> bool:
    """Whether a weight's memory is anonymous; else it is a page of the weight file."""
    address = parameter.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < stop:
            return "safetensors" not in line
    raise AssertionError("memory that is not mapped")


def test_zero_3_rank_peaks_at_its_share_and_one_layer(tiny, big):
    for found in run_ranks(2, _load, tiny("llama"), big, {"zero_stage": 3}):
        whole = 4 * found["parameters"]
        assert found["held"] == pytest.approx(whole / 2, rel=0.01)
        assert found["read"] == pytest.approx(whole / 2, rel=0.01)
        assert found["grown"] < found["held"] + LAYER_BYTES + SLACK < 0.85 * whole


@pytest.mark.parametrize("stage", [0, 3])
def test_tensor_parallel_rank_peaks_at_its_slices(tiny, big, stage):
    for found in run_ranks(2, _load, tiny("llama"), big, {"tensor_parallel": 2, "zero_stage": stage}):
        whole = 4 * found["parameters"]
        assert found["held"] == pytest.approx(whole / 2, rel=0.01)
        assert found["read"] == pytest.approx(whole / 2, rel=0.01)
        assert found["grown"] < found["held"] + LAYER_BYTES + SLACK < 0.85 * whole


def test_ranks_of_a_host_share_the_pages_of_the_file(tiny, big):
    """At ZeRO 0 on a CPU no rank has a copy of its own; with tensor parallelism, of what is cut by columns alone."""
    for found in run_ranks(2, _load, tiny("llama"), big, {"zero_stage": 0}):
        assert found["in_file"] == 4 * found["parameters"]
    for found in run_ranks(2, _load, tiny("llama"), big, {"tensor_parallel": 2}):
        assert 0.5 * found["held"] < found["in_file"] < 0.9 * found["held"]
