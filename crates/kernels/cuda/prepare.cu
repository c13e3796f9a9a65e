// The input of a linear: f32 rows, normed or gated, become fp16 rows in the linear's order.
//
//   y[row]      = norm(x[row]),  activation(gate[row]) * x[row],  or x[row]
//   out[row][r] = f16(clamp(y[row][permutation[r]], -65504, 65504)),  0 from `width` on
//
// In rows for products of few rows; for those of many, rows lie in chunks (chunks.cuh) and their places
// are in another order.
//
// NaN stays NaN, so that what went wrong is seen in the logits. A norm's sums are taken in f32, in
// an order that depends on the width alone. At most three outputs of different orders are
// written at once.
//
// Floor at one row: a few tens of kilobytes, so the way there and back: launch (hidden by
// programmatic launch), one load from the L2 (0.4 us), the sum over the block (0.2 us), the gather
// from shared memory (0.1 us with four blocks a row, each of which norms the whole row and writes
// a quarter) and the stores. Weights and orders are loaded before the wait. At many rows the
// bytes: 6 (norm) or 10 (gate) an element.
#include "chunks.cuh"
#include "rows.cuh"

constexpr int MOST_PREPARED = 3;

struct PrepareArgs {
    // f32 [rows, width], or f16 where an entry's name says halves
    const float* x;
    // f32 [rows, width]: y is activation(gate) * x. Null: y is x. Without a norm only.
    const float* gate;
    // f32 [width]; with a norm only.
    const float* norm_weight;
    // f32 [width] or null; with a norm only.
    const float* norm_bias;
    // u32 [width] each, 16-byte aligned: which element of y each place takes. Null: its own.
    const uint32_t* permutations[MOST_PREPARED];
    // f16 [rows, padded_width] or [padded_width / 64, row_stride, 64] each, 16-byte aligned.
    __half* outs[MOST_PREPARED];
    int32_t width;
    // A multiple of 32, or of 64 for chunks; the same for all outputs.
    int32_t padded_width;
    // NORM_RMS or NORM_LAYER.
    int32_t norm_kind;
    // ACTIVATION_...
    int32_t activation;
    float epsilon;
    // Rows of a chunk in memory.
    int32_t row_stride;
};

namespace {

using oxl::Four;

struct Places {
    int at[4];
};

// Rows after each other, places in the linear's order.
struct PlainRows {
    // Whether four places that are stored together are four after each other.
    static constexpr bool IS_PLAIN = true;

    static __device__ __forceinline__ Places places(int first) {
        return {{first, first + 1, first + 2, first + 3}};
    }

    static __device__ __forceinline__ Places permuted(const uint32_t* permutation, int first) {
        const uint4 loaded = *reinterpret_cast<const uint4*>(permutation + first);
        return {{int(loaded.x), int(loaded.y), int(loaded.z), int(loaded.w)}};
    }

    static __device__ __forceinline__ int64_t offset(const PrepareArgs& args, int row, int first) {
        return int64_t(row) * args.padded_width + first;
    }
};

// Rows in chunks: four stored places are two pairs of places.
struct ChunkRows {
    static constexpr bool IS_PLAIN = false;

    static __device__ __forceinline__ Places places(int first) {
        const int place = oxl::chunk_place(first);
        return {{place, place + 1, place + 8, place + 9}};
    }

    static __device__ __forceinline__ Places permuted(const uint32_t* permutation, int first) {
        const auto* pairs = reinterpret_cast<const uint2*>(permutation + oxl::chunk_place(first));
        const uint2 low = pairs[0];
        const uint2 high = pairs[4];
        return {{int(low.x), int(low.y), int(high.x), int(high.y)}};
    }

