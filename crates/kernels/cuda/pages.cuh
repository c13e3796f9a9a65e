// How keys and values lie in the pages of a cache: the device's side of
// `oxllama_backend::quantised`, which defines every stored bit.
//
// A page holds PAGE_TOKENS tokens of every kv head; what one head has of it is one block:
// plain formats [PAGE_TOKENS, head_dim] elements; quantised ones the codes
// [PAGE_TOKENS, head_dim * bits / 8] of all tokens, then their scales, fp16
// [PAGE_TOKENS, head_dim / GROUP].
#pragma once

#include "magic.cuh"

namespace oxl {

// Elements that are rotated together and share a scale; one a lane.
constexpr int GROUP = 32;

// `oxllama_memory::ElementFormat`, in its order.
constexpr int32_t FORMAT_F32 = 0;
constexpr int32_t FORMAT_F16 = 1;
constexpr int32_t FORMAT_Q8 = 2;
constexpr int32_t FORMAT_Q4 = 3;

// The vectors of one head in one page.
struct HeadLayout {
    int32_t format;
    int32_t head_dim;

    __device__ __forceinline__ bool is_quantised() const { return format >= FORMAT_Q8; }

    // Bytes of a token's elements or codes.
    __device__ __forceinline__ int vector_bytes() const { return head_dim * (32 >> format) / 8; }

    // Bytes of a token's scales.
    __device__ __forceinline__ int scale_bytes() const {
        return is_quantised() ? head_dim / GROUP * 2 : 0;
    }

    // Bytes of one head in one page.
    __device__ __forceinline__ int page_bytes() const {
        return PAGE_TOKENS * (vector_bytes() + scale_bytes());
    }
};

// Which of all pages' blocks is that of `head` in `page`.
__device__ __forceinline__ int64_t head_block(int kv_heads, uint32_t page, int head) {
    return int64_t(page) * kv_heads + head;
}

// Where it begins.
template <typename Byte>
__device__ __forceinline__ Byte* head_page(Byte* pages, HeadLayout layout, int kv_heads,
                                           uint32_t page, int head) {
    return pages + head_block(kv_heads, page, head) * layout.page_bytes();
}

// The lane's element of H x, where lane i holds x[i]: sums of pairs at distance 1, 2, 4, 8, 16,
// then one product, every step rounded as the definition rounds it.
__device__ __forceinline__ float rotate_group(float x, int lane) {
#pragma unroll
    for (int distance = 1; distance < GROUP; distance *= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, x, distance);
        x = (lane & distance) == 0 ? __fadd_rn(x, other) : __fsub_rn(other, x);
    }
    return __fmul_rn(x, 0.17677669f);
}

// The lane's code of a rotated group and the group's scale; `half_range` is 2^(bits - 1).
struct EncodedElement {
    uint32_t code;
    __half scale;
};

__device__ __forceinline__ EncodedElement encode_group(float x, float half_range) {
    // Numbers of one sign are ordered as their bits are; not-a-number comes above all.
    const int32_t bits = __float_as_int(x);
    const int32_t largest = __reduce_max_sync(0xffffffffu, bits);
    const int32_t magnitude = __reduce_max_sync(0xffffffffu, bits & 0x7fffffff);
    const float extreme = __int_as_float(magnitude);
    const float sign = largest == magnitude ? -1.0f : 1.0f;
    constexpr float MOST = 65504.0f;
    EncodedElement encoded;
    if (magnitude > 0x7f800000) {
        encoded.scale = __ushort_as_half(uint16_t(0x7e00));
    } else {
        const float scale = __fdiv_rn(__fmul_rn(sign, extreme), half_range);
        encoded.scale = __float2half_rn(fminf(fmaxf(scale, -MOST), MOST));
    }
    const float divisor = __half2float(encoded.scale);
    if (divisor == 0.0f) {
        encoded.code = uint32_t(half_range);
        return encoded;
    }
    // Added to a small number, this leaves its nearest integer, ties to even, in the low bits.
    constexpr float ROUND = 12582912.0f;
    const float wanted = fminf(fmaxf(__fdiv_rn(x, divisor), -half_range), half_range - 1.0f);
    const float nearest = __fadd_rn(__fadd_rn(wanted, ROUND), half_range);
    encoded.code = __float_as_uint(nearest) & 0xffu;
    return encoded;
}

// A group as quantised formats keep it: the codes of the lane's neighbours, its own among them, and what a reader will
// decode of its own.
struct StoredGroup {
    uint32_t word;
    __half scale;
    __half element;
};

