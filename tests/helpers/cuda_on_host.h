// Runs kernels of csrc/ on a CPU, for tests: the threads of a block are fibers that take turns at barriers.
//
// Blocks run one after the other, so shared memory is static. Turns alternate in direction, so that a missing barrier
// shows: what a thread reads was then written before it by one half of the threads only.
#pragma once
#include <csetjmp>
#include <ucontext.h>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cmath>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define MEGAPTUNE_LAUNCH

using __nv_bfloat16 = c10::BFloat16;
using __half = c10::Half;
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline float __half2float(__half x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, gridDim;

namespace on_host {

struct Fiber {
    ucontext_t start;
    jmp_buf place;  // where it goes on: unlike swapcontext, a jump costs no system call
    std::vector<char> stack = std::vector<char>(1 << 16);
    bool started = false, done = false;
    int vote = 0;
};

inline ucontext_t unused;
inline jmp_buf scheduler;
inline Fiber* current;
inline std::function<void()> body;
inline int verdict;

inline int barrier(int vote) {
    current->vote = vote;
    if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
    return verdict;
}

inline void enter() {
    body();
    current->done = true;
    _longjmp(scheduler, 1);
}

// Until its next barrier or its end.
inline void resume(Fiber& fiber) {
    current = &fiber;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    swapcontext(&unused, &fiber.start);
}

inline void run_block(std::vector<Fiber>& fibers) {
    const int count = int(fibers.size());
    for (Fiber& fiber : fibers) {
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data();
        fiber.start.uc_stack.ss_size = fiber.stack.size();
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
        fiber.started = fiber.done = false;
    }
    for (int turn = 0, done = 0; done < count; ++turn) {
        int votes = 0;
        done = 0;
        for (int i = 0; i < count; ++i) {
            const int thread = turn % 2 ? count - 1 - i : i;
            threadIdx = dim3(thread);
            resume(fibers[thread]);
            done += fibers[thread].done;
            votes |= fibers[thread].vote;
            fibers[thread].vote = 0;
        }
        if (done != 0 && done != count) throw std::runtime_error("some threads ended while others wait at a barrier");
        verdict = votes;
    }
}

}  // namespace on_host

inline void __syncthreads() { on_host::barrier(0); }
inline int __syncthreads_or(int vote) { return on_host::barrier(vote != 0); }

namespace megaptune {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, void*, Arguments... arguments) {
    std::vector<on_host::Fiber> fibers(threads);
    on_host::body = [=] { kernel(arguments...); };
    gridDim = grid;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                on_host::run_block(fibers);
            }
}

}  // namespace megaptune
