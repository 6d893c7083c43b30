"""Which implementation is taken, and what is said when the wanted one cannot be."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from megaptune.kernels import cuda_extension, dispatch, registration
from megaptune.kernels.registration import REGISTERED

ROOT = Path(__file__).resolve().parents[2]
SLOTS, VOCABULARY, TABLE = torch.tensor([[1, -1]]), torch.ones(3, 4), torch.ones(2, 4)
FEATURES, ROWS, LABELS = torch.ones(2, 4), torch.ones(5, 4), torch.tensor([0, 4])


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Implementations whose ops were called, in order; the ops themselves are replaced."""
    calls = []

    def recorder(self: registration.Ops, *_: object) -> None:
        calls.append(self.implementation)

    monkeypatch.setattr(registration.Ops, "prompt_splice", recorder)
    monkeypatch.setattr(registration.Ops, "verbalizer_softmax", recorder)
    return calls


def call_both(device: str = "cpu") -> None:
    dispatch.prompt_splice(SLOTS.to(device), VOCABULARY.to(device), TABLE.to(device))
    dispatch.verbalizer_softmax(FEATURES.to(device), ROWS.to(device), LABELS.to(device))


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_a_cpu_gets_the_reference(choice, taken) -> None:
    dispatch.choose(choice)
    call_both()
    assert taken == ["reference", "reference"]
    assert dispatch.describe("cpu") == {"prompt_splice": "reference", "verbalizer_softmax": "reference"}


def test_triton_where_it_is_asked_for(taken, device) -> None:
    for choice in ({"implementation": "triton"}, {"implementation": "auto", "require": True}):
        dispatch.choose("auto")
        dispatch.choose(**choice)
        call_both(device.type)
    assert taken == ["triton"] * 4
    how = f"triton {triton.__version__}" + (", interpreted" if device.type == "cpu" else "")
    assert dispatch.describe() == {"prompt_splice": how, "verbalizer_softmax": how}


