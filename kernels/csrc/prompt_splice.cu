// prompt_splice: one gather forward, one ordered sum backward.
#include "common.cuh"

namespace megaptune {
namespace {

constexpr int THREADS = 256;

// One block per (position, THREADS columns). A slot outside the vocabulary or the table gives NaN and reads nothing.
template <typename T>
__global__ void splice_forward_kernel(const int64_t* slots, const T* vocab, Matrix vocab_, const float* table,
                                      Matrix table_, float scale, T* out) {
    const int64_t n = blockIdx.x, d = int64_t(blockIdx.y) * THREADS + threadIdx.x, D = vocab_.columns;
    if (d >= D) return;
    const int64_t slot = slots[n];
    float value = NAN;
    if (slot >= 0 && slot < vocab_.rows)
        value = widen(vocab[slot * vocab_.row_stride + d * vocab_.column_stride]) * scale;
    else if (slot < 0 && -1 - slot < table_.rows)
        value = table[(-1 - slot) * table_.row_stride + d * table_.column_stride] * scale;
    narrow(value, out + n * D + d);  // scaled in fp32 and rounded once
}

// One block per (table row, THREADS columns): out[r] = scale * sum of grad[n] over slots[n] == -1 - r. A thread owns its
// column's whole sum and takes the positions in order: no atomics, and bits that do not depend on scheduling.
template <typename T>
__global__ void splice_backward_kernel(const int64_t* slots, int64_t N, const T* grad, int64_t D, float scale,
                                       float* out) {
    __shared__ bool used[THREADS];
    const int64_t r = blockIdx.x, d = int64_t(blockIdx.y) * THREADS + threadIdx.x;
    float total = 0;
    for (int64_t start = 0; start < N; start += THREADS) {
        const int64_t n = start + threadIdx.x;
        used[threadIdx.x] = n < N && slots[n] == -1 - r;
        // Most blocks of positions hold no use of this row and cost one load. The barrier also makes `used` visible.
        if (__syncthreads_or(used[threadIdx.x])) {
            for (int i = 0; i < THREADS; ++i)
                if (used[i] && d < D) total += widen(grad[(start + i) * D + d]);
        }
        __syncthreads();
    }
    if (d < D) out[r * D + d] = total * scale;
}

}  // namespace

void splice_forward(const int64_t* slots, int64_t N, Matrix vocab, Matrix table, float scale, void* out, void* stream) {
    with_type(vocab.kind, [&](auto zero) {
        using T = decltype(zero);
        launch(splice_forward_kernel<T>, dim3(unsigned(N), blocks_of(vocab.columns, THREADS)), THREADS, stream, slots,
               static_cast<const T*>(vocab.data), vocab, static_cast<const float*>(table.data), table, scale,
               static_cast<T*>(out));
    });
}

void splice_backward(const int64_t* slots, int64_t N, Matrix grad, float scale, float* out, int64_t R, void* stream) {
    with_type(grad.kind, [&](auto zero) {
        using T = decltype(zero);
        launch(splice_backward_kernel<T>, dim3(unsigned(R), blocks_of(grad.columns, THREADS)), THREADS, stream, slots, N,
               static_cast<const T*>(grad.data), grad.columns, scale, out);
    });
}

}  // namespace megaptune
