// A cluster that can be broken: each of two blocks brings half of the numbers to both, and gives all of them
// backwards. Launch: clusters of two blocks of a warp; dynamic shared memory = 128 bytes.
#include "bulk.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int NUMBERS = 32;

struct BrokenClusterArgs {
    // u32 [32], 16-byte aligned.
    const uint32_t* in;
    // u32 [2, 32]
    uint32_t* out;
    // 1: nobody waits for what is brought. 2: all wait for more than that.
    int32_t fault;
    int32_t unused;
};

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(NUMBERS)
    oxl_broken_cluster(const __grid_constant__ BrokenClusterArgs args) {
    constexpr int HALF_BYTES = NUMBERS / 2 * sizeof(uint32_t);
    DYNAMIC_SHARED(uint32_t, shared, 128);
    __shared__ uint64_t brought;
    const uint32_t barrier = oxl::shared_address(&brought);
    const int thread = int(threadIdx.x);
    const int rank = int(blockIdx.x) % 2;
    if (thread == 0) {
        oxl::barrier_init(barrier, 1);
        oxl::barriers_are_made();
    }
    oxl::cluster_meet();
    if (thread == 0) {
        oxl::barrier_expect(barrier, args.fault == 2 ? 3 * HALF_BYTES : 2 * HALF_BYTES);
        oxl::bulk_copy_to_both(oxl::shared_address(shared) + rank * HALF_BYTES, args.in + rank * NUMBERS / 2,
                               HALF_BYTES, barrier);
    }
    __syncwarp();
    if (args.fault != 1) oxl::barrier_wait(barrier, 0);
    args.out[blockIdx.x * NUMBERS + thread] = shared[NUMBERS - 1 - thread];
    oxl::cluster_meet();
}

#endif
