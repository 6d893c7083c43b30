"""The weights of a tuned LM under DeepSpeed: steps, the best epoch's copy, and state that any layout can read.

DeepSpeed's own checkpoints are bound to the number of ranks. Here every rank reads and writes its pieces of the fp32
master weights and of the optimizer's moments, found through the attributes below of the pinned DeepSpeed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaptune.backbone.architectures import Shard
from megaptune.backbone.weight_pieces import Pieces, Place, write_tensors
from megaptune.config import TrainConfig
from megaptune.run.grid import ProcessGrid

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """This rank's share of a parameter: ``offset`` elements into the flat fp32 tensor that the optimizer steps."""

    name: str
    place: Place
    flat: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """Its elements of a tensor laid out as ``flat``, as a view."""
        return flat.detach()[self.offset : self.offset + self.place.count]

    @property
    def weight(self) -> Tensor:
        return self.of(self.flat)


class TunedWeights:
    """See :class:`megaptune.backbone.weights.Weights`.

    :param stage: of ZeRO.
    :param names: of all parameters, as in the weight files of the undivided model.
    :param shapes: of the undivided parameters.
    :param plan: which parameters tensor parallelism divides, and how.
    """

    def __init__(
        self,
        engine: Any,
        stage: int,
        names: dict[int, str],
        shapes: dict[str, tuple[int, ...]],
        plan: dict[str, Shard],
        grid: ProcessGrid,
        train: TrainConfig,
    ) -> None:
        self.engine, self.stage, self.grid, self.train = engine, stage, grid, train
        self.shapes = shapes
        self.num_trained = sum(torch.Size(shape).numel() for shape in shapes.values())
        self.pieces = list(_pieces(engine, stage, names, shapes, plan, grid))
        dtype = next(engine.module.parameters()).dtype
        self.original = {piece.name: piece.weight.to("cpu", dtype, copy=True) for piece in self.pieces}
        self.best: dict[str, Tensor] | None = None
        self.best_is_current = False
        self.moved = False

    # -- training ------------------------------------------------------------------------------------------------

    def begin(self, train: TrainConfig) -> None:
        self.train = train
        self.best, self.best_is_current = None, False
        if self.moved:
            self._base.state.clear()
            original = self.original
            self._set(lambda piece: original[piece.name])
        self.moved = False

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.grid.replicas)  # DeepSpeed averages over replicas

    def step(self, factor: float) -> float:
        """NaN when the gradient is not finite; in fp32 the weights are then as they were."""
        for group in self._base.param_groups:
            group["lr"] = self.train.lm_learning_rate * factor
        self.engine.step()
        self.moved, self.best_is_current = True, False
        norm = self.engine.get_global_grad_norm()
        norm = float("nan") if norm is None or not self.engine.was_step_applied() else float(norm)
        return norm if norm >= 0 else float("nan")  # -1 is DeepSpeed's mark of a norm that is not finite

    def keep_best(self) -> None:
        if self.best is None:
            self.best = {piece.name: torch.empty(piece.place.count) for piece in self.pieces}
        for piece in self.pieces:
            self.best[piece.name].copy_(piece.weight)
        self.best_is_current = True

    def use_best(self) -> None:
        best = self.best
        if best is not None and not self.best_is_current:
            self._set(lambda piece: best[piece.name])
            self.best_is_current = True

    # -- state ---------------------------------------------------------------------------------------------------

    def write(self, file: Path, weights_only: bool = False) -> str:
        mine = [piece for piece in self.pieces if piece.place.shard is not None or self.grid.speaks]
        tensors = [(f"weight.{piece.name}", piece.weight) for piece in mine]
        for moment in () if weights_only else MOMENTS:
            tensors += [
                (f"{moment}.{piece.name}", piece.of(self._base.state[piece.flat][moment]))
                for piece in mine
                if moment in self._base.state.get(piece.flat, {})
            ]
        if self.best is not None and not self.best_is_current and not weights_only:
            tensors += [(f"best.{piece.name}", self.best[piece.name]) for piece in mine]
        return write_tensors(file, tensors, {piece.name: piece.place for piece in mine})

    def read(self, files: list[Path], step: int) -> None:
        found = Pieces(files)
        self._base.state.clear()
        moments = [moment for moment in MOMENTS if moment in found.kinds]
        if moments:
            for flat in {id(piece.flat): piece.flat for piece in self.pieces}.values():
                self._base.state[flat] = {"step": torch.tensor(float(step))}
                self._base.state[flat] |= {moment: torch.zeros_like(flat) for moment in moments}
        for piece in self.pieces:
            for moment in moments:
                value = found.take(moment, piece.name, piece.place)
                piece.of(self._base.state[piece.flat][moment]).copy_(value)
            piece.weight.copy_(found.take("weight", piece.name, piece.place))
        self.keep_best()
        if "best" in found.kinds:
            self.best = {piece.name: found.take("best", piece.name, piece.place).clone() for piece in self.pieces}
            self.best_is_current = False
        self.moved = True

    def renew(self) -> None:
        zero = self.engine.optimizer
        if self.stage == 3:
            zero._partition_all_parameters()
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
        else:
            zero.update_lp_params()

    @property
    def _base(self) -> Any:
        """torch's optimizer, which steps the flat fp32 tensors."""
        return self.engine.optimizer.optimizer

    def _set(self, value_of: Callable[[Piece], Tensor]) -> None:
        """Write the fp32 weights, and renew those that the model computes with."""
        for piece in self.pieces:
            piece.weight.copy_(value_of(piece))
        self.renew()


def _pieces(
    engine: Any,
    stage: int,
    names: dict[int, str],
    shapes: dict[str, tuple[int, ...]],
    plan: dict[str, Shard],
    grid: ProcessGrid,
) -> Iterator[Piece]:
    """This rank's share of every parameter of which it has one."""
    zero = engine.optimizer
    for parameter in engine.module.parameters():
        name = names[id(parameter)]
        if stage == 3:
            group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            flat, size = zero.fp32_partitioned_groups_flat[group], parameter.partition_numel()
            start = size * grid.replica
            count = min(size, parameter.ds_numel - start)
        else:
            mapping = parameter._hp_mapping
            if mapping is None:  # all of it lies with other replicas
                continue
            flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            offset = mapping.hp_fragment_address.start
            start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        if count > 0:
            yield Piece(name, Place(shapes[name], plan.get(name), start, count), flat, offset)
