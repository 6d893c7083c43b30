"""The layout of a run: chosen where the configuration says ``auto``, checked where it states one."""

from dataclasses import replace

from megaptune.config import Config, ParallelConfig
from megaptune.planning.choice import recommend, require_fit, weigh
from megaptune.planning.layout import Layout, Machines, this_machine
from megaptune.planning.workload import Shapes, Workload
from megaptune.preparation import PreparedRun
from megaptune.run.grid import check_grid
from megaptune.run.monitor import Monitor
from megaptune.run.topology import Topology, on_main


def settle_layout(run: PreparedRun, topology: Topology, monitor: Monitor) -> PreparedRun:
    """The run with everything stated in its ``parallel`` section, as rank 0 finds it; no weight is read for it.

    :raises SetupError: when it does not fit; when ranks do not divide into its groups.
    """

    def settled() -> ParallelConfig:
        machines = this_machine(topology.world_size, topology.local_world_size, topology.device.type == "cuda")
        drawn = run.backbone.random_seed is not None
        shapes = Shapes(run.backbone.folder, run.backbone.kind, run.config.backbone.dtype, drawn)
        return settle(run.config, shapes, Workload.prepared(run), machines, monitor)

    parallel = on_main(topology, settled)
    return replace(run, config=run.config.model_copy(update={"parallel": parallel}))


def settle(config: Config, shapes: Shapes, work: Workload, machines: Machines, monitor: Monitor) -> ParallelConfig:
    """The ``parallel`` section that a run takes on ``machines``."""
    parallel = config.parallel
    if parallel.layout == "auto":
        best, reason = recommend(weigh(shapes, work, machines, parallel), work)
        monitor.say(f"layout     {best.layout} (auto): {reason}")
        return best.layout.settings(parallel)
    check_grid(machines.world_size, machines.ranks_per_node, parallel.tensor_parallel, parallel.across_nodes)
    if parallel.check_memory:
        require_fit(shapes, work, Layout.stated(parallel, machines.world_size), machines, parallel)
    return parallel
