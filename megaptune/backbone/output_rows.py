"""The output embedding as scoring reads it: this rank's rows of the candidates.

C candidates, c of them on this rank, D backbone width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megaptune.backbone.architectures import vocabulary_range
from megaptune.run.grid import ProcessGrid

NEVER = -1e30  # added to the score of an id that is no token; finite, so that no difference of infinities arises


class OutputEmbedding:
    """Weight [V, D] and bias [V] of the output embedding, of which a tensor-parallel rank holds consecutive rows.

    :param unused: ranges of ids that are no tokens (filler rows of a converted checkpoint); they are never an answer.
    :param frozen: False where training changes the rows, so that none may be copied for later.
    """

    def __init__(
        self, head: Any, vocabulary_size: int, unused: list[list[int]], grid: ProcessGrid, frozen: bool = True
    ) -> None:
        self.frozen = frozen
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
        penalty = self.unused_penalty()
        if bias is None or penalty is None:
            return penalty if bias is None else bias
        return torch.where(penalty < 0, penalty.to(bias.dtype), bias)

    def unused_penalty(self) -> Tensor | None:
        """What puts unused ids out of the running when added to scores; None where all are tokens."""
        ranges = [(start, stop) for start, stop in self.unused if start < stop]
        if not ranges:
            return None
        penalty = torch.zeros(self.stop - self.first, device=self.parameter.device)
        for start, stop in ranges:
            penalty[start:stop] = NEVER
        return penalty

    def rows(self, ids: Tensor | None = None) -> "OutputRows":
        """The rows of the candidates ``ids`` [C]; of the whole vocabulary for None."""
        return OutputRows(self, ids)


class OutputRows:
    """Candidates' rows on this rank. ids [C] on the device, or None for the whole vocabulary; index [c]: which of them
    are here; local [c]: the rows of this rank's part that they are, None for all.

    Frozen rows of a set of candidates are copied once; all others are read where they lie.
    """

    def __init__(self, embedding: OutputEmbedding, ids: Tensor | None) -> None:
        self.embedding, device = embedding, embedding.parameter.device
        first, stop = embedding.first, embedding.stop
        self.ids, self.local = None, None
        self.index = torch.arange(first, stop, device=device)
        if ids is not None:
            self.ids = ids.to(device)
            self.index = ((self.ids >= first) & (self.ids < stop)).nonzero().squeeze(1)
            self.local = self.ids[self.index] - first
        frozen = embedding.frozen
        self._weight = self._pick(embedding.weight()).clone() if frozen and self.local is not None else None
        self._bias = self._pick(embedding.bias()) if frozen else None

    @property
    def weight(self) -> Tensor:
        """[c, D], without a gradient."""
        return self._pick(self.embedding.weight()) if self._weight is None else self._weight

    @property
    def bias(self) -> Tensor | None:
        """[c] or None, without a gradient."""
        return self._bias if self.embedding.frozen else self._pick(self.embedding.bias())

    def _pick(self, rows: Any) -> Any:
        return rows if self.local is None or rows is None else rows[self.local]


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
