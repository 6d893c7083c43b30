"""Compile the Triton kernels for GPUs that are not there and print what they use, one JSON line per variant.

Run by test_ahead_of_time.py as a program of its own: Triton decides at import whether it interprets, and here it must
not. By hand: ``python tests/kernels/compile_kernels.py`` from the repository root.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megaptune.kernels import triton_softmax as softmax
from megaptune.kernels import triton_splice as splice

TOOLS = Path(nvidia.__file__).parent / "bin"
ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}  # Triton writes PTX for sm_90a, not for plain sm_90

INT64_POINTERS = ("slots_ptr", "labels_ptr", "ranges_ptr", "place_ptr", "better_ptr")
WEIGHT_POINTERS = ("vocab_ptr", "rows_ptr", "features_ptr", "bias_ptr", "grad_ptr")
TILES = {"BLOCK_B": softmax.BLOCK_B, "BLOCK_C": softmax.BLOCK_C}
PRODUCT_TILES = {"BLOCK_B": softmax.BLOCK_B, "BLOCK_C": softmax.PRODUCT_BLOCK_C, "BLOCK_D": softmax.PRODUCT_BLOCK_D}
KERNELS = {
    "splice_forward": (splice.splice_forward_kernel, {"BLOCK_D": splice.FORWARD_BLOCK_D}),
    "splice_backward": (
        splice.splice_backward_kernel,
        {"BLOCK_N": splice.BACKWARD_BLOCK_N, "BLOCK_D": splice.BACKWARD_BLOCK_D},
    ),
    "softmax_forward": (softmax.softmax_forward_kernel, {**TILES, "SPLIT_C": softmax.SPLIT_C}),
    "softmax_weights": (softmax.softmax_weights_kernel, {**TILES, "WEIGH": True, "COUNT": True}),
    "softmax_counts": (softmax.softmax_weights_kernel, {**TILES, "WEIGH": False, "COUNT": True}),
    "weighted_rows": (softmax.weighted_rows_kernel, {**PRODUCT_TILES, "PRODUCT_C": softmax.PRODUCT_C}),
}
# What the launcher makes of a size or stride: 1 is compiled in, a multiple of 16 is promised, anything else is unknown.
SIZES = {
    "aligned": lambda name: 1 if name.endswith("stride_d") else 16,
    "odd": lambda name: 1 if name.endswith("stride_d") else 7,
    "strided": lambda name: 16,
    "ones": lambda name: 1,
}


def source(kernel, constants: dict, dtype: str, sizes: str, extras: bool) -> ASTSource:
    """The kernel as the launcher would specialise it for weights of ``dtype`` and sizes of one kind; ``extras``: with a
    bias and with ranges."""
    constants, signature, promises = dict(constants), {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in ("HAS_BIAS", "HAS_RANGES"):
            constants[name] = extras
        elif name == "PRECISION":
            constants[name] = "ieee" if dtype == "fp32" else "tf32"
            constants.setdefault("BLOCK_D", softmax.BLOCK_D[constants[name]])
        kind = "fp32" if name == "scale" else None
        if name in constants:
            kind = "constexpr"
        elif name in INT64_POINTERS:
            kind = "*i64"
        elif kind is None and name.endswith("_ptr"):
            kind = f"*{dtype}" if name in WEIGHT_POINTERS else "*fp32"
            if name == "out_ptr" and kernel is splice.splice_forward_kernel:
                kind = f"*{dtype}"
        elif kind is None:
            size = SIZES[sizes](name)
            kind = "i32"
            if size == 1 and name != "first":
                kind, constants[name] = "constexpr", 1
            elif size % 16 == 0:
                promises[(place,)] = [["tt.divisibility", 16]]
        if kind.startswith("*"):
            promises[(place,)] = [["tt.divisibility", 16]]
        signature[name] = kind
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=promises)


def resources(compiled, capability: int) -> dict[str, int]:
    """Registers, stack and local bytes from the machine code; spill bytes from assembling its PTX once more."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = _output(TOOLS / "cuobjdump", "-res-usage", cubin)
        assembler = "ptxas-blackwell" if not (TOOLS / "ptxas").exists() else "ptxas"
        spills = _output(TOOLS / assembler, "-v", f"-arch={ARCHITECTURES[capability]}", ptx, "-o", Path(folder, "out"))
    found = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", spills).groups()
    return {**found, "spill": int(stores) + int(loads), "shared": compiled.metadata.shared}


def _output(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main() -> None:
    for name, (kernel, constants) in KERNELS.items():
        takes_extras = "HAS_RANGES" in kernel.arg_names
        # Both architectures and dtypes for sizes as models have them; the other launches once, on the newer one.
        variants = [(cc, dtype, "aligned", takes_extras) for cc in ARCHITECTURES for dtype in ("bf16", "fp32")]
        variants += [(90, "fp16", "odd", False), (90, "fp32", "strided", False), (90, "fp32", "ones", takes_extras)]
        variants += [(80, "fp32", "aligned", False)] if takes_extras else []
        for capability, dtype, sizes, extras in variants:
            compiled = triton.compile(
                source(kernel, constants, dtype, sizes, extras), target=GPUTarget("cuda", capability, 32)
            )
            about = {"kernel": name, "capability": capability, "dtype": dtype, "sizes": sizes}
            print(json.dumps({**about, **resources(compiled, capability)}), flush=True)


if __name__ == "__main__":
    main()
