"""The ops as the rest of the program calls them: plain torch on a CPU, Triton or CUDA C++ on CUDA.

The only file of this folder that the rest of the program imports. Triton, and what csrc/ is built into, are imported
when an op first needs them: an installation without a GPU has neither.

B examples, T tokens, R table rows, D backbone width, V vocabulary, C candidates.
"""

import importlib.metadata
import importlib.util
import logging
import os

import torch
from torch import Tensor

from . import reference  # noqa: F401  registers its ops
from .registration import REGISTERED, Ops

IMPLEMENTATIONS = ("auto", "reference", "triton", "cuda")
OPS = ("prompt_splice", "verbalizer_softmax")
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None

log = logging.getLogger(__name__)
_chosen = "auto"
_said_that_triton_is_missing = False


def choose(implementation: str = "auto", require: bool = False) -> None:
    """Set what every later call uses, in this process.

    implementation  "auto": Triton for CUDA tensors where it is installed, else plain torch
                    "reference": plain torch everywhere
                    "triton": Triton or an error
                    "cuda": CUDA C++, built now unless it has been already, or an error
    require         with "auto": an error now, and at any later call, where plain torch would have been taken

    Raises ValueError for an unknown name, for "reference" with ``require``, and where kernels are asked for but not
    usable on this machine: no CUDA device (TRITON_INTERPRET=1 runs Triton's on a CPU, slowly), Triton not installed, no
    compiler for csrc/ or one that fails.
    """
    global _chosen
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"kernel implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if require and implementation == "reference":
        raise ValueError("kernels that are required cannot also be 'reference': drop one of the two")
    wanted = "triton" if require and implementation == "auto" else implementation
    if wanted in ("triton", "cuda"):
        problem = _why_not(wanted, _current_device())
        if problem:
            raise ValueError(problem)
    if wanted == "cuda":
        try:
            _load("cuda")
        except RuntimeError as error:
            raise ValueError(f"the CUDA kernels could not be built: {error}") from None
    _chosen = wanted


def describe(device: torch.device | str | None = None) -> dict[str, str]:
    """What each op gets on ``device`` (default: CUDA where there is one), such as {"prompt_splice": "triton 3.7.1"}."""
    found = _pick(_current_device() if device is None else torch.device(device).type, _chosen)
    if found == "triton":
        found += f" {importlib.metadata.version('triton')}" + (", interpreted" if _interpreted() else "")
    if found == "cuda":
        found += f" {torch.version.cuda}"
    return dict.fromkeys(OPS, found)


