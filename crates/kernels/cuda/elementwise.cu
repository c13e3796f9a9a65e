// The row-wise and element-wise operations on f32 activations, the contract's one by one.
//
// All of them move bytes: the floor of each is what it reads and writes (its comment says how
// much) at the memory's or, in a decode step, the L2's speed; below a megabyte the launch costs
// more. Rows begin at multiples of 16 bytes where their width is a multiple of four elements.
#include "rows.cuh"

using oxl::Four;

struct NormArgs {
    // f32 [rows, width]
    const float* x;
    // f32 [width]
    const float* weight;
    // f32 [width] or null.
    const float* bias;
    // f32 [rows, width]; not `x`.
    float* out;
    int32_t width;
    // NORM_RMS or NORM_LAYER.
    int32_t kind;
    float epsilon;
    int32_t reserved;
};

// out[row] = (x[row] - mean) / sqrt(mean square + epsilon) * weight + bias; the mean is taken off
// by NORM_LAYER alone. Sums in f32, in an order that depends on the width alone.
//
// Grid (rows); threads: `width / 8` rounded up to whole warps, 1,024 at most. Bytes: 8 an element
// (a row is read from memory once, then from the L1).
extern "C" __global__ void __launch_bounds__(oxl::MOST_ROW_THREADS)
    oxl_norm(const __grid_constant__ NormArgs args) {
    __shared__ float mean_partials[oxl::WARP_LANES];
    __shared__ float square_partials[oxl::WARP_LANES];
    const int width = args.width;
    const int stride = 4 * blockDim.x;
    const int first = 4 * threadIdx.x;
    const float inverse_width = 1.0f / float(width);
    const float* x = args.x + int64_t(blockIdx.x) * width;
    float* out = args.out + int64_t(blockIdx.x) * width;
    oxl::dependency_trigger();
    oxl::dependency_wait();

    float mean = 0.0f;
    if (args.kind == oxl::NORM_LAYER) {
        float sum = 0.0f;
        for (int at = first; at < width; at += stride) {
            const Four four = oxl::load_four(x, at, width);
#pragma unroll
            for (int i = 0; i < 4; ++i) sum += four.at[i];
        }
        mean = __fmul_rn(oxl::block_sum(sum, mean_partials), inverse_width);
    }
    float squares = 0.0f;
    for (int at = first; at < width; at += stride) {
        const Four four = oxl::load_four(x, at, width);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float difference = at + i < width ? four.at[i] - mean : 0.0f;
            squares = __fmaf_rn(difference, difference, squares);
        }
    }
    const float square_sum = oxl::block_sum(squares, square_partials);
    const float scale = oxl::norm_scale(square_sum, inverse_width, args.epsilon);
    for (int at = first; at < width; at += stride) {
        Four four = oxl::load_four(x, at, width);
        const Four weight = oxl::load_four(args.weight, at, width);
        Four bias = {};
        if (args.bias != nullptr) bias = oxl::load_four(args.bias, at, width);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float normed = __fmul_rn(__fmul_rn(four.at[i] - mean, scale), weight.at[i]);
            four.at[i] = __fadd_rn(normed, bias.at[i]);
        }
        oxl::store_four(out, at, width, four);
    }
}

struct GateArgs {
    // f32 [elements], changed in place.
    float* gate;
    // f32 [elements]
    const float* up;
    uint64_t elements;
    // ACTIVATION_...
    int32_t activation;
    int32_t reserved;
};

// gate[i] = activation(gate[i]) * up[i]. Four elements a thread; bytes: 12 an element.
extern "C" __global__ void __launch_bounds__(256)
    oxl_gate(const __grid_constant__ GateArgs args) {
    const uint64_t first = 4 * (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x);
    oxl::dependency_trigger();
    oxl::dependency_wait();
    if (first >= args.elements) return;
    // From here on as if these four were a row of their own.
    const int count = int(min(args.elements - first, uint64_t(4)));
    Four gate = oxl::load_four(args.gate + first, 0, count);
    const Four up = oxl::load_four(args.up + first, 0, count);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        gate.at[i] = __fmul_rn(oxl::activate(args.activation, gate.at[i]), up.at[i]);
    }
    oxl::store_four(args.gate + first, 0, count, gate);
}

struct AddArgs {
    // f32 [elements]
    const float* x;
    // f32 [elements], changed in place.
    float* out;
    uint64_t elements;
    float scale;
    int32_t reserved;
};

// out[i] += scale * x[i], rounded once. Four elements a thread; bytes: 12 an element.
extern "C" __global__ void __launch_bounds__(256) oxl_add(const __grid_constant__ AddArgs args) {
    const uint64_t first = 4 * (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x);
    oxl::dependency_trigger();
    oxl::dependency_wait();
    if (first >= args.elements) return;
    const int count = int(min(args.elements - first, uint64_t(4)));
    const Four x = oxl::load_four(args.x + first, 0, count);
    Four out = oxl::load_four(args.out + first, 0, count);
#pragma unroll
    for (int i = 0; i < 4; ++i) out.at[i] = __fmaf_rn(args.scale, x.at[i], out.at[i]);
    oxl::store_four(args.out + first, 0, count, out);
}

// Indices that travel with a launch: no copy, and the host may forget them at once.
constexpr int MOST_ROW_INDICES = 256;

struct RowsArgs {
    // f32 [_, width]
    const float* x;
    // f32 [_, width]
    float* out;
    int32_t width;
    // Of `oxl_scatter_add_rows`.
    float scale;
    uint32_t rows[MOST_ROW_INDICES];
};

