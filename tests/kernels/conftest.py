"""Where the kernels run: on the GPU where there is one, else in Triton's interpreter and compiled for the CPU."""

from collections.abc import Callable, Iterator

import pytest
import torch
from cuda_kernels import cuda_ops
from interpreted_kernels import ON_GPU

from megaptune.kernels import dispatch
from megaptune.kernels.registration import REGISTERED, Ops

KERNELS = ["triton", "cuda"]


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _default_choice() -> Iterator[None]:
    dispatch.choose("auto")
    yield
    dispatch.choose("auto")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(scope="session")
def implemented(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ops]:
    """``implemented("cuda")``: the ops of that name. Building CUDA for the CPU takes some ten seconds, once."""

    def find(name: str) -> Ops:
        if name == "cuda" and name not in REGISTERED:
            with pytest.MonkeyPatch.context() as patch:
                if not ON_GPU:
                    patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
                return cuda_ops(tmp_path_factory.mktemp("sources"))
        return REGISTERED[name]

    return find


@pytest.fixture(params=["reference", *KERNELS])
def ops(request: pytest.FixtureRequest, implemented: Callable[[str], Ops]) -> Ops:
    """The implementation under test."""
    return implemented(request.param)


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, implemented: Callable[[str], Ops]) -> Ops:
    """The implementation under test, plain torch left out."""
    return implemented(request.param)


@pytest.fixture(params=["reference", *KERNELS])
def choose(request: pytest.FixtureRequest, implemented: Callable[[str], Ops], monkeypatch: pytest.MonkeyPatch) -> str:
    """The implementation that dispatch takes; the CUDA kernels on a CPU too, which a user cannot have."""
    implemented(request.param)
    if request.param == "cuda" and not ON_GPU:
        monkeypatch.setattr(dispatch, "_why_not", lambda implementation, device: None)
    dispatch.choose(request.param)
    return request.param
