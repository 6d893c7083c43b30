"""From a folder to the weights that this rank holds: build on meta, divide, then read one tensor at a time.

No rank ever holds the whole model: with tensor parallelism it reads its slices, with ZeRO 3 its share of each slice.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.initialization import no_init_weights

from megaptune.backbone.architectures import FAMILIES, Family, Shard, is_unread, shard_plan
from megaptune.backbone.checkpoint_reader import CheckpointReader
from megaptune.backbone.random_weights import open_weights
from megaptune.backbone.tensor_parallel import divide
from megaptune.errors import BackboneError, first_line
from megaptune.run.grid import ProcessGrid
from megaptune.run.monitor import peak_host_bytes

_TENSORS_AHEAD = 12  # asked of the disk while one is copied

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoadReport:
    """What loading took on this rank. num_parameters and embedding_shape (V, D): of the whole model; bytes_read: of the
    files, each once; seconds: for reading, the model being built; peak: the process's, until now."""

    num_parameters: int
    embedding_shape: tuple[int, int]
    bytes_read: int
    seconds: float
    peak_host_bytes: int

    def __str__(self) -> str:
        gigabytes_per_s = self.bytes_read / 1e9 / max(self.seconds, 1e-9)
        return (
            f"{self.bytes_read / 2**30:.2f} GiB a rank in {self.seconds:.1f} s ({gigabytes_per_s:.2f} GB/s), "
            f"peak host memory {self.peak_host_bytes / 2**30:.2f} GiB"
        )


