"""Bytes that one rank needs, by component, under a layout.

Weights are counted tensor by tensor, activations are traced (activations.py); what is an estimate says so below. The
total is what is there at once when a training step, or a batch of evaluation if that needs more, is at its peak.

B examples, T tokens, C candidates, D backbone width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

from megaptune.backbone.zero_config import PREFETCHED_ELEMENTS, REUSE_ELEMENTS, tuned_stage
from megaptune.planning.layout import Layout, Machines
from megaptune.planning.workload import Shapes, Tensor, Workload, largest_module, prompt_size
from megaptune.prompts.encoder_stack import CHUNK

# Estimates: CUDA's context, the libraries' workspaces and NCCL's buffers; Python with torch and DeepSpeed.
CUDA_OVERHEAD_BYTES = 3 * 2**29
PROCESS_BYTES = 700 * 2**20
UPCAST_ROWS = 4096  # candidates' rows that scoring holds in fp32 at a time
LOGIT_TENSORS = 6  # of B x C fp32 at once: logits, exponentials, probabilities, comparisons, the gradient
REDUCE_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default for the gradients of a tuned LM
NVME_BUFFERS, NVME_SMALLEST_BYTES = 8, 2**20  # shares below the latter stay in memory


@dataclass(frozen=True)
class Memory:
    """device, host: component -> bytes of one rank; on a CPU there is one memory, and ``host`` is empty. peak: when."""

    device: dict[str, int]
    host: dict[str, int]
    peak: Literal["training", "evaluation"]

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def weight_bytes(tensors: tuple[Tensor, ...], layout: Layout) -> int:
    """Bytes of parameters that a rank holds between steps: all its slices, or at ZeRO 3 its share of each."""
    return sum(share(tensor, layout) * tensor.itemsize for tensor in tensors)


def share(tensor: Tensor, layout: Layout) -> int:
    """Elements of a tensor that a replica holds; DeepSpeed pads every tensor to a multiple of the replicas."""
    return -(-tensor.elements // layout.replicas) if layout.zero_stage == 3 else tensor.elements


def memory_of(shapes: Shapes, work: Workload, layout: Layout, machines: Machines) -> Memory:
    """What the fullest rank needs: the first of a tensor-parallel group, which holds most rows of the vocabulary.

    :raises BackboneError: when the model cannot be divided so.
    """
    tensors = shapes.tensors(0, layout.tensor_parallel)
    training, evaluating = _phase(shapes, work, layout, tensors, True), _phase(shapes, work, layout, tensors, False)
    trains = sum(training.values()) >= sum(evaluating.values())
    peak: Literal["training", "evaluation"] = "training" if trains else "evaluation"
    fuller = training if trains else evaluating
    device = {
        **_weights(shapes, work, layout, machines, tensors),
        **fuller,
        **_prompt(shapes, work, layout, machines.device == "cpu"),
    }
    if work.tuned:
        device |= _tuning(shapes, tensors, work, layout)
    on_device, on_host = _contexts(shapes, work, layout, machines)
    device["kept contexts"] = on_device
    device["fixed overhead"] = PROCESS_BYTES if machines.device == "cpu" else CUDA_OVERHEAD_BYTES
    host = _offloaded(shapes, layout, tensors)
    if machines.device == "cpu":
        return Memory({**device, **host}, {}, peak)
    host["kept contexts"] = on_host
    best = owned(work, layout) * 4 * prompt_size(work, shapes).parameters
    return Memory(device, {**host, "best prompt": best, "process": PROCESS_BYTES}, peak)


def _contexts(shapes: Shapes, work: Workload, layout: Layout, machines: Machines) -> tuple[int, int]:
    """Kept keys and values on the device and in host memory; beside them, on the device, a micro-batch's together."""
    token = shapes.context_token_bytes(layout.tensor_parallel)
    total, batch = work.context_tokens * token, max(work.micro_batch, work.evaluation_batch) * work.longest_context
    if machines.device == "cpu":
        return min(total, work.host_contexts) + batch * token, 0
    on_device = min(total, work.device_contexts)
    return on_device + batch * token, min(total - on_device, work.host_contexts)


