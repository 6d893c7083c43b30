"""Builds csrc/ when it is first asked for, with torch's extension loader, and keeps what was built.

The folder of a build is named after all that goes into it: sources, torch, compiler flags, GPUs. It lies where torch
keeps extensions (TORCH_EXTENSIONS_DIR, by default ~/.cache/torch_extensions) and serves all processes of a host.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch

log = logging.getLogger(__name__)

CSRC = Path(__file__).with_name("csrc")
CUDA_SOURCES = (CSRC / "binding.cpp", CSRC / "prompt_splice.cu", CSRC / "verbalizer_softmax.cu")


def why_not() -> str | None:
    """What keeps csrc/ from being built on this machine, in one line; None where nothing does."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return "they are compiled when first used, and no CUDA toolkit with nvcc was found: set CUDA_HOME"
    if shutil.which("ninja") is None:
        return "they are compiled when first used, and ninja was not found: pip install ninja"
    return None


def build(sources: Sequence[Path] = CUDA_SOURCES, flags: Sequence[str] = ()) -> ModuleType:
    """The extension, built unless it has been already (up to a minute; other processes wait meanwhile).

    Raises RuntimeError with the compiler's messages.
    """
    from torch.utils.cpp_extension import _get_build_directory, load

    every_file = sorted({*sources, *CSRC.iterdir()})
    gpus = {torch.cuda.get_device_capability(gpu) for gpu in range(torch.cuda.device_count())}
    targets = os.environ.get("TORCH_CUDA_ARCH_LIST"), sorted(gpus)
    content = hashlib.sha256(repr((torch.__version__, torch.version.cuda, targets, *flags)).encode())
    for file in every_file:
        content.update(file.read_bytes())
    name = f"megaptune_kernels_{content.hexdigest()[:12]}"
    folder = Path(_get_build_directory(name, verbose=False))
    with _alone_in(folder):
        if not list(folder.glob("*.so")):
            log.warning("compiling kernels in %s: up to a minute, once", folder)
        return load(
            name,
            [str(source) for source in sources],
            extra_cflags=["-O2", *flags],
            extra_cuda_cflags=["-O3"],
            extra_include_paths=[str(CSRC)],
            build_directory=str(folder),
        )


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One process at a time. torch's own lock is a file that a killed build leaves behind, and every later one would
    wait for it for ever; ours is let go of by the system when its process ends. So whoever holds ours knows that no
    build is under way and that a file of torch's is a dead one's."""
    with (folder / "building").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield
