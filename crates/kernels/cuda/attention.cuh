// What the attention kernels share: tensor-core products, the arithmetic of a row, and the way
// of a tile of keys or values from its page to shared memory.
//
// The arithmetic of a row is defined once, so that its bits depend on its own sequence alone:
//  - A *tile* is TILE tokens, at multiples of TILE. Its scores are sums over the head's
//    dimensions in order; its weights are 2^(score - largest of the tile), rounded to fp16; its
//    part of the result, and the sum of its weights, are sums over its tokens in order.
//  - A *piece* is `piece_tiles` tiles, at multiples of that; how many depends on how many tokens
//    the row sees. A piece's parts are its tiles' folded in order (`fold`).
//  - The result is the pieces folded in order, divided by the sum of weights.
// Who computes which piece does not matter: blocks that share a sequence, one or all of them, give the same
// bits, and so does the kernel that walks through a sequence for long runs of rows, up to MOST_PIECES tiles. Past
// those it folds tile by tile still: two results of so many rows have no room in registers.
//
// Against exact arithmetic on what the cache holds: queries, weights and decoded values are
// rounded to fp16 (2^-11 of each), sums are f32. The error of the result is below 2e-3 of its
// largest element for scores up to a few units, and grows with the scores (a rounded query
// moves a score by 2^-12 of the sum of its products' magnitudes, about): 1e-2 where scores reach
// 30.
#pragma once

#include "pages.cuh"

// Arguments of the kernels that attend on tensor cores.
struct AttendArgs {
    // fp16 [rows, heads, padded_head_dim]: normed, rotated, zeros from head_dim on.
    const __half* queries;
    // [pages, kv_heads] of the key format's blocks.
    uint8_t* key_pages;
    // [pages, kv_heads] of the value format's blocks.
    uint8_t* value_pages;
    // f32 [rows, heads, head_dim]
    float* out;
    // f32 [partial_rows, heads, most_pieces, padded_head_dim]: pieces' parts of the result.
    float* partial_out;
    // f32 [partial_rows, heads, most_pieces, 2]: their largest score and sum of weights.
    float* partial_state;
    // i32 [tiles, kv_heads * head_tiles]: blocks that have finished; zero between launches.
    int32_t* counters;
    // u32 [tiles, 8]: first row, rows, first partial row, tokens of the sequence that earlier
    // steps have stored; the first row's position, the sequence, its first page, and the page of
    // the first row's position. Rows of a tile belong to one sequence, and their positions follow
    // each other.
    const uint4* tiles;
    // u32 [sequences, table_stride]
    const uint32_t* page_tables;
    // Score in units of log2 e: product * score_factor, or, where cap_factor is not zero,
    // cap_factor * tanh(x) with product * score_factor = 2 x log2 e.
    float score_factor;
    float cap_factor;
    // Positions that a row sees, its own included; 0: all.
    int32_t window;
    int32_t heads;
    int32_t kv_heads;
    int32_t head_dim;
    // Query heads of a kv head that one block takes, and blocks that take all of them.
    int32_t heads_per_tile;
    int32_t head_tiles;
    // Query heads of a kv head.
    int32_t group;
    // 65,536 / heads_per_tile, rounded up.
    int32_t inverse_heads;
    int32_t key_format;
    int32_t value_format;
    int32_t table_stride;
    // Extent of the partial results.
    int32_t most_pieces;
    // Stages of keys and values in shared memory, and bytes of each.
    int32_t slots;
    int32_t slot_bytes;
};

namespace oxl {

constexpr int ATTEND_WARPS = 4;
constexpr int ATTEND_THREADS = ATTEND_WARPS * WARP_LANES;

// Tokens of a tile.
constexpr int TILE = 64;
// Pieces of a row; its tokens decide how many tiles a piece has.
constexpr int MOST_PIECES = 64;

// Elements by which rows in shared memory are longer than a head, so that the eight rows that
// ldmatrix reads at once lie in different banks.
constexpr int PADDING = 8;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// --- Tensor cores. Lane l is g = l / 4, t = l % 4. ---

__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    multiply(c, a[0], a[1], a[2], a[3], b0, b1);
}

// The a operand from 16 rows of `stride` elements.
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const __half* rows, int stride,
                                       int column, int lane) {
    const int row = lane % 16;
    load_blocks(a, shared_address(rows + row * stride + column + lane / 16 * 8));
}

