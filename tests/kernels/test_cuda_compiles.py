"""csrc/ compiles for GPUs that are not there and keeps everything in registers; and building it survives what builds
die of. binding.cpp is compiled against torch's headers wherever the other tests run the CUDA kernels."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from megaptune.kernels import cuda_extension

ROOT = Path(__file__).resolve().parents[2]
NVCC = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "nvcc")
KERNELS = {
    "prompt_splice": ["splice_forward_kernel", "splice_backward_kernel"],
    "verbalizer_softmax": ["softmax_forward_kernel", "softmax_weights_kernel", "weighted_rows_kernel"],
}
ARCHITECTURES = ["sm_80", "sm_90"]
TYPES = ["If", "I6__half", "I13__nv_bfloat16"]  # a kernel's element type, as compilers write it in names
TORCHS_FLAGS = [
    f"-D__CUDA_NO_{what}__"
    for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
]
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>sm_\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers[^\n]*?(?P<shared>\d+ bytes smem)?",
    re.DOTALL,
)


@pytest.mark.parametrize("file", list(KERNELS))
def test_compiles_without_spills(file, tmp_path) -> None:
    targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]
    command = [NVCC, "-std=c++20", "-O3", *TORCHS_FLAGS, "-Werror=all-warnings", *targets, "-Xptxas=-v", "-c"]
    done = subprocess.run(
        [*command, cuda_extension.CSRC / f"{file}.cu", "-o", tmp_path / "out.o"],
        env={**os.environ, "CUDA_HOME": str(NVCC.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [match.groupdict() for match in REPORT.finditer(done.stderr + done.stdout)]
    for kernel in KERNELS[file]:
        for architecture in ARCHITECTURES:
            for kind in TYPES:
                (one,) = [f for f in found if kernel + kind in f["name"] and f["architecture"] == architecture]
                assert (one["stack"], one["stores"], one["loads"]) == ("0", "0", "0"), one
                assert int(one["registers"]) <= 128, one
    assert len(found) == len(KERNELS[file]) * len(ARCHITECTURES) * len(TYPES)


BUILD = """
import sys
from pathlib import Path
from megaptune.kernels import cuda_extension
print(cuda_extension.build([Path(sys.argv[1])], [f"-I{sys.argv[2]}"]).answer())
"""
SOURCE = """
#include <pybind11/pybind11.h>
#include "slow.h"
PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) { module.def("answer", [] { return ANSWER; }); }
"""


def test_a_killed_build_is_in_nobodys_way(tmp_path) -> None:
    """Killed while the compiler runs, it leaves torch's lock behind, at which torch alone would wait for ever."""
    source, header = tmp_path / "small.cpp", tmp_path / "slow.h"
    source.write_text(SOURCE)
    os.mkfifo(header)  # the compiler waits here until somebody writes
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    command = [sys.executable, "-c", BUILD, str(source), str(tmp_path)]
    build = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("extensions/*/lock")):
        assert build.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(build.pid, signal.SIGKILL)
    build.wait()
    assert list(tmp_path.glob("extensions/*/lock"))

    header.unlink()
    header.write_text("#define ANSWER 42\n")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr[-4000:]


def test_a_build_that_fails_says_why(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    (tmp_path / "wrong.cpp").write_text("#error this is what is wrong\n")
    with pytest.raises(RuntimeError, match="this is what is wrong"):
        cuda_extension.build([tmp_path / "wrong.cpp"])
