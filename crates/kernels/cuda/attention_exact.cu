// Attention over a cache of f32, all in f32: for checking, not for speed.
//
// Floor: keys and values of every row and query head read once, since nothing is shared among
// them. One block a query head of a row; a thread scores a token, then sums a dimension. The
// error is that of f32 sums, below 1e-4 of the result's largest element.
#include "attention.cuh"

struct AttendExactArgs {
    // f32 [rows, heads, head_dim], normed and rotated.
    const float* queries;
    // [pages, kv_heads] of blocks of f32.
    const uint8_t* key_pages;
    const uint8_t* value_pages;
    // f32 [rows, heads, head_dim]
    float* out;
    // u32 [rows]
    const uint32_t* positions;
    // u32 [rows]
    const uint32_t* row_sequences;
    // u32 [sequences, table_stride]
    const uint32_t* page_tables;
    // As in AttendArgs.
    float score_factor;
    float cap_factor;
    int32_t window;
    int32_t heads;
    int32_t kv_heads;
    int32_t head_dim;
    int32_t table_stride;
    int32_t unused;
};

namespace {

using namespace oxl;

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP_LANES;
constexpr int MOST_HEAD_DIM = 256;
// Dimensions that a thread sums.
constexpr int DIMENSIONS = MOST_HEAD_DIM / THREADS;

struct ExactShared {
    float query[MOST_HEAD_DIM];
    float weights[THREADS];
    float of_warps[WARPS];
};

// The token's vector of the head, f32 [head_dim].
__device__ __forceinline__ const float* vector_of(const AttendExactArgs& args,
                                                  const uint8_t* pages, int row, int head,
                                                  int token) {
    const HeadLayout layout = {FORMAT_F32, args.head_dim};
    const int64_t table = int64_t(args.row_sequences[row]) * args.table_stride;
    const uint32_t page = args.page_tables[table + token / PAGE_TOKENS];
    const uint8_t* block = head_page(pages, layout, args.kv_heads, page, head);
    return reinterpret_cast<const float*>(block) + token % PAGE_TOKENS * args.head_dim;
}

// The block's largest, or its sum, in an order that is always the same.
template <bool IS_SUM>
__device__ __forceinline__ float over_block(float x, ExactShared& shared) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, x, distance);
        x = IS_SUM ? x + other : fmaxf(x, other);
    }
    __syncthreads();
    if (threadIdx.x % WARP_LANES == 0) shared.of_warps[threadIdx.x / WARP_LANES] = x;
    __syncthreads();
    x = shared.of_warps[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) {
        const float other = shared.of_warps[warp];
        x = IS_SUM ? x + other : fmaxf(x, other);
    }
    return x;
}

}  // namespace

// Grid: (rows, heads); 128 threads.
extern "C" __global__ void __launch_bounds__(128)
oxl_attend_exact(const __grid_constant__ AttendExactArgs args) {
    __shared__ ExactShared shared;
    dependency_wait();
    dependency_trigger();
    const int row = blockIdx.x;
    const int head = blockIdx.y;
    const int kv_head = head / (args.heads / args.kv_heads);
    const int thread = threadIdx.x;
    const int64_t at = (int64_t(row) * args.heads + head) * args.head_dim;
    for (int i = thread; i < args.head_dim; i += THREADS) shared.query[i] = args.queries[at + i];
    __syncthreads();
    const int position = int(args.positions[row]);
    const int first = args.window > 0 ? max(0, position + 1 - args.window) : 0;
    RowState state = nothing_seen();
    float kept[DIMENSIONS] = {};
    for (int start = first; start <= position; start += THREADS) {
        const int tokens = min(THREADS, position + 1 - start);
        float score = minus_infinity();
        if (thread < tokens) {
            const float* key = vector_of(args, args.key_pages, row, kv_head, start + thread);
            float product = 0.0f;
            for (int i = 0; i < args.head_dim; ++i) {
                product = __fmaf_rn(shared.query[i], key[i], product);
            }
            score = score_of(product, args.score_factor, args.cap_factor);
        }
        RowState part;
        part.largest = over_block<false>(score, shared);
        const float weight = power_of_two(score - finite_base(part.largest));
        part.sum = over_block<true>(weight, shared);
        shared.weights[thread] = weight;
        __syncthreads();
        const FoldFactors factors = fold_state(state, part);
        float sums[DIMENSIONS] = {};
        for (int token = 0; token < tokens; ++token) {
            const float* value = vector_of(args, args.value_pages, row, kv_head, start + token);
#pragma unroll
            for (int i = 0; i < DIMENSIONS; ++i) {
                const int dimension = thread + i * THREADS;
                if (dimension < args.head_dim) {
                    sums[i] = __fmaf_rn(shared.weights[token], value[dimension], sums[i]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < DIMENSIONS; ++i) kept[i] = fold(kept[i], sums[i], factors);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < DIMENSIONS; ++i) {
        const int dimension = thread + i * THREADS;
        if (dimension < args.head_dim) args.out[at + dimension] = kept[i] / state.sum;
    }
}
