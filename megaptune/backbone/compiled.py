"""``torch.compile`` of a frozen backbone's blocks: one compilation for all of them and for every number of tokens.

Between matrix products a block passes over its activations many times (norms, rotary positions, gates, laying packed
tokens side by side); Inductor makes few passes of them. What it makes is kept in the user's cache directory, so only
the first run on a machine waits for it.
"""

import os
import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

from megaptune.backbone.architectures import FAMILIES
from megaptune.backbone.embedded import cache_directory
from megaptune.backbone.packed_attention import BlockForward
from megaptune.errors import BackboneError, ConfigError, SetupError

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
VARIANTS = 32
"""Compilations at most: with and without gradients, each kind of prefix, sizes of one, that torch compiles apart."""


def require_compilable(family: str, packs: bool, zero_stage: int, trained: bool, device: torch.device) -> None:
    """:raises MegaptuneError: where ``speed.compile_blocks`` cannot be had, saying what to change."""
    off = "or set speed.compile_blocks: false"
    if family not in FAMILIES:
        raise BackboneError(f"speed.compile_blocks is for {', '.join(FAMILIES)}; the backbone is {family!r}: {off[3:]}")
    if trained:
        raise ConfigError(f"speed.compile_blocks is for a frozen LM and a method tunes it: run that one apart, {off}")
    if zero_stage == 3:
        raise ConfigError(
            "speed.compile_blocks needs the weights in place, and ZeRO 3 fetches them as they are used: set "
            f"parallel.zero_stage: 0, with parallel.tensor_parallel where one rank cannot hold them, {off}"
        )
    if not packs:
        raise ConfigError(
            "speed.compile_blocks compiles the reading of packed batches: set speed.answers_only and one of packing, "
            f"share_leading_tokens, cut_last_block and context_cache, {off}"
        )
    missing = _missing(device)
    if missing:
        raise SetupError(f"speed.compile_blocks: torch.compile needs {missing}: install it, {off}")


def _missing(device: torch.device) -> str | None:
    """What Inductor would look for in vain."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"a C++ compiler, and there is no {compiler!r} (CXX names another)"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if device.type == "cuda" or header.is_file() else f"Python's headers, and there is no {header}"


def compile_blocks(blocks: list[Any]) -> None:
    """Let blocks that read packed batches do so compiled; nothing is compiled before the first of them."""
    _keep_compilations()
    import torch._dynamo.config
    import torch._functorch.config

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    # Ours are traced whole into the graph that is the cache's key.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    for block in blocks:
        assert isinstance(block.forward, BlockForward)
        block.forward.packed = torch.compile(block.forward.padded, dynamic=True)
    for first in blocks[:1]:
        first.register_forward_pre_hook(_own_storage)


def _keep_compilations() -> None:
    """In the user's cache directory, unless the user says where.

    torch would take the temporary directory, which may be emptied at any time; it writes its choice into the
    environment when it is imported, so that is not the user's.
    """
    chosen = os.environ.get(_CACHE_VARIABLE)
    default = Path(tempfile.gettempdir()) / "torchinductor_"
    if chosen is None or chosen.startswith(str(default)):
        os.environ[_CACHE_VARIABLE] = str(cache_directory() / "inductor")


def _own_storage(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Embeddings come as a view, which torch would compile apart from what one block hands to the next."""
    return (inputs[0].clone(), *inputs[1:])
