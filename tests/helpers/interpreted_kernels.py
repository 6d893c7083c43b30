"""The Triton kernels, imported so that Triton's interpreter runs them where there is no GPU.

Triton reads TRITON_INTERPRET when a kernel is defined, so this is imported before anything else can import Triton
(tests/conftest.py does it); the variable is set again around each test of tests/kernels, and no other test sees it.
"""

import os
import sys

import numpy as np
import torch

__all__ = ["ON_GPU", "triton_ops"]

ON_GPU = torch.cuda.is_available()

if ON_GPU:
    from megaptune.kernels import triton_ops
else:
    before = os.environ.get("TRITON_INTERPRET")
    if before != "1" and "triton" in sys.modules:
        raise RuntimeError("something imported triton before its interpreter could be asked for")
    os.environ["TRITON_INTERPRET"] = "1"
    from megaptune.kernels import triton_ops

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
