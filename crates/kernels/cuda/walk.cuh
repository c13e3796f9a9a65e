// What a block that walks through the tokens of a sequence has in shared memory, and how keys and
// values get there from their pages (attention_walk.cu).
#pragma once

#include "attention.cuh"

namespace oxl {

// Extents of a block. Its shared memory: `Block`, queries, tiles decoded where the format is
// quantised, then one or two stages of keys and values, as pages hold them where it is.
template <int D>
struct Walk {
    // Sets of 16 query heads that a warp takes.
    static constexpr int SETS = D <= 128 ? 2 : 1;
    static constexpr int WARP_HEADS = SETS * HEADS_OF_WARP;
    static constexpr int HEADS = ATTEND_WARPS * WARP_HEADS;
    // Of a row of fp16, in queries as in tiles.
    static constexpr int ROW_BYTES = D * 2;
    static constexpr int TILE_BYTES = TILE * ROW_BYTES;
    static constexpr int QUERY_BYTES = HEADS * ROW_BYTES;
    // Long heads' keys and values are decoded to the same place, one after the other.
    static constexpr int DECODED_TILES = D <= 128 ? 2 : 1;
    // Units of 16 bytes in a row.
    static constexpr int UNITS = D / 8;
};

// What all warps of a block need of it, in shared memory: registers are for results.
struct Block {
    Queries queries;
    Span span;
};

// Bytes of a block's shared memory for `Block`, with which it begins.
constexpr int BLOCK_BYTES = 128;
static_assert(sizeof(Block) <= BLOCK_BYTES, "a block's own memory");

// Where unit `unit` of row `row` lies.
template <int D>
__device__ __forceinline__ int unit_offset(int row, int unit) {
    return row * Walk<D>::ROW_BYTES + (unit ^ row % 8) * 16;
}

// Rotates groups of 32 dimensions back, where lane (g, t) holds dimensions 8 n + 2 t and + 1 of
// row g as x[n][0..2], of row g + 8 as x[n][2..4]: in the order of `rotate_group`.
__device__ __forceinline__ void rotate_fragment(float (&x)[4][4], int lane) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const float first = x[n][i];
            const float second = x[n][i + 1];
            x[n][i] = __fadd_rn(first, second);
            x[n][i + 1] = __fsub_rn(first, second);
        }
    }
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float& mine = x[i / 4][i % 4];
            const float other = __shfl_xor_sync(0xffffffffu, mine, distance);
            mine = (lane & distance) == 0 ? __fadd_rn(mine, other) : __fsub_rn(other, mine);
        }
    }
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            if ((n & distance) != 0) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float first = x[n][i];
                const float second = x[n + distance][i];
                x[n][i] = __fadd_rn(first, second);
                x[n + distance][i] = __fsub_rn(first, second);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i / 4][i % 4] = __fmul_rn(x[i / 4][i % 4], 0.17677669f);
}

// Makes minus infinity of the scores of row g + 8 half but for the tokens from `first` to `end`, counted from the
// lane's first one; its tokens are 8 n + 0 and + 1 from there.
__device__ __forceinline__ void hide_tokens(float (&s)[TILE / 8][4], int half, int first, int end) {
#pragma unroll
    for (int j = 0; j < TILE / 4; ++j) {
        const int token = j / 2 * 8 + j % 2;
        float& x = s[j / 2][2 * half + j % 2];
        if (token >= end || token < first) x = minus_infinity();
    }
}

