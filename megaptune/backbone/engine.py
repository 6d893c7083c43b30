"""DeepSpeed around a model that is loaded already, and what has to be put right in DeepSpeed for that."""

from typing import Any

import torch
from torch import nn

from megaptune.run.grid import ProcessGrid


def zero_init(config: dict[str, Any], grid: ProcessGrid, dtype: torch.dtype, trained: bool) -> Any:
    """What turns a parameter into ZeRO 3's, one at a time."""
    import deepspeed

    init = deepspeed.zero.Init(
        config_dict_or_path=config, data_parallel_group=grid.data_group, dtype=dtype, mpu=_mpu(grid)
    )
    if trained:
        init._enable_mem_efficient_linear()  # torch's linear would hold on to the gathered weight until backward
    return init


def _mpu(grid: ProcessGrid) -> ProcessGrid | None:
    return grid if grid.shards > 1 else None


def start_engine(module: nn.Module, config: dict[str, Any], grid: ProcessGrid, optimizer: Any = None) -> Any:
    """DeepSpeed around a loaded module; with torch's ``optimizer`` over its parameters it trains them."""
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine

    # Every rank has read its part of the same files. Sending them again would take time and, on CPU, copy every page of
    # the weights that the ranks of a host share through the memory map.
    broadcast = DeepSpeedEngine._broadcast_model
    DeepSpeedEngine._broadcast_model = lambda engine: None
    _forget_releases_with_their_trace()
    try:
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, mpu=_mpu(grid))
    finally:
        DeepSpeedEngine._broadcast_model = broadcast
    return engine


def _forget_releases_with_their_trace() -> None:
    """Let ZeRO 3 decide anew which weights to keep when it learns another order of modules.

    DeepSpeed 0.19.8 remembers the decision beyond that order. What it sees first here is a forward without a backward
    (the probe, an evaluation), in which nothing is needed again: every later step would fetch all weights twice.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    clear, decide = Coordinator._clear_trace_structures, Coordinator._PartitionedParameterCoordinator__params_to_release
    # The cache stands inside a wrapper of DeepSpeed's that does not show it.
    cells = [cell.cell_contents for cell in decide.__closure__ or ()]
    cached = next((inner for inner in cells if hasattr(inner, "cache_clear")), None)
    if cached is None or getattr(clear, "forgets_releases", False):
        return

    def clear_all(coordinator: Any) -> None:
        clear(coordinator)
        cached.cache_clear()

    clear_all.forgets_releases = True  # type: ignore[attr-defined]
    Coordinator._clear_trace_structures = clear_all
