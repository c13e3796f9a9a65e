// How results of a block that attends for few rows leave it (attention_split.cu): its own from shared memory, or
// those of all blocks that share a sequence, folded.
#pragma once

#include "rows.cuh"
#include "split.cuh"

namespace oxl {

// Row length of results in shared memory, where a tile was.
template <int D>
constexpr int RESULT_STRIDE = D + PADDING;

// The four elements that the lane has of a group of 32, rotated as `rotate_group` does: lane i has
// 4 (i % 8) + 0..4.
__device__ __forceinline__ void rotate_four(float (&x)[4], int lane) {
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if ((i & distance) != 0) continue;
            const float first = x[i];
            const float second = x[i + distance];
            x[i] = __fadd_rn(first, second);
            x[i + distance] = __fsub_rn(first, second);
        }
    }
#pragma unroll
    for (int distance = 1; distance <= 4; distance *= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float other = __shfl_xor_sync(0xffffffffu, x[i], distance);
            x[i] = (lane & distance) == 0 ? __fadd_rn(x[i], other) : __fsub_rn(other, x[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = __fmul_rn(x[i], 0.17677669f);
}

// Where a piece's part of query head m lies: index into [partial_rows, heads, most_pieces].
__device__ __forceinline__ int64_t partial_index(const AttendArgs& args, const Queries& queries,
                                                 int m, int piece) {
    return queries.partial(args, m) * args.most_pieces + piece;
}

// What folds the pieces' parts of the tile's query heads, once all are written: [HEADS_OF_WARP, MOST_FOLDED] in
// shared memory where tiles were. A warp computes a head's, for all pieces at a time; sums of weights go to `sums`.
constexpr int MOST_FOLDED = MOST_PIECES + 2;
constexpr int FACTOR_BYTES = HEADS_OF_WARP * MOST_FOLDED * sizeof(FoldFactors);

__device__ __forceinline__ void compute_factors(const AttendArgs& args, const Queries& queries,
                                                int pieces, FoldFactors* factors, float* sums) {
    const int lane = threadIdx.x % WARP_LANES;
#pragma unroll 1
    for (int m = threadIdx.x / WARP_LANES; m < queries.rows * args.heads_per_tile;
         m += ATTEND_WARPS) {
        if (!queries.has(args, m)) continue;
        const int64_t index = partial_index(args, queries, m, 0);
        const float2* states = reinterpret_cast<const float2*>(args.partial_state) + index;
        RowState whole = nothing_seen();
#pragma unroll 1
        for (int first = 0; first < pieces; first += WARP_LANES) {
            const bool is_there = first + lane < pieces;
            const float2 loaded = __ldcg(states + min(first + lane, pieces - 1));
            const RowState part = {is_there ? loaded.x : minus_infinity(), loaded.y};
            // Largest of all pieces up to the lane's.
            float largest = part.largest;
#pragma unroll
            for (int distance = 1; distance < WARP_LANES; distance *= 2) {
                const float other = __shfl_up_sync(0xffffffffu, largest, distance);
                if (lane >= distance) largest = fmaxf(largest, other);
            }
            RowState before = {fmaxf(whole.largest, __shfl_up_sync(0xffffffffu, largest, 1)), 0.0f};
            if (lane == 0) before.largest = whole.largest;
            const FoldFactors own = fold_state(before, part);
            if (is_there) factors[m * MOST_FOLDED + first + lane] = own;
            const float product = __fmul_rn(part.sum, own.take);
#pragma unroll 8
            for (int i = 0; i < WARP_LANES; ++i) {
                const float keep = __shfl_sync(0xffffffffu, own.keep, i);
                const float part_sum = __shfl_sync(0xffffffffu, product, i);
                if (first + i < pieces) whole.sum = __fmaf_rn(whole.sum, keep, part_sum);
            }
            whole.largest = __shfl_sync(0xffffffffu, before.largest, WARP_LANES - 1);
        }
        if (lane == 0) sums[m] = whole.sum;
    }
}

// Four dimensions of a query head's result, which a thread stores.
template <int D>
struct Piece {
    static constexpr int QUADS = D / 4;
    int m;
    int quad;

    __device__ __forceinline__ explicit Piece(int index)
        : m(index / QUADS), quad(index % QUADS * 4) {}

    // Where they go in the linear's order.
    __device__ __forceinline__ uint4 places(const AttendSplitArgs& all,
                                            const Queries& queries) const {
        const AttendArgs& args = all.attend;
        const int head = queries.first_head + queries.head(args, m);
        const uint32_t first = head * args.head_dim + quad;
        if (all.out_places == nullptr) return {first, first + 1, first + 2, first + 3};
        const bool is_there = queries.has(args, m) && quad < args.head_dim;
        return __ldg(reinterpret_cast<const uint4*>(all.out_places + (is_there ? first : 0)));
    }

    // Stores them there.
    __device__ __forceinline__ void store(const AttendSplitArgs& all, const Queries& queries,
                                          const float (&x)[4], const uint4& places) const {
        const AttendArgs& args = all.attend;
        if (quad >= args.head_dim) return;
        const int64_t row = queries.first_row + queries.row(args, m);
        __half* out = all.ordered_out + row * args.heads * args.head_dim;
        const __half2 low = clamped_half2(x[0], x[1]);
        const __half2 high = clamped_half2(x[2], x[3]);
        out[places.x] = __low2half(low);
        out[places.y] = __high2half(low);
        out[places.z] = __low2half(high);
        out[places.w] = __high2half(high);
    }
};

__device__ __forceinline__ uint8_t* staging_of(const AttendSplitArgs& all) {
    DYNAMIC_SHARED(uint8_t, dynamic_shared, 128);
    return dynamic_shared + all.staging_at;
}

// Whether the thread's first piece of the result is stored in a linear's order.
template <int D>
__device__ __forceinline__ bool has_places(const AttendSplitArgs& all, const Queries& queries) {
    return all.ordered_out != nullptr && threadIdx.x < queries.heads * Piece<D>::QUADS;
}

// Four dimensions a thread of results that lie in shared memory, f32 [HEADS_OF_WARP, RESULT_STRIDE].
template <int D>
struct WholeResults {
    const float* results;

    __device__ __forceinline__ void start(int, const Piece<D>&) const {}

    __device__ __forceinline__ void take(float (&x)[4], int, const Piece<D>& own) const {
        const float* row = results + own.m * RESULT_STRIDE<D>;
        const float4 four = *reinterpret_cast<const float4*>(row + own.quad);
        x[0] = four.x;
        x[1] = four.y;
        x[2] = four.z;
        x[3] = four.w;
    }
};

// The same folded from all pieces' parts. A thread copies those of its own dimensions to shared memory, as many at
// a time as there is room for, since each way to the second-level cache and back takes long.
template <int D>
struct FoldedResults {
    const AttendArgs& args;
    const Queries& queries;
    int pieces;
    // Where shared memory has what folds parts, then the parts.
    FoldFactors* factors;
    uint8_t* memory;
    int memory_bytes;
    // Four dimensions each, of all query heads, in a turn of the block's threads.
    int items;

    // Over so many bytes of shared memory, where tiles were.
    __device__ __forceinline__ FoldedResults(const AttendArgs& args, const Queries& queries,
                                             int pieces, uint8_t* memory, int memory_bytes)
        : args(args),
          queries(queries),
          pieces(pieces),
          factors(reinterpret_cast<FoldFactors*>(memory)),
          memory(memory + FACTOR_BYTES),
          memory_bytes(memory_bytes - FACTOR_BYTES),
          items(min(queries.rows * args.heads_per_tile * Piece<D>::QUADS, ATTEND_THREADS)) {}

    __device__ __forceinline__ int pieces_at_a_time() const {
        return min(pieces, memory_bytes / (items * int(sizeof(float4))));
    }

    __device__ __forceinline__ float4* place(int item) const {
        return reinterpret_cast<float4*>(memory) + item % items;
    }

    // Starts copying the first parts of an item.
    __device__ __forceinline__ void start(int item, const Piece<D>& own) const {
        copy(item, own, 0, pieces_at_a_time());
    }

    __device__ __forceinline__ void copy(int item, const Piece<D>& own, int first, int count) const {
        const int64_t index = partial_index(args, queries, own.m, first);
        const float* from = args.partial_out + index * D + own.quad;
        uint32_t to = shared_address(place(item));
#pragma unroll 4
        for (int i = 0; i < count; ++i) {
            copy_async(to, from, true);
            from += D;
            to += items * sizeof(float4);
        }
        commit_copies();
    }

    __device__ __forceinline__ void take(float (&x)[4], int item, const Piece<D>& own) const {
        const int most = pieces_at_a_time();
        const FoldFactors* of_head = factors + own.m * MOST_FOLDED;
#pragma unroll 1
        for (int first = 0; first < pieces; first += most) {
            const int count = min(most, pieces - first);
            if (first > 0) copy(item, own, first, count);
            copies_wait(0);
            const float4* part = place(item);
#pragma unroll 4
            for (int i = 0; i < count; ++i) {
                const FoldFactors now = of_head[first + i];
                const float4 four = part[i * items];
                x[0] = fold(x[0], four.x, now);
                x[1] = fold(x[1], four.y, now);
                x[2] = fold(x[2], four.z, now);
                x[3] = fold(x[3], four.w, now);
            }
        }
    }
};

// Writes the results of all of the tile's query heads, four dimensions a lane. `then` follows the start of the first
// copies.
template <int D, bool IS_CODES, typename Results, typename Then>
__device__ __forceinline__ void write_results(const AttendSplitArgs& all, const Queries& queries,
                                              const Results& results, const float* sums,
                                              Then then) {
    const AttendArgs& args = all.attend;
    constexpr int QUADS = Piece<D>::QUADS;
    const int lane = threadIdx.x % WARP_LANES;
    const int items = queries.rows * args.heads_per_tile * QUADS;
    const Piece<D> first_piece(threadIdx.x);
    if (int(threadIdx.x) < items && queries.has(args, first_piece.m)) {
        results.start(threadIdx.x, first_piece);
    }
    then();
#pragma unroll 1
    for (int first = threadIdx.x - lane; first < items; first += ATTEND_THREADS) {
        const int item = first + lane;
        const Piece<D> own(item);
        const int m = own.m;
        const int quad = own.quad;
        const bool is_there = queries.has(args, m);
        float x[4] = {};
        float sum = 1.0f;
        if (is_there) {
            if (first >= ATTEND_THREADS) results.start(item, own);
            results.take(x, item, own);
            sum = sums[m];
        }
        const float inverse = __fdiv_rn(1.0f, sum);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = __fmul_rn(x[i], inverse);
        if (layout_of<IS_CODES>(args, true).is_quantised()) rotate_four(x, lane);
        if (!is_there) continue;
        if (all.ordered_out != nullptr) {
            // Of a linear's order results are of one row.
            const uint4 places = first < ATTEND_THREADS
                                     ? reinterpret_cast<const uint4*>(staging_of(all))[threadIdx.x]
                                     : own.places(all, queries);
            own.store(all, queries, x, places);
            continue;
        }
        float* out = args.out + queries.query(args, m) * args.head_dim + quad;
        if (quad < args.head_dim) *reinterpret_cast<float2*>(out) = make_float2(x[0], x[1]);
        if (quad + 2 < args.head_dim) {
            *reinterpret_cast<float2*>(out + 2) = make_float2(x[2], x[3]);
        }
    }
}

// Whether this block is the last of those that share a tile of rows to come here: it sees what all
// have written.
__device__ __forceinline__ bool is_last_sharer(const AttendArgs& args, int sharers,
                                               int& is_last) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        int32_t* counter = args.counters + blockIdx.x * gridDim.y + blockIdx.y;
        is_last = atomicAdd(counter, 1) == sharers - 1;
        if (is_last) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    return is_last != 0;
}

// Writes what warps have put into shared memory, f32 [HEADS_OF_WARP, RESULT_STRIDE], and its sums of weights.
template <int D, bool IS_CODES>
__device__ __forceinline__ void write_whole(const AttendSplitArgs& all, const Queries& queries,
                                            const uint8_t* memory, const float* sums) {
    const WholeResults<D> whole = {reinterpret_cast<const float*>(memory)};
    write_results<D, IS_CODES>(all, queries, whole, sums, [] { __syncthreads(); });
}

// Writes what the parts of all pieces give, by way of so many bytes of shared memory; puts sums of weights there.
template <int D, bool IS_CODES>
__device__ __forceinline__ void write_folded(const AttendSplitArgs& all, const Queries& queries,
                                             int pieces, uint8_t* memory, int memory_bytes,
                                             float* sums) {
    const FoldedResults<D> folded(all.attend, queries, pieces, memory, memory_bytes);
    write_results<D, IS_CODES>(all, queries, folded, sums, [&] {
        compute_factors(all.attend, queries, pieces, folded.factors, sums);
        __syncthreads();
    });
}

}  // namespace oxl
