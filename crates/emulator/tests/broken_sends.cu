// Blocks of a cluster that can be broken: each passes its numbers on to the next one, twice. Launch: clusters of four blocks
// of a warp; dynamic shared memory = 80 bytes.
#include "bulk.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int BLOCKS_OF_CLUSTER = 4;
constexpr int PASSED = 16;

struct BrokenSendsArgs {
    // u32 [4, 16]
    const uint32_t* in;
    // u32 [4, 16]
    uint32_t* out;
    // 1: nobody waits for what is sent. 2: nor for the block before to have taken what it was sent first.
    int32_t fault;
    int32_t unused;
};

extern "C" __global__ void __cluster_dims__(BLOCKS_OF_CLUSTER, 1, 1) __launch_bounds__(32)
    oxl_broken_sends(const __grid_constant__ BrokenSendsArgs args) {
    DYNAMIC_SHARED(uint32_t, numbers, 128);
    const int lane = int(threadIdx.x);
    const int rank = int(blockIdx.x) % BLOCKS_OF_CLUSTER;
    const int next = (rank + 1) % BLOCKS_OF_CLUSTER;
    const int before = (rank + BLOCKS_OF_CLUSTER - 1) % BLOCKS_OF_CLUSTER;
    const uint32_t are_there = oxl::shared_address(numbers + PASSED);
    const uint32_t are_taken = are_there + oxl::BARRIER_BYTES;
    constexpr uint32_t BYTES = PASSED * sizeof(uint32_t);
    if (lane == 0) {
        oxl::barrier_init(are_there, 1);
        oxl::barrier_init(are_taken, 1);
        oxl::barriers_are_made();
        oxl::barrier_expect(are_there, BYTES);
    }
    oxl::cluster_meet();
    uint32_t number = lane < PASSED ? args.in[rank * PASSED + lane] : 0;
    for (int round = 0; round < 2; ++round) {
        if (round == 1 && args.fault != 2) oxl::barrier_wait(are_taken, 0);
        if (lane < PASSED) {
            const float word[1] = {__uint_as_float(number)};
            oxl::send_async(oxl::cluster_address(oxl::shared_address(numbers + lane), next), word,
                            oxl::cluster_address(are_there, next));
        }
        if (args.fault != 1) oxl::barrier_wait(are_there, round);
        if (lane < PASSED) number = numbers[lane];
        __syncwarp();
        if (round == 0 && lane == 0) {
            if (args.fault != 1) oxl::barrier_expect(are_there, BYTES);
            oxl::barrier_arrive_at(are_taken, before);
        }
    }
    if (lane < PASSED) args.out[rank * PASSED + lane] = number;
    oxl::cluster_meet();
}

#endif
