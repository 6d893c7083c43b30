"""Bytes that one rank sends in a training step, by kind.

Collectives are rings: to reduce x bytes over n ranks each sends 2 (n - 1) / n x; to gather x bytes, (n - 1) / n x.

B examples, T tokens, R table rows, D backbone width.
"""

from dataclasses import dataclass

from megaptune.backbone.zero_config import REUSE_ELEMENTS
from megaptune.planning.layout import Layout
from megaptune.planning.workload import Shapes, Tensor, Workload, prompt_size

JOB_FIGURES = 4  # loss, hits, examples, tokens; and a flag for all: fp64, gathered with the rows' largest gradients


@dataclass(frozen=True)
class Communication:
    """tensor_parallel, zero_3, table, tuned_lm: bytes that a rank sends in a step; host_link: copied to the device."""

    tensor_parallel: float
    zero_3: float
    table: float
    host_link: float
    tuned_lm: float = 0.0

    @property
    def sent_bytes(self) -> float:
        return self.tensor_parallel + self.zero_3 + self.table + self.tuned_lm

    @property
    def moved_bytes(self) -> float:
        return self.sent_bytes + self.host_link


def reduced(payload_bytes: float, ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * payload_bytes


def gathered(payload_bytes: float, ranks: int) -> float:
    return (ranks - 1) / ranks * payload_bytes


def communication_of(shapes: Shapes, work: Workload, layout: Layout) -> Communication:
    """A step of the busiest rank, every input being as long as the longest."""
    rounds = -(-work.pieces // layout.replicas)  # micro-batches that a rank computes
    passes = weight_passes(shapes, layout)
    tensors = shapes.tensors(0, layout.tensor_parallel)
    share = sum(-(-tensor.elements // layout.replicas) * tensor.itemsize for tensor in tensors)
    return Communication(
        tensor_parallel=rounds * _tensor_parallel(shapes, work, layout),
        zero_3=rounds * _zero_3(tensors, passes, layout) if layout.zero_stage == 3 else 0.0,
        table=_table(shapes, work, layout.world_size),
        host_link=rounds * passes * share if layout.offload != "none" else 0.0,
        tuned_lm=_tuned_lm(tensors, layout) if work.tuned else 0.0,
    )


def _tensor_parallel(shapes: Shapes, work: Workload, layout: Layout) -> float:
    """Of a micro-batch. A block sums twice forward (after attention and MLP) and twice backward (before them); what is
    computed again in backward is summed again. The words are looked up once. The softmax over the vocabulary exchanges
    a few numbers per example: best logit, two sums, place and rank; and the gradient of the features."""
    if layout.tensor_parallel == 1:
        return 0.0
    examples, width = work.micro_batch, shapes.width
    hidden = examples * work.tokens * width * shapes.itemsize
    sums = (6 if layout.activation_checkpointing else 4) * shapes.blocks + 1
    softmax = examples * (4 + 2 * 4 + 8 + 8 + 4 * width)
    return reduced(sums * hidden + softmax, layout.tensor_parallel)


def weight_passes(shapes: Shapes, layout: Layout) -> float:
    """How often ZeRO 3 fetches the weights in a micro-batch: for forward and for backward, but for what it still holds
    after the turn. (In a run's first steps, before DeepSpeed knows the order of modules, twice.)"""
    elements = sum(tensor.elements for tensor in shapes.tensors(0, layout.tensor_parallel))
    return 2.0 - min(1.0, REUSE_ELEMENTS / 2 / elements)


def _zero_3(tensors: tuple[Tensor, ...], passes: float, layout: Layout) -> float:
    padded = sum(-(-tensor.elements // layout.replicas) * layout.replicas * tensor.itemsize for tensor in tensors)
    return gathered(passes * padded, layout.replicas)


def _table(shapes: Shapes, work: Workload, world_size: int) -> float:
    """The gradient of the prompt table as int32, as many bytes as fp32; before it the figures and row scales."""
    prompt = prompt_size(work, shapes)
    rows = work.jobs * prompt.rows
    figures = world_size * (JOB_FIGURES * work.jobs + 1 + rows) * 8
    tables = 2 if work.is_sharded(world_size) else 1  # owners' rows reach all ranks before the step
    return tables * reduced(rows * prompt.width * 4, world_size) + gathered(figures, world_size)


def _tuned_lm(tensors: tuple[Tensor, ...], layout: Layout) -> float:
    """Gradients to the replica that steps them, once a step, and below stage 3 the stepped weights back to all."""
    size = sum(tensor.elements * tensor.itemsize for tensor in tensors)
    return gathered(size if layout.zero_stage == 3 else 2 * size, layout.replicas)
