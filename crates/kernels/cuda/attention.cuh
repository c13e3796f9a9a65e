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
// Who computes which piece does not matter: the kernel that splits a sequence among blocks, the
// kernel that walks through it, one row a tile or sixty-four all give the same bits.
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
    const uint8_t* key_pages;
    // [pages, kv_heads] of the value format's blocks.
    const uint8_t* value_pages;
    // f32 [rows, heads, head_dim]
    float* out;
    // f32 [partial_rows, heads, most_pieces, padded_head_dim]: pieces' parts of the result.
    float* partial_out;
    // f32 [partial_rows, heads, most_pieces, 2]: their largest score and sum of weights.
    float* partial_state;
    // i32 [tiles, kv_heads * head_tiles]: blocks that have finished; zero between launches.
    int32_t* counters;
    // u32 [tiles, 4]: first row, rows, first partial row, tokens of the sequence that earlier
    // steps have stored. Rows of a tile belong to one sequence, and their positions follow each
    // other.
    const uint4* tiles;
    // u32 [rows]
    const uint32_t* positions;
    // u32 [rows]
    const uint32_t* row_sequences;
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
    int32_t key_format;
    int32_t value_format;
    int32_t table_stride;
    // Extent of the partial results.
    int32_t most_pieces;
    // Slots of the ring of tiles in shared memory, and bytes of each.
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

// 2^x; 2^0 is 1 and 2^-inf is 0.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// --- Tensor cores. Lane l is g = l / 4, t = l % 4. ---

