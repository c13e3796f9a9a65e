// What the memory of a device gives when nothing else is asked of it.
#include "common.cuh"

struct FillRandomArgs {
    // fp16 [elements]
    __half* memory;
    int64_t elements;
};

// Numbers without a pattern between -1 and 1: products of zeros would run faster than real ones.
// Eight elements a thread; bytes: 2 an element.
extern "C" __global__ void __launch_bounds__(256)
    oxl_fill_random(const __grid_constant__ FillRandomArgs args) {
    oxl::dependency_trigger();
    oxl::dependency_wait();
    const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    uint64_t state = (thread + 1) * 0x9e3779b97f4a7c15ull;
    for (int i = 0; i < 8; ++i) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        const int64_t element = thread * 8 + i;
        const float unit = float(uint32_t(state >> 40)) / float(1 << 24);
        if (element < args.elements) args.memory[element] = __float2half(2.0f * unit - 1.0f);
    }
}

struct ReadAllArgs {
    // [pieces], 16 bytes each.
    const uint4* memory;
    // Written only if all of the memory is one pattern: what keeps the loads alive.
    uint32_t* result;
    int64_t pieces;
};

// Reads every piece once, 16 bytes a load and eight loads of a thread under way, in the order in
// which blocks are started. Bytes: 16 a piece.
extern "C" __global__ void __launch_bounds__(512)
    oxl_read_all(const __grid_constant__ ReadAllArgs args) {
    constexpr int LOADS = 8;
    oxl::dependency_trigger();
    oxl::dependency_wait();
    const int64_t first = int64_t(blockIdx.x) * blockDim.x * LOADS + threadIdx.x;
    uint4 values[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        const int64_t piece = first + int64_t(i) * blockDim.x;
        values[i] = piece < args.pieces ? __ldcs(args.memory + piece) : make_uint4(0, 0, 0, 0);
    }
    uint32_t all = ~0u;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) all &= values[i].x & values[i].y & values[i].z & values[i].w;
    if (all == 0x5a5a5a5a) *args.result = all;
}
