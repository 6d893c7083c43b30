"""Where the kernels run: on the GPU where there is one, else in Triton's interpreter."""

from types import ModuleType

import pytest
import torch
from interpreted_kernels import ON_GPU, prompt_splice, verbalizer_softmax

from megaptune.kernels import dispatch, reference


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
