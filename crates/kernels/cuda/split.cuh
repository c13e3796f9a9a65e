// What a block that attends for few rows of a sequence has in shared memory: tiles on their way from
// their pages, and what the step's own token brings (attention_split.cu).
#pragma once

#include "attention.cuh"
#include "heads.cuh"

// What a step's rows bring, as the linears before left it.
struct StepHeads {
    // f32 [rows, heads, head_dim]
    const float* queries;
    // f32 [rows, kv_heads, head_dim]
    const float* keys;
    // f32 [rows, kv_heads, head_dim]
    const float* values;
    // f32 [heads, head_dim] and [kv_heads, head_dim]; null: not normed.
    const float* query_weight;
    const float* key_weight;
    // f32 [rows, 2, angle_pairs]: cosines, then sines.
    const float* angles;
    float query_epsilon;
    float key_epsilon;
    // NORM_RMS or NORM_LAYER.
    int32_t query_norm;
    int32_t key_norm;
    int32_t rope_style;
    int32_t rope_pairs;
    int32_t angle_pairs;
    // Not zero: each tile is one row, the only one of its sequence in the step, and what it brings is
    // neither normed nor rotated nor in its page yet.
    int32_t is_fresh;
};

struct AttendSplitArgs {
    AttendArgs attend;
    StepHeads heads;
    // Where shared memory has the step's heads as they come, and tiles: bytes from its start.
    int32_t staging_at;
    int32_t tiles_at;
};

namespace oxl {

// Asks for the arguments' lines of the constant cache, one a warp, before they are needed one after
// the other: each costs as much as an access to memory.
__device__ __forceinline__ void touch_arguments(const AttendSplitArgs& args) {
    constexpr int LINE_WORDS = 16;
    static_assert(sizeof(AttendSplitArgs) <= 4 * LINE_WORDS * ATTEND_WARPS, "a line a warp");
    const uint32_t* words = reinterpret_cast<const uint32_t*>(&args);
    const uint32_t word = words[threadIdx.x / WARP_LANES * LINE_WORDS];
    asm volatile("" ::"r"(word));
}

// How the vectors of a head lie, which is known beforehand where tiles are used as pages have them.
template <bool IS_DIRECT>
__device__ __forceinline__ HeadLayout layout_of(const AttendArgs& args, bool is_value) {
    const int32_t format = is_value ? args.value_format : args.key_format;
    return {IS_DIRECT ? FORMAT_F16 : format, args.head_dim};
}

// Who attends to what of a tile of rows: block z of `sharers` takes every `sharers`-th piece.
struct Share {
    int pieces;
    int sharers;

    __device__ __forceinline__ explicit Share(const Span& span) {
        pieces = span.last_piece - span.first_piece + 1;
        const int tiles = span.last_tile - span.first_token / TILE + 1;
        // Folding what several blocks have takes as long as some tiles do.
        constexpr int TILES_ALONE = 4;
        sharers = tiles <= TILES_ALONE ? 1 : min(min(pieces, (tiles + 1) / 2), int(gridDim.z));
    }
};

// What rows of a tile there are.
struct TileRows {
    // Tokens that a row of the block sees: first <= token < end.
    int first;
    int end;
    // Tokens from here on are not in the page: the block has them itself.
    int memory_end;
    // Parts of 16 tokens that are looked at.
    int quarters;

    __device__ __forceinline__ TileRows(const Span& span, int memory_end, int tile) {
        first = span.first_token - tile * TILE;
        end = min(TILE, span.end_token - tile * TILE);
        this->memory_end = min(TILE, memory_end - tile * TILE);
        quarters = (end + 15) / 16;
    }

    __device__ __forceinline__ bool is_own(int row) const { return row >= memory_end && row < end; }
    __device__ __forceinline__ bool is_seen(int row) const { return row >= first && row < end; }
};

// The tiles of a block's pieces, keys and values together, in a ring of stages that is filled ahead.
// IS_DIRECT: pages hold fp16 as it is wanted, but for the padding; otherwise a stage has the
// page's own bytes.
template <int D, bool IS_DIRECT>
struct TileRing {
    static constexpr int STRIDE = D + PADDING;
    static constexpr int TILE_BYTES = TILE * STRIDE * 2;
    // Eight elements.
    static constexpr int UNITS = D / 8;
    static constexpr int PASS_ROWS = ATTEND_THREADS / UNITS;

