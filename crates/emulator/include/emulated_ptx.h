// What `ptx.cuh` has, made by hand, and what it counts on.
#pragma once

#include <cuda_fp16.h>
#include <emulated_hopper.h>

#define DYNAMIC_SHARED(TYPE, NAME, ALIGNMENT) \
    TYPE* const NAME = reinterpret_cast<TYPE*>(emulated::dynamic_shared)

namespace oxl {

// --- Threads and launches: kernels run one after the other ---

inline uint32_t shared_address(const void* pointer) { return emulated::shared_address_of(pointer); }
inline void dependency_wait() {}
inline void dependency_trigger() {}
inline int lane_number() { return emulated::lane(); }
inline int fresh_thread() { return int(threadIdx.x); }
inline void touch(uint32_t) {}

// --- Arithmetic ---

// Without subnormal numbers, as asked for.
inline float power_of_two(float x) {
    const float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

inline uint32_t add(uint32_t a, uint32_t b) {
    using emulated::bit_cast;
    return bit_cast<uint32_t>(__hadd2_rn(bit_cast<__half2>(a), bit_cast<__half2>(b)));
}
inline uint32_t times(uint32_t a, uint32_t b) {
    using emulated::bit_cast;
    return bit_cast<uint32_t>(__hmul2_rn(bit_cast<__half2>(a), bit_cast<__half2>(b)));
}
// A product of fp16 numbers is exact in f32; kernels only add what leaves the sum exact as well.
inline uint32_t times_plus(uint32_t a, uint32_t b, uint32_t c) {
    using emulated::bit_cast;
    const float2 x = __half22float2(bit_cast<__half2>(a));
    const float2 y = __half22float2(bit_cast<__half2>(b));
    const float2 z = __half22float2(bit_cast<__half2>(c));
    return bit_cast<uint32_t>(__floats2half2_rn(fmaf(x.x, y.x, z.x), fmaf(x.y, y.y, z.y)));
}

inline uint32_t masked_beside(uint32_t word, uint32_t mask, uint32_t beside) { return (word & mask) | beside; }

// --- Words at addresses in shared memory ---

template <typename... Words>
inline void store_shared(uint32_t place, Words... words) {
    const uint32_t all[] = {words...};
    memcpy(emulated::shared_at(place), all, sizeof(all));
}
template <typename... Words>
inline void load_shared(uint32_t place, Words&... words) {
    const uint8_t* from = emulated::shared_at(place);
    ((memcpy(&words, from, sizeof(words)), from += sizeof(words)), ...);
}
inline uint32_t load_shared_byte(uint32_t place) { return *emulated::shared_at(place); }
inline uint32_t load_shared_half(uint32_t place) {
    uint16_t half;
    memcpy(&half, emulated::shared_at(place), sizeof(half));
    return half;
}

// --- Tensor cores ---

inline void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1) {
    const uint32_t words[] = {a0, a1, a2, a3, b0, b1};
    emulated::show(emulated::PRODUCT, words, 6);
    const double* sums = emulated::product();
    for (int i = 0; i < 4; ++i) c[i] = float(c[i] + sums[i]);
}

// Lane l's words of four 8 x 8 blocks: row l / 4, columns 2 (l % 4) and the next one.
inline void load_blocks(uint32_t (&out)[4], uint32_t address) {
    const emulated::Shown shown = emulated::show(emulated::BLOCKS, &address, 1);
    const int lane = emulated::lane();
    for (int i = 0; i < 4; ++i) {
        const uint8_t* row = emulated::shared_at(*shown.of(8 * i + lane / 4));
        memcpy(&out[i], row + lane % 4 * 4, 4);
    }
}
// The other way round.
inline void load_blocks_transposed(uint32_t (&out)[4], uint32_t address) {
    const emulated::Shown shown = emulated::show(emulated::BLOCKS, &address, 1);
    const int lane = emulated::lane();
    for (int i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (int j = 0; j < 2; ++j) {
            const uint8_t* row = emulated::shared_at(*shown.of(8 * i + lane % 4 * 2 + j));
            memcpy(&pair[j], row + lane / 4 * 2, 2);
        }
        memcpy(&out[i], pair, 4);
    }
}

// --- Copies that are made when they are waited for ---

inline void copy_async(uint32_t to, const void* from) { emulated::start_copy(to, from, 16, 16); }
inline void copy_part_async(uint32_t to, const void* from, int bytes) {
    emulated::start_copy(to, from, 16, bytes);
}
inline void copy_async(uint32_t to, const void* from, bool is_read) {
    emulated::start_copy(to, from, 16, is_read ? 16 : 0);
}
inline void copy_async_if(int left, uint32_t to, const void* from) {
    if (left > 0) copy_async(to, from);
}
inline void copy_two_async(uint32_t to, const void* from) { emulated::start_copy(to, from, 8, 8); }
inline void copy_word_async(uint32_t to, const void* from, bool is_read) {
    emulated::start_copy(to, from, 4, is_read ? 4 : 0);
}
inline void commit_copies() { emulated::end_group(); }
template <int PENDING>
inline void wait_for_copies() {
    emulated::wait_for_groups(PENDING);
}

}  // namespace oxl
