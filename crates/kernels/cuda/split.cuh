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
    // Parts of 16 tokens that are looked at.
    int quarters;

    __device__ __forceinline__ TileRows(const Span& span, int memory_end, int tile) {
        first = span.first_token - tile * TILE;
        end = min(TILE, span.end_token - tile * TILE);
        this->memory_end = min(TILE, memory_end - tile * TILE);
        quarters = (end + 15) / 16;
    }

    // Whether all rows are in the page, and seen.
    __device__ __forceinline__ bool is_whole() const { return first <= 0 && memory_end == TILE; }

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
    static constexpr int PAGE_TILES = PAGE_TOKENS / TILE;

    const AttendArgs& args;
    const Queries& queries;
    const Span& span;
    // Tokens that are read from pages end here.
    int memory_end;
    // Where tiles become fp16 (keys, then values), unless they are already, and the stages.
    uint8_t* memory;
    int fill_stage;
    int use_stage;
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
          fill_stage(0),
          use_stage(0),
          piece(first_piece),
          tile(span.first_tile_of(first_piece)),
          page(queries.page(tile / PAGE_TILES)),
          piece_step(step) {}

    __device__ __forceinline__ HeadLayout keys() const { return layout_of<IS_DIRECT>(args, false); }
    __device__ __forceinline__ HeadLayout values() const { return layout_of<IS_DIRECT>(args, true); }

    // Where values begin in a stage.
    __device__ __forceinline__ int values_offset() const {
        return IS_DIRECT ? TILE_BYTES : TILE * (keys().vector_bytes() + keys().scale_bytes());
    }

    // Bytes from `memory` on.
    __device__ __forceinline__ int bytes() const {
        return (IS_DIRECT ? 0 : 2 * TILE_BYTES) + args.slots * args.slot_bytes;
    }

    __device__ __forceinline__ uint8_t* stage(int index) const {
        return memory + (IS_DIRECT ? 0 : 2 * TILE_BYTES) + index * args.slot_bytes;
    }

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
        fill_stage = fill_stage + 1 == args.slots ? 0 : fill_stage + 1;
    }

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
        const uint8_t* block = head_page(pages, layout, args.kv_heads, page, queries.kv_head);
        uint32_t to = shared_address(stage(fill_stage)) + offset;
        if (!IS_DIRECT) {
            copy_bytes(to, layout, block, token, rows.memory_end);
            return;
        }
        if (args.head_dim == D && rows.is_whole()) {
            copy_whole(to, block + token * D * 2);
            return;
        }
        const int vector_bytes = args.head_dim * 2;
        int row = threadIdx.x / UNITS;
        const int unit = threadIdx.x % UNITS;
        const uint8_t* from = block + (token + row) * vector_bytes + unit * 16;
        const bool is_there = unit * 8 < args.head_dim;
        to += (row * STRIDE + unit * 8) * 2;