// The row that a lane names for the b operands of two neighbouring products whose 16 columns are keys: those from `first`
// on, of `stride` elements. `load_blocks` from here, and 32 bytes further for the next 16 dimensions.
__device__ __forceinline__ uint32_t place_of_keys(const __half* first, int stride, int lane) {
    const int row = lane / 16 * 8 + lane % 8;
    return shared_address(first + row * stride + lane / 8 % 2 * 8);
}

// The same where the columns are 16 dimensions of values: `load_blocks_transposed` from here, and 16 rows further for
// the next 16 tokens.
__device__ __forceinline__ uint32_t place_of_values(const __half* first, int stride, int lane) {
    return shared_address(first + lane % 16 * stride + lane / 16 * 8);
}

// --- The arithmetic of a row. ---

// cap_factor * tanh(x), of 2 x log2 e.
__device__ __forceinline__ float capped_score(float x, float cap_factor) {
    // tanh(x) = 1 - 2 / (e^(2 x) + 1)
    const float small = __fdividef(2.0f, power_of_two(x) + 1.0f);
    return __fmul_rn(cap_factor, __fsub_rn(1.0f, small));
}

// Score in units of log2 e, as AttendArgs says.
__device__ __forceinline__ float score_of(float product, float score_factor, float cap_factor) {
    const float x = __fmul_rn(product, score_factor);
    return cap_factor == 0.0f ? x : capped_score(x, cap_factor);
}

// What a row's scores are taken relative to: its largest, or 0 where it sees nothing.
__device__ __forceinline__ float finite_base(float largest) {
    return largest == minus_infinity() ? 0.0f : largest;
}

