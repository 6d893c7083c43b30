"""Saving jobs that train together, and continuing them: one checkpoint of all at the same step, so that a resumed run
mixes the same batches as one that nobody touched.

Ranks that own prompts write them; whoever owns them after a restart, on any number of ranks, reads them.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from megaptune.backbone.host import BackboneHost
from megaptune.config import Config
from megaptune.errors import CheckpointError
from megaptune.jobs import Selection, Training
from megaptune.prompts.bank import PromptBank
from megaptune.run.checkpoint import Checkpoint, CheckpointFolder, read_checkpoint, save_file
from megaptune.run.monitor import Monitor
from megaptune.run.topology import Topology, agree, everywhere, on_main

Resumed = tuple[int, list[Training], list[Training], dict[str, str]]
"""The bank's step, jobs in training, jobs that wait, and why others diverged."""


class TrainingState:
    def __init__(
        self,
        topology: Topology,
        host: BackboneHost,
        bank: PromptBank,
        folder: Path,
        config: Config,
        monitor: Monitor,
    ) -> None:
        self.topology, self.host, self.bank, self.config, self.monitor = topology, host, bank, config, monitor
        self.checkpoints = CheckpointFolder(folder, config.checkpoint.keep)

    def save(self, step: int, active: list[Training], diverged: dict[str, str]) -> None:
        """All jobs as they are after ``step`` steps of the bank; collective."""
        self.monitor.flush()  # a checkpoint must not be ahead of the record
        state = {
            "step": step,
            "jobs": {training.name: training.state() for training in active},
            "diverged": diverged,
            "backbone": self.host.fingerprint.as_dict(),
        }
        tensors: dict[str, Tensor] = {}
        for training in active:
            found = self.bank.tensors(training.prompt)
            tensors |= {f"{training.name}:{name}": tensor for name, tensor in found.items()}
        if self.host.trained:
            self.checkpoints.save_together(self.topology, self.host.weights.write, step, tensors, state)
        elif self.bank.sharded:
            agree(None)  # rank 0 has flushed
            write = lambda file: save_file(tensors, file)  # noqa: E731
            self.checkpoints.save_together(self.topology, write, step, {}, state, "prompts")
        elif self.topology.is_main:
            self.checkpoints.save(step, tensors, state)

    def resume(self, trainings: list[Training]) -> Resumed:
        """Jobs as the newest whole checkpoint has them; without one, all wait."""
        newest = on_main(self.topology, lambda: self.checkpoints.newest(self.monitor.warn))
        if newest is None:
            self.monitor.rewind({training.name: 0 for training in trainings})
            return 0, [], trainings, {}
        found = read_checkpoint(newest, check=False)  # rank 0 has checked it
        saved: dict[str, Any] = found.state.get("jobs", {})
        if "jobs" not in found.state:
            raise CheckpointError(
                f"{found.folder}: written by an older version, whose checkpoints held one job; finish the run with "
                "that version, or remove the folder to start its jobs over"
            )
        self.host.fingerprint.require(found.state["backbone"], found.folder)
        active = [training for training in trainings if training.name in saved]
        order = list(saved)
        active.sort(key=lambda training: order.index(training.name))
        diverged: dict[str, str] = found.state["diverged"]
        waiting = [t for t in trainings if t.name not in saved and t.name not in diverged]
        for training in active:
            if saved[training.name]["data"] != training.digest:
                raise CheckpointError(
                    f"{found.folder}: the training records of {training.name} or their tokens changed since this "
                    "checkpoint was saved; name another run.directory"
                )
            self.bank.add(training.prompt)
        everywhere(self.topology, lambda: self._load(found, active, saved))
        if self.host.trained and active:
            self.host.weights.renew()
        steps = {training.name: training.step for training in active}
        steps |= {training.name: 0 for training in waiting}
        self.monitor.rewind(steps)
        for line in resumed(active):
            self.monitor.say(line)
        return found.state["step"], active, waiting, diverged

    def _load(self, found: Checkpoint, active: list[Training], saved: dict[str, Any]) -> None:
        for training in active:
            state = saved[training.name]
            held = self.bank.holds(training.prompt)
            try:
                self.bank.load(training.prompt, found.below(f"{training.name}:") if held else {}, state["step"])
            except KeyError as error:
                raise CheckpointError(f"{found.folder}: {training.name} lacks {error}") from None
            training.selection = Selection(**{**state["selection"], "patience": self.config.train.patience})
            if self.host.trained:
                self.host.weights.read(found.lm_pieces, training.step)

    def clear(self) -> None:
        """All jobs have their results."""
        if self.topology.is_main:
            self.checkpoints.clear()


def resumed(trainings: list[Training]) -> list[str]:
    """A line for those that have done as many steps of as many."""
    names: dict[tuple[int, int], list[str]] = {}
    for training in trainings:
        names.setdefault((training.step, training.total_steps), []).append(training.name)
    return [
        (found[0] if len(found) == 1 else f"{len(found)} jobs ({found[0]} to {found[-1]})")
        + f"  resumed at step {step} of {total}"
        for (step, total), found in names.items()
    ]
