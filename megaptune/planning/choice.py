"""Which layout to take, and whether a stated one fits.

The order of preference follows what a choice costs. A layout without offload goes before one with it (every pass over
the weights crosses the host's bus or the disk), ZeRO 0 before 3 (the weights cross the network in every micro-batch),
keeping activations before computing them twice. Within that, as many ranks as possible should have a micro-batch to
work on in a step; and the smallest tensor-parallel group does, since each doubling adds traffic to every layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from megaptune.backbone.architectures import FAMILIES
from megaptune.config import ParallelConfig
from megaptune.errors import BackboneError, SetupError
from megaptune.planning.communication import Communication, communication_of
from megaptune.planning.layout import Layout, Machines, Offload, gibibytes
from megaptune.planning.memory import Memory, memory_of
from megaptune.planning.workload import Shapes, Workload

KEPT_FREE = 0.1  # of device and host memory: fragmentation, and what the estimates leave out
_OFFLOADS: tuple[Offload, ...] = ("none", "cpu", "nvme")


@dataclass(frozen=True)
class Candidate:
    """A layout with what it needs; problem says why it cannot be taken, and is None where it can."""

    layout: Layout
    machines: Machines
    idle_ranks: int
    memory: Memory | None
    communication: Communication | None
    problem: str | None

    @property
    def fits(self) -> bool:
        return self.problem is None

    @cached_property
    def preference(self) -> tuple[int, int, bool, int, int]:
        """The smaller, the better."""
        layout = self.layout
        offload = _OFFLOADS.index(layout.offload)
        return offload, layout.zero_stage, layout.activation_checkpointing, self.idle_ranks, layout.tensor_parallel

    def beaten_by(self, best: "Candidate") -> str:
        """Why ``best`` was preferred, in words."""
        ours, theirs = self.preference, best.preference
        if ours[0] != theirs[0]:
            return f"fits without offload to {self.layout.offload}"
        if ours[1] != theirs[1]:
            sent = self.communication.zero_3 if self.communication else 0
            return f"ZeRO {best.layout.zero_stage} is enough" + (
                f", and saves {gibibytes(sent)} a step" if sent else ""
            )
        if ours[2] != theirs[2]:
            return "fits without computing blocks twice"
        if ours[3] != theirs[3]:
            return f"{self.idle_ranks} of {self.layout.world_size} ranks without a micro-batch"
        return "a smaller tensor-parallel group does"


def candidate(shapes: Shapes, work: Workload, layout: Layout, machines: Machines) -> Candidate:
    """A layout, weighed."""
    busy = min(layout.replicas, work.pieces) * layout.tensor_parallel
    try:
        memory, communication = memory_of(shapes, work, layout, machines), communication_of(shapes, work, layout)
    except BackboneError as error:
        return Candidate(layout, machines, layout.world_size - busy, None, None, str(error))
    problem = _too_much(memory, machines)
    return Candidate(layout, machines, layout.world_size - busy, memory, communication, problem)


def _too_much(memory: Memory, machines: Machines) -> str | None:
    limit = (1 - KEPT_FREE) * machines.memory_bytes
    if memory.device_bytes > limit:
        return f"needs {gibibytes(memory.device_bytes)} of {gibibytes(limit)} a rank"
    host = memory.host_bytes * machines.ranks_per_node
    if machines.host_bytes is not None and host > (1 - KEPT_FREE) * machines.host_bytes:
        return f"needs {gibibytes(host)} of {gibibytes((1 - KEPT_FREE) * machines.host_bytes)} of host memory a node"
    return None


def layouts(shapes: Shapes, work: Workload, machines: Machines, parallel: ParallelConfig) -> Iterator[Layout]:
    """Every layout that could be asked for on these machines."""
    within = machines.world_size if parallel.across_nodes else machines.ranks_per_node
    known = shapes.family in FAMILIES
    sizes = [size for size in range(1, within + 1) if within % size == 0 and machines.world_size % size == 0]
    offloads = ["none"]
    if not work.tuned:  # offload is for weights that nobody writes to
        offloads += ["cpu"] * (machines.device == "cuda") + ["nvme"] * (parallel.offload_folder is not None)
    for offload in offloads:
        for stage in (3,) if offload != "none" else (1, 2, 3) if work.tuned else (0, 3):
            for checkpointing in (False, True) if known else (False,):
                for size in sizes if known else (1,):
                    replicas = machines.world_size // size
                    if replicas > 1 or stage < 3 or offload != "none":  # one replica has nobody to share with
                        yield Layout(size, replicas, stage, offload, checkpointing)  # type: ignore[arg-type]


def weigh(shapes: Shapes, work: Workload, machines: Machines, parallel: ParallelConfig) -> list[Candidate]:
    """All layouts, those that fit first, by preference."""
    weighed = [candidate(shapes, work, layout, machines) for layout in layouts(shapes, work, machines, parallel)]
    return sorted(weighed, key=lambda found: (not found.fits, found.preference))


def recommend(candidates: list[Candidate], work: Workload) -> tuple[Candidate, str]:
    """The best layout that fits, and the reason.

    :raises SetupError: when none fits.
    """
    best = candidates[0]
    if best.memory is None or not best.fits:
        raise SetupError(_nothing_fits(candidates))
    layout, machines = best.layout, best.machines
    limit = (1 - KEPT_FREE) * machines.memory_bytes
    reason = [
        f"needs {gibibytes(best.memory.device_bytes)} of {gibibytes(limit)} a rank ({100 * KEPT_FREE:.0f} % stay free)."
    ]
    if layout.tensor_parallel > 1:
        smaller = [c for c in candidates if _same_but_for_size(c.layout, layout) and c.preference > best.preference]
        smaller = [c for c in smaller if c.layout.tensor_parallel < layout.tensor_parallel]
        if smaller:
            pieces = f"a step has {work.pieces} micro-batch{'es' if work.pieces > 1 else ''} of {work.micro_batch}"
            idle = max(found.idle_ranks for found in smaller)
            reason.append(f"Smaller groups fit too, but {pieces}, which would leave {idle} ranks without work.")
        else:
            reason.append("Smaller tensor-parallel groups do not fit.")
    if best.idle_ranks:
        reason.append(
            f"{best.idle_ranks} of {layout.world_size} ranks have no micro-batch: lower train.micro_batch "
            f"(now {work.micro_batch} of a global batch of {work.global_batch}) or start fewer."
        )
    if layout.zero_stage == 3 and not work.tuned:
        reason.append("No layout fits in which every replica holds its weights.")
    if layout.activation_checkpointing:
        reason.append("Activations fit only if blocks are computed again in backward.")
    if layout.offload != "none":
        reason.append(f"Weights fit only in {'host memory' if layout.offload == 'cpu' else 'files'}.")
    return best, " ".join(reason)


def _same_but_for_size(one: Layout, other: Layout) -> bool:
    ours = one.zero_stage, one.offload, one.activation_checkpointing
    return ours == (other.zero_stage, other.offload, other.activation_checkpointing)


def _nothing_fits(candidates: list[Candidate]) -> str:
    possible = [found for found in candidates if found.memory is not None]
    nearest = min(possible, key=lambda found: found.memory.device_bytes if found.memory else 0)
    return (
        f"no layout fits on {nearest.machines}: the leanest, {nearest.layout}, {nearest.problem} "
        f"({_components(nearest.memory)}); use more ranks or larger ones, lower train.micro_batch or evaluation.batch, "
        "set backbone.dtype: bf16, or name a parallel.offload_folder for offload to disk"
    )


def require_fit(shapes: Shapes, work: Workload, layout: Layout, machines: Machines, parallel: ParallelConfig) -> None:
    """:raises SetupError: when a stated layout does not fit, with its components and the nearest one that does."""
    stated = candidate(shapes, work, layout, machines)
    if stated.memory is None or stated.fits:
        return  # what cannot be divided is refused where it is divided
    fitting = [found for found in weigh(shapes, work, machines, parallel) if found.fits]
    advice = "no other layout fits either: use more ranks or larger ones, or lower train.micro_batch"
    if fitting:
        nearest = min(fitting, key=lambda found: (_differences(found.layout, layout), found.preference))
        advice = f"the nearest layout that fits is {nearest.layout}: {_as_keys(nearest.layout, layout)}"
    raise SetupError(
        f"the layout {layout} does not fit on {machines}: it {stated.problem} ({_components(stated.memory)}); "
        f"{advice}. parallel.check_memory: false starts it all the same"
    )


def _differences(one: Layout, other: Layout) -> int:
    return len(_changed(one, other))


def _changed(one: Layout, other: Layout) -> dict[str, object]:
    keys = ("tensor_parallel", "zero_stage", "offload", "activation_checkpointing")
    return {key: getattr(one, key) for key in keys if getattr(one, key) != getattr(other, key)}


def _as_keys(layout: Layout, stated: Layout) -> str:
    return "set " + ", ".join(
        f"parallel.{key}: {str(value).lower()}" for key, value in _changed(layout, stated).items()
    )


def _components(memory: Memory | None) -> str:
    if memory is None:
        return "unknown"
    parts = {**memory.device, **{f"{name} (host)": size for name, size in memory.host.items()}}
    shown = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {gibibytes(size)}" for name, size in shown if size >= 0.01 * memory.device_bytes)
