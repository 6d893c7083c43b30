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
    random_seed: int | None = None,
    **parallel: Any,
) -> BackboneHost:
    """Join the ranks, unless ``topology`` says they are, and host ``folder``: ``open_host(folder, zero_stage=3)``."""
    settings = ParallelConfig(**parallel)
    topology = topology or connect()
    grid = build_grid(topology, settings.tensor_parallel, settings.across_nodes)
    description = describe_backbone(folder, "auto", random_seed)
    return BackboneHost(description, dtype, settings, grid, topology.device, speed)


def training(config: Any, host: BackboneHost, topology: Topology, task: Any, **candidates: Any) -> Any:
    """A trainer with one job in it, of an encoded task; ``candidates``: ids of readings beside ``vocabulary``."""
    from megaptune.examples import PreparedTask
    from megaptune.jobs import Job, Variant
    from megaptune.run.directory import RunDirectory
    from megaptune.run.monitor import Monitor
    from megaptune.run.stopping import StopRequest
    from megaptune.scoring import Scorer
    from megaptune.tasks.records import TaskData
    from megaptune.trainer import Stage, Trainer

    method = config.methods[0]
    prepared = PreparedTask(TaskData("t", {}, None), {"vocabulary": None, **candidates}, None, task)
    folder = RunDirectory(config.run.directory).job("t", method, 0)
    job = Job(0, method, prepared, task, 0, Variant(config.train.learning_rate, task.template.text), folder)
    scorers = {reading: Scorer(host, [ids]) for reading, ids in prepared.candidates.items()}
    stage = Stage(config, host, topology, scorers, 0, Monitor(False), StopRequest(None))
    trainer = Trainer(stage, [job], folder / "checkpoints", lambda *_: None)
    trainer.move_up()
    return trainer
