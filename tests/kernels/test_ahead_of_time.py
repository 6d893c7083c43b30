"""The Triton kernels compile for GPUs that are not there, and keep everything they use in registers.

This shows that they are valid and what they use, never that they are right or fast on a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compile_kernels.py")
KERNELS = ["splice_forward", "splice_backward", "softmax_forward", "softmax_weights", "softmax_counts", "weighted_rows"]
SHARED_BYTES = 48 * 1024  # what any block gets without asking for more


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """One dict per variant of a kernel, compiled afresh and without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_spills(compiled, kernel, capability) -> None:
    found = [variant for variant in compiled if (variant["kernel"], variant["capability"]) == (kernel, capability)]
    assert {"bf16", "fp32"} <= {variant["dtype"] for variant in found}
    for variant in found:
        assert (variant["spill"], variant["local"], variant["stack"]) == (0, 0, 0), variant
        assert 0 < variant["reg"] <= 255, variant
        assert variant["shared"] <= SHARED_BYTES, variant


def test_every_kind_of_specialisation_was_compiled(compiled) -> None:
    assert {variant["sizes"] for variant in compiled} == {"aligned", "odd", "strided", "ones"}
