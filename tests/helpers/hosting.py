"""A hosted backbone in one line, in a rank of ``run_ranks``."""

from pathlib import Path
from typing import Any

from megaptune.backbone.description import describe_backbone
from megaptune.backbone.host import BackboneHost
from megaptune.config import ParallelConfig
from megaptune.run.grid import build_grid
from megaptune.run.topology import connect


def open_host(folder: Path, dtype: str = "fp32", **parallel: Any) -> BackboneHost:
    """Join the ranks and host ``folder``: ``open_host(folder, tensor_parallel=2, zero_stage=3)``."""
    settings = ParallelConfig(**parallel)
    topology = connect()
    grid = build_grid(topology, settings.tensor_parallel, settings.across_nodes)
    return BackboneHost(describe_backbone(folder, "auto"), dtype, settings, grid, topology.device)
