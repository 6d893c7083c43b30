"""The output embedding as scoring reads it: this rank's rows of the candidates.

C candidates, c of them on this rank, D backbone width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megaptune.backbone.architectures import vocabulary_range
from megaptune.run.grid import ProcessGrid

_NEVER = -1e30  # added to the score of an id that is no token; finite, so that no difference of infinities arises


class OutputEmbedding:
    """Weight [V, D] and bias [V] of the output embedding, of which a tensor-parallel rank holds consecutive rows.

    :param unused: ranges of ids that are no tokens (filler rows of a converted checkpoint); they are never an answer.
    """

    def __init__(self, head: Any, vocabulary_size: int, unused: list[list[int]], grid: ProcessGrid) -> None:
        self.parameter, self.bias_parameter = head.weight, getattr(head, "bias", None)
        self.vocabulary_size, self.grid = vocabulary_size, grid
        self.first, self.stop = vocabulary_range(vocabulary_size, grid.shard, grid.shards)
        self.unused = [(max(a, self.first) - self.first, min(b, self.stop) - self.first) for a, b in unused]
        # What lies on NVMe between steps is not read again for every score.
        self.kept = whole_parameter(self.parameter, grid) if _on_nvme(self.parameter) else None

    def weight(self) -> Tensor:
        """This rank's rows, whole; at ZeRO 3 fetched from the replicas, for as long as the caller holds them."""
        return whole_parameter(self.parameter, self.grid) if self.kept is None else self.kept

    def bias(self) -> Tensor | None:
        """This rank's biases, with unused ids put out of the running."""
        bias = None if self.bias_parameter is None else whole_parameter(self.bias_parameter, self.grid).clone()
        for start, stop in self.unused:
            if start < stop:
                if bias is None:
                    bias = torch.zeros(self.stop - self.first, device=self.parameter.device)
                bias[start:stop] = _NEVER
        return bias

    def rows(self, ids: Tensor | None = None) -> "OutputRows":
        """The rows of the candidates ``ids`` [C]; of the whole vocabulary for None."""
        return OutputRows(self, ids)


class OutputRows:
    """Candidates' rows on this rank. ids [C] on the device, or None for the whole vocabulary; index [c]: which of them.

    The rows of a set of candidates are copied once; those of the whole vocabulary are read where they lie.
    """

    def __init__(self, embedding: OutputEmbedding, ids: Tensor | None) -> None:
        self.embedding, device = embedding, embedding.parameter.device
        first, stop = embedding.first, embedding.stop
        self.bias = embedding.bias()
        if ids is None:
            self.ids, self.copied, self.index = None, None, torch.arange(first, stop, device=device)
            return
        self.ids = ids.to(device)
        self.index = ((self.ids >= first) & (self.ids < stop)).nonzero().squeeze(1)
        mine = self.ids[self.index] - first
        self.copied = embedding.weight()[mine].clone()
        self.bias = None if self.bias is None else self.bias[mine]

    @property
    def weight(self) -> Tensor:
        """[c, D], frozen."""
        return self.embedding.weight() if self.copied is None else self.copied


def whole_parameter(parameter: nn.Parameter, grid: ProcessGrid) -> Tensor:
    """A parameter as this rank's module sees it, also where ZeRO 3 has partitioned it; every replica calls this.

    Read from the partitions, beside DeepSpeed's own bookkeeping of what is gathered.
    """
    partition: Any = getattr(parameter, "ds_tensor", None)
    if partition is None:
        return parameter.detach()
    if parameter.numel() == parameter.ds_numel:  # type: ignore[attr-defined]  # it is gathered at the moment
        return parameter.detach()
    if _on_nvme(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    mine = partition.detach().to(parameter.device)
    whole = mine
    if grid.replicas > 1:
        whole = mine.new_empty(mine.numel() * grid.replicas)
        torch.distributed.all_gather_into_tensor(whole, mine, group=grid.data_group)
    return whole[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]


def _on_nvme(parameter: nn.Parameter) -> bool:
    return getattr(getattr(parameter, "ds_tensor", None), "final_location", None) == "nvme"
