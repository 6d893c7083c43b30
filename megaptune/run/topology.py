"""Who am I among how many: one mapping from the launchers' environments to ranks, and the process group over them.

``deepspeed`` and ``torchrun`` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; Slurm's ``srun`` and MPI's
``mpirun`` set their own names. Nothing set means one process.
"""

import datetime
import os
import socket
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from megaptune.errors import MegaptuneError, SetupError

T = TypeVar("T")

_LAUNCHERS = {
    "torch": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


@dataclass(frozen=True)
class Topology:
    """This process among all; every rank is a data-parallel replica."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def read_environment(environment: Mapping[str, str]) -> Topology:
    """:raises SetupError: when a launcher left half of what is needed, or the values contradict each other."""
    for launcher, (rank, world, local, local_world) in _LAUNCHERS.items():
        if launcher == "slurm" and "SLURM_STEP_ID" not in environment:
            continue  # inside an allocation, but not started by srun: a shell on the first node
        if rank not in environment and world not in environment:
            continue
        if rank not in environment or world not in environment:
            absent, there = (rank, world) if world in environment else (world, rank)
            raise SetupError(f"{there} is set but {absent} is not: start with deepspeed, torchrun, srun or mpirun")
        try:
            numbers = int(environment[rank]), int(environment[world]), int(environment.get(local, "0"))
            # DeepSpeed's launcher calls it LOCAL_SIZE; Slurm may write "2(x4)"
            size = environment.get(local_world) or environment.get("LOCAL_SIZE") or str(numbers[1])
            local_size = int(size.split("(")[0])
        except ValueError as error:
            raise SetupError(f"the {launcher} environment holds a rank that is no number: {error}") from None
        if not 0 <= numbers[0] < numbers[1]:
            raise SetupError(f"{rank}={numbers[0]} does not lie within {world}={numbers[1]}")
        unset = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if numbers[1] > 1 and launcher == "torch" and unset:
            raise SetupError(f"{rank} is set but {' and '.join(unset)} is not: start with deepspeed, torchrun or srun")
        return Topology(*numbers, local_world_size=max(1, local_size), launcher=launcher)
    return Topology()


def connect(timeout_s: int = 1800) -> Topology:
    """Join the process group (NCCL on GPU, gloo on CPU), through DeepSpeed, and return this process's place."""
    topology = read_environment(os.environ)
    _export(topology)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # The same sum whatever the number of threads: 1 rank x 2 threads and 2 ranks x 1 thread then agree bit by bit.
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // topology.local_world_size))
    # DeepSpeed's ZeRO calls both at each step.
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.*deprecated")
    import deepspeed
    import deepspeed.ops

    # DeepSpeed would build a C++ shared-memory op when joining on CPU: over a minute, and gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(topology.local_rank)
    deepspeed.init_distributed(
        dist_backend=backend,
        auto_mpi_discovery=False,
        verbose=False,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    return topology


def _export(topology: Topology) -> None:
    """Set the five variables that torch and DeepSpeed read, whatever the launcher called them."""
    os.environ.update(RANK=str(topology.rank), WORLD_SIZE=str(topology.world_size), LOCAL_RANK=str(topology.local_rank))
    if topology.launcher == "slurm":
        os.environ.setdefault("MASTER_ADDR", _first_slurm_host(os.environ))
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))
    elif topology.world_size == 1:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(_free_port())
    elif "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise SetupError(
            f"started by {topology.launcher} with {topology.world_size} ranks: set MASTER_ADDR to rank 0's host and "
            "MASTER_PORT to a free port (mpirun -x MASTER_ADDR=... -x MASTER_PORT=...)"
        )


def _first_slurm_host(environment: Mapping[str, str]) -> str:
    import subprocess

    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if not any(mark in nodes for mark in "[,"):
        return nodes or socket.gethostname()
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout.strip():
        raise SetupError(f"`scontrol show hostnames {nodes}` gave no host: set MASTER_ADDR to the first node")
    return listed.stdout.split()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, in place; with one rank nothing happens."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def agree(value: Any) -> Any:
    """Rank 0's ``value`` on every rank (small Python objects)."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def on_main(topology: Topology, work: Callable[[], T]) -> T:
    """Let rank 0 do ``work`` and every rank have its result, or its error."""
    result: T | None = None
    error: MegaptuneError | None = None
    if topology.is_main:
        try:
            result = work()
        except MegaptuneError as failure:
            error = failure
    result, error = agree((result, error))
    if error is not None:
        raise error
    return cast(T, result)


def everywhere(topology: Topology, work: Callable[[], T]) -> list[T]:
    """Let every rank do ``work`` and have all results by rank, or the error of the first rank that met one."""
    mine: tuple[T | None, MegaptuneError | None]
    try:
        mine = work(), None
    except MegaptuneError as failure:
        mine = None, failure
    found: list[Any] = [mine]
    if topology.world_size > 1:
        found = [None] * topology.world_size
        torch.distributed.all_gather_object(found, mine)
    for _, error in found:
        if error is not None:
            raise error
    return [cast(T, result) for result, _ in found]


def disconnect() -> None:
    """Leave the process group; some MPI builds abort at exit without this."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