#pragma unroll 1
        for (; row < rows.quarters * 16; row += PASS_ROWS) {
            if (!rows.is_own(row)) {
                const bool is_read = is_there && rows.is_seen(row);
                copy_async(to, is_read ? from : block, is_read);
            }
            to += PASS_ROWS * STRIDE * 2;
            from += PASS_ROWS * vector_bytes;
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
    // call it together. `insert` writes rows that are not in the page. A stage that has been decoded
    // is filled again.
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
            // Rows that are not in the page have been written too.
            if (of_tile.memory_end < of_tile.end) __syncthreads();
        }
        insert(rows);
        __syncthreads();
        if (!IS_DIRECT) {
            fill_keys();
            fill_values();
        }
        return rows;
    }

    // Makes rows of fp16 of quantised ones, a Word for eight elements. Several words are read before
    // one is decoded: the compiler does not know that rows do not lie where they are read.
    template <typename Word, typename Decode>
    __device__ __forceinline__ void decode_words(const uint8_t* bytes, __half* rows,
                                                 HeadLayout layout, const TileRows& of_tile,
                                                 Decode decode_word) const {
        constexpr int AHEAD = 2;
        static_assert(TILE % (AHEAD * PASS_ROWS) == 0, "no row past the tile is read");
        const int vector_bytes = layout.vector_bytes();
        const int scale_bytes = layout.scale_bytes();
        const int unit = threadIdx.x % UNITS;
        const int last_unit = layout.head_dim / 8 - 1;
        const int read = min(unit, last_unit);
        const uint8_t* words = bytes + read * sizeof(Word);
        const uint8_t* scales = bytes + TILE * vector_bytes + read / 4 * sizeof(__half);
        rows += unit * 8;
#pragma unroll 1
        for (int row = threadIdx.x / UNITS; row < of_tile.quarters * 16;
             row += AHEAD * PASS_ROWS) {
            Word word[AHEAD];
            __half scale[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int at = row + i * PASS_ROWS;
                word[i] = *reinterpret_cast<const Word*>(words + at * vector_bytes);
                scale[i] = *reinterpret_cast<const __half*>(scales + at * scale_bytes);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int at = row + i * PASS_ROWS;
                uint4 elements = decode_word(word[i], scale[i]);
                if (!of_tile.is_seen(at) || unit > last_unit) elements = {0, 0, 0, 0};
                *reinterpret_cast<uint4*>(rows + at * STRIDE) = elements;
            }
        }
    }

    // Makes rows of fp16 of a stage's bytes; zeros where no row of the block sees the token.
    __device__ __forceinline__ void decode(const uint8_t* bytes, __half* rows, HeadLayout layout,
                                           const TileRows& of_tile) const {
        if (layout.format == FORMAT_Q4) {
            decode_words<uint32_t>(bytes, rows, layout, of_tile, [](uint32_t word, __half scale) {
                return decode_q4(word, scale);
            });
            return;
        }
        if (layout.format == FORMAT_Q8) {
            decode_words<uint2>(bytes, rows, layout, of_tile, [](uint2 word, __half scale) {
                return decode_q8(word, scale);
            });
            return;
        }
        // fp16 heads of an even number of dimensions that is not a multiple of 8.
#pragma unroll 1
        for (int index = threadIdx.x; index < of_tile.quarters * 8 * D; index += ATTEND_THREADS) {
            const int row = index / (D / 2);
            const int pair = index % (D / 2);
            const bool is_seen = of_tile.is_seen(row) && pair * 2 < layout.head_dim;
            const uint8_t* vector = bytes + row * layout.vector_bytes();
            reinterpret_cast<uint32_t*>(rows + row * STRIDE)[pair] =
                is_seen ? reinterpret_cast<const uint32_t*>(vector)[pair] : 0;
        }
    }
};

// The heads that the step's row brings to a block: its query heads, then, where `count` says so, its
// key and its value. A warp prepares every ATTEND_WARPS-th.
template <int D, bool IS_DIRECT>
struct RowHeads {
    static constexpr int PARTS = D / GROUP;
    static constexpr int STRIDE = D + PADDING;

    const AttendArgs& args;
    const StepHeads& heads;
    const Queries& queries;
    int count;
    int lane;
    RopePairs rope;
    RowAngles<PARTS> angles;

    __device__ __forceinline__ RowHeads(const AttendSplitArgs& all, const Queries& queries,
                                        bool has_own)
        : args(all.attend), heads(all.heads), queries(queries) {
        count = queries.heads + (has_own ? 2 : 0);
        lane = threadIdx.x % WARP_LANES;
        rope = {heads.rope_style, heads.rope_pairs};
        if (rope.style != ROPE_NONE) {
            const int pairs = heads.angle_pairs;
            const float* row = heads.angles + int64_t(queries.first_row) * 2 * pairs;
            angles.load(row, pairs, rope, lane);
        }
    }