def _weights(
    shapes: Shapes, work: Workload, layout: Layout, machines: Machines, tensors: tuple[Tensor, ...]
) -> dict[str, int]:
    held = weight_bytes(tensors, layout) if layout.offload == "none" else 0
    if layout.offload == "nvme":
        held = shapes.output_rows_bytes(layout.tensor_parallel)  # scoring keeps the output embedding
    mapped = shapes.mapped and layout.tensor_parallel == 1 and not work.tuned
    if machines.device == "cpu" and layout.zero_stage == 0 and mapped:
        held = -(-held // machines.ranks_per_node)  # views of the files, which the ranks of a host share
    return {"weights": held, "buffers": shapes.buffer_bytes}


def _phase(
    shapes: Shapes, work: Workload, layout: Layout, tensors: tuple[Tensor, ...], training: bool
) -> dict[str, int]:
    """What lives while a micro-batch is trained on, or a batch evaluated."""
    examples = work.micro_batch if training else work.evaluation_batch
    length = work.tokens if training else work.evaluation_tokens
    checkpointing = layout.activation_checkpointing and training
    traced = shapes.activations(
        layout.tensor_parallel, examples, length, checkpointing, training, work.tuned and training
    )
    vocabulary = -(-shapes.vocabulary_size // layout.tensor_parallel)
    counts = [vocabulary if count is None else min(count, vocabulary) for count in work.candidates.values()]
    read = max(counts)
    if training:
        count = work.candidates[work.train_over]
        read = vocabulary if count is None else min(count, vocabulary)
    rows = sum(min(count, vocabulary) for count in work.candidates.values() if count is not None)
    sets = sum(count is not None for count in work.candidates.values())
    virtual_tokens = 0 if work.deep is None else examples * work.sequences * work.deep.length
    deep = virtual_tokens * shapes.context_token_bytes(layout.tensor_parallel)
    upcast = min(read, UPCAST_ROWS) * shapes.width * 4 if shapes.itemsize < 4 else 0
    return {
        "gathered layers": gathered_bytes(shapes, work, layout, tensors),
        "saved activations": traced.saved_bytes,
        "working tensors": traced.working_bytes,
        **({"deep prompts": deep} if deep else {}),  # before the keys and values of every sequence
        "logits": LOGIT_TENSORS * 4 * examples * read + upcast,
        # a copy of each set's rows, and where each token stands in it
        "candidate rows": rows * (shapes.width * shapes.itemsize + 16) + sets * 8 * shapes.vocabulary_size,
    }


def gathered_bytes(shapes: Shapes, work: Workload, layout: Layout, tensors: tuple[Tensor, ...]) -> int:
    """The most of other replicas' weights that ZeRO 3 brings together at a time.

    Every module that runs lets DeepSpeed fetch some more ahead, until as much as is allowed lives; what is then still
    missing for the module itself comes on top. Scoring over the whole vocabulary fetches the output embedding, unless
    it is the input embedding too, which is read at the bottom of the model and kept.
    """
    if layout.zero_stage != 3:
        return 0
    rows = shapes.output_rows_bytes(layout.tensor_parallel)
    elements = sum(tensor.elements for tensor in tensors) - (0 if shapes.tied else rows // shapes.itemsize)
    prefetched = 0 if layout.offload == "nvme" else PREFETCHED_ELEMENTS
    live = min(elements, REUSE_ELEMENTS + prefetched + largest_module(tensors))
    fetched = 0 if shapes.tied or layout.offload == "nvme" or None not in work.candidates.values() else rows
    return live * shapes.itemsize + fetched


def _prompt(shapes: Shapes, work: Workload, layout: Layout, on_cpu: bool) -> dict[str, int]:
    """Encoders are fp32 and stay outside DeepSpeed: of the jobs that train together, those that the rank owns, with
    their moments; gradients are there for a chunk of them, and the best epochs' weights lie in host memory."""
    size = 4 * prompt_size(work, shapes).parameters
    held = owned(work, layout)
    chunk = min(held, CHUNK["cpu" if on_cpu else "cuda"])
    moments = 2 * size if work.optimizer == "adam" else 0
    best = held * size if on_cpu else 0
    return {"prompt encoder": held * size + chunk * size, "prompt optimizer": held * moments + best}


def owned(work: Workload, layout: Layout) -> int:
    """Jobs that the fullest rank owns."""
    return -(-work.jobs // layout.world_size) if work.is_sharded(layout.world_size) else work.jobs


def _tuning(shapes: Shapes, tensors: tuple[Tensor, ...], work: Workload, layout: Layout) -> dict[str, int]:
    """A tuned LM: fp32 gradients, a master copy and the moments; divided over the replicas by ZeRO's stage."""
    elements = sum(tensor.elements for tensor in tensors)
    part, stage = -(-elements // layout.replicas), tuned_stage(layout.zero_stage, shapes.dtype)
    bucket = min(elements, REDUCE_BUCKET_ELEMENTS) * shapes.itemsize
    moments = 2 if work.optimizer == "adam" else 0
    gradients = 4 * (part if stage >= 2 else elements)
    return {"LM gradients": gradients + bucket, "LM optimizer": 4 * (1 + moments) * part}


def _offloaded(shapes: Shapes, layout: Layout, tensors: tuple[Tensor, ...]) -> dict[str, int]:
    if layout.offload == "cpu":
        return {"offloaded weights": weight_bytes(tensors, layout)}
    if layout.offload == "nvme":
        sizes = [share(tensor, layout) * tensor.itemsize for tensor in tensors]
        resident = sum(size for size in sizes if size < NVME_SMALLEST_BYTES)
        return {"swap buffers": NVME_BUFFERS * max(sizes), "small weights": resident}
    return {}