    static __device__ __forceinline__ int64_t offset(const PrepareArgs& args, int row, int first) {
        return oxl::chunk_offset(row, first, args.row_stride);
    }
};

// Where the four places stored from `first` on take their elements from; places past the width from 0.
template <typename Rows>
__device__ __forceinline__ Places load_places(const uint32_t* permutation, int first, int width) {
    Places places = Rows::places(first);
    if (permutation != nullptr && places.at[3] < width) return Rows::permuted(permutation, first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (places.at[i] >= width) {
            places.at[i] = 0;
        } else if (permutation != nullptr) {
            places.at[i] = int(permutation[places.at[i]]);
        }
    }
    return places;
}

// Writes the four places stored from `first` on, zeros from `width` on.
template <typename Rows>
__device__ __forceinline__ void store_places(__half* out, int first, int width, Four y) {
    const Places places = Rows::places(first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (places.at[i] >= width) y.at[i] = 0.0f;
    }
    __half2 pairs[2] = {oxl::clamped_half2(y.at[0], y.at[1]),
                        oxl::clamped_half2(y.at[2], y.at[3])};
    uint2 packed;
    packed.x = *reinterpret_cast<uint32_t*>(&pairs[0]);
    packed.y = *reinterpret_cast<uint32_t*>(&pairs[1]);
    *reinterpret_cast<uint2*>(out) = packed;
}

// Elements `first..first + 4` of rows that are y already, in f16; past the width from 0.
__device__ __forceinline__ uint2 load_halves(const PrepareArgs& args, int64_t row, int first) {
    const __half* x = reinterpret_cast<const __half*>(args.x) + row * args.width + first;
    return first < args.width ? *reinterpret_cast<const uint2*>(x) : make_uint2(0, 0);
}

// Elements `first..first + 4` of y without a norm.
__device__ __forceinline__ Four load_input(const PrepareArgs& args, int64_t row, int first) {
    Four y = oxl::load_four(args.x + row * args.width, first, args.width);
    if (args.gate != nullptr) {
        const Four gate = oxl::load_four(args.gate + row * args.width, first, args.width);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            y.at[i] = __fmul_rn(oxl::activate(args.activation, gate.at[i]), y.at[i]);
        }
    }
    return y;
}

// One element of y without a norm.
__device__ __forceinline__ float load_element(const PrepareArgs& args, int64_t row, int place) {
    const int64_t index = row * args.width + place;
    const float x = args.x[index];
    if (args.gate == nullptr) return x;
    return __fmul_rn(oxl::activate(args.activation, args.gate[index]), x);
}

// The places of a row that a block writes: its share, in fours.
struct Slice {
    int start;
    int end;

    __device__ __forceinline__ explicit Slice(int padded_width) {
        const int64_t quads = padded_width / 4;
        start = int(quads * blockIdx.y / gridDim.y) * 4;
        end = int(quads * (blockIdx.y + 1) / gridDim.y) * 4;
    }
};

