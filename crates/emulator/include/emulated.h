// What CUDA's compiler knows by itself: qualifiers, vectors, a thread's place, what the threads of a warp and of a
// block do together.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#define OXL_EMULATED

#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
// Hopper's own kernels as well.
#define __CUDA_ARCH_FEAT_SM90_ALL
#define __align__(BYTES) __attribute__((aligned(BYTES)))
// Blocks run one after the other.
#define __shared__ static

struct __align__(8) float2 {
    float x, y;
};
struct __align__(16) float4 {
    float x, y, z, w;
};
struct __align__(8) uint2 {
    uint32_t x, y;
};
struct __align__(16) uint4 {
    uint32_t x, y, z, w;
};
struct __align__(8) int2 {
    int32_t x, y;
};
struct __align__(16) int4 {
    int32_t x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulated {

struct Index {
    uint32_t x, y, z;
};

constexpr int LANES = 32;
// Of a block, and of a cluster's blocks.
constexpr int MOST_THREADS = 1024;
constexpr int MOST_CLUSTER_THREADS = 4096;

// Words that a lane shows the others of its warp.
constexpr int MOST_WORDS = 6;

// What a thread waits for. A warp's threads are to come to the same. POLL: for others to go on; CLUSTER: for all threads
// of the cluster; TWO_WARPS and a number: for another warp at the same number.
enum Meeting : int32_t { BLOCK, WARP, SHUFFLE, REDUCTION, BLOCKS, PRODUCT, POLL, CLUSTER, TWO_WARPS = 256 };

// The thread that runs, by its number in the cluster, which mostly is a block; and its block there.
extern int thread;
extern int cta;
// The block's dynamic shared memory.
extern uint8_t* dynamic_shared;

inline int lane() { return thread % LANES; }

// Returns when all threads of the block, or the warp, have come to the meeting. In Rust.
extern "C" void oxl_emulated_meet(int32_t meeting);

// Shows the warp some words, and returns when all have; `of(lane)` is what a lane has shown, until the next time.
struct Shown {
    const uint32_t (*words)[MOST_WORDS];

    const uint32_t* of(int lane) const { return words[lane]; }
};
Shown show(Meeting meeting, const uint32_t* words, int count);

// The products of a warp's tensor core operands for a lane, without what they are added to.
const double* product();

// Where an address of shared memory points to.
uint8_t* shared_at(uint32_t address);
uint32_t shared_address_of(const void* pointer);

// A copy that is made when it is waited for; with fewer bytes read than written, the rest are zeros.
void start_copy(uint32_t to, const void* from, int bytes, int read_bytes);
void end_group();
void wait_for_groups(int pending);

// Barriers in shared memory, whose phase ends when as many have arrived as were said, and all bytes that were announced. Of
// a block of the cluster: its barrier that was made as this one was of the own.
void make_barrier(uint32_t barrier, int arrivals);
void arrive(uint32_t barrier, int rank, uint32_t announced_bytes);
// Whether the phase of this parity has ended; makes copies that are to arrive.
bool has_passed(uint32_t barrier, uint32_t parity);

// A copy to a block of the cluster that is made when its barrier is waited for.
void start_bulk_copy(int rank, uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);

// Where an address of dynamic shared memory is in a block of the cluster, and a store there that counts at a barrier: made
// when the barrier is waited for, or at once (`oxl_emulated_begin`).
uint32_t cluster_address_of(uint32_t address, int rank);
void start_send(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);

// Products of a warp group of 16 inputs, made when they are waited for; A in registers, taken now, or in shared memory.
void start_product(float* sums, int width, const uint32_t (&a)[4], uint64_t b, bool is_columns, bool adds);
void start_shared_product(float* sums, int width, uint64_t a, uint64_t b, bool adds);
void end_products();
void wait_for_products(int pending);

template <typename To, typename From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

// One kernel.
struct Entry {
    const char* name;
    void (*run)(const void* args);
    size_t args_bytes;
    // Threads of a block, at most.
    size_t most_threads;
    // Blocks of a cluster.
    size_t ctas;
    // Of a cluster's second block: static shared memory of its own. Null: there is none.
    void (*run_second)(const void* args);
    // Whether it is made of Hopper's own instructions.
    bool is_hoppers;
};

// The first of a kernel's bounds, or of its cluster's extents.
constexpr size_t first_of(size_t first, size_t = 0, size_t = 0) { return first; }

template <typename Args>
constexpr size_t args_bytes_of(void (*)(Args)) {
    return sizeof(Args);
}

template <typename Args>
void run_with(void (*kernel)(Args), const void* args) {
    kernel(*static_cast<const Args*>(args));
}

}  // namespace emulated

#define ENTRY(NAME, CTAS, SECOND, IS_HOPPERS, ...)                              \
    {                                                                           \
        #NAME, [](const void* args) { emulated::run_with(NAME, args); },        \
            emulated::args_bytes_of(NAME), emulated::first_of(__VA_ARGS__),     \
            CTAS, SECOND, IS_HOPPERS                                            \
    }

extern emulated::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { emulated::oxl_emulated_meet(emulated::BLOCK); }
inline void __syncwarp() { emulated::oxl_emulated_meet(emulated::WARP); }
inline void __threadfence() {}

// --- What a warp does together, all of it ---

namespace emulated {

template <typename T>
inline T shuffle(T x, int from) {
    constexpr int WORDS = sizeof(T) / sizeof(uint32_t);
    uint32_t words[WORDS];
    memcpy(words, &x, sizeof(T));
    const Shown shown = show(SHUFFLE, words, WORDS);
    memcpy(&x, shown.of(from), sizeof(T));
    return x;
}

template <typename T, typename Join>
inline T reduce(T x, Join join) {
    const uint32_t word = bit_cast<uint32_t>(x);
    const Shown shown = show(REDUCTION, &word, 1);
    T all = bit_cast<T>(*shown.of(0));
    for (int i = 1; i < LANES; ++i) all = join(all, bit_cast<T>(*shown.of(i)));
    return all;
}

}  // namespace emulated

template <typename T>
inline T __shfl_sync(uint32_t, T x, int from) {
    return emulated::shuffle(x, from % emulated::LANES);
}
template <typename T>
inline T __shfl_xor_sync(uint32_t, T x, int distance) {
    return emulated::shuffle(x, emulated::lane() ^ distance);
}
template <typename T>
inline T __shfl_up_sync(uint32_t, T x, int distance) {
    const int lane = emulated::lane();
    return emulated::shuffle(x, lane < distance ? lane : lane - distance);
}
template <typename T>
inline T __reduce_max_sync(uint32_t, T x) {
    return emulated::reduce(x, [](T a, T b) { return a > b ? a : b; });
}
template <typename T>
inline T __reduce_min_sync(uint32_t, T x) {
    return emulated::reduce(x, [](T a, T b) { return a < b ? a : b; });
}
template <typename T>
inline T __reduce_add_sync(uint32_t, T x) {
    return emulated::reduce(x, [](T a, T b) { return T(a + b); });
}

// --- Memory ---

template <typename T>
inline T __ldg(const T* from) {
    return *from;
}
template <typename T>
inline T __ldcg(const T* from) {
    return *from;
}
template <typename T>
inline T __ldcs(const T* from) {
    return *from;
}
template <typename T>
inline void __stcg(T* to, T x) {
    *to = x;
}
template <typename T>
inline T atomicAdd(T* at, std::common_type_t<T> x) {
    const T before = *at;
    *at = before + x;
    return before;
}
template <typename T>
inline T atomicMax(T* at, std::common_type_t<T> x) {
    const T before = *at;
    if (x > before) *at = x;
    return before;
}

// --- Numbers ---

template <typename A, typename B>
inline std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B>
inline std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(a) < T(b) ? T(b) : T(a);
}

inline float __uint_as_float(uint32_t x) { return emulated::bit_cast<float>(x); }
inline float __int_as_float(int32_t x) { return emulated::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return emulated::bit_cast<uint32_t>(x); }
inline int32_t __float_as_int(float x) { return emulated::bit_cast<int32_t>(x); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
// The remainder is exact, so that large angles lose nothing.
inline void sincospi(double x, double* sine, double* cosine) {
    const double angle = M_PI * fmod(x, 2.0);
    *sine = sin(angle);
    *cosine = cos(angle);
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = uint64_t(high) << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t from = selector >> (4 * i) & 7;
        uint32_t byte = uint32_t(bytes >> (8 * from)) & 0xff;
        // The sign of the byte instead.
        if (selector >> (4 * i) & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by) {
    return uint32_t((uint64_t(high) << 32 | low) >> (by & 31));
}
