// What both files of kernels need: three number formats, and starting a kernel.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace megaptune {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float* out) { *out = x; }
__device__ inline void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half* out) { *out = __float2half_rn(x); }

#ifndef MEGAPTUNE_LAUNCH  // a build for a machine without CUDA brings its own
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream, Arguments... arguments) {
    kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
    if (cudaError_t error = cudaGetLastError(); error != cudaSuccess)
        throw std::runtime_error(std::string("a kernel did not start: ") + cudaGetErrorString(error));
}
#endif

// run(T{}) with T the element type that `kind` stands for.
template <typename Run>
void with_type(Kind kind, Run run) {
    switch (kind) {
        case Kind::fp32: return run(float{});
        case Kind::bf16: return run(__nv_bfloat16{});
        case Kind::fp16: return run(__half{});
    }
}

inline unsigned blocks_of(int64_t count, int64_t size) { return static_cast<unsigned>((count + size - 1) / size); }

}  // namespace megaptune