def build_on_meta(folder: Path, kind: Literal["causal", "masked"], dtype: str) -> tuple[Any, Any]:
    """The model with its parameters on meta and its buffers computed, and its configuration.

    GPT-2's Python form of GELU becomes torch's fused one: the same function, a quarter of the saved activations. A
    folder that says ``"final_layer_norm": false`` (megatron_11b as converted) gets the identity in its place.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    for name in ("activation_function", "hidden_act"):
        if getattr(config, name, None) == "gelu_new":
            setattr(config, name, "gelu_pytorch_tanh")
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForMaskedLM
    try:
        with _parameters_on_meta(), no_init_weights():
            model = auto.from_config(config, dtype=DTYPES[dtype])
        model.tie_weights()
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise BackboneError(f"{folder}: cannot build the {kind} language model: {first_line(error)}") from None
    if getattr(config, "final_layer_norm", True) is False:
        model.base_model.layer_norm = nn.Identity()
    return model.eval().requires_grad_(False), config


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made within lie on meta; buffers, which files do not hold, are made as usual."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_divided(
    folder: Path,
    kind: Literal["causal", "masked"],
    dtype: str,
    grid: ProcessGrid,
    device: torch.device,
    zero_init: Any = None,
    trainable: bool = False,
    random_seed: int | None = None,
) -> tuple[Any, LoadReport]:
    """The model with this rank's weights.

    :param zero_init: DeepSpeed's ``zero.Init``; every parameter is handed to it as soon as it is read.
    :param trainable: weights are written to later, so none may be a view of a file.
    :param random_seed: draw the weights from it instead of reading them.
    :raises BackboneError: tensors that are missing, left over or of another shape; heads that do not divide.
    """
    model, config = build_on_meta(folder, kind, dtype)
    family = FAMILIES[config.model_type]
    reader = open_weights(folder, random_seed)
    sources = match_names(model, reader, family)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    embedding_shape = tuple(model.get_input_embeddings().weight.shape)
    plan = shard_plan(model, config, grid.shard, grid.shards)
    model.shard_plan, model.whole_shapes = plan, {name: tuple(p.shape) for name, p in model.named_parameters()}
    divide(model, config, plan, grid)
    started, bytes_read = time.monotonic(), 0
    largest = max(parameter.numel() for parameter in model.parameters()) if zero_init is not None else 0
    scratch = torch.empty(largest, dtype=DTYPES[dtype], device=device)
    parameters = list(model.named_parameters())
    for number, (name, parameter) in enumerate(parameters):
        source, shard = sources[name], plan.get(name)
        for coming, _ in parameters[number + 1 : number + 1 + _TENSORS_AHEAD]:
            reader.prefetch(sources[coming], plan.get(coming))
        if zero_init is not None:
            bytes_read += _read_share(parameter, model, reader, source, shard, zero_init, grid, scratch)
        else:
            data = reader.part(source, shard, parameter.dtype, device, mapped=not trainable)
            if data.data_ptr() == reader.views(source, shard)[0].data_ptr():
                reader.populate(source, shard)
            _materialise(model, parameter, data)
            bytes_read += data.numel() * reader.entries[source].dtype.itemsize
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(device))
    seconds = time.monotonic() - started
    return model, LoadReport(num_parameters, embedding_shape, bytes_read, seconds, peak_host_bytes())


def _read_share(
    parameter: nn.Parameter,
    model: nn.Module,
    reader: CheckpointReader,
    source: str,
    shard: Shard | None,
    zero_init: Any,
    grid: ProcessGrid,
    scratch: torch.Tensor,
) -> int:
    """Read this replica's share of a parameter and let ZeRO 3 keep it; the bytes read.

    DeepSpeed cuts the share from a tensor of the parameter's full size. That is ``scratch``, the same for all, in which
    only shares are ever written: on a CPU, its other pages do not come to exist.
    """
    empty = scratch[: parameter.numel()].view(parameter.shape)
    size = -(-parameter.numel() // grid.replicas)
    start = min(size * grid.replica, parameter.numel())
    bytes_read = reader.fill(empty, source, shard, start, min(start + size, parameter.numel()))
    real = _materialise(model, parameter, empty)
    zero_init._convert_to_deepspeed_param(real)
    real.partition()  # type: ignore[attr-defined]
    return bytes_read


def match_names(model: nn.Module, reader: CheckpointReader, family: Family) -> dict[str, str]:
    """Parameter -> tensor of the files. Files of a bare body lack the model's prefix; old ones say gamma and beta.

    :raises BackboneError: a tensor that is missing, left over, or of another shape than the configuration's.
    """
    prefix = f"{model.base_model_prefix}."
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    first_name = {name: names[id(held)] for name, held in model.named_parameters(remove_duplicate=False)}
    sources: dict[str, str] = {}
    left_over = []
    for key in reader.entries:
        modern = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        for old, new in family.renamed.items():
            modern = new + modern.removeprefix(old) if modern.startswith(old) else modern
        forms = (modern, prefix + modern, modern.removeprefix(prefix))
        form = next((form for form in forms if form in first_name), None)
        if form is None:
            left_over += [] if is_unread(key, family) else [key]
        elif form in parameters or first_name[form] not in sources:  # of a tied pair the first name goes first
            sources[first_name[form]] = key
    _refuse(reader.folder, sorted(parameters.keys() - sources.keys()), "lack", "which the model needs")
    _refuse(reader.folder, sorted(left_over), "hold", "for which the model has no place: does config.json fit?")
    for name, key in sources.items():
        found, expected = reader.entries[key].shape, tuple(parameters[name].shape)
        if found != expected:
            raise BackboneError(
                f"{reader.entries[key].file}: {key} has shape {list(found)}, config.json asks for {list(expected)}"
            )
    return sources


def _refuse(folder: Path, names: list[str], verb: str, why: str) -> None:
    if names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise BackboneError(f"{folder}: the weight files {verb} {shown}, {why}")


def _materialise(model: nn.Module, parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    """Give a parameter on meta its data, wherever in the model it stands (tied weights stand twice)."""
    real = nn.Parameter(data, requires_grad=parameter.requires_grad)
    for module in model.modules():
        for name, held in module._parameters.items():
            if held is parameter:
                module._parameters[name] = real
    return real
