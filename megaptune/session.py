"""From a configuration to a finished run: join the ranks, prepare, train, write the table, leave a state."""

from megaptune.config import Config
from megaptune.errors import MegaptuneError, SetupError


def run_training(config: Config) -> None:
    """:raises MegaptuneError: on every rank alike; ``state.json`` says so."""
    from megaptune.run import preflight, roll_call
    from megaptune.run import topology as ranks
    from megaptune.run.directory import RunDirectory
    from megaptune.run.grid import build_grid
    from megaptune.run.monitor import Monitor
    from megaptune.run.stopping import StopRequest

    topology = ranks.connect(config.launch)
    from megaptune.experiment import Experiment
    from megaptune.planning.settle import settle_layout
    from megaptune.preparation import prepare_run

    directory = RunDirectory(config.run.directory)
    monitor = Monitor(topology.is_main)
    claimed = False
    try:
        with StopRequest(directory.stop_file if topology.is_main else None) as stop:
            preflight.require(config, topology)
            roll_call.mark("preparing the data")
            prepared = settle_layout(prepare_run(config, monitor), topology, monitor)
            parallel = prepared.config.parallel
            grid = build_grid(topology, parallel.tensor_parallel, parallel.across_nodes)
            ranks.on_main(topology, lambda: directory.claim(config))
            claimed = True
            if topology.is_main:
                directory.set_state("running")
                roll_call.on_failure(lambda reason: directory.set_state("failed", SetupError.exit_code, reason))
            tensorboard = directory.path / "tb" if config.monitor.tensorboard else None
            monitor = Monitor(topology.is_main, directory.metrics_file, tensorboard)
            experiment = Experiment.open(prepared, topology, grid, directory, monitor, stop)
            table = experiment.run()
        if topology.is_main:
            table.write(directory.path)
            monitor.show(table.console())
            monitor.say(f"written to {directory.path / 'results.md'}")
        experiment.require_finite()
        if topology.is_main:
            directory.set_state("finished", 0)
    except BaseException as error:
        if claimed and topology.is_main:
            _remember_failure(directory, error)
        raise
    finally:
        monitor.close()
        ranks.disconnect()


def run_preflight(config: Config) -> None:
    """Join the ranks, print the checks of their hosts, and leave.

    :raises MegaptuneError: on every rank alike, when a check failed.
    """
    from megaptune.run import preflight
    from megaptune.run import topology as ranks
    from megaptune.run.monitor import Monitor

    topology = ranks.connect(config.launch)
    try:
        checks = preflight.run_checks(config, topology)
        Monitor(topology.is_main).show(preflight.table(checks))
        failed = [check for check in checks if check.failed]
        if failed:
            raise failed[0].error(f"{len(failed)} of {len(checks)} checks failed").shared()
    finally:
        ranks.disconnect()


def _remember_failure(directory: object, error: BaseException) -> None:
    from megaptune.errors import StoppedEarly
    from megaptune.run.directory import RunDirectory

    assert isinstance(directory, RunDirectory)
    code = error.exit_code if isinstance(error, MegaptuneError) else 1
    status = "stopped" if isinstance(error, StoppedEarly) else "failed"
    directory.set_state(status, code, str(error) or type(error).__name__)
