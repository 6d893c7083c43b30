"""Ways to lay a run over ranks, and the machines that they run on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megaptune.config import ParallelConfig

Offload = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class Layout:
    """``replicas`` groups of ``tensor_parallel`` ranks; the other fields are those of the configuration."""

    tensor_parallel: int = 1
    replicas: int = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Offload = "none"
    activation_checkpointing: bool = False

    @classmethod
    def stated(cls, parallel: ParallelConfig, world_size: int) -> "Layout":
        """What a configuration says, over ``world_size`` ranks that it divides."""
        return cls(
            parallel.tensor_parallel,
            world_size // parallel.tensor_parallel,
            parallel.zero_stage,
            parallel.offload,
            parallel.activation_checkpointing,
        )

    @property
    def world_size(self) -> int:
        return self.tensor_parallel * self.replicas

    def settings(self, parallel: ParallelConfig) -> ParallelConfig:
        """``parallel`` with this layout stated in it."""
        return parallel.model_copy(
            update={
                "layout": "stated",
                "tensor_parallel": self.tensor_parallel,
                "zero_stage": self.zero_stage,
                "offload": self.offload,
                "activation_checkpointing": self.activation_checkpointing,
            }
        )

    def __str__(self) -> str:
        parts = [f"TP {self.tensor_parallel} x DP {self.replicas}", f"ZeRO {self.zero_stage}"]
        parts += ["activation checkpointing"] if self.activation_checkpointing else []
        parts += [f"offload to {self.offload}"] if self.offload != "none" else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Machines:
    """nodes x ranks_per_node ranks. memory_bytes: of a rank's device (on CPU: its part of the host's memory);
    host_bytes: of a node, None where it is not known."""

    nodes: int
    ranks_per_node: int
    memory_bytes: int
    host_bytes: int | None = None
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def __str__(self) -> str:
        what = {"cuda": "device", "cpu": "host"}[self.device]
        nodes = f"{self.nodes} node{'s' if self.nodes > 1 else ''}"
        return f"{nodes} of {self.ranks_per_node} ranks, {gibibytes(self.memory_bytes)} of {what} memory a rank"


def this_machine(world_size: int, ranks_per_node: int, cuda: bool) -> Machines:
    """The machine that this process runs on, as one of equal nodes."""
    import torch

    host = _host_bytes()
    nodes = max(1, world_size // ranks_per_node)
    if not cuda:
        return Machines(nodes, ranks_per_node, host // ranks_per_node, host, "cpu")
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return Machines(nodes, ranks_per_node, total, host, "cuda")


def _host_bytes() -> int:
    """Of this host, or what its control group allows."""
    import os

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(file).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return total


def gibibytes(size: float) -> str:
    """A size as people read it: ``2.75 GiB``, ``512 KiB``."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}" if size < 100 * scale else f"{size / scale:,.0f} {unit}"
    return f"{size:.0f} B"


def parse_size(text: str) -> int:
    """``80GiB``, ``80GB`` or ``80`` (GiB) in bytes.

    :raises ValueError: for anything else.
    """
    units = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6, "": 2**30}
    number = text.strip().rstrip("BGIMbgim")
    size = float(number) * units[text.strip()[len(number) :].strip().lower()] if number else 0.0
    if not 0 < size < 2**60:
        raise ValueError(text)
    return int(size)
