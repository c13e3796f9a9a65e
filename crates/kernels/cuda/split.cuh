// What blocks that attend for few rows of a sequence take, and tiles on their way from their pages to shared memory
// (attention_split.cu).
#pragma once

#include "attention.cuh"
#include "codes.cuh"

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
    // f16 [rows, heads * head_dim]: where results go instead of `attend.out`, in the order of the linear that
    // reads them; null: nowhere. Then head_dim is a multiple of 4.
    __half* ordered_out;
    // u32 [heads * head_dim], 16-byte aligned: each element's place in it; null: its own.
    const uint32_t* out_places;
    // Where shared memory has the step's heads as they come, and tiles: bytes from its start.
    int32_t staging_at;
    int32_t tiles_at;
    // Tiles up to which a block takes all that its rows see.
    int32_t tiles_alone;
    int32_t unused;
};

namespace oxl {

// Asks for the arguments' lines of the constant cache, one a warp, before they are needed one after
// the other: each costs as much as an access to memory.
__device__ __forceinline__ void touch_arguments(const AttendSplitArgs& args) {
    constexpr int LINE_WORDS = 16;
    static_assert(sizeof(AttendSplitArgs) <= 4 * LINE_WORDS * ATTEND_WARPS, "a line a warp");
    const uint32_t* words = reinterpret_cast<const uint32_t*>(&args);
    const uint32_t word = words[threadIdx.x / WARP_LANES * LINE_WORDS];
    touch(word);
}

// How the vectors of a head lie, which is known beforehand of fp16.
template <bool IS_CODES>
__device__ __forceinline__ HeadLayout layout_of(const AttendArgs& args, bool is_value) {
    const int32_t format = is_value ? args.value_format : args.key_format;
    return {IS_CODES ? format : FORMAT_F16, args.head_dim};
}

// Who attends to what of a tile of rows: block z of `sharers` takes every `sharers`-th piece.
struct Share {
    int pieces;
    int sharers;

    __device__ __forceinline__ Share(const Span& span, int tiles_alone) {
        pieces = span.last_piece - span.first_piece + 1;
        const int tiles = span.last_tile - span.first_token / TILE + 1;
        sharers = 1;
        if (tiles <= tiles_alone) return;
        // No more blocks than it takes for none to have more pieces than another must.
        const int most_of_block = (pieces + int(gridDim.z) - 1) / int(gridDim.z);
        sharers = (pieces + most_of_block - 1) / most_of_block;
    }
};

// What rows of a tile there are.
struct TileRows {
    // Tokens that a row of the block sees: first <= token < end.
    int first;
    int end;
    // Tokens from here on are not in the page: the block has them itself.
    int memory_end;

    __device__ __forceinline__ TileRows(const Span& span, int memory_end, int tile) {
        first = span.first_token - tile * TILE;
        end = min(TILE, span.end_token - tile * TILE);
        this->memory_end = min(TILE, memory_end - tile * TILE);
    }

    // Whether all rows are in the page, and seen.
    __device__ __forceinline__ bool is_whole() const { return first <= 0 && memory_end == TILE; }

    __device__ __forceinline__ bool is_own(int row) const { return row >= memory_end && row < end; }
    __device__ __forceinline__ bool is_seen(int row) const { return row >= first && row < end; }
};

// The tiles of a block's pieces, keys and values together, in a ring of stages that is filled ahead. They are used where
// they are: fp16 [TILE, D + PADDING], zeros where no row sees the token; or, IS_CODES, a `StoredTile`.
template <int D, bool IS_CODES>
struct TileRing {
    static constexpr int STRIDE = D + PADDING;
    static constexpr int TILE_BYTES = TILE * STRIDE * 2;
    // Eight elements.
    static constexpr int UNITS = D / 8;
    static constexpr int PASS_ROWS = ATTEND_THREADS / UNITS;
    static constexpr int PAGE_TILES = PAGE_TOKENS / TILE;

    const AttendArgs& args;
    const Queries& queries;
    const Span& span;
    // Tokens that are read from pages end here.
    int memory_end;
    // The stages.
    uint8_t* memory;
    // What is filled next, which is the oldest: once all have been filled, that in use.
    int oldest;
    // What is copied next, and its page; past the last piece nothing is.
    int piece;
    int tile;
    uint32_t page;
    int piece_step;

    __device__ __forceinline__ TileRing(const AttendArgs& args, const Queries& queries,
                                        const Span& span, int memory_end, uint8_t* memory,
                                        int first_piece, int step)
        : args(args),
          queries(queries),
          span(span),
          memory_end(memory_end),
          memory(memory),
          oldest(0),
          piece(first_piece),
          tile(span.first_tile_of(first_piece)),
          page(queries.page(tile / PAGE_TILES)),
          piece_step(step) {}

    __device__ __forceinline__ HeadLayout keys() const { return layout_of<IS_CODES>(args, false); }
    __device__ __forceinline__ HeadLayout values() const { return layout_of<IS_CODES>(args, true); }

    // Where values begin in a stage.
    __device__ __forceinline__ int values_offset() const {
        return IS_CODES ? StoredTile{keys()}.bytes() : TILE_BYTES;
    }

    // Bytes from `memory` on.
    __device__ __forceinline__ int bytes() const { return args.slots * args.slot_bytes; }

    __device__ __forceinline__ uint8_t* stage() const { return memory + oldest * args.slot_bytes; }

    // Starts copying the next tile's keys to the next stage; its values must follow.
    __device__ __forceinline__ void fill_keys() const {
        if (piece <= span.last_piece) copy_half(keys(), args.key_pages, 0);
    }

