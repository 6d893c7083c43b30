"""Where the kernels run: on the GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from interpreted_kernels import ON_GPU

from megaptune.kernels import dispatch
from megaptune.kernels.registration import REGISTERED, Ops


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
def ops(request: pytest.FixtureRequest) -> Ops:
    """The implementation under test."""
    return REGISTERED[request.param]
