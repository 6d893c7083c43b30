"""Hosting a language model whose weights are trained: the same two ends as a frozen one's, with gradients in them.

B examples, T tokens, R table rows, D backbone width, V vocabulary, C candidates, c of them on this rank, M terms.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from megaptune.backbone.description import BackboneDescription
from megaptune.backbone.engine import start_engine
from megaptune.backbone.host import BackboneHost, PromptedBackbone
from megaptune.backbone.inputs import Inputs
from megaptune.backbone.output_rows import OutputRows
from megaptune.backbone.tensor_parallel import UPCAST_ROWS, divided_softmax, look_up, sum_gradients
from megaptune.backbone.tuned_weights import TunedWeights
from megaptune.backbone.zero_config import tuned_backbone_config
from megaptune.config import ParallelConfig, SpeedConfig, TrainConfig
from megaptune.errors import BackboneError
from megaptune.run.grid import ProcessGrid
from megaptune.schedule import adam_or_sgd


class TunedBackbone(PromptedBackbone):
    """From slots to losses. Vocabulary and output embedding belong to modules that run, so that ZeRO 3 gathers them."""

    def __init__(self, model: Any, grid: ProcessGrid, first_id: int) -> None:
        super().__init__(model, grid, first_id)
        self.embedding = SplicedEmbedding(self.vocabulary, first_id, self.embedding_scale, grid.tensor_group)
        self.answers = AnswerLosses(self.head, grid.tensor_group)
        del self.vocabulary
        self.spread = 1.0 / grid.replicas

    def forward(
        self,
        inputs: Inputs,
        table: Tensor,
        kept: Tensor | None = None,
        everywhere: bool = False,
        record: bool = False,
        labels: Tensor | None = None,
        rows: OutputRows | None = None,
        reads: Tensor | None = None,
        heads: Tensor | None = None,
    ) -> Any:
        """Features [B, D] as a frozen one gives them; with labels [B], places among candidates, losses and ranks [B].

        ``reads`` [M] says which feature each of M labels is asked of; without it every feature has one. With ``heads``
        [M], rows of the table, it is instead the products of features and rows [M] fp32: a linear layer's scores.

        The gradient of the table is that of the loss, while the weights' is averaged over replicas by DeepSpeed and so
        made from ``replicas`` times the loss.
        """
        if heads is None and (labels is None or rows is None):
            return super().forward(inputs, table, None, everywhere)
        table = _ScaleGradient.apply(table, self.spread)
        features = super().forward(inputs, table)
        features = features if reads is None else features[reads]
        if heads is not None:
            return head_scores(features, table, heads)
        return self.answers(features, labels, rows)

    def embed(self, slots: Tensor, table: Tensor) -> Tensor:
        return self.embedding(slots, table)


def head_scores(features: Tensor, table: Tensor, heads: Tensor) -> Tensor:
    """features [M, D], table [R, D] fp32, heads [M] rows of it -> their products [M] fp32."""
    return (features.float() * table[heads]).sum(dim=1)


class SplicedEmbedding(nn.Module):
    """As ``dispatch.prompt_splice``, with a gradient in the vocabulary too."""

    def __init__(self, weight: nn.Parameter, first_id: int, scale: float, group: Any) -> None:
        super().__init__()
        self.weight, self.first_id, self.scale, self.group = weight, first_id, scale, group

    def forward(self, slots: Tensor, table: Tensor) -> Tensor:
        """slots [B, T], table [R, D] fp32 -> embeds [B, T, D]."""
        words = look_up(slots, self.weight, self.first_id, self.group) * self.scale
        if not len(table):
            return words
        prompts = (table[(-1 - slots).clamp(min=0)] * self.scale).to(words.dtype)
        return torch.where((slots < 0)[..., None], prompts, words)


class AnswerLosses(nn.Module):
    """Cross-entropy over candidates through the output embedding, of which this rank may hold a part of the rows."""

    def __init__(self, head: Any, group: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = head.weight
        self.bias: nn.Parameter | None = getattr(head, "bias", None)
        self.group = group
        self.unused: Tensor | None = None  # what is added to the scores of ids that are no tokens

    def forward(self, features: Tensor, labels: Tensor, rows: OutputRows) -> tuple[Tensor, Tensor]:
        """features [B, D], labels [B] -> losses [B] fp32, ranks [B]."""
        logits = _Logits.apply(sum_gradients(features, self.group), self.weight, rows.local)
        for term in (self.bias, self.unused):
            if term is not None:
                logits = logits + (term if rows.local is None else term[rows.local]).float()
        return _CrossEntropy.apply(logits, rows.index, labels, self.group)


class _Logits(torch.autograd.Function):
    """``features @ weight[local].T`` in fp32 [B, c], without ever holding a wider copy of all rows."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, local: Tensor | None) -> Tensor:
        ctx.save_for_backward(features, weight, local)
        wide = features.float()
        return torch.cat([wide @ block.float().T for block in _blocks(weight, local)], dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        features, weight, local = ctx.saved_tensors
        wide, parts = features.float(), gradient.split(UPCAST_ROWS, dim=1)
        to_features = torch.zeros_like(wide)
        for part, block in zip(parts, _blocks(weight, local), strict=True):
            to_features.addmm_(part, block.float())
        to_rows = torch.cat([(part.T @ wide).to(weight.dtype) for part in parts])
        if local is not None:
            to_rows = torch.zeros_like(weight).index_add_(0, local, to_rows)
        return to_features.to(features.dtype), to_rows, None


def _blocks(weight: Tensor, local: Tensor | None) -> tuple[Tensor, ...]:
    return (weight if local is None else weight[local]).split(UPCAST_ROWS)


class _CrossEntropy(torch.autograd.Function):
    """Losses [B] and ranks [B] of logits [B, c]; the gradient goes to this rank's logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, labels: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        loss, rank, _, slope = divided_softmax(logits, index, labels, group)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(rank)
        return loss, rank

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * upstream[:, None], None, None, None


class _ScaleGradient(torch.autograd.Function):
    """Identity; backward multiplies by ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class TunedHost(BackboneHost):
    """A backbone under DeepSpeed with torch's optimizer over all its weights, at ZeRO 1, 2 or 3.

    It computes without dropout, like the frozen one: what a rank drew would depend on the layout.
    """

    trained = True

    def __init__(
        self,
        description: BackboneDescription,
        dtype: Literal["fp32", "bf16"],
        parallel: ParallelConfig,
        grid: ProcessGrid,
        device: torch.device,
        train: TrainConfig,
        speed: SpeedConfig | None = None,
    ) -> None:
        """:raises BackboneError: when tensor-parallel ranks would hold the same key-value head."""
        self.train = train
        _refuse_shared_heads(description, grid)
        super().__init__(description, dtype, parallel, grid, device, speed)
        answers = self.module.answers
        assert isinstance(answers, AnswerLosses)
        answers.unused = self.output.unused_penalty()
        self.weights = TunedWeights(self.engine, self.zero_stage, self._names, self.shapes, self._plan, grid, train)

    def deepspeed_config(self, largest_share: int) -> dict[str, Any]:
        return tuned_backbone_config(self.parallel, self.dtype, self.train.max_gradient_norm)

    def take_apart(self, model: Any, first_id: int) -> PromptedBackbone:
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._plan = getattr(model, "shard_plan", {})
        whole = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.shapes = getattr(model, "whole_shapes", whole)
        for name, parameter in model.named_parameters():
            parameter.tensor_model_parallel = name in self._plan  # the others count once in the gradient's norm
        return TunedBackbone(model, self.grid, first_id).requires_grad_(True)

    def start_engine(self, config: dict[str, Any]) -> Any:
        train = self.train
        optimizer = adam_or_sgd(train)(
            self.module.parameters(), lr=train.lm_learning_rate, weight_decay=train.weight_decay
        )
        return start_engine(self.module, config, self.grid, optimizer)

    def losses(
        self, inputs: Inputs, table: Tensor, labels: Tensor, rows: OutputRows, reads: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses [B] fp32 and ranks [B], for ``weights.backward``; labels [B] are places among the candidates.

        :param reads: [M] which feature each of M labels is asked of; then losses and ranks are [M].
        """
        return self.engine(inputs, table, labels=labels, rows=rows, reads=reads)

    def head_scores(self, inputs: Inputs, table: Tensor, reads: Tensor, heads: Tensor) -> Tensor:
        """Products [M] of the features ``reads`` and the table's rows ``heads``, for ``weights.backward``."""
        return self.engine(inputs, table, reads=reads, heads=heads)


def _refuse_shared_heads(description: BackboneDescription, grid: ProcessGrid) -> None:
    config = AutoConfig.from_pretrained(description.folder, local_files_only=True)
    heads = getattr(config, "num_key_value_heads", None)
    if heads and grid.shards > heads:
        raise BackboneError(
            f"{description.folder}: its {heads} key-value heads would lie on {grid.shards} tensor-parallel ranks more "
            "than once, which only a frozen model can do: to tune it, set parallel.tensor_parallel to "
            f"{heads} or a divisor of it"
        )