    const AttendArgs& args;
    const Queries& queries;
    const Span& span;
    // Tokens that are read from pages end here.
    int memory_end;
    // Where tiles become fp16 (keys, then values), unless they are already, and the stages.
    uint8_t* memory;
    int fill_stage;
    int use_stage;
    // What is copied next; past the last piece nothing is.
    int piece;
    int tile;
    int piece_step;

    __device__ __forceinline__ TileRing(const AttendArgs& args, const Queries& queries,
                                        const Span& span, int memory_end, uint8_t* memory,
                                        int first_piece, int step)
        : args(args),
          queries(queries),
          span(span),
          memory_end(memory_end),
          memory(memory),
          fill_stage(0),
          use_stage(0),
          piece(first_piece),
          tile(span.first_tile_of(first_piece)),
          piece_step(step) {}

    __device__ __forceinline__ HeadLayout keys() const { return layout_of<IS_DIRECT>(args, false); }
    __device__ __forceinline__ HeadLayout values() const { return layout_of<IS_DIRECT>(args, true); }

    // Where values begin in a stage.
    __device__ __forceinline__ int values_offset() const {
        return IS_DIRECT ? TILE_BYTES : TILE * (keys().vector_bytes() + keys().scale_bytes());
    }

    __device__ __forceinline__ uint8_t* stage(int index) const {
        return memory + (IS_DIRECT ? 0 : 2 * TILE_BYTES) + index * args.slot_bytes;
    }

    // Fills the next stage. Threads count groups of copies, so there is one even where there is
    // nothing to copy.
    __device__ __forceinline__ void fill() {
        if (piece <= span.last_piece) {
            copy_tile(shared_address(stage(fill_stage)));
            if (++tile > span.last_tile_of(piece)) {
                piece += piece_step;
                tile = span.first_tile_of(piece);
            }
        }
        copies_commit();
        fill_stage = fill_stage + 1 == args.slots ? 0 : fill_stage + 1;
    }

    __device__ __forceinline__ void copy_tile(uint32_t to) {
        const TileRows rows(span, memory_end, tile);
        const uint32_t page = queries.page(tile * TILE / PAGE_TOKENS);
        const int token = tile * TILE % PAGE_TOKENS;
        const uint8_t* key_block =
            head_page(args.key_pages, keys(), args.kv_heads, page, queries.kv_head);
        const uint8_t* value_block =
            head_page(args.value_pages, values(), args.kv_heads, page, queries.kv_head);
        if (!IS_DIRECT) {
            copy_bytes(to, keys(), key_block, token, rows.memory_end);
            copy_bytes(to + values_offset(), values(), value_block, token, rows.memory_end);
            return;
        }
        const int vector_bytes = args.head_dim * 2;
        int row = threadIdx.x / UNITS;
        const int unit = threadIdx.x % UNITS;
        const int offset = (token + row) * vector_bytes + unit * 16;
        const uint8_t* from[2] = {key_block + offset, value_block + offset};
        const bool is_there = unit * 8 < args.head_dim;
        to += (row * STRIDE + unit * 8) * 2;
#pragma unroll 4
        for (; row < rows.quarters * 16; row += PASS_ROWS) {
            if (!rows.is_own(row)) {
                const bool is_read = is_there && rows.is_seen(row);
                copy_async(to, is_read ? from[0] : key_block, is_read);
                copy_async(to + TILE_BYTES, is_read ? from[1] : value_block, is_read);
            }
            to += PASS_ROWS * STRIDE * 2;
            from[0] += PASS_ROWS * vector_bytes;
            from[1] += PASS_ROWS * vector_bytes;
        }
    }

