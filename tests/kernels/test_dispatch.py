"""Which implementation is taken, and what is said when the wanted one cannot be."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from megaptune.kernels import dispatch, prompt_splice, reference, verbalizer_softmax

ROOT = Path(__file__).resolve().parents[2]
SLOTS, VOCABULARY, TABLE = torch.tensor([[1, -1]]), torch.ones(3, 4), torch.ones(2, 4)
FEATURES, ROWS, LABELS = torch.ones(2, 4), torch.ones(5, 4), torch.tensor([0, 4])


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose ops were called, in order; the ops themselves are replaced."""
    calls = []
    for op, files in {
        "prompt_splice": (reference, prompt_splice),
        "verbalizer_softmax": (reference, verbalizer_softmax),
    }.items():
        for file in files:
            name = "reference" if file is reference else "triton"
            monkeypatch.setattr(file, op, lambda *_, name=name: calls.append(name))
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


def test_choices_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="'cuda' is not one of auto, reference, triton"):
        dispatch.choose("cuda")
    with pytest.raises(ValueError, match="cannot also be 'reference'"):
        dispatch.choose("reference", require=True)


def test_plain_torch_never_imports_triton() -> None:
    program = (
        "import sys, torch\n"
        "from megaptune.kernels import dispatch\n"
        "dispatch.choose('auto'); dispatch.describe('cpu')\n"
        "dispatch.prompt_splice(torch.tensor([[1, -1]]), torch.ones(3, 4), torch.ones(2, 4))\n"
        "dispatch.verbalizer_softmax(torch.ones(2, 4), torch.ones(5, 4), torch.tensor([0, 4]))\n"
        "assert 'triton' not in sys.modules\n"
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
        ((FEATURES, ROWS[:, :3], LABELS), r"rows must be fp32, bf16 or fp16 \[C > 0, 4\], not float32 \[5, 3\]"),
        ((FEATURES, ROWS[:0], LABELS), "rows must be"),
        ((FEATURES, ROWS, LABELS[:1]), r"labels must be int64 \[2\]"),
        ((FEATURES, ROWS, LABELS.int()), "labels must be"),
        ((FEATURES, ROWS, LABELS, torch.ones(4)), r"bias must be \[5\]"),
    ],
)
def test_verbalizer_softmax_names_what_does_not_fit(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        dispatch.verbalizer_softmax(*arguments)
