"""Who am I among how many: one mapping from the launchers' environments to ranks, and the process group over them.

``deepspeed`` and ``torchrun`` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; Slurm's ``srun`` and MPI's
``mpirun`` set their own names. Nothing set means one process. What a launcher leaves out, the place where ranks meet
above all, is found here.
"""

import base64
import contextlib
import datetime
import itertools
import json
import os
import re
import socket
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from megaptune.config import LaunchConfig
from megaptune.errors import MegaptuneError, SetupError, first_line
from megaptune.run import roll_call

T = TypeVar("T")

# In this order: mpirun inside a Slurm job starts its daemons with srun, so its ranks see Slurm's names too.
_LAUNCHERS = {
    "torch": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
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
        if launcher == "slurm" and ("SLURM_STEP_ID" not in environment or "MPI_LOCALRANKID" in environment):
            continue  # a shell on the first node of an allocation; or MPICH's mpirun, which starts through srun
        if rank not in environment and world not in environment:
            continue
        if rank not in environment or world not in environment:
            absent, there = (rank, world) if world in environment else (world, rank)
            raise SetupError(f"{there} is set but {absent} is not: start with deepspeed, torchrun, srun or mpirun")
        try:
            numbers = int(environment[rank]), int(environment[world]), int(environment.get(local, "0"))
            # DeepSpeed's launcher calls it LOCAL_SIZE; Slurm may write "2(x4)"
            size = environment.get(local_world) or environment.get("LOCAL_SIZE") or str(numbers[1])
            tasks = _slurm_tasks(environment) if launcher == "slurm" else []
            local_size = tasks[int(environment.get("SLURM_NODEID", "0"))] if tasks else int(size.split("(")[0])
        except ValueError as error:
            raise SetupError(f"the {launcher} environment holds a rank that is no number: {error}") from None
        if not 0 <= numbers[0] < numbers[1]:
            raise SetupError(f"{rank}={numbers[0]} does not lie within {world}={numbers[1]}")
        unset = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if numbers[1] > 1 and launcher == "torch" and unset:
            raise SetupError(f"{rank} is set but {' and '.join(unset)} is not: start with deepspeed, torchrun or srun")
        return Topology(*numbers, local_world_size=max(1, local_size), launcher=launcher)
    return Topology()


def connect(launch: LaunchConfig | None = None) -> Topology:
    """Call the roll, then join the process group (NCCL on GPU, gloo on CPU); this process's place.

    :raises SetupError: on every rank, when one does not come or cannot join.
    """
    launch = launch or LaunchConfig()
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
    if torch.cuda.is_available():
        torch.cuda.set_device(topology.local_rank)
    call = roll_call.join(
        topology.rank,
        topology.world_size,
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        topology.device.type,
        launch.join_timeout_s,
        lambda: launcher_hosts(topology, os.environ),
    )
    if topology.world_size > 1:
        call.watch(launch.first_step_timeout_s)
    backend = "nccl" if topology.device.type == "cuda" else "gloo"
    # Longer than the roll call's patience, which names the rank that is late.
    timeout = datetime.timedelta(seconds=max(1800.0, 2 * launch.first_step_timeout_s))
    call.store.set_timeout(timeout)
    try:
        torch.distributed.init_process_group(
            backend, store=call.group_store, rank=topology.rank, world_size=topology.world_size, timeout=timeout
        )
    except torch.distributed.DistError as error:
        raise SetupError(f"rank {topology.rank} cannot connect to the others: {first_line(error)}") from None
    import deepspeed
    import deepspeed.ops

    # DeepSpeed would build a C++ shared-memory op when joining on CPU: over a minute, and gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    return topology


def _export(topology: Topology) -> None:
    """Set the five variables that torch and DeepSpeed read, whatever the launcher called them."""
    os.environ.update(RANK=str(topology.rank), WORLD_SIZE=str(topology.world_size), LOCAL_RANK=str(topology.local_rank))
    if topology.launcher == "slurm":
        os.environ.setdefault("MASTER_ADDR", _first_slurm_host(os.environ))
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))
    elif topology.world_size == 1:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(_free_port())
    elif topology.launcher in ("openmpi", "mpich"):
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = _meet_through_mpi(topology)
    try:
        int(os.environ["MASTER_PORT"])
    except ValueError:
        raise SetupError(f"MASTER_PORT is {os.environ['MASTER_PORT']!r}, expected a number") from None


# -- MPI ---------------------------------------------------------------------------------------------------------------