    // Starts copying the tile's values, which completes the stage. Threads count groups of copies,
    // so there is one even where there is nothing to copy.
    __device__ __forceinline__ void fill_values() {
        if (piece <= span.last_piece) {
            copy_half(values(), args.value_pages, values_offset());
            advance();
        }
        commit_copies();
        oldest = oldest + 1 == args.slots ? 0 : oldest + 1;
    }

    // Waits for what the thread copies of the oldest stage.
    __device__ __forceinline__ void wait() const { copies_wait(args.slots - 1); }

private:
    // The page of what comes next is asked for long before it is needed.
    __device__ __forceinline__ void advance() {
        const int page_index = tile / PAGE_TILES;
        if (++tile > span.last_tile_of(piece)) {
            piece += piece_step;
            if (piece > span.last_piece) return;
            tile = span.first_tile_of(piece);
        }
        if (tile / PAGE_TILES != page_index) page = queries.page(tile / PAGE_TILES);
    }

    // Starts copying the next tile's keys or values to `offset` in the stage.
    __device__ __forceinline__ void copy_half(HeadLayout layout, uint8_t* pages, int offset) const {
        const TileRows rows(span, memory_end, tile);
        const int token = tile % PAGE_TILES * TILE;
        const int64_t index = head_block(args.kv_heads, page, queries.kv_head);
        const uint32_t to = shared_address(stage()) + offset;
        if (IS_CODES) {
            const StoredTile stored = {layout};
            copy_codes(to, stored, pages + index * stored.page_bytes(), token, rows.memory_end);
            return;
        }
        const uint8_t* block = pages + index * layout.page_bytes();
        if (args.head_dim == D && rows.is_whole()) {
            copy_whole(to, block + token * D * 2);
        } else if (args.head_dim % 8 == 0) {
            copy_rows<16>(to, block, token, rows);
        } else {
            copy_rows<4>(to, block, token, rows);
        }
    }

    // Starts copying a tile that is all there and seen, as most are.
    __device__ __forceinline__ void copy_whole(uint32_t to, const uint8_t* tile) const {
        const uint8_t* from = tile + threadIdx.x * 16;
        to += (threadIdx.x / UNITS * STRIDE + threadIdx.x % UNITS * 8) * 2;
#pragma unroll
        for (int pass = 0; pass < TILE / PASS_ROWS; ++pass) {
            copy_async(to + pass * PASS_ROWS * STRIDE * 2, from + pass * PASS_ROWS * D * 2);
        }
    }

    // Any other, so many bytes a thread at a time: zeros for what is not there or not seen, since all dimensions of every 16
    // tokens are multiplied.
    template <int BYTES>
    __device__ __forceinline__ void copy_rows(uint32_t to, const uint8_t* block, int token,
                                              const TileRows& rows) const {
        constexpr int UNITS_OF_ROW = D * 2 / BYTES;
        constexpr int PASS = ATTEND_THREADS / UNITS_OF_ROW;
        const int vector_bytes = args.head_dim * 2;
        int row = threadIdx.x / UNITS_OF_ROW;
        const int unit = threadIdx.x % UNITS_OF_ROW;
        const uint8_t* from = block + (token + row) * vector_bytes + unit * BYTES;
        const bool is_there = unit * BYTES < vector_bytes;
        to += row * STRIDE * 2 + unit * BYTES;
#pragma unroll 1
        for (; row < (rows.end + 15) / 16 * 16; row += PASS) {
            if (!rows.is_own(row)) {
                const bool is_read = is_there && rows.is_seen(row);
                const uint8_t* read = is_read ? from : block;
                if (BYTES == 16) {
                    copy_async(to, read, is_read);
                } else {
                    copy_word_async(to, read, is_read);
                }
            }
            to += PASS * STRIDE * 2;
            from += PASS * vector_bytes;
        }
    }

    // Starts copying the codes and scales of a tile's tokens before `end`; the scales of others are zeros.
    __device__ __forceinline__ void copy_codes(uint32_t to, StoredTile stored, const uint8_t* block,
                                               int token, int end) const {
        // Threads side by side over the 16 bytes of the longest row: D / 32 of four bits, or twice as many. By shifts: a
        // choice between two numbers to divide by is a division.
        constexpr int Q4_SHIFT = D == 64 ? 1 : D == 128 ? 2 : 3;
        static_assert(D == 32 << Q4_SHIFT, "units of a row");
        const int shift = Q4_SHIFT + (stored.layout.format == FORMAT_Q4 ? 0 : 1);
        const int pass_rows = ATTEND_THREADS >> shift;
        int row = int(threadIdx.x) >> shift;
        const int at = (int(threadIdx.x) - (row << shift)) * 16;
        const int vector_bytes = stored.vector_bytes();
        const uint8_t* from = block + (token + row) * vector_bytes + at;
        uint32_t place = to + row * stored.row_bytes() + at;
        if (at >= vector_bytes) row = TILE;
#pragma unroll 1
        for (; row < end; row += pass_rows) {
            copy_async(place, from);
            place += pass_rows * stored.row_bytes();
            from += pass_rows * vector_bytes;
        }
        // A page's scales of every TILE-th token start at multiples of 16 bytes.
        const int scale_bytes = stored.scale_bytes();
        const uint8_t* scales = block + PAGE_TOKENS * vector_bytes + token * scale_bytes;
#pragma unroll 1
        for (int first = threadIdx.x * 16; first < TILE * scale_bytes; first += ATTEND_THREADS * 16) {
            const int bytes = min(16, max(0, end * scale_bytes - first));
            copy_part_async(to + stored.scales_at() + first, scales + first, bytes);
        }
    }
};

}  // namespace oxl