// c[16, 8] += a[16, 16] b[16, 8]. Lane (g, t) holds of c the columns 2 t and 2 t + 1 of row g,
// then those of row g + 8.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return uint32_t(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 blocks of fp16; lane i names row i % 8 of block i / 8.
__device__ __forceinline__ void load_blocks(uint32_t (&out)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// The same, each block transposed.
__device__ __forceinline__ void load_blocks_transposed(uint32_t (&out)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// The a operand from 16 rows of `stride` elements.
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const __half* rows, int stride,
                                       int column, int lane) {
    const int row = lane % 16;
    load_blocks(a, shared_address(rows + row * stride + column + lane / 16 * 8));
}

// The b operands of two neighbouring products whose 16 columns are rows of a tile of keys.
__device__ __forceinline__ void load_keys(uint32_t (&b)[4], const __half* tile, int stride,
                                          int token, int dimension, int lane) {
    const int row = token + lane / 16 * 8 + lane % 8;
    load_blocks(b, shared_address(tile + row * stride + dimension + lane / 8 % 2 * 8));
}

// The b operands of two neighbouring products whose 16 columns are dimensions of values.
__device__ __forceinline__ void load_values(uint32_t (&b)[4], const __half* tile, int stride,
                                            int token, int dimension, int lane) {
    const int row = token + lane % 16;
    load_blocks_transposed(b, shared_address(tile + row * stride + dimension + lane / 16 * 8));
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

// --- The rows of a tile. ---
//
// The step's inputs (step.cu), and what earlier steps have stored in pages, are read before
// `dependency_wait`: `oxl_cache` comes before, and lets the next kernel start only after its own
// wait, when all that was enqueued before it is done. What it stores itself is read after the
// wait. (Through the second-level cache: the first may hold what was there before.)

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
    const uint32_t* page_table;

    __device__ __forceinline__ Queries(const AttendArgs& args, int index, int head_index) {
        const uint4 tile = __ldcg(args.tiles + index);
        first_row = int(tile.x);
        rows = int(tile.y);
        partial_row = int(tile.z);
        old_tokens = int(tile.w);
        kv_head = head_index / args.head_tiles;
        const int group = args.heads / args.kv_heads;
        const int first_of_group = head_index % args.head_tiles * args.heads_per_tile;
        first_head = kv_head * group + first_of_group;
        heads = min(args.heads_per_tile, group - first_of_group);
        first_position = int(__ldcg(args.positions + first_row));
        const int64_t sequence = __ldcg(args.row_sequences + first_row);
        page_table = args.page_tables + sequence * args.table_stride;
    }

    // The row, counted from the tile's first, of query head m.
    __device__ __forceinline__ int row(const AttendArgs& args, int m) const {
        return m / args.heads_per_tile;
    }

    __device__ __forceinline__ int head(const AttendArgs& args, int m) const {
        return m % args.heads_per_tile;
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
    int piece_tiles;
    int first_piece;
    int last_piece;

    __device__ __forceinline__ Span(const AttendArgs& args, const Queries& queries) {
        first_token = first_visible(args, queries.first_position);
        end_token = queries.first_position + queries.rows;
        last_tile = (end_token - 1) / TILE;
        // The same for all rows of a tile: the host cuts them where the rule changes.
        const int tokens = queries.first_position + 1 - first_token;
        piece_tiles = 1;
        while (piece_tiles * TILE * MOST_PIECES < tokens) piece_tiles *= 4;
        first_piece = first_token / TILE / piece_tiles;
        last_piece = last_tile / piece_tiles;
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

// Adds the tile's parts of 16 dimensions, sum over tokens of weight * value, to what is kept.
__device__ __forceinline__ void fold_values(float (&kept)[2][4], const uint32_t (&weights)[4][4],
                                            const __half* values, int stride, int dimension,
                                            const FoldFactors (&factors)[2], int lane) {
    float part[2][4] = {};
#pragma unroll
    for (int step = 0; step < TILE / 16; ++step) {
        uint32_t b[4];
        load_values(b, values, stride, step * 16, dimension, lane);
        multiply_add(part[0], weights[step], b[0], b[1]);
        multiply_add(part[1], weights[step], b[2], b[3]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) kept[n][i] = fold(kept[n][i], part[n][i], factors[i / 2]);
    }
}

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

// Replaces products by scores; of tokens that a row does not see, by minus infinity. `token` is
// the position of the first of the lane's two columns.
__device__ __forceinline__ void products_to_scores(float (&s)[4], const AttendArgs& args, int token,
                                                   const int (&positions)[2],
                                                   const int (&firsts)[2], bool is_masked) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float score = score_of(s[i], args.score_factor, args.cap_factor);
        const int at = token + i % 2;
        const bool is_seen = !is_masked || (at <= positions[i / 2] && at >= firsts[i / 2]);
        s[i] = is_seen ? score : minus_infinity();
    }
}

// --- From pages to shared memory. ---

// Copies 16 bytes, or writes zeros where the source is not to be read.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool is_read) {
    const int bytes = is_read ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void copies_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `pending` of the thread's latest groups of copies are under way.
__device__ __forceinline__ void copies_wait(int pending) {
    switch (pending) {
        case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
        case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
        case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
        case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
        default: asm volatile("cp.async.wait_group 4;" ::: "memory"); break;
    }
}

// The keys or the values of one kv head: where they are, and how they become tiles of fp16
// [TILE, D + PADDING].
template <int D>
struct TileSource {
    static constexpr int STRIDE = D + PADDING;
    // Eight elements.
    static constexpr int UNITS = D / 8;

    const uint8_t* pages;
    HeadLayout layout;
    int kv_heads;
    int kv_head;

    // Whether pages hold the tile as it is wanted, but for the padding.
    __device__ __forceinline__ bool is_direct() const {
        return layout.format == FORMAT_F16 && layout.head_dim % 8 == 0;
    }

    // Starts copying a tile of the sequence to a slot: rows of fp16, or the page's own bytes.
    __device__ __forceinline__ void copy(uint8_t* slot, uint32_t page, const Span& span,
                                         int tile) const {
        const int token = tile * TILE;
        const uint8_t* block = head_page(pages, layout, kv_heads, page, kv_head);
        const int token_in_page = token % PAGE_TOKENS;
        const int vector_bytes = layout.vector_bytes();
        const uint8_t* from = block + token_in_page * vector_bytes;
        const uint32_t to = shared_address(slot);
        const int first = span.first_token - token;
        const int end = min(TILE, span.end_token - token);
        if (is_direct()) {
#pragma unroll 4
            for (int index = threadIdx.x; index < TILE * UNITS; index += ATTEND_THREADS) {
                const int row = index / UNITS;
                const int unit = index % UNITS;
                const bool is_read = row >= first && row < end && unit * 8 < layout.head_dim;
                copy_async(to + (row * STRIDE + unit * 8) * 2,
                           is_read ? from + row * vector_bytes + unit * 16 : from, is_read);
            }
            return;
        }
        // A page's blocks and every TILE-th vector in them start at multiples of 16 bytes.
#pragma unroll 2
        for (int at = threadIdx.x * 16; at < end * vector_bytes; at += ATTEND_THREADS * 16) {
            copy_async(to + at, from + at, true);
        }
        const int scale_bytes = layout.scale_bytes();
        const uint8_t* scales =
            block + PAGE_TOKENS * vector_bytes + token_in_page * scale_bytes;
#pragma unroll 1
        for (int at = threadIdx.x * 16; at < end * scale_bytes; at += ATTEND_THREADS * 16) {
            copy_async(to + TILE * vector_bytes + at, scales + at, true);
        }
    }

    // Makes rows of fp16 of a slot's bytes; zeros where no row of the tile sees the token.
    __device__ __forceinline__ void decode(const uint8_t* slot, __half* rows, const Span& span,
                                           int tile) const {
        const int first = span.first_token - tile * TILE;
        const int end = span.end_token - tile * TILE;
        const int vector_bytes = layout.vector_bytes();
        const int scale_bytes = layout.scale_bytes();
        const uint8_t* scales = slot + TILE * vector_bytes;
        const auto decode_units = [&](auto decode_unit) {
#pragma unroll 4
            for (int index = threadIdx.x; index < TILE * UNITS; index += ATTEND_THREADS) {
                const int row = index / UNITS;
                const int unit = index % UNITS;
                uint4 elements = {0, 0, 0, 0};
                if (row >= first && row < end && unit * 8 < layout.head_dim) {
                    elements = decode_unit(slot + row * vector_bytes, row, unit);
                }
                *reinterpret_cast<uint4*>(rows + row * STRIDE + unit * 8) = elements;
            }
        };
        const auto scale = [&](int row, int unit) {
            return reinterpret_cast<const __half*>(scales + row * scale_bytes)[unit / 4];
        };
        if (layout.format == FORMAT_Q4) {
            decode_units([&](const uint8_t* vector, int row, int unit) {
                const uint32_t word = reinterpret_cast<const uint32_t*>(vector)[unit];
                return decode_q4(word, scale(row, unit));
            });
            return;
        }
        if (layout.format == FORMAT_Q8) {
            decode_units([&](const uint8_t* vector, int row, int unit) {
                const uint2 words = reinterpret_cast<const uint2*>(vector)[unit];
                return decode_q8(words, scale(row, unit));
            });
            return;
        }
        // fp16 heads of an even number of dimensions that is not a multiple of 8.
#pragma unroll 1
        for (int index = threadIdx.x; index < TILE * D / 2; index += ATTEND_THREADS) {
            const int row = index / (D / 2);
            const int pair = index % (D / 2);
            const bool is_seen = row >= first && row < end && pair * 2 < layout.head_dim;
            const uint8_t* vector = slot + row * vector_bytes;
            reinterpret_cast<uint32_t*>(rows + row * STRIDE)[pair] =
                is_seen ? reinterpret_cast<const uint32_t*>(vector)[pair] : 0;
        }
    }
};

// The stream of tiles that a block works through: keys and values of every tile of its pieces,
// in a ring of slots that is filled ahead.
template <int D>
struct TileRing {
    TileSource<D> keys;
    TileSource<D> values;
    uint8_t* slots;
    // fp16 [TILE, D + PADDING], where a format is decoded.
    __half* decoded;
    int slot_count;
    int slot_bytes;
    // The next slot to fill, and the next to use.
    int fill_slot;
    int use_slot;
    // What is copied next; past the last piece nothing is.
    int piece;
    int tile;
    int piece_step;
    bool is_values;
    // The page that was looked up last, and which of the sequence's it is.
    int page_index;
    uint32_t page;

    __device__ __forceinline__ TileRing(const AttendArgs& args, const Queries& queries,
                                        const Span& span, uint8_t* shared, int first_piece,
                                        int step)
        : keys{args.key_pages, {args.key_format, args.head_dim}, args.kv_heads, queries.kv_head},
          values{args.value_pages,
                 {args.value_format, args.head_dim},
                 args.kv_heads,
                 queries.kv_head} {
        const bool needs_decoded = !(keys.is_direct() && values.is_direct());
        decoded = reinterpret_cast<__half*>(shared);
        slots = shared + (needs_decoded ? TILE * TileSource<D>::STRIDE * 2 : 0);
        slot_count = args.slots;
        slot_bytes = args.slot_bytes;
        fill_slot = 0;
        use_slot = 0;
        piece = first_piece;
        piece_step = step;
        is_values = false;
        page_index = -1;
        page = 0;
        tile = span.first_tile_of(piece);
    }

    // Fills all slots but one, before and after the wait for what this step stores.
    __device__ __forceinline__ void start(const Queries& queries, const Span& span) {
        bool has_waited = false;
        for (int ahead = 1; ahead <= slot_count; ++ahead) {
            if (!has_waited && (ahead == slot_count || (tile + 1) * TILE > queries.old_tokens)) {
                dependency_wait();
                dependency_trigger();
                has_waited = true;
            }
            if (ahead < slot_count) fill(queries, span);
        }
    }

    __device__ __forceinline__ void fill(const Queries& queries, const Span& span) {
        if (piece <= span.last_piece) {
            if (page_index != tile * TILE / PAGE_TOKENS) {
                page_index = tile * TILE / PAGE_TOKENS;
                page = __ldcg(queries.page_table + page_index);
            }
            const TileSource<D> source = is_values ? values : keys;
            source.copy(slots + fill_slot * slot_bytes, page, span, tile);
            if (is_values && ++tile > span.last_tile_of(piece)) {
                piece += piece_step;
                tile = span.first_tile_of(piece);
            }
            is_values = !is_values;
        }
        // Groups are counted, so there is one even where there is nothing to copy.
        copies_commit();
        fill_slot = fill_slot + 1 == slot_count ? 0 : fill_slot + 1;
    }

    // The next tile as fp16 [TILE, D + PADDING], keys and values in turn; valid until the next
    // call. All threads of the block call it together: it separates what they did before from
    // what they do after.
    __device__ __forceinline__ const __half* next(const Queries& queries, const Span& span,
                                                  const TileSource<D>& source, int tile_in_use) {
        if (slot_count > 1) {
            copies_wait(slot_count - 2);
            __syncthreads();
            // The slot that was used last is free now.
            fill(queries, span);
        } else {
            __syncthreads();
            fill(queries, span);
            copies_wait(0);
            __syncthreads();
        }
        uint8_t* slot = slots + use_slot * slot_bytes;
        use_slot = use_slot + 1 == slot_count ? 0 : use_slot + 1;
        if (source.is_direct()) return reinterpret_cast<const __half*>(slot);
        source.decode(slot, decoded, span, tile_in_use);
        __syncthreads();
        return decoded;
    }
};

}  // namespace oxl
