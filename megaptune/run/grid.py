"""The ranks as a grid: tensor-parallel groups that hold one copy of the backbone, and replicas of such groups.

Tensor-parallel ranks are neighbours (rank = replica x size of a group + place in it), so that a group lies in one node.
The grid is also what DeepSpeed calls ``mpu``: it partitions ZeRO's shares over the data-parallel group.
"""

from dataclasses import dataclass
from typing import Any

import torch

from megaptune.errors import SetupError
from megaptune.run.topology import Topology


@dataclass(frozen=True)
class ProcessGrid:
    """This process's place: ``replica`` of ``replicas``, ``shard`` of ``shards`` (the tensor-parallel size).

    The groups are None where there is nobody to talk to.
    """

    replica: int = 0
    replicas: int = 1
    shard: int = 0
    shards: int = 1
    tensor_group: Any = None
    data_group: Any = None

    @property
    def speaks(self) -> bool:
        """Whether this rank gives its replica's figures and gradients; its tensor-parallel peers hold the same ones."""
        return self.shard == 0

    # -- what DeepSpeed asks of an mpu ---------------------------------------------------------------------------

    def get_model_parallel_rank(self) -> int:
        return self.shard

    def get_model_parallel_world_size(self) -> int:
        return self.shards

    def get_model_parallel_group(self) -> Any:
        return self.tensor_group

    def get_data_parallel_rank(self) -> int:
        return self.replica

    def get_data_parallel_world_size(self) -> int:
        return self.replicas

    def get_data_parallel_group(self) -> Any:
        return self.data_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def check_grid(world_size: int, local_world_size: int, tensor_parallel: int, across_nodes: bool) -> None:
    """:raises SetupError: when the ranks do not form whole tensor-parallel groups, or a group would span nodes."""
    if world_size % tensor_parallel:
        raise SetupError(
            f"{world_size} ranks do not divide into tensor-parallel groups of {tensor_parallel}: start a multiple of "
            f"{tensor_parallel} ranks, or change parallel.tensor_parallel"
        )
    if not across_nodes and local_world_size % tensor_parallel:
        raise SetupError(
            f"a tensor-parallel group of {tensor_parallel} would span nodes that have {local_world_size} ranks each; "
            "its traffic is too heavy for most networks: lower parallel.tensor_parallel, or set parallel.across_nodes"
        )


def build_grid(topology: Topology, tensor_parallel: int = 1, across_nodes: bool = False) -> ProcessGrid:
    """The grid over all ranks; every rank calls this, since groups are made together.

    :raises SetupError: see :func:`check_grid`.
    """
    world, rank = topology.world_size, topology.rank
    check_grid(world, topology.local_world_size, tensor_parallel, across_nodes)
    if world == 1:
        return ProcessGrid()
    replicas = world // tensor_parallel
    if tensor_parallel == 1:
        return ProcessGrid(rank, world, data_group=torch.distributed.group.WORLD)
    tensor_group = data_group = None
    for replica in range(replicas):
        members = range(replica * tensor_parallel, (replica + 1) * tensor_parallel)
        group = torch.distributed.new_group(list(members))
        tensor_group = group if rank in members else tensor_group
    for shard in range(tensor_parallel):
        members = range(shard, world, tensor_parallel)
        group = torch.distributed.new_group(list(members))
        data_group = group if rank in members else data_group
    return ProcessGrid(
        rank // tensor_parallel, replicas, rank % tensor_parallel, tensor_parallel, tensor_group, data_group
    )