def _meet_through_mpi(topology: Topology) -> tuple[str, str]:
    """Rank 0's address and a port that is free there, told to all through MPI.

    MASTER_ADDR and MASTER_PORT win where rank 0 has them. That the other ranks have them does not follow (mpirun hands
    variables to its own host only), so all ask; where MPI cannot be used they must be set for every rank.
    """
    by_hand = "set MASTER_ADDR and MASTER_PORT for all ranks (mpirun -x MASTER_ADDR=... -x MASTER_PORT=...)"
    try:
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        problem = ""
        if world.Get_size() != topology.world_size:
            ranks = f"{topology.launcher} started {topology.world_size} ranks, but mpi4py sees {world.Get_size()}"
            problem = f"{ranks}: it loads another MPI than that mpirun; use the one that mpi4py finds, or {by_hand}"
    except (ImportError, RuntimeError) as error:
        problem = f"mpi4py cannot load the MPI that started this rank ({first_line(error)}); mend it, or {by_hand}"
    if problem:
        if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
            return os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        raise SetupError(problem)
    place = None
    on_one_host = len(set(world.allgather(socket.gethostname()))) == 1
    if topology.is_main:
        address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if on_one_host else _own_address())
        place = address, os.environ.get("MASTER_PORT") or str(_free_port())
    place = world.bcast(place, root=0)
    MPI.Finalize()  # nothing else uses it, and its own farewell at exit waits for ranks that may be gone
    return cast(tuple[str, str], place)


def _own_address() -> str:
    """An address of this host that others can reach: of the interface that gloo or NCCL was told to use, else what the
    host's name stands for, else the first that is not loopback."""
    import psutil  # comes with DeepSpeed

    interfaces = {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
    }
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        for address in interfaces.get(os.environ.get(variable, ""), []):
            return address
    outward = [address for found in interfaces.values() for address in found if not address.startswith("127.")]
    with contextlib.suppress(OSError):
        named = socket.gethostbyname(socket.gethostname())
        if named in outward:
            return named
    return outward[0] if outward else socket.gethostname()


# -- Slurm -------------------------------------------------------------------------------------------------------------


def _slurm_hosts(environment: Mapping[str, str]) -> list[str]:
    import subprocess

    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if not any(mark in nodes for mark in "[,"):
        return [nodes] if nodes else []
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        return listed.stdout.split() if listed.returncode == 0 else []
    except OSError:
        return []


def _first_slurm_host(environment: Mapping[str, str]) -> str:
    hosts = _slurm_hosts(environment)
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if nodes and not hosts:
        raise SetupError(f"`scontrol show hostnames {nodes}` gave no host: set MASTER_ADDR to the first node")
    return hosts[0] if hosts else socket.gethostname()


def _slurm_tasks(environment: Mapping[str, str]) -> list[int]:
    """The tasks of each node of the step: "2(x3),1" is [2, 2, 2, 1]."""
    written = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    pieces = re.findall(r"(\d+)(?:\(x(\d+)\))?", written)
    return [int(tasks) for tasks, times in pieces for _ in range(int(times or 1))]


def launcher_hosts(topology: Topology, environment: Mapping[str, str]) -> dict[int, str]:
    """Which host the launcher meant for which rank, as far as it can be known: to name a rank that never came."""
    counts: list[tuple[str, int]] = []
    if topology.launcher == "slurm" and not environment.get("SLURM_DISTRIBUTION", "block").startswith("cyclic"):
        counts = list(zip(_slurm_hosts(environment), _slurm_tasks(environment), strict=False))
    elif topology.launcher == "torch":
        counts = _deepspeed_hosts()
    names = itertools.chain.from_iterable([host] * count for host, count in counts)
    return dict(zip(range(topology.world_size), names, strict=False))


def _deepspeed_hosts() -> list[tuple[str, int]]:
    """DeepSpeed's launcher, the parent process, has the hostfile in its arguments."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        arguments = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")
        packed = next((argument for argument in arguments if argument.startswith("--world_info=")), None)
        if packed is not None:
            slots = json.loads(base64.urlsafe_b64decode(packed.partition("=")[2]))
            return [(host, len(ids)) for host, ids in slots.items()]
    return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, in place; with one rank nothing happens."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        roll_call.arrive()
        torch.distributed.all_reduce(tensor)
    return tensor


def agree(value: Any) -> Any:
    """Rank 0's ``value`` on every rank (small Python objects)."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    box = [value]
    roll_call.arrive()
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """Every rank's ``value``, by rank, on every rank (small Python objects)."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    roll_call.arrive()
    torch.distributed.all_gather_object(values, value)
    return values


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
        raise error.shared()
    return cast(T, result)


def everywhere(topology: Topology, work: Callable[[], T]) -> list[T]:
    """Let every rank do ``work`` and have all results by rank, or the error of the first rank that met one."""
    mine: tuple[T | None, MegaptuneError | None]
    try:
        mine = work(), None
    except MegaptuneError as failure:
        mine = None, failure
    found = gather(mine)
    for _, error in found:
        if error is not None:
            raise error.shared()
    return [cast(T, result) for result, _ in found]


def disconnect() -> None:
    """Leave the roll call and the process group; some MPI builds abort at exit without this."""
    roll_call.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