    // Brings all of them to shared memory, f32 [count, head_dim].
    __device__ __forceinline__ void load(float* staging) const {
        const int head_pairs = args.head_dim / 2;
        const int query_pairs = queries.heads * head_pairs;
        const int pairs = count * head_pairs;
        const int64_t row = queries.first_row;
        const int64_t own = (row * args.kv_heads + queries.kv_head) * args.head_dim;
        const float2* q = reinterpret_cast<const float2*>(
            heads.queries + (row * args.heads + queries.first_head) * args.head_dim);
        const float2* k = reinterpret_cast<const float2*>(heads.keys + own) - query_pairs;
        const float2* v =
            reinterpret_cast<const float2*>(heads.values + own) - query_pairs - head_pairs;
        constexpr int AHEAD = 3;
#pragma unroll 1
        for (int first = threadIdx.x; first < pairs; first += AHEAD * ATTEND_THREADS) {
            float2 loaded[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int at = first + i * ATTEND_THREADS;
                const float2* from = at < query_pairs ? q : at < query_pairs + head_pairs ? k : v;
                if (at < pairs) loaded[i] = __ldcg(from + at);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int at = first + i * ATTEND_THREADS;
                if (at < pairs) reinterpret_cast<float2*>(staging)[at] = loaded[i];
            }
        }
    }

    // Queries go to `q`, fp16 [heads, STRIDE]; key and value to their page and to `fresh`.
    __device__ __forceinline__ void prepare(float* staging, __half* q, __half (&fresh)[2][D]) {
        const int head_dim = args.head_dim;
#pragma unroll 1
        for (int task = threadIdx.x / WARP_LANES; task < count; task += ATTEND_WARPS) {
            float* head = staging + task * head_dim;
            const bool is_query = task < queries.heads;
            const bool is_value = task > queries.heads;
            float x[PARTS];
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const int element = part * GROUP + lane;
                x[part] = element < head_dim ? head[element] : 0.0f;
            }
            if (!is_value) norm_and_rotate(x, head, is_query ? queries.first_head + task : -1);
            const HeadLayout layout = layout_of<IS_DIRECT>(args, is_value);
            if (layout.is_quantised()) {
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    if (part * GROUP < head_dim) x[part] = rotate_group(x[part], lane);
                }
            }
            if (is_query) {
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    q[task * STRIDE + part * GROUP + lane] = limited_half(x[part]);
                }
                continue;
            }
            // From shared memory, so that one copy of the code that encodes serves all groups.
            __syncwarp();
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const int element = part * GROUP + lane;
                if (element < head_dim) head[element] = x[part];
            }
            keep(head, layout, is_value, fresh[is_value ? 1 : 0]);
        }
    }

private:
    // `query_head` is below zero for the key.
    __device__ __forceinline__ void norm_and_rotate(float (&x)[PARTS], float* head,
                                                    int query_head) const {
        const bool is_query = query_head >= 0;
        const float* weights = is_query ? heads.query_weight : heads.key_weight;
        if (weights != nullptr) {
            const HeadNorm norm = {
                weights + (is_query ? query_head : queries.kv_head) * args.head_dim,
                is_query ? heads.query_epsilon : heads.key_epsilon,
                is_query ? heads.query_norm : heads.key_norm};
            normalize(x, norm, args.head_dim, lane);
            __syncwarp();
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const int element = part * GROUP + lane;
                if (element < args.head_dim) head[element] = x[part];
            }
            __syncwarp();
        }
        if (rope.style != ROPE_NONE) rotate_pairs(x, head, angles, rope, lane);
    }

    // One block of the row's stores what all attend to.
    __device__ __forceinline__ void keep(const float* head, HeadLayout layout, bool is_value,
                                         __half* fresh) const {
        const bool is_kept = args.head_tiles == 1 || blockIdx.y % args.head_tiles == 0;
        uint8_t* page = head_page(is_value ? args.value_pages : args.key_pages, layout,
                                  args.kv_heads, queries.home_page, queries.kv_head);
        const int token = queries.first_position % PAGE_TOKENS;
#pragma unroll 1
        for (int part = 0; part < PARTS; ++part) {
            const int element = part * GROUP + lane;
            __half kept = __half();
            if (part * GROUP < layout.head_dim) {
                const float x = element < layout.head_dim ? head[element] : 0.0f;
                kept = store_group(page, layout, token, part, x, lane, is_kept);
            }
            fresh[element] = kept;
        }
    }
};

}  // namespace oxl