def prompt_splice(slots: Tensor, vocab_weight: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """slots [B, T] int64, vocab_weight [V, D], table [R, D] fp32 -> embeds [B, T, D] in vocab_weight's dtype.

    A slot >= 0 is a vocabulary id, a slot < 0 is row ``-1 - slot`` of the table. Differentiable in ``table`` only.
    All of it, with what is raised when: reference.prompt_splice. ValueError for shapes or dtypes that do not fit.
    """
    if slots.dtype != torch.int64 or slots.dim() != 2:
        raise ValueError(f"slots must be int64 [B, T], not {_shape(slots)}")
    if vocab_weight.dtype not in WEIGHT_DTYPES or vocab_weight.dim() != 2:
        raise ValueError(f"vocab_weight must be fp32, bf16 or fp16 [V, D], not {_shape(vocab_weight)}")
    if table.dtype != torch.float32 or table.dim() != 2 or table.shape[1] != vocab_weight.shape[1]:
        raise ValueError(f"table must be float32 [R, {vocab_weight.shape[1]}], not {_shape(table)}")
    return _ops(vocab_weight.device.type).prompt_splice(slots, vocab_weight, table, scale)


def verbalizer_softmax(
    features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None = None, ranges: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """features [B, D], rows [C, D], labels [B] int64, bias [C] or None -> loss [B] fp32, rank [B], prediction [B].

    Cross-entropy over the candidates; rank 0 is a hit at 1. With ``ranges`` [B, 2] int64 the candidates of example b
    are ``rows[ranges[b, 0]:ranges[b, 1]]`` and its label, rank and prediction count from the first of them.
    Differentiable in ``features`` only. All of it, with what is raised when: reference.verbalizer_softmax. ValueError
    for shapes or dtypes that do not fit.
    """
    _check_candidates(features, rows, labels, bias, ranges)
    if not len(rows):
        raise ValueError(f"rows must be [C > 0, {features.shape[1]}], not {_shape(rows)}")
    return _ops(features.device.type).verbalizer_softmax(features, rows, labels, bias, ranges)


def softmax_partials(
    features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None = None, ranges: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What this rank's candidates, rows [c, D], perhaps none, say of features [B, D]; without a gradient.

    labels  [B] int64, signed: ``label >= 0`` is a row of this rank; ``label < 0`` is held by another, and would stand
            before row ``-1 - label`` here
    ranges  [B, 2] int64 or None: example b's candidates among this rank's rows; they may be none

    Returns best [B] fp32, the highest score (-inf where there is none); total [B] fp32, the sum of exp(score - best);
    at_label [B] fp32, the label's score, 0 where another rank holds it; place [B] int64, the row of the best score, -1
    where there is none; and what this implementation keeps for softmax_finish, perhaps nothing.
    """
    _check_candidates(features, rows, labels, bias, ranges)
    bias = None if bias is None else bias.detach()
    with torch.no_grad():
        return _ops(features.device.type).softmax_partials(features, rows.detach(), labels, bias, ranges)


def softmax_finish(
    features: Tensor,
    rows: Tensor,
    labels: Tensor,
    lse: Tensor,
    at_label: Tensor,
    kept: Tensor,
    bias: Tensor | None = None,
    ranges: Tensor | None = None,
    wanted: bool = True,
) -> tuple[Tensor, Tensor]:
    """After softmax_partials, once lse [B] fp32 and at_label [B] fp32 of all ranks together are known.

    Returns better [B] int64, how many of this rank's candidates beat the label, and this rank's part of
    d loss / d features, [B, D] fp32, or [0] unless ``wanted``.
    """
    bias = None if bias is None else bias.detach()
    with torch.no_grad():
        return _ops(features.device.type).softmax_finish(
            features, rows.detach(), labels, lse, at_label, kept, bias, ranges, wanted
        )


def _check_candidates(
    features: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None, ranges: Tensor | None
) -> None:
    if features.dtype not in WEIGHT_DTYPES or features.dim() != 2:
        raise ValueError(f"features must be fp32, bf16 or fp16 [B, D], not {_shape(features)}")
    if rows.dtype not in WEIGHT_DTYPES or rows.dim() != 2 or rows.shape[1] != features.shape[1]:
        raise ValueError(f"rows must be fp32, bf16 or fp16 [C, {features.shape[1]}], not {_shape(rows)}")
    if labels.dtype != torch.int64 or labels.shape != features.shape[:1]:
        raise ValueError(f"labels must be int64 [{len(features)}], not {_shape(labels)}")
    if bias is not None and bias.shape != rows.shape[:1]:
        raise ValueError(f"bias must be [{len(rows)}], not {_shape(bias)}")
    if ranges is not None and (ranges.dtype != torch.int64 or ranges.shape != (len(features), 2)):
        raise ValueError(f"ranges must be int64 [{len(features)}, 2], not {_shape(ranges)}")


def _ops(device: str) -> Ops:
    return REGISTERED[_imported(device, _chosen)]


@torch.compiler.assume_constant_result
def _imported(device: str, chosen: str) -> str:
    """The implementation that ``device`` gets when ``chosen``; imported when it is first needed."""
    found = _pick(device, chosen)
    _load(found)
    return found


def _load(implementation: str) -> None:
    if implementation in REGISTERED:
        return
    if implementation == "triton":
        from . import triton_ops  # noqa: F401
    else:
        from . import cuda_ops

        cuda_ops.implemented()


def _pick(device: str, chosen: str) -> str:
    if chosen == "auto":
        if device != "cuda":
            return "reference"
        if not TRITON_IS_INSTALLED:
            _say_once_that_triton_is_missing()
            return "reference"
        return "triton"
    if chosen != "reference":
        problem = _why_not(chosen, device)
        if problem:
            raise ValueError(problem)
    return chosen


def _why_not(implementation: str, device: str) -> str | None:
    if implementation == "cuda":
        if device != "cuda":
            return f"CUDA kernels were asked for on {device}, but they need CUDA: set kernels to 'auto'"
        from . import cuda_extension

        problem = None if "cuda" in REGISTERED else cuda_extension.why_not()
        return problem and f"CUDA kernels were asked for, but {problem}; or set kernels to 'auto'"
    if not TRITON_IS_INSTALLED:
        return "Triton kernels were asked for, but triton is not installed: install it, or set kernels to 'auto'"
    if device != "cuda" and not _interpreted():
        return (
            f"Triton kernels were asked for on {device}, but they need CUDA: set kernels to 'auto', "
            "or TRITON_INTERPRET=1 to run them in Triton's (slow) interpreter"
        )
    return None


def _current_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _say_once_that_triton_is_missing() -> None:
    global _said_that_triton_is_missing
    if not _said_that_triton_is_missing:
        log.warning("triton is not installed: %s run as plain torch on CUDA", " and ".join(OPS))
    _said_that_triton_is_missing = True


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
