"""Deep prompts: virtual tokens whose keys and values are trained, for every layer (prefix tuning, Li and Liang 2021;
P-tuning v2, Liu et al. 2022).

They lie in the prompt table like any other prompt: a virtual token is 2 L rows, a layer's key and then its value, of
all heads side by side. Attention puts them before an example's own keys and values; the example's positions begin
after them. Keys are taken as attention compares them: of rotary models, already rotated.

R table rows, J prompts in the table, P virtual tokens of each, L layers, k key-value heads of the model, h of them on
this rank, E head width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaptune.backbone.tensor_parallel import sum_gradients
from megaptune.run.grid import ProcessGrid


@dataclass(frozen=True)
class DeepPrompts:
    """The shape of a backbone's deep prompts."""

    layers: int
    kv_heads: int
    head_width: int

    @classmethod
    def of(cls, config: Any) -> "DeepPrompts":
        """For the whole model of a transformers ``config``."""
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.num_hidden_layers, kv_heads, head_width)

    @property
    def rows(self) -> int:
        """Rows of the table that make up a virtual token."""
        return 2 * self.layers

    @property
    def width(self) -> int:
        """Of such a row."""
        return self.kv_heads * self.head_width

    def by_layer(self, table: Tensor, length: int, grid: ProcessGrid) -> list[Tensor]:
        """table [J * P * 2 L, k * E] -> this rank's heads of every layer's keys and values, L x [J, 2, h, P, E].

        Tensor-parallel ranks read different heads, or the same with other queries: the gradient of the table is the sum
        over them, the same on all.
        """
        if grid.shards > 1:
            table = sum_gradients(table, grid.tensor_group)
        whole = table.view(-1, length, self.layers, 2, self.kv_heads, self.head_width)
        return list(whole[..., self._heads(grid), :].permute(2, 0, 3, 4, 1, 5).unbind())

    def _heads(self, grid: ProcessGrid) -> slice:
        """As ``architectures`` divides them: where ranks outnumber heads, several hold the same one."""
        first = grid.shard * self.kv_heads // grid.shards
        return slice(first, first + max(1, self.kv_heads // grid.shards))

    def rows_of(self, recorded: Tensor, grid: ProcessGrid) -> Tensor:
        """Keys and values of P tokens that the backbone read itself, this rank's heads [L, 2, h, P, E] -> all heads' as
        rows of the table [P * 2 L, k * E] fp32, on every rank. Collective."""
        length = recorded.shape[3]
        whole = recorded.new_zeros(self.layers, 2, self.kv_heads, length, self.head_width, dtype=torch.float32)
        copies = max(1, grid.shards // self.kv_heads)  # ranks that hold the same head, of which one gives it
        if grid.shard % copies == 0:
            whole[:, :, self._heads(grid)] = recorded.float()
        if grid.shards > 1:
            torch.distributed.all_reduce(whole, group=grid.tensor_group)
        return whole.permute(3, 0, 1, 2, 4).reshape(length * self.rows, self.width)

    def keys_and_values(self, vectors: Tensor, length: int) -> Tensor:
        """One prompt's rows [P * 2 L, k * E] as they are handed out: [L, 2, P, k, E]."""
        return vectors.view(length, self.layers, 2, self.kv_heads, self.head_width).permute(1, 2, 0, 3, 4)
