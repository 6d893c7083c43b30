"""Families without a table of their own: read whole by transformers, on every rank, with a check of their read-out."""

import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.utils import logging as transformers_logging

from megaptune.backbone.fingerprint import probe_ids
from megaptune.backbone.loading import DTYPES, LoadReport
from megaptune.errors import BackboneError, first_line
from megaptune.run.monitor import peak_host_bytes


def load_whole(
    folder: Path, kind: Literal["causal", "masked"], dtype: str, device: torch.device
) -> tuple[Any, LoadReport, tuple[Tensor, Tensor]]:
    """The model, and a probe input [1, 5] with the plain model's scores [V] at its last position.

    :raises BackboneError: damaged or missing weights.
    """
    started = time.monotonic()
    model = _load(folder, kind, dtype)
    shape = tuple(model.get_input_embeddings().weight.shape)
    ids = probe_ids(shape[0])
    with torch.no_grad():
        scores = model(input_ids=ids).logits[0, -1].float()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_bytes = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    report = LoadReport(num_parameters, shape, num_bytes, time.monotonic() - started, peak_host_bytes())
    return model.to(device), report, (ids, scores)


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