// Two weights as a pair of fp16.
__device__ __forceinline__ uint32_t weights_of(float first, float second, float base) {
    const __half2 pair =
        __floats2half2_rn(power_of_two(first - base), power_of_two(second - base));
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// Largest score and sum of the weights relative to it, of what a row has seen so far.
struct RowState {
    float largest;
    float sum;
};

__device__ __forceinline__ RowState nothing_seen() { return {minus_infinity(), 0.0f}; }

// What `fold` multiplies what was there, and what comes, with.
struct FoldFactors {
    float keep;
    float take;
};

__device__ __forceinline__ FoldFactors fold_state(RowState& state, RowState part) {
    const float largest = fmaxf(state.largest, part.largest);
    const float base = finite_base(largest);
    const FoldFactors factors = {power_of_two(state.largest - base),
                                 power_of_two(part.largest - base)};
    state.sum = __fmaf_rn(state.sum, factors.keep, __fmul_rn(part.sum, factors.take));
    state.largest = largest;
    return factors;
}

__device__ __forceinline__ float fold(float kept, float part, FoldFactors factors) {
    return __fmaf_rn(kept, factors.keep, __fmul_rn(part, factors.take));
}

// Folds two dimensions of a piece into the pieces before it, which lie at `place`, unless it is the first.
__device__ __forceinline__ void fold_in_place(float& first, float& second, float2* place,
                                              FoldFactors factors, bool is_first) {
    const float2 before = is_first ? make_float2(0.0f, 0.0f) : *place;
    first = fold(before.x, first, factors);
    second = fold(before.y, second, factors);
    *place = make_float2(first, second);
}

// --- The rows of a tile. ---
//
// The step's inputs, and what earlier steps have stored in pages, are read before
// `dependency_wait`: `oxl_begin_step` lets the kernels after it start only when it has written the
// inputs, which is after all earlier steps. What this step stores is read after the wait.
// (Through the second-level cache: the first may hold what was there before.)

// Up to 16 or 64 query heads of rows of one sequence, all over one kv head. Query head m of the
// tile is head m % heads_per_tile of row m / heads_per_tile.
struct Queries {
    int first_row;
    int rows;
    int partial_row;
    // Tokens that earlier steps have stored.
    int old_tokens;
    int kv_head;
    int first_head;
    int heads;
    int first_position;
    // The sequence's pages: its first, that of `first_position`, and where all are.
    uint32_t first_page;
    uint32_t home_page;
    const uint32_t* page_table;

    __device__ __forceinline__ Queries(const AttendArgs& args, int index, int head_index) {
        const uint4 tile = __ldcg(args.tiles + 2 * index);
        const uint4 place = __ldcg(args.tiles + 2 * index + 1);
        // Divided only where several blocks take the query heads of a kv head.
        int first_of_group = 0;
        kv_head = head_index;
        if (args.head_tiles > 1) {
            kv_head = head_index / args.head_tiles;
            first_of_group = (head_index - kv_head * args.head_tiles) * args.heads_per_tile;
        }
        first_head = kv_head * args.group + first_of_group;
        heads = min(args.heads_per_tile, args.group - first_of_group);
        first_row = int(tile.x);
        rows = int(tile.y);
        partial_row = int(tile.z);
        old_tokens = int(tile.w);
        first_position = int(place.x);
        first_page = place.z;
        home_page = place.w;
        page_table = args.page_tables + int64_t(place.y) * args.table_stride;
    }

    // The page of the tokens from PAGE_TOKENS * index on.
    __device__ __forceinline__ uint32_t page(int index) const {
        if (index == first_position / PAGE_TOKENS) return home_page;
        return index == 0 ? first_page : __ldcg(page_table + index);
    }

    // The row, counted from the tile's first, of query head m; exact for all m of a tile.
    __device__ __forceinline__ int row(const AttendArgs& args, int m) const {
        return m * args.inverse_heads >> 16;
    }

    __device__ __forceinline__ int head(const AttendArgs& args, int m) const {
        return m - row(args, m) * args.heads_per_tile;
    }

    __device__ __forceinline__ bool has(const AttendArgs& args, int m) const {
        return row(args, m) < rows && head(args, m) < heads;
    }

    // Index into [rows, heads].
    __device__ __forceinline__ int64_t query(const AttendArgs& args, int m) const {
        return int64_t(first_row + row(args, m)) * args.heads + first_head + head(args, m);
    }

    // Index into [partial_rows, heads].
    __device__ __forceinline__ int64_t partial(const AttendArgs& args, int m) const {
        return int64_t(partial_row + row(args, m)) * args.heads + first_head + head(args, m);
    }
};

// The first position that a row sees.
__device__ __forceinline__ int first_visible(const AttendArgs& args, int position) {
    return args.window > 0 ? max(0, position + 1 - args.window) : 0;
}

// What the rows of a tile see: tokens, tiles of them, and pieces.
struct Span {
    int first_token;
    int end_token;
    int last_tile;
    // A power of two, and which.
    int piece_tiles;
    int piece_shift;
    int first_piece;
    int last_piece;

    __device__ __forceinline__ Span(const AttendArgs& args, const Queries& queries) {
        first_token = first_visible(args, queries.first_position);
        end_token = queries.first_position + queries.rows;
        last_tile = (end_token - 1) / TILE;
        // The same for all rows of a tile: the host cuts them where the rule changes.
        const int tokens = queries.first_position + 1 - first_token;
        piece_shift = 0;
        while (TILE * MOST_PIECES << piece_shift < tokens) ++piece_shift;
        piece_tiles = 1 << piece_shift;
        first_piece = first_token / TILE >> piece_shift;
        last_piece = last_tile >> piece_shift;
    }

    __device__ __forceinline__ int first_tile_of(int piece) const {
        return max(piece * piece_tiles, first_token / TILE);
    }

    __device__ __forceinline__ int last_tile_of(int piece) const {
        return min(piece * piece_tiles + piece_tiles - 1, last_tile);
    }
};

// --- A warp's part of a tile. ---

// Query heads that a warp multiplies at once.
constexpr int HEADS_OF_WARP = 16;
// Two fp16 ones.
constexpr uint32_t ONES = 0x3c003c00u;

// The state of the two rows of a lane, g and g + 8.
struct LaneStates {
    RowState rows[2];
};

// The sums of the rows' weights: products with ones, in the order of the values' sums.
__device__ __forceinline__ void sum_weights(RowState (&part)[2],
                                            const uint32_t (&weights)[4][4]) {
    float sums[4] = {};
#pragma unroll
    for (int step = 0; step < TILE / 16; ++step) multiply_add(sums, weights[step], ONES, ONES);
    part[0].sum = sums[0];
    part[1].sum = sums[2];
}

// The largest of a row's scores, which the four lanes of a row hold.
__device__ __forceinline__ float largest_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Replaces products by scores.
__device__ __forceinline__ void products_to_scores(float (&s)[4], const AttendArgs& args) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = __fmul_rn(s[i], args.score_factor);
    if (args.cap_factor != 0.0f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[i] = capped_score(s[i], args.cap_factor);
    }
}

// --- From pages to shared memory. ---

// Waits until at most `pending`, up to 3, of the thread's latest groups of copies are under way. By bits: of a switch the
// compiler makes a table in memory.
__device__ __forceinline__ void copies_wait(int pending) {
    if ((pending & 2) == 0) {
        if ((pending & 1) == 0) {
            wait_for_copies<0>();
        } else {
            wait_for_copies<1>();
        }
    } else if ((pending & 1) == 0) {
        wait_for_copies<2>();
    } else {
        wait_for_copies<3>();
    }
}

}  // namespace oxl