// Of a rotated group, of which lane i holds element i; all lanes take part.
__device__ __forceinline__ StoredGroup stored_group(HeadLayout layout, float x, int lane) {
    const bool is_q8 = layout.format == FORMAT_Q8;
    const float half_range = is_q8 ? 128.0f : 8.0f;
    const EncodedElement encoded = encode_group(x, half_range);
    // Four or eight neighbours' codes make a word.
    const int neighbours = is_q8 ? 4 : 8;
    const int bits = is_q8 ? 8 : 4;
    uint32_t word = encoded.code << (bits * (lane % neighbours));
    word |= __shfl_xor_sync(0xffffffffu, word, 1);
    word |= __shfl_xor_sync(0xffffffffu, word, 2);
    const uint32_t eight = word | __shfl_xor_sync(0xffffffffu, word, 4);
    // As `scaled_pair` rounds.
    const __half element =
        __hmul(__float2half_rn(float(encoded.code) - half_range), encoded.scale);
    return {is_q8 ? word : eight, encoded.scale, element};
}

// Writes it as the elements GROUP * part .. of a vector of codes, and its scale among the vector's.
__device__ __forceinline__ void put_group(uint8_t* vector, __half* scales, HeadLayout layout,
                                          int part, const StoredGroup& stored, int lane) {
    const int neighbours = layout.format == FORMAT_Q8 ? 4 : 8;
    const int element = part * GROUP + lane;
    if (lane % neighbours == 0) {
        reinterpret_cast<uint32_t*>(vector)[element / neighbours] = stored.word;
    }
    if (lane == 0) scales[part] = stored.scale;
}

// Writes it as the head page's `token`.
__device__ __forceinline__ void put_in_page(uint8_t* page, HeadLayout layout, int token, int part,
                                            const StoredGroup& stored, int lane) {
    uint8_t* vector = page + token * layout.vector_bytes();
    uint8_t* scales = page + PAGE_TOKENS * layout.vector_bytes() + token * layout.scale_bytes();
    put_group(vector, reinterpret_cast<__half*>(scales), layout, part, stored, lane);
}

// Keeps the elements GROUP * part .. of a vector as the head page's `token`, if it is to be kept:
// lane i holds element GROUP * part + i, already rotated where the format is quantised. All lanes
// take part. Returns what a reader will decode; in f32, nothing.
__device__ __forceinline__ __half store_group(uint8_t* page, HeadLayout layout, int token,
                                              int part, float x, int lane, bool is_kept) {
    const int element = part * GROUP + lane;
    uint8_t* vector = page + token * layout.vector_bytes();
    const bool is_there = is_kept && element < layout.head_dim;
    if (layout.format == FORMAT_F32) {
        if (is_there) reinterpret_cast<float*>(vector)[element] = x;
        return __half();
    }
    if (layout.format == FORMAT_F16) {
        const __half stored = __float2half_rn(x);
        if (is_there) reinterpret_cast<__half*>(vector)[element] = stored;
        return stored;
    }
    const StoredGroup stored = stored_group(layout, x, lane);
    if (is_kept) put_in_page(page, layout, token, part, stored, lane);
    return stored.element;
}

// Eight codes with their scale as eight fp16 numbers in their order: code times scale, rounded
// once. `offset` is half2(1024 + 2^(bits - 1)).
__device__ __forceinline__ uint32_t scaled_pair(uint32_t codes, uint32_t offset, __half2 scale) {
    const uint32_t biased = codes | MAGIC;
    const __half2 number = __hsub2(*reinterpret_cast<const __half2*>(&biased),
                                   *reinterpret_cast<const __half2*>(&offset));
    const __half2 scaled = __hmul2(number, scale);
    return *reinterpret_cast<const uint32_t*>(&scaled);
}

__device__ __forceinline__ uint4 decode_q4(uint32_t word, __half scale) {
    const __half2 scales = __half2half2(scale);
    // half2(1032): pair j holds elements j and j + 4.
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        pairs[j] = scaled_pair((word >> (4 * j)) & 0x000f000fu, 0x64086408u, scales);
    }
    uint4 out;
    out.x = __byte_perm(pairs[0], pairs[1], 0x5410);
    out.y = __byte_perm(pairs[2], pairs[3], 0x5410);
    out.z = __byte_perm(pairs[0], pairs[1], 0x7632);
    out.w = __byte_perm(pairs[2], pairs[3], 0x7632);
    return out;
}

__device__ __forceinline__ uint4 decode_q8(uint2 words, __half scale) {
    const __half2 scales = __half2half2(scale);
    // half2(1152)
    constexpr uint32_t OFFSET = 0x64806480u;
    uint4 out;
    out.x = scaled_pair(__byte_perm(words.x, 0, 0x4140), OFFSET, scales);
    out.y = scaled_pair(__byte_perm(words.x, 0, 0x4342), OFFSET, scales);
    out.z = scaled_pair(__byte_perm(words.y, 0, 0x4140), OFFSET, scales);
    out.w = scaled_pair(__byte_perm(words.y, 0, 0x4342), OFFSET, scales);
    return out;
}

}  // namespace oxl
