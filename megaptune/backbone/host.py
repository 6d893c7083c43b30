"""Hosting a frozen language model: load, freeze, hand to DeepSpeed, and read it at the answer positions.

Any causal or masked LM of transformers serves whose answer scores are ``features @ weight.T + bias``; this is checked
on a probe input after loading, so a family with another read-out is refused instead of scored wrongly.

B examples, T tokens, R table rows, D backbone width, V vocabulary, C candidates.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.utils import logging as transformers_logging

from megaptune.backbone.description import BackboneDescription
from megaptune.backbone.zero_config import frozen_backbone_config
from megaptune.errors import BackboneError, first_line
from megaptune.kernels import dispatch
from megaptune.run import roll_call

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROBE_TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}  # relative to the largest logit; bf16 has 8 bits of mantissa


@dataclass(frozen=True)
class OutputRows:
    """Rows of the output embedding: weight [C, D], bias [C] or None; ids [C] (None: the whole vocabulary)."""

    weight: Tensor
    bias: Tensor | None
    ids: Tensor | None


class PromptedBackbone(nn.Module):
    """A language model taken apart at its two ends: slots go in, features at one position per example come out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        self.body = model.base_model
        self.readout = _detach_readout(model, head)
        self.head = head
        embedding = self.body.get_input_embeddings()
        # Held under a name of its own: ZeRO-3 gathers what the module that runs owns, and the embedding never runs.
        self.vocabulary = embedding.weight
        self.embedding_scale = float(getattr(embedding, "embed_scale", None) or 1.0)

    def forward(self, slots: Tensor, attention_mask: Tensor | None, answer_positions: Tensor, table: Tensor) -> Tensor:
        """slots [B, T], attention_mask [B, T] or None, answer_positions [B], table [R, D] fp32 -> features [B, D]."""
        embeds = dispatch.prompt_splice(slots, self.vocabulary, table, self.embedding_scale)
        output = self.body(inputs_embeds=embeds, attention_mask=attention_mask, **self.body_options)
        hidden = output.last_hidden_state  # [B, T, D]
        at_answers = hidden[torch.arange(hidden.shape[0], device=hidden.device), answer_positions]
        return at_answers if self.readout is None else self.readout(at_answers)

    @property
    def body_options(self) -> dict[str, Any]:
        return {"use_cache": False} if hasattr(self.body.config, "use_cache") else {}


def _detach_readout(model: Any, head: nn.Module) -> nn.Module | None:
    """What lies between the last hidden state and the output embedding: BERT's ``cls``, RoBERTa's ``lm_head``, nothing.

    The output embedding inside it is replaced by the identity, so it yields the features that the rows multiply.
    """
    for child in model.children():
        if child is head:
            return None
        for inner_name, inner in child.named_modules():
            if inner is head and child is not model.base_model:
                owner = child.get_submodule(inner_name.rpartition(".")[0])
                setattr(owner, inner_name.rpartition(".")[2], nn.Identity())
                return child
    raise BackboneError(f"{type(model).__name__}: its output embedding was not found where language models have it")


