"""What ``megaptune plan`` and ``megaptune train --dry-run`` do."""

import json
import os
import sys

from megaptune.config import Config
from megaptune.errors import ConfigError
from megaptune.planning.dry_run import dry_run
from megaptune.planning.layout import Machines
from megaptune.planning.report import PlanReport
from megaptune.planning.source import (
    ASSUMED_DEVICE_BYTES,
    ASSUMED_WORDS,
    assumed_tokens,
    find_backbone,
    planned_machines,
)
from megaptune.planning.workload import Workload
from megaptune.run.monitor import Monitor
from megaptune.run.topology import read_environment


def print_plan(
    config: Config,
    nodes: int,
    ranks_per_node: int | None,
    memory: str | None,
    host_memory: str | None,
    tokens: int | None,
    as_json: bool,
) -> None:
    """:raises MegaptuneError: no config.json, a size that is none, no layout that fits."""
    machines = _machines(nodes, ranks_per_node or _devices_here(), memory, host_memory)
    source = find_backbone(config)
    shapes = source.shapes(config)
    words = ASSUMED_WORDS if config.task.word_list else 0
    basis = "given" if tokens else "assumed: --tokens says otherwise"
    longest = min(tokens or assumed_tokens(config), source.max_tokens)
    work = Workload.assumed(config, source.kind, longest, basis, words)
    report = PlanReport(config, source, shapes, work, machines)
    if as_json:
        print(json.dumps(report.as_dict(), indent=2), file=sys.stdout)
    else:
        Monitor(speaks=True).show(report.console())


def run_dry(config: Config, world_size: int | None, ranks_per_node: int | None, memory: str | None) -> None:
    """:raises MegaptuneError: as the run itself would."""
    topology = read_environment(os.environ)
    world = world_size or topology.world_size
    per_node = ranks_per_node or (world if world_size else topology.local_world_size)
    if world % per_node:
        raise ConfigError(f"--world-size {world} is not a multiple of --ranks-per-node {per_node}")
    if memory is None:
        machines = Machines(world // per_node, per_node, ASSUMED_DEVICE_BYTES)
    else:
        machines = _machines(world // per_node, per_node, memory, None)
    monitor = Monitor(speaks=topology.is_main or world_size is not None)
    if memory is None and config.parallel.layout == "auto":
        monitor.say("memory     80 GiB a rank (assumed: --gpu-memory says otherwise)")
    dry_run(config, machines, monitor, check_memory=memory is not None)


def _machines(nodes: int, ranks_per_node: int, memory: str | None, host_memory: str | None) -> Machines:
    try:
        return planned_machines(nodes, ranks_per_node, memory, host_memory)
    except ValueError as error:
        raise ConfigError(f"--gpu-memory or --host-memory: {error} is no size; write 80GiB") from None


def _devices_here() -> int:
    import torch

    return max(1, torch.cuda.device_count())