def test_cuda_gets_triton(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert dispatch.describe("cuda")["prompt_splice"] == f"triton {triton.__version__}"
    dispatch.choose("reference")
    assert dispatch.describe("cuda")["prompt_splice"] == "reference"


def test_cuda_without_triton_falls_back_and_says_so_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(dispatch, "TRITON_IS_INSTALLED", False)
    monkeypatch.setattr(dispatch, "_said_that_triton_is_missing", False)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert dispatch.describe("cuda") == {"prompt_splice": "reference", "verbalizer_softmax": "reference"}
    assert [record.message for record in caplog.records] == [
        "triton is not installed: prompt_splice and verbalizer_softmax run as plain torch on CUDA"
    ]


@pytest.mark.parametrize("choice", [{"implementation": "triton"}, {"require": True}])
def test_triton_that_is_not_installed(choice, monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON_IS_INSTALLED", False)
    with pytest.raises(ValueError, match="triton is not installed"):
        dispatch.choose(**choice)
    assert dispatch.describe("cpu")["prompt_splice"] == "reference"  # a refused choice changes nothing


@pytest.mark.parametrize("choice", [{"implementation": "triton"}, {"require": True}])
def test_triton_on_a_cpu_needs_the_interpreter(choice, monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "_current_device", lambda: "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"asked for on cpu, but they need CUDA.*TRITON_INTERPRET=1"):
        dispatch.choose(**choice)


def test_cpu_tensors_where_triton_is_required(monkeypatch) -> None:
    """As on a machine with a GPU, where choosing succeeds and a CPU tensor comes later."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dispatch.choose("triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="asked for on cpu, but they need CUDA"):
        dispatch.prompt_splice(SLOTS, VOCABULARY, TABLE)
    with pytest.raises(ValueError, match="asked for on cpu, but they need CUDA"):
        dispatch.verbalizer_softmax(FEATURES, ROWS, LABELS)


@pytest.mark.parametrize("require", [False, True])
def test_cuda_kernels_need_a_gpu_and_a_compiler(require, monkeypatch) -> None:
    """On a GPU without nvcc too: csrc/ is never built when the package is installed."""
    monkeypatch.setattr(dispatch, "_current_device", lambda: "cpu")
    with pytest.raises(
        ValueError, match="CUDA kernels were asked for on cpu, but they need CUDA: set kernels to 'auto'"
    ):
        dispatch.choose("cuda", require)
    monkeypatch.setattr(dispatch, "_current_device", lambda: "cuda")
    monkeypatch.delitem(REGISTERED, "cuda", raising=False)
    monkeypatch.setattr(cuda_extension, "why_not", lambda: "no nvcc was found")
    with pytest.raises(ValueError, match="asked for, but no nvcc was found; or set kernels to 'auto'"):
        dispatch.choose("cuda", require)
    assert dispatch.describe("cuda")["prompt_splice"].startswith("triton")  # as before


def test_cuda_kernels_that_do_not_compile(monkeypatch) -> None:
    def build() -> None:
        raise RuntimeError("Error building extension: line 7")

    monkeypatch.setattr(dispatch, "_why_not", lambda implementation, device: None)
    monkeypatch.delitem(REGISTERED, "cuda", raising=False)
    monkeypatch.setattr(cuda_extension, "build", build)
    with pytest.raises(ValueError, match="could not be built: Error building extension: line 7"):
        dispatch.choose("cuda")


def test_cuda_kernels_where_they_are_asked_for(implemented, monkeypatch, taken) -> None:
    implemented("cuda")
    monkeypatch.setattr(dispatch, "_current_device", lambda: "cuda")
    dispatch.choose("cuda")
    assert dispatch.describe("cuda")["prompt_splice"] == f"cuda {torch.version.cuda}"
    with pytest.raises(ValueError, match="asked for on cpu, but they need CUDA"):
        dispatch.prompt_splice(SLOTS, VOCABULARY, TABLE)
    monkeypatch.setattr(dispatch, "_why_not", lambda implementation, device: None)
    call_both()
    assert taken == ["cuda", "cuda"]


def test_choices_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="'opencl' is not one of auto, reference, triton, cuda"):
        dispatch.choose("opencl")
    with pytest.raises(ValueError, match="cannot also be 'reference'"):
        dispatch.choose("reference", require=True)


def test_plain_torch_needs_no_triton() -> None:
    program = (
        "import sys\n"
        "sys.modules['triton'] = None\n"  # as where it is not installed
        "import torch\n"
        "from megaptune.kernels import dispatch\n"
        "assert dispatch.describe('cuda')['prompt_splice'] == 'reference'\n"
        "dispatch.prompt_splice(torch.tensor([[1, -1]]), torch.ones(3, 4), torch.ones(2, 4))\n"
        "dispatch.verbalizer_softmax(torch.ones(2, 4), torch.ones(5, 4), torch.tensor([0, 4]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SLOTS.int(), VOCABULARY, TABLE), r"slots must be int64 \[B, T\], not int32 \[1, 2\]"),
        ((SLOTS[0], VOCABULARY, TABLE), "slots must be int64"),
        ((SLOTS, VOCABULARY.long(), TABLE), "vocab_weight must be fp32, bf16 or fp16"),
        ((SLOTS, VOCABULARY[0], TABLE), "vocab_weight must be"),
        ((SLOTS, VOCABULARY, TABLE.bfloat16()), r"table must be float32 \[R, 4\], not bfloat16 \[2, 4\]"),
        ((SLOTS, VOCABULARY, TABLE[:, :3]), "table must be"),
    ],
)
def test_prompt_splice_names_what_does_not_fit(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        dispatch.prompt_splice(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FEATURES.double(), ROWS, LABELS), "features must be fp32, bf16 or fp16"),
        ((FEATURES[0], ROWS, LABELS), "features must be"),
        ((FEATURES, ROWS[:, :3], LABELS), r"rows must be fp32, bf16 or fp16 \[C, 4\], not float32 \[5, 3\]"),
        ((FEATURES, ROWS[:0], LABELS), r"rows must be \[C > 0, 4\]"),
        ((FEATURES, ROWS, LABELS[:1]), r"labels must be int64 \[2\]"),
        ((FEATURES, ROWS, LABELS.int()), "labels must be"),
        ((FEATURES, ROWS, LABELS, torch.ones(4)), r"bias must be \[5\]"),
        ((FEATURES, ROWS, LABELS, None, LABELS), r"ranges must be int64 \[2, 2\], not int64 \[2\]"),
        ((FEATURES, ROWS, LABELS, None, torch.ones(2, 2)), "ranges must be int64"),
    ],
)
def test_verbalizer_softmax_names_what_does_not_fit(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        dispatch.verbalizer_softmax(*arguments)