    // Starts copying the bytes of a tile's tokens before `end`.
    __device__ __forceinline__ void copy_bytes(uint32_t to, HeadLayout layout,
                                               const uint8_t* block, int token, int end) const {
        const int vector_bytes = layout.vector_bytes();
        const int scale_bytes = layout.scale_bytes();
        // A page's blocks and every TILE-th vector in them start at multiples of 16 bytes.
        const uint8_t* vectors = block + token * vector_bytes;
#pragma unroll 2
        for (int at = threadIdx.x * 16; at < end * vector_bytes; at += ATTEND_THREADS * 16) {
            copy_async(to + at, vectors + at, true);
        }
        const uint8_t* scales = block + PAGE_TOKENS * vector_bytes + token * scale_bytes;
#pragma unroll 1
        for (int at = threadIdx.x * 16; at < end * scale_bytes; at += ATTEND_THREADS * 16) {
            copy_async(to + TILE * vector_bytes + at, scales + at, true);
        }
    }

    // The next tile's keys as fp16 [TILE, STRIDE]; the values follow them. All threads of the block
    // call it together. `insert` writes rows that are not in the page.
    template <typename Insert>
    __device__ __forceinline__ __half* next(int tile_in_use, Insert insert) {
        copies_wait(args.slots - 1);
        uint8_t* slot = stage(use_stage);
        use_stage = use_stage + 1 == args.slots ? 0 : use_stage + 1;
        __half* rows = reinterpret_cast<__half*>(IS_DIRECT ? slot : memory);
        if (!IS_DIRECT) {
            __syncthreads();
            const TileRows of_tile(span, memory_end, tile_in_use);
            decode(slot, rows, keys(), of_tile);
            decode(slot + values_offset(), rows + TILE_BYTES / 2, values(), of_tile);
        }
        insert(rows);
        __syncthreads();
        return rows;
    }

    // Makes rows of fp16 of a stage's bytes; zeros where no row of the block sees the token.
    __device__ __forceinline__ void decode(const uint8_t* bytes, __half* rows, HeadLayout layout,
                                           const TileRows& of_tile) const {
        const int vector_bytes = layout.vector_bytes();
        const int scale_bytes = layout.scale_bytes();
        const uint8_t* scales = bytes + TILE * vector_bytes;
        const int units = of_tile.quarters * 16 * UNITS;
        const auto decode_units = [&](auto decode_unit) {
#pragma unroll 4
            for (int index = threadIdx.x; index < units; index += ATTEND_THREADS) {
                const int row = index / UNITS;
                const int unit = index % UNITS;
                if (of_tile.is_own(row)) continue;
                uint4 elements = {0, 0, 0, 0};
                if (of_tile.is_seen(row) && unit * 8 < layout.head_dim) {
                    const __half* of_row =
                        reinterpret_cast<const __half*>(scales + row * scale_bytes);
                    elements = decode_unit(bytes + row * vector_bytes, unit, of_row[unit / 4]);
                }
                *reinterpret_cast<uint4*>(rows + row * STRIDE + unit * 8) = elements;
            }
        };
        if (layout.format == FORMAT_Q4) {
            decode_units([](const uint8_t* vector, int unit, __half scale) {
                return decode_q4(reinterpret_cast<const uint32_t*>(vector)[unit], scale);
            });
            return;
        }
        if (layout.format == FORMAT_Q8) {
            decode_units([](const uint8_t* vector, int unit, __half scale) {
                return decode_q8(reinterpret_cast<const uint2*>(vector)[unit], scale);
            });
            return;
        }
        // fp16 heads of an even number of dimensions that is not a multiple of 8.
#pragma unroll 1
        for (int index = threadIdx.x; index < units * 4; index += ATTEND_THREADS) {
            const int row = index / (D / 2);
            const int pair = index % (D / 2);
            if (of_tile.is_own(row)) continue;
            const bool is_seen = of_tile.is_seen(row) && pair * 2 < layout.head_dim;
            const uint8_t* vector = bytes + row * vector_bytes;
            reinterpret_cast<uint32_t*>(rows + row * STRIDE)[pair] =
                is_seen ? reinterpret_cast<const uint32_t*>(vector)[pair] : 0;
        }
    }
};

}  // namespace oxl
