// Tiles of quantised keys and values in shared memory, and the operands that a lane makes of their codes in registers
// (attention_split.cu): bit for bit what `scaled_pair` makes of them.
#pragma once

#include "attention.cuh"

namespace oxl {

// Bytes by which rows of codes in shared memory are longer than a vector: the eight rows of keys, or four pairs of
// rows of values, that a warp reads at once lie in different banks.
constexpr int ROW_PADDING_BYTES = 16;

// The keys or the values of a tile: rows of codes, then scales as pages have them. As `HeadLayout` counts, of whole groups of
// codes, by shifts alone.
struct StoredTile {
    HeadLayout layout;

    __device__ __forceinline__ int vector_bytes() const {
        return layout.head_dim >> (layout.format - FORMAT_Q8);
    }
    __device__ __forceinline__ int scale_bytes() const { return layout.head_dim >> 4; }
    __device__ __forceinline__ int row_bytes() const { return vector_bytes() + ROW_PADDING_BYTES; }
    __device__ __forceinline__ int scales_at() const { return TILE * row_bytes(); }
    __device__ __forceinline__ int bytes() const { return scales_at() + TILE * scale_bytes(); }
    // Bytes of one head in one page.
    __device__ __forceinline__ int page_bytes() const {
        return PAGE_TOKENS * (vector_bytes() + scale_bytes());
    }
};
static_assert(GROUP == 32 && FORMAT_Q4 == FORMAT_Q8 + 1, "the shifts above");

// A code of BITS bits at bit LOW of the low half and one at bit HIGH of the high half, less their zero point, times their
// scales: rounded once.
template <int BITS, int LOW, int HIGH>
__device__ __forceinline__ uint32_t scaled_codes(uint32_t codes, uint32_t scales) {
    constexpr uint32_t FIELD = (1u << BITS) - 1;
    constexpr uint32_t ZERO = 1u << (BITS - 1);
    constexpr uint32_t OFFSET =
        (magic_offset(LOW, ZERO) & 0xffff) | (magic_offset(HIGH, ZERO) & 0xffff0000);
    const uint32_t biased = masked_beside(codes, FIELD << LOW | FIELD << (16 + HIGH), MAGIC);
    if constexpr (LOW == 0 && HIGH == 0) return times(add(biased, OFFSET), scales);
    constexpr uint32_t DOWN = (15u - LOW) << 10 | (15u - HIGH) << 26;
    return times(times_plus(biased, DOWN, OFFSET), scales);
}

// What lane (g, t) needs of the key of its column g for GROUP dimensions: the b operands of two products, the first of
// the lower 16 dimensions.
template <int FORMAT>
struct KeyOperands {
    static constexpr int GROUP_BYTES = FORMAT == FORMAT_Q4 ? GROUP / 2 : GROUP;

    uint32_t b[2][2];

    // From GROUP_BYTES of codes; `selector` is `of_lane`'s.
    __device__ __forceinline__ KeyOperands(uint32_t codes, uint32_t scale, uint32_t selector) {
        const uint32_t scales = __byte_perm(scale, 0, 0x1010);
        uint32_t words[GROUP_BYTES / 4];
#pragma unroll
        for (int i = 0; i < GROUP_BYTES / 4; i += 4) {
            load_shared(codes + 4 * i, words[i], words[i + 1], words[i + 2], words[i + 3]);
        }
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            if constexpr (FORMAT == FORMAT_Q4) {
                const uint32_t both = __byte_perm(words[2 * step], words[2 * step + 1], selector);
                b[step][0] = scaled_codes<4, 0, 4>(both, scales);
                b[step][1] = scaled_codes<4, 0, 4>(both >> 8, scales);
            } else {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const uint32_t* eight = words + 4 * step + 2 * i;
                    b[step][i] = scaled_codes<8, 0, 0>(__byte_perm(eight[0], eight[1], selector), scales);
                }
            }
        }
    }

    // Which bytes of two words have the codes of the lane's dimensions 2 t and 2 t + 1 of eight: of four bits, byte t of
    // each word, in each half; of eight bits, bytes 2 t and 2 t + 1 of both, one in each half.
    static __device__ __forceinline__ uint32_t of_lane(int t) {
        return FORMAT == FORMAT_Q4 ? 0x4040u + 0x1111u * t : 0x1100u + 0x2222u * t;
    }
};

// COUNT (2, 4, 8) neighbouring dimensions of two tokens' values: pair j is of dimension j.
template <int FORMAT, int COUNT>
struct ValuePairs {
    static constexpr int BYTES = FORMAT == FORMAT_Q4 ? COUNT / 2 : COUNT;

    uint32_t pairs[COUNT];

    // From the first token's BYTES of codes, of which the other's are `row_bytes` away, with both scales.
    __device__ __forceinline__ ValuePairs(uint32_t codes, int row_bytes, uint32_t scales) {
        uint32_t first[2], second[2];
        load(codes, first);
        load(codes + row_bytes, second);
        if constexpr (FORMAT == FORMAT_Q4) {
#pragma unroll
            for (int j = 0; j < COUNT; j += 2) {
                const uint32_t four =
                    __byte_perm(first[0], second[0], j < 4 ? 0x5410 : 0x7632);
                const uint32_t two = j % 4 == 0 ? four : four >> 8;
                pairs[j] = scaled_codes<4, 0, 0>(two, scales);
                pairs[j + 1] = scaled_codes<4, 4, 4>(two, scales);
            }
        } else {
#pragma unroll
            for (int j = 0; j < COUNT; ++j) {
                const uint32_t selector = 0x0400u + 0x1111u * (j % 4);
                pairs[j] = scaled_codes<8, 0, 0>(__byte_perm(first[j / 4], second[j / 4], selector), scales);
            }
        }
    }

private:
    static __device__ __forceinline__ void load(uint32_t place, uint32_t (&words)[2]) {
        if constexpr (BYTES == 1) {
            words[0] = load_shared_byte(place);
        } else if constexpr (BYTES == 2) {
            words[0] = load_shared_half(place);
        } else if constexpr (BYTES == 4) {
            load_shared(place, words[0]);
        } else {
            load_shared(place, words[0], words[1]);
        }
    }
};

}  // namespace oxl