// Weights of a tile's scores as the a operand, and their sums: what the lane has of the scores is what it needs of them.
__device__ __forceinline__ void weigh_scores(const float (&s)[TILE / 8][4], RowState (&part)[2],
                                             uint32_t (&weights)[4][4]) {
    float bases[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float largest = fmaxf(s[0][2 * half], s[0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < TILE / 8; ++n) {
            largest = fmaxf(largest, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        }
        part[half].largest = largest_of_row(largest);
        bases[half] = finite_base(part[half].largest);
    }
#pragma unroll
    for (int step = 0; step < TILE / 16; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float(&four)[4] = s[2 * step + i / 2];
            const int half = i % 2;
            weights[step][i] = weights_of(four[2 * half], four[2 * half + 1], bases[half]);
        }
    }
    sum_weights(part, weights);
}

// The keys or the values of one kv head: where they are, and how they become tiles.
template <int D>
struct WalkSource {
    using W = Walk<D>;

    const uint8_t* pages;
    HeadLayout layout;
    int kv_heads;
    int kv_head;

    // Bytes of a tile in a stage: rows of fp16, or the page's own bytes.
    __device__ __forceinline__ int stage_bytes() const {
        return layout.is_quantised() ? TILE * (layout.vector_bytes() + layout.scale_bytes())
                                     : W::TILE_BYTES;
    }

    // Starts copying a tile of the sequence to shared memory.
    __device__ __forceinline__ void copy(uint32_t to, uint32_t page, const Span& span,
                                         int tile) const {
        const uint8_t* block = head_page(pages, layout, kv_heads, page, kv_head);
        const int token_in_page = tile * TILE % PAGE_TOKENS;
        const int vector_bytes = layout.vector_bytes();
        const uint8_t* from = block + token_in_page * vector_bytes;
        const int first = span.first_token - tile * TILE;
        const int end = min(TILE, span.end_token - tile * TILE);
        if (layout.is_quantised()) {
            const int scale_bytes = layout.scale_bytes();
            const uint8_t* scales =
                block + PAGE_TOKENS * vector_bytes + token_in_page * scale_bytes;
            // A page's blocks and every TILE-th vector in them start at multiples of 16 bytes.
            copy_bytes(to, from, end * vector_bytes);
            copy_bytes(to + TILE * vector_bytes, scales, end * scale_bytes);
        } else if (vector_bytes == W::ROW_BYTES && first <= 0 && end == TILE) {
            copy_whole(to, from);
        } else if (layout.head_dim % 8 == 0) {
            copy_units(to, from, first, end);
        } else {
            copy_words(to, from, first, end);
        }
    }

    __device__ __forceinline__ void copy_bytes(uint32_t to, const uint8_t* from, int bytes) const {
#pragma unroll 1
        for (int at = fresh_thread() * 16; at < bytes; at += ATTEND_THREADS * 16) {
            copy_async(to + at, from + at, true);
        }
    }

    // Rows of D elements, all of which are seen.
    __device__ __forceinline__ void copy_whole(uint32_t to, const uint8_t* from) const {
        constexpr int PASS_ROWS = ATTEND_THREADS / W::UNITS;
        const int thread = fresh_thread();
        const int row = thread / W::UNITS;
        const int unit = thread % W::UNITS;
        const uint8_t* mine = from + thread * 16;
#pragma unroll
        for (int pass = 0; pass < TILE / PASS_ROWS; ++pass) {
            copy_async(to + unit_offset<D>(row + pass * PASS_ROWS, unit),
                       mine + pass * PASS_ROWS * W::ROW_BYTES);
        }
    }

    // Rows of which some are not seen, or of fewer than D elements: zeros there.
    __device__ __forceinline__ void copy_units(uint32_t to, const uint8_t* from, int first,
                                               int end) const {
        const int vector_bytes = layout.vector_bytes();
#pragma unroll 1
        for (int index = fresh_thread(); index < TILE * W::UNITS; index += ATTEND_THREADS) {
            const int row = index / W::UNITS;
            const int unit = index % W::UNITS;
            const bool is_read = row >= first && row < end && unit * 16 < vector_bytes;
            copy_async(to + unit_offset<D>(row, unit),
                       is_read ? from + row * vector_bytes + unit * 16 : from, is_read);
        }
    }

    // The same for heads whose rows begin at multiples of 4 bytes only.
    __device__ __forceinline__ void copy_words(uint32_t to, const uint8_t* from, int first,
                                               int end) const {
        const int vector_bytes = layout.vector_bytes();
#pragma unroll 1
        for (int index = fresh_thread(); index < TILE * D / 2; index += ATTEND_THREADS) {
            const int row = index / (D / 2);
            const int word = index % (D / 2);
            const bool is_read = row >= first && row < end && word * 4 < vector_bytes;
            copy_word_async(to + unit_offset<D>(row, word / 4) + word % 4 * 4,
                            is_read ? from + row * vector_bytes + word * 4 : from, is_read);
        }
    }

    // Makes rows of fp16 of a quantised tile; zeros where no row of the block sees the token.
    __device__ __forceinline__ void decode(const uint8_t* stage, uint8_t* decoded,
                                           const Span& span, int tile) const {
        const int first = span.first_token - tile * TILE;
        const int end = span.end_token - tile * TILE;
        const int vector_bytes = layout.vector_bytes();
        const int scale_bytes = layout.scale_bytes();
        const uint8_t* scales = stage + TILE * vector_bytes;
        const auto decode_units = [&](auto decode_unit) {
#pragma unroll 4
            for (int index = fresh_thread(); index < TILE * W::UNITS; index += ATTEND_THREADS) {
                const int row = index / W::UNITS;
                const int unit = index % W::UNITS;
                uint4 elements = {0, 0, 0, 0};
                if (row >= first && row < end && unit * 8 < layout.head_dim) {
                    const __half* of_row =
                        reinterpret_cast<const __half*>(scales + row * scale_bytes);
                    elements = decode_unit(stage + row * vector_bytes, unit, of_row[unit / 4]);
                }
                *reinterpret_cast<uint4*>(decoded + unit_offset<D>(row, unit)) = elements;
            }
        };
        if (layout.format == FORMAT_Q4) {
            decode_units([](const uint8_t* vector, int unit, __half scale) {
                return decode_q4(reinterpret_cast<const uint32_t*>(vector)[unit], scale);
            });
        } else {
            decode_units([](const uint8_t* vector, int unit, __half scale) {
                return decode_q8(reinterpret_cast<const uint2*>(vector)[unit], scale);
            });
        }
    }
};

}  // namespace oxl
