"""The CUDA kernels for tests: on the GPU where there is one, else the same sources compiled for this CPU.

Without a GPU every ``.cu`` file is compiled behind cuda_on_host.h, which runs the threads of a block in turns. That
shows what the kernels compute, not what a GPU's compiler or memory makes of them.
"""

import shutil
from pathlib import Path

import pytest
import torch

from megaptune.kernels import cuda_extension
from megaptune.kernels.registration import REGISTERED, Ops

ON_HOST = Path(__file__).with_name("cuda_on_host.h")


def sources_for_the_host(folder: Path) -> list[Path]:
    """binding.cpp as it is, and the kernels behind cuda_on_host.h."""
    found = [cuda_extension.CSRC / "binding.cpp"]
    for kernels in sorted(cuda_extension.CSRC.glob("*.cu")):
        found.append(folder / f"{kernels.stem}_on_host.cpp")
        found[-1].write_text(f'#include "{ON_HOST}"\n#include "{kernels.name}"\n')
    return found


def cuda_ops(folder: Path) -> Ops:
    """The implementation "cuda", built for this machine; ``folder`` is where sources are put."""
    if "cuda" in REGISTERED:
        return REGISTERED["cuda"]
    from megaptune.kernels import cuda_ops as module
    from megaptune.kernels.streaming import implement

    if torch.cuda.is_available():
        problem = cuda_extension.why_not()
        if problem:
            pytest.skip(problem)
        return module.implemented()
    assert shutil.which("g++"), "the CUDA kernels are tested on a CPU by compiling them with g++"
    return implement("cuda", module.ExtensionLauncher(cuda_extension.build(sources_for_the_host(folder))))
