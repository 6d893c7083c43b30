"""What is known of a backbone before its weights are read: family, kind, context length, tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from megaptune.backbone.checkpoint_reader import CheckpointReader
from megaptune.backbone.weight_files import check_headers
from megaptune.errors import BackboneError, first_line

Kind = Literal["causal", "masked"]


@dataclass(frozen=True)
class BackboneDescription:
    """kind: causal or masked; max_tokens: the context length; num_bytes: of the weight files; largest_tensor: elements
    of the largest parameter; unused_ids: ranges of ids that are no tokens (a converted checkpoint's filler rows);
    random_seed: draw the weights from it instead of reading them."""

    folder: Path
    family: str
    kind: Kind
    max_tokens: int
    num_bytes: int
    largest_tensor: int
    unused_ids: list[list[int]]
    random_seed: int | None = None


def describe_backbone(
    folder: Path, kind: Literal["auto", "causal", "masked"], random_seed: int | None = None
) -> BackboneDescription:
    """:raises BackboneError: no such folder, no or damaged weight files, an unsupported architecture."""
    num_bytes = check_headers(folder)
    config = read_config(folder)
    largest = max(torch.Size(entry.shape).numel() for entry in CheckpointReader(folder).entries.values())
    return BackboneDescription(
        folder,
        config.model_type,
        resolve_kind(config, kind, folder),
        context_length(config),
        num_bytes,
        largest,
        getattr(config, "unused_token_ids", None) or [],
        random_seed,
    )


def load_tokenizer(folder: Path) -> Any:
    """:raises BackboneError: when the folder holds no tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise BackboneError(f"{folder}: no tokenizer that transformers can load: {first_line(error)}") from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a folder without its files
        raise BackboneError(f"{folder}: no tokenizer files (tokenizer.json, or a vocabulary with its merges)")
    return tokenizer


def read_config(folder: Path) -> Any:
    """The transformers configuration in a folder's config.json.

    :raises BackboneError: when it is none, or of a family that transformers does not know.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise BackboneError(
            f"{folder / 'config.json'}: unsupported architecture or damaged file: {first_line(error)}"
        ) from None


def resolve_kind(config: Any, wanted: Literal["auto", "causal", "masked"], folder: Path) -> Kind:
    """Causal or masked, as asked for or as the folder's ``architectures`` say.

    :raises BackboneError: when transformers has no such model of this family.
    """
    families: dict[Kind, Any] = {
        "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }
    possible = [kind for kind, names in families.items() if config.model_type in names]
    if wanted != "auto":
        if wanted not in possible:
            raise BackboneError(f"{folder}: {config.model_type!r} has no {wanted} language model in transformers")
        return wanted
    stated = getattr(config, "architectures", None) or []
    for kind in possible:
        names = families[kind][config.model_type]
        if any(name in (names if isinstance(names, tuple) else (names,)) for name in stated):
            return kind
    if len(possible) == 1:
        return possible[0]
    what = "no causal or masked language model" if not possible else "either kind of language model; set backbone.kind"
    raise BackboneError(
        f"{folder}: unsupported architecture: {config.model_type!r} ({', '.join(stated) or 'unnamed'}) is {what}"
    )


def context_length(config: Any) -> int:
    """The most tokens that an input may have."""
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**31
    # RoBERTa numbers its positions from padding_idx + 1.
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return int(limit) - offset