// out[i] = x[rows[i]]. Grid (rows, blocks a row), four elements a thread; bytes: 8 an element.
extern "C" __global__ void __launch_bounds__(256)
    oxl_gather_rows(const __grid_constant__ RowsArgs args) {
    const int first = 4 * (blockIdx.y * blockDim.x + threadIdx.x);
    const float* x = args.x + int64_t(args.rows[blockIdx.x]) * args.width;
    float* out = args.out + int64_t(blockIdx.x) * args.width;
    oxl::dependency_trigger();
    oxl::dependency_wait();
    oxl::store_four(out, first, args.width, oxl::load_four(x, first, args.width));
}

struct GatherIndexedArgs {
    // f32 [_, width]
    const float* x;
    // f32 [rows, width]
    float* out;
    // [rows]: which row of x, as the step's kernels wrote it.
    const uint32_t* indices;
    int32_t width;
    int32_t reserved;
};

// out[i] = x[indices[i]]: the gather whose rows are an input of the step, so that a recorded step
// can be replayed with others. Grid and bytes as above.
extern "C" __global__ void __launch_bounds__(256)
    oxl_gather_indexed(const __grid_constant__ GatherIndexedArgs args) {
    const int first = 4 * (blockIdx.y * blockDim.x + threadIdx.x);
    oxl::dependency_trigger();
    oxl::dependency_wait();
    const float* x = args.x + int64_t(args.indices[blockIdx.x]) * args.width;
    float* out = args.out + int64_t(blockIdx.x) * args.width;
    oxl::store_four(out, first, args.width, oxl::load_four(x, first, args.width));
}

// out[rows[i]] += scale * x[i], rounded once; no row twice. Grid (rows, blocks a row), four
// elements a thread; bytes: 12 an element.
extern "C" __global__ void __launch_bounds__(256)
    oxl_scatter_add_rows(const __grid_constant__ RowsArgs args) {
    const int first = 4 * (blockIdx.y * blockDim.x + threadIdx.x);
    const float* x = args.x + int64_t(blockIdx.x) * args.width;
    float* row = args.out + int64_t(args.rows[blockIdx.x]) * args.width;
    oxl::dependency_trigger();
    oxl::dependency_wait();
    const Four added = oxl::load_four(x, first, args.width);
    Four out = oxl::load_four(row, first, args.width);
#pragma unroll
    for (int i = 0; i < 4; ++i) out.at[i] = __fmaf_rn(args.scale, added.at[i], out.at[i]);
    oxl::store_four(row, first, args.width, out);
}

struct FinishLogitsArgs {
    // f32 [rows, width], changed in place.
    float* logits;
    int32_t width;
    // Columns from here on become -infinity.
    int32_t vocab_size;
    float scale;
    // Above 0: logits become cap * tanh(logit / cap).
    float softcap;
};

// Grid (rows, blocks a row), four logits a thread; bytes: 8 a logit.
extern "C" __global__ void __launch_bounds__(256)
    oxl_finish_logits(const __grid_constant__ FinishLogitsArgs args) {
    const int first = 4 * (blockIdx.y * blockDim.x + threadIdx.x);
    float* row = args.logits + int64_t(blockIdx.x) * args.width;
    oxl::dependency_trigger();
    oxl::dependency_wait();
    Four logits = oxl::load_four(row, first, args.width);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float logit = __fmul_rn(logits.at[i], args.scale);
        if (args.softcap > 0.0f) logit = __fmul_rn(args.softcap, tanhf(logit / args.softcap));
        logits.at[i] = first + i < args.vocab_size ? logit : oxl::negative_infinity();
    }
    oxl::store_four(row, first, args.width, logits);
}

struct EmbedArgs {
    // u32 [rows]
    const uint32_t* token_ids;
    // The table's fp16 weights in the layout of linears: [column tiles, k blocks, 4 pieces,
    // 32 lanes, 8 halves]; lane 4 g + t of piece i holds output 8 i + g and the inputs
    // 8 t..8 t + 8 of the block, so that an output has 64 bytes of each block in one run.
    const uint4* table;
    // f32 [rows, width]
    float* out;
    // The table's inputs.
    int32_t width;
    // `width` in blocks of 32, rounded up.
    int32_t blocks;
    // The table's outputs; tokens from here on read output 0.
    uint32_t tokens;
    float scale;
};

// out[row] = scale * table[token_ids[row]]. Grid (rows, blocks of threads a row), eight elements a
// thread; bytes: 6 an element.
extern "C" __global__ void __launch_bounds__(128)
    oxl_embed(const __grid_constant__ EmbedArgs args) {
    constexpr int TILE = 32;
    constexpr int BLOCK_VECTORS = 128;
    const int eight = blockIdx.y * blockDim.x + threadIdx.x;
    const int first = 8 * eight;
    oxl::dependency_trigger();
    oxl::dependency_wait();
    if (first >= args.width) return;
    uint32_t token = args.token_ids[blockIdx.x];
    if (token >= args.tokens) token = 0;
    const int piece = token % TILE / 8;
    const int lane = token % 8 * 4 + eight % 4;
    const int64_t block = int64_t(token / TILE) * args.blocks + eight / 4;
    const uint4 loaded = args.table[block * BLOCK_VECTORS + piece * oxl::WARP_LANES + lane];
    const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    float* out = args.out + int64_t(blockIdx.x) * args.width;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&words[2 * half]));
        const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&words[2 * half + 1]));
        const Four four = {{args.scale * low.x, args.scale * low.y, args.scale * high.x,
                            args.scale * high.y}};
        oxl::store_four(out, first + 4 * half, args.width, four);
    }
}
