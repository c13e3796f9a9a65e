// A kernel that can be broken, to see what the emulator finds: every thread gives its neighbours' sum, by way of
// shared memory. Launch: one block of two warps; dynamic shared memory = 512 bytes.
#include "common.cuh"

constexpr int THREADS = 64;

struct BrokenArgs {
    // u32 [64] each, 16-byte aligned.
    const uint32_t* in;
    uint32_t* out;
    // 1: nobody waits for the block. 2: nor for copies. 3: half of a warp waits for the warp, the others for the block.
    int32_t fault;
    int32_t unused;
};

extern "C" __global__ void __launch_bounds__(THREADS)
    oxl_broken(const __grid_constant__ BrokenArgs args) {
    DYNAMIC_SHARED(uint32_t, shared, 16);
    const int thread = int(threadIdx.x);
    if (thread % 4 == 0) oxl::copy_async(oxl::shared_address(shared + thread), args.in + thread);
    oxl::commit_copies();
    if (args.fault != 2) oxl::wait_for_copies<0>();
    if (args.fault == 3 && thread % 2 == 0) {
        __syncwarp();
    } else if (args.fault != 1) {
        __syncthreads();
    }
    args.out[thread] = shared[(thread + 1) % THREADS] + shared[(thread + THREADS - 1) % THREADS];
}