// Grid (rows, slices, outputs): each block knows the whole row and writes one slice of one output.
// IN_SHARED: the row lies in shared memory, f32 [width rounded up to 4]; else elements are
// loaded again, from the L2.
template <typename Rows, bool IN_SHARED>
__device__ __forceinline__ void prepare_row(const PrepareArgs& args) {
    DYNAMIC_SHARED(float4, shared, 16);
    __shared__ float mean_partials[oxl::WARP_LANES];
    __shared__ float square_partials[oxl::WARP_LANES];
    float* staged = reinterpret_cast<float*>(shared);

    const int64_t row = blockIdx.x;
    const int width = args.width;
    const int threads = blockDim.x;
    const int stride = 4 * threads;
    const int first = 4 * threadIdx.x;
    const uint32_t* permutation = args.permutations[blockIdx.z];
    __half* out = args.outs[blockIdx.z];
    const float* in = args.x + row * width;
    const Slice slice(args.padded_width);
    const float inverse_width = 1.0f / float(width);

    // Two pieces of four a thread are most of a row (all up to 8,192): their weights and the
    // first places come from memory while the kernel before still runs.
    Four weights[2];
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
        weights[piece] = oxl::load_four(args.norm_weight, first + piece * stride, width);
    }
    Places places = load_places<Rows>(permutation, slice.start + first, width);
    oxl::dependency_trigger();
    oxl::dependency_wait();

    Four x[2];
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
        x[piece] = oxl::load_four(in, first + piece * stride, width);
    }
    float mean = 0.0f;
    if (args.norm_kind == oxl::NORM_LAYER) {
        float sum = 0.0f;
#pragma unroll
        for (int piece = 0; piece < 2; ++piece) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sum += x[piece].at[i];
        }
        for (int at = first + 2 * stride; at < width; at += stride) {
            const Four more = oxl::load_four(in, at, width);
#pragma unroll
            for (int i = 0; i < 4; ++i) sum += more.at[i];
        }
        mean = __fmul_rn(oxl::block_sum(sum, mean_partials), inverse_width);
    }
    float squares = 0.0f;
    for (int at = first, piece = 0; at < width; at += stride, ++piece) {
        Four four = piece == 0 ? x[0] : x[1];
        Four weight = piece == 0 ? weights[0] : weights[1];
        if (piece > 1) {
            four = oxl::load_four(in, at, width);
            weight = oxl::load_four(args.norm_weight, at, width);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float difference = at + i < width ? four.at[i] - mean : 0.0f;
            squares = __fmaf_rn(difference, difference, squares);
            four.at[i] = __fmul_rn(difference, weight.at[i]);
        }
        if (IN_SHARED) {
            reinterpret_cast<float4*>(staged)[at / 4] =
                make_float4(four.at[0], four.at[1], four.at[2], four.at[3]);
        }
    }
    // Its barrier is the one that the staged row needs.
    const float square_sum = oxl::block_sum(squares, square_partials);
    const float scale = oxl::norm_scale(square_sum, inverse_width, args.epsilon);

    const bool has_bias = args.norm_bias != nullptr;
    for (int at = slice.start + first; at < slice.end; at += stride) {
        if (at != slice.start + first) places = load_places<Rows>(permutation, at, width);
        Four y;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int place = places.at[i];
            float value;
            if (IN_SHARED) {
                value = staged[place];
            } else {
                value = __fmul_rn(in[place] - mean, args.norm_weight[place]);
            }
            value = __fmul_rn(value, scale);
            if (has_bias) value = __fadd_rn(value, args.norm_bias[place]);
            y.at[i] = value;
        }
        store_places<Rows>(out + Rows::offset(args, blockIdx.x, at), at, width, y);
    }
}

// Without a norm: four places a thread.
template <typename Rows>
__device__ __forceinline__ void prepare(const PrepareArgs& args) {
    const int64_t row = blockIdx.x;
    const int first = 4 * (blockIdx.y * blockDim.x + threadIdx.x);
    const uint32_t* permutation = args.permutations[blockIdx.z];
    const Places places = load_places<Rows>(permutation, first, args.width);
    oxl::dependency_trigger();
    oxl::dependency_wait();
    if (first >= args.padded_width) return;
    Four y;
    if (permutation == nullptr && Rows::IS_PLAIN) {
        y = load_input(args, row, first);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) y.at[i] = load_element(args, row, places.at[i]);
    }
    __half* out = args.outs[blockIdx.z] + Rows::offset(args, blockIdx.x, first);
    store_places<Rows>(out, first, args.width, y);
}