class BackboneHost:
    """The frozen model under DeepSpeed. ``kind``: causal or masked; ``num_parameters`` counts the whole model."""

    def __init__(
        self,
        description: BackboneDescription,
        dtype: Literal["fp32", "bf16"],
        zero_stage: int,
        device: torch.device,
    ) -> None:
        self.folder, self.family, self.kind = description.folder, description.family, description.kind
        self.dtype, self.device, self.zero_stage = dtype, device, zero_stage
        model = _load(self.folder, self.kind, dtype)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        probe_ids, probe_logits = _plain_probe(model)
        self.module = PromptedBackbone(model).eval().requires_grad_(False).to(device)
        self.vocabulary_size, self.width = self.module.vocabulary.shape
        if zero_stage == 0:
            _group_gradients(self.module)
        roll_call.mark("handing the backbone to DeepSpeed")
        self.engine = _host(self.module, frozen_backbone_config(zero_stage, dtype))
        self._check_probe(probe_ids, probe_logits)

    def features(self, slots: Tensor, attention_mask: Tensor | None, answer_positions: Tensor, table: Tensor) -> Tensor:
        """Features [B, D] that score the answers; differentiable in ``table`` [R, D] (fp32) only."""
        return self.engine.module(slots, attention_mask, answer_positions, table)

    def output_rows(self, ids: Tensor | None = None) -> OutputRows:
        """Rows ``ids`` of the output embedding, held whole on every rank; all of them for None."""
        weight, bias = self.module.head.weight, getattr(self.module.head, "bias", None)
        parameters = [parameter for parameter in (weight, bias) if parameter is not None]
        with self._gathered(parameters):
            if ids is None:
                copy = self.zero_stage == 3
                rows = weight.detach().clone() if copy else weight.detach()
                return OutputRows(rows, None if bias is None else bias.detach().clone(), None)
            ids = ids.to(self.device)
            return OutputRows(weight.detach()[ids], None if bias is None else bias.detach()[ids], ids)

    @contextlib.contextmanager
    def _gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        if self.zero_stage != 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            yield

    @torch.no_grad()
    def _check_probe(self, ids: Tensor, expected: Tensor) -> None:
        """The hosted model, read our way, gives the plain model's logits."""
        ids = ids.to(self.device)
        last = torch.tensor([ids.shape[1] - 1], device=self.device)
        table = torch.zeros(0, self.width, device=self.device)
        features = self.features(ids, None, last, table)
        rows = self.output_rows()
        unsupported = f"unsupported architecture {self.family!r}: its answer scores are not features times output "
        if not torch.isfinite(expected).all():
            raise BackboneError(f"{self.folder}: the model's scores are not finite; its weights are damaged")
        if features.shape[1] != rows.weight.shape[1]:
            widths = f"widths {features.shape[1]} and {rows.weight.shape[1]}"
            raise BackboneError(f"{unsupported}embedding ({widths})")
        logits = features.float() @ rows.weight.float().T
        if rows.bias is not None:
            logits = logits + rows.bias.float()
        error = (logits[0].cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        if error > PROBE_TOLERANCE[self.dtype]:
            raise BackboneError(f"{unsupported}embedding (a probe differs by {error:.1e} of the largest score)")


def _load(folder: Path, kind: str, dtype: str) -> Any:
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForMaskedLM
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, info = auto.from_pretrained(folder, dtype=DTYPES[dtype], local_files_only=True, output_loading_info=True)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise BackboneError(f"{folder}: cannot load the {kind} language model: {first_line(error)}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise BackboneError(f"{folder}: the weight files lack {shown}, which the {kind} language model needs")
    return model.eval()


@torch.no_grad()
def _plain_probe(model: Any) -> tuple[Tensor, Tensor]:
    """A fixed input [1, 5] and the plain model's logits [V] at its last position."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[(7919 * (position + 1)) % vocabulary for position in range(5)]])
    return ids, model(input_ids=ids).logits[0, -1].float()


def _group_gradients(module: nn.Module) -> None:
    """Sum a tensor's gradient module by module, as ZeRO-3's hooks do.

    Where a hidden state has several readers (a norm's two uses and the residual), autograd adds their gradients in the
    order of the graph. ZeRO-3 passes every module a view of its inputs; the same views here give the same order, so
    both stages agree bit by bit and Adam has no rounding to amplify.
    """

    def pass_views(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs)

    for inner in module.modules():
        inner.register_forward_pre_hook(pass_views)


def _host(module: nn.Module, config: dict[str, Any]) -> Any:
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine

    # Every rank has read the same verified files. Sending them again would take time and, on CPU, copy every page of
    # the weights that the ranks of a host share through the memory map.
    broadcast = DeepSpeedEngine._broadcast_model
    DeepSpeedEngine._broadcast_model = lambda engine: None
    try:
        engine, *_ = deepspeed.initialize(model=module, config=config)
    finally:
        DeepSpeedEngine._broadcast_model = broadcast
    return engine
