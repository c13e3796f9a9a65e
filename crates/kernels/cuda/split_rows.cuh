// What a step's row brings to a block that attends for it, normed, rotated and kept (attention_split.cu).
#pragma once

#include "heads.cuh"
#include "split_results.cuh"

namespace oxl {

// The row's own key or value as pages have it, which a block keeps for itself as well.
template <int D, bool IS_CODES>
struct FreshRow;

template <int D>
struct FreshRow<D, false> {
    __half elements[D];

    // Writes a group of it to its page, if it is to be kept, and here.
    __device__ __forceinline__ void keep(uint8_t* page, HeadLayout layout, int token, int part,
                                         float x, int lane, bool is_kept) {
        __half kept = __half();
        if (part * GROUP < layout.head_dim) {
            kept = store_group(page, layout, token, part, x, lane, is_kept);
        }
        elements[part * GROUP + lane] = kept;
    }

    // Copies all of it to row `at` of a tile, by threads of which this is one.
    __device__ __forceinline__ void insert(uint8_t* tile, HeadLayout, int at, int thread) const {
        if (thread >= D / 8) return;
        reinterpret_cast<uint4*>(tile + at * (D + PADDING) * 2)[thread] =
            reinterpret_cast<const uint4*>(elements)[thread];
    }
};

template <int D>
struct FreshRow<D, true> {
    // [head_dim * bits / 8]
    uint8_t codes[D];
    // [head_dim / GROUP]; as many bytes as of fp16 in all.
    __half scales[D / 2];

    __device__ __forceinline__ void keep(uint8_t* page, HeadLayout layout, int token, int part,
                                         float x, int lane, bool is_kept) {
        if (part * GROUP >= layout.head_dim) return;
        const StoredGroup stored = stored_group(layout, x, lane);
        put_group(codes, scales, layout, part, stored, lane);
        if (is_kept) put_in_page(page, layout, token, part, stored, lane);
    }

    __device__ __forceinline__ void insert(uint8_t* tile, HeadLayout layout, int at,
                                           int thread) const {
        const StoredTile stored = {layout};
        const int vector_words = layout.vector_bytes() / 4;
        if (thread < vector_words) {
            reinterpret_cast<uint32_t*>(tile + at * stored.row_bytes())[thread] =
                reinterpret_cast<const uint32_t*>(codes)[thread];
        }
        const int row_scales = layout.scale_bytes() / 2;
        if (thread < row_scales) {
            __half* to = reinterpret_cast<__half*>(tile + stored.scales_at());
            to[at * row_scales + thread] = scales[thread];
        }
    }
};

// The heads that the step's row brings to a block: its query heads, then, where `count` says so, its
// key and its value. A warp prepares every ATTEND_WARPS-th.
template <int D, bool IS_CODES>
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
    __device__ __forceinline__ void prepare(float* staging, __half* q,
                                            FreshRow<D, IS_CODES> (&fresh)[2]) {
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
            const HeadLayout layout = layout_of<IS_CODES>(args, is_value);
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
                                         FreshRow<D, IS_CODES>& fresh) const {
        const bool is_kept = args.head_tiles == 1 || blockIdx.y % args.head_tiles == 0;
        uint8_t* page = head_page(is_value ? args.value_pages : args.key_pages, layout,
                                  args.kv_heads, queries.home_page, queries.kv_head);
        const int token = queries.first_position % PAGE_TOKENS;
#pragma unroll 1
        for (int part = 0; part < PARTS; ++part) {
            const int element = part * GROUP + lane;
            const float x = element < layout.head_dim ? head[element] : 0.0f;
            fresh.keep(page, layout, token, part, x, lane, is_kept);
        }
    }
};

// Query heads of rows that `oxl_cache_...` has prepared, as fp16 [HEADS_OF_WARP, STRIDE].
template <int D>
__device__ __forceinline__ void copy_queries(const AttendArgs& args, const Queries& queries,
                                             __half* q) {
    constexpr int UNITS = D / 8;
#pragma unroll 1
    for (int index = threadIdx.x; index < HEADS_OF_WARP * UNITS; index += ATTEND_THREADS) {
        const int m = index / UNITS;
        const int unit = index % UNITS;
        uint4 eight = {0, 0, 0, 0};
        if (queries.has(args, m)) {
            const __half* row = args.queries + queries.query(args, m) * D;
            eight = __ldcg(reinterpret_cast<const uint4*>(row) + unit);
        }
        *reinterpret_cast<uint4*>(q + m * (D + PADDING) + unit * 8) = eight;
    }
}

// Brings the tile's query heads to `q`, prepared, and where `has_own` says so, the row's own key and
// value to shared memory and their page. Where the step's heads were, `places` of all threads wait for the end.
template <int D, bool IS_CODES>
__device__ __forceinline__ void prepare_queries(const AttendSplitArgs& all,
                                                const Queries& queries, bool has_own,
                                                FreshRow<D, IS_CODES> (&fresh)[2], __half* q,
                                                const uint4& places) {
    if (all.heads.is_fresh != 0) {
        float* staging = reinterpret_cast<float*>(staging_of(all));
        RowHeads<D, IS_CODES> heads(all, queries, has_own);
        dependency_wait();
        heads.load(staging);
        __syncthreads();
        heads.prepare(staging, q, fresh);
    } else {
        copy_queries<D>(all.attend, queries, q);
    }
    __syncthreads();
    if (has_places<D>(all, queries)) {
        reinterpret_cast<uint4*>(staging_of(all))[threadIdx.x] = places;
    }
}

}  // namespace oxl