// Without a norm, the row as fp16 in shared memory. HALVES: as it comes, its width a multiple of four.
template <typename Rows, bool HALVES>
__device__ __forceinline__ void prepare_gather(const PrepareArgs& args) {
    DYNAMIC_SHARED(float4, shared, 16);
    __half* staged = reinterpret_cast<__half*>(shared);
    const int64_t row = blockIdx.x;
    const int width = args.width;
    const uint32_t* permutation = args.permutations[blockIdx.z];
    __half* out = args.outs[blockIdx.z];
    const Slice slice(args.padded_width);
    const int stride = 4 * blockDim.x;
    const int first = 4 * threadIdx.x;
    Places places = load_places<Rows>(permutation, slice.start + first, width);
    oxl::dependency_trigger();
    oxl::dependency_wait();
    // Places past the width are zeros; shared memory ends there.
#pragma unroll 3
    for (int at = first; at < width; at += stride) {
        if (HALVES) {
            *reinterpret_cast<uint2*>(staged + at) = load_halves(args, row, at);
        } else {
            store_places<PlainRows>(staged + at, at, width, load_input(args, row, at));
        }
    }
    __syncthreads();
#pragma unroll 2
    for (int at = slice.start + first; at < slice.end; at += stride) {
        if (at != slice.start + first) places = load_places<Rows>(permutation, at, width);
        const Places own = Rows::places(at);
        uint32_t taken[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            taken[i] = own.at[i] < width ? __half_as_ushort(staged[places.at[i]]) : 0;
        }
        uint2 packed;
        packed.x = taken[0] | taken[1] << 16;
        packed.y = taken[2] | taken[3] << 16;
        *reinterpret_cast<uint2*>(out + Rows::offset(args, blockIdx.x, at)) = packed;
    }
}

}  // namespace

// Threads: `width / 8`, rounded up to whole warps, 1,024 at most. With a norm only.
extern "C" __global__ void __launch_bounds__(oxl::MOST_ROW_THREADS)
    oxl_prepare_row(const __grid_constant__ PrepareArgs args) {
    prepare_row<PlainRows, true>(args);
}

extern "C" __global__ void __launch_bounds__(oxl::MOST_ROW_THREADS)
    oxl_prepare_row_chunks(const __grid_constant__ PrepareArgs args) {
    prepare_row<ChunkRows, true>(args);
}

// The same for rows that shared memory cannot hold.
extern "C" __global__ void __launch_bounds__(oxl::MOST_ROW_THREADS)
    oxl_prepare_wide_row(const __grid_constant__ PrepareArgs args) {
    prepare_row<PlainRows, false>(args);
}

extern "C" __global__ void __launch_bounds__(oxl::MOST_ROW_THREADS)
    oxl_prepare_wide_row_chunks(const __grid_constant__ PrepareArgs args) {
    prepare_row<ChunkRows, false>(args);
}

// Without a norm, for few rows or rows in their own order: four places a thread, no barrier, and few registers, so
// that there is room for other kernels' blocks beside. Grid (rows, blocks a row, outputs).
extern "C" __global__ void __launch_bounds__(256)
    oxl_prepare(const __grid_constant__ PrepareArgs args) {
    prepare<PlainRows>(args);
}

extern "C" __global__ void __launch_bounds__(256)
    oxl_prepare_chunks(const __grid_constant__ PrepareArgs args) {
    prepare<ChunkRows>(args);
}

// Without a norm, for more rows in another order: the row as fp16 in shared memory, [width rounded up to 4], is
// gathered from there. At very many rows a block has a quarter of the threads that a norm's row has, and half its
// bytes, so that other blocks' loads go on while one gathers.
// Grid (rows, slices, outputs): each block knows the whole row and writes one slice of one output.
extern "C" __global__ void __launch_bounds__(768, 2)
    oxl_prepare_gather(const __grid_constant__ PrepareArgs args) {
    prepare_gather<PlainRows, false>(args);
}

extern "C" __global__ void __launch_bounds__(768, 2)
    oxl_prepare_gather_chunks(const __grid_constant__ PrepareArgs args) {
    prepare_gather<ChunkRows, false>(args);
}

extern "C" __global__ void __launch_bounds__(768, 2)
    oxl_prepare_gather_halves(const __grid_constant__ PrepareArgs args) {
    prepare_gather<ChunkRows, true>(args);
}
