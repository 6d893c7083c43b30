"""A GGUF file as a folder, through transformers, which dequantises it and knows a list of architectures."""

import importlib.util
from pathlib import Path

import torch

from megaptune.backbone.convert.output import staged_folder
from megaptune.errors import BackboneError, SetupError, first_line


def is_source(source: Path) -> bool:
    return source.is_file() and source.suffix == ".gguf"


def num_elements(gguf: Path) -> int:
    """Of all tensors.

    :raises SetupError: when the gguf package is not installed.
    :raises BackboneError: a damaged file.
    """
    _require_package(gguf)
    from gguf import GGUFReader

    try:
        return sum(int(tensor.n_elements) for tensor in GGUFReader(gguf).tensors)
    except (OSError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise BackboneError(f"{gguf}: truncated, damaged or no GGUF file ({first_line(error)})") from None


def convert(gguf: Path, folder: Path, dtype: torch.dtype | None = None, max_shard_bytes: int | None = None) -> None:
    """Dequantise into ``folder``; ``dtype`` None: fp32. The whole model is in memory, twice, in fp32.

    :raises SetupError: when the gguf package is not installed.
    :raises BackboneError: a file that transformers cannot convert.
    """
    _require_package(gguf)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    shards = {} if max_shard_bytes is None else {"max_shard_size": max_shard_bytes}
    with staged_folder(folder) as part:
        try:
            source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
            quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            # save_pretrained refuses a model that was read from GGUF, so its weights go into a fresh one.
            settings = {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
            config = AutoConfig.for_model(settings.pop("model_type"), **settings)
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            plain.load_state_dict(quantised.state_dict())
            plain.to(dtype or torch.float32).save_pretrained(part, **shards)
            AutoTokenizer.from_pretrained(**source).save_pretrained(part)
        except (OSError, RuntimeError, ValueError) as error:
            raise BackboneError(f"could not convert {gguf} into {folder}: {first_line(error)}") from error


def _require_package(gguf: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise SetupError(f"converting {gguf.name} needs the gguf package: pip install 'megaptune[embedded]'")
