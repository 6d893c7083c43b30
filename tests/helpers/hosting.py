"""A hosted backbone in one line, in a rank of ``run_ranks``."""

from pathlib import Path
from typing import Any

from megaptune.backbone.description import describe_backbone
from megaptune.backbone.host import BackboneHost
from megaptune.config import ParallelConfig, SpeedConfig
from megaptune.run.grid import build_grid
from megaptune.run.topology import Topology, connect


def open_host(
    folder: Path,
    dtype: str = "fp32",
    topology: Topology | None = None,
    speed: SpeedConfig | None = None,
    **parallel: Any,
) -> BackboneHost:
    """Join the ranks, unless ``topology`` says they are, and host ``folder``: ``open_host(folder, zero_stage=3)``."""
    settings = ParallelConfig(**parallel)
    topology = topology or connect()
    grid = build_grid(topology, settings.tensor_parallel, settings.across_nodes)
    return BackboneHost(describe_backbone(folder, "auto"), dtype, settings, grid, topology.device, speed)
