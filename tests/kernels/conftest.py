"""Where the kernels run: on the GPU where there is one, else in Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined and again when it runs, so the kernels are imported here with the
variable set, and it is set again around each test of this folder; other tests of the same process never see it.
"""

import os
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from megaptune.kernels import dispatch, reference

ON_GPU = torch.cuda.is_available()

if ON_GPU:
    from megaptune.kernels import prompt_splice, verbalizer_softmax
else:
    before = os.environ.get("TRITON_INTERPRET")
    if before != "1" and "triton" in sys.modules:
        raise RuntimeError("something imported triton before tests/kernels could ask for its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"
    from megaptune.kernels import prompt_splice, verbalizer_softmax

    if before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = before

    # Triton 3.7's interpreter cuts fp32 down to bf16 where a GPU rounds to nearest even. Round here too, so that the
    # tests can ask for equal bits.
    import triton.language as tl
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def convert(data: np.ndarray, from_dtype: tl.dtype, to_dtype: tl.dtype, rounding: object) -> np.ndarray:
        if (from_dtype, to_dtype) != (tl.float32, tl.bfloat16):
            return cut(data, from_dtype, to_dtype, rounding)
        return torch.from_numpy(np.array(data)).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = convert


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _default_choice():
    dispatch.choose("auto")
    yield
    dispatch.choose("auto")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(params=["reference", "triton"])
def splice(request: pytest.FixtureRequest) -> ModuleType:
    """The file under test: its ``prompt_splice``."""
    return reference if request.param == "reference" else prompt_splice


@pytest.fixture(params=["reference", "triton"])
def softmax(request: pytest.FixtureRequest) -> ModuleType:
    """The file under test: its ``verbalizer_softmax``."""
    return reference if request.param == "reference" else verbalizer_softmax
