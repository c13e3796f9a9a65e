// y = store(W x + bias) for 1 to 16 rows and up to five matrices that share their rows, on tensor
// cores: mma.m16n8k16 with weights as A, activations as B, sums in fp32.
//
// Floor: every weight is read from memory once (0.5 bytes at 4 bits): 7.3 us for 4096 x 11008 at
// 3.1 TB/s. A multiprocessor's share of that is a 4-bit block of 1024 weights every 37 cycles, for
// which a warp issues 43 instructions (36 of them take weights apart, 4 multiply) and its share of
// what is done once a unit or tile.
//
// There is one block of threads (CTA) a multiprocessor. It goes through an equal, contiguous share
// of all matrices' column tiles of 32 outputs. K is cut into one range a warp, all as equal as
// blocks allow, and a range into *units*: up to four neighbouring blocks of one group. Each warp
// copies the units of its range of one tile after the other, scales included, into a ring of its own
// in shared memory (cp.async), across tiles and matrices without a stop. What is done once a unit is
// a quarter of what would be done once a block: instructions are what this kernel runs out of first.
// Activations of the range lie in shared memory, for as many blocks at a time as fit. Warps put
// their sums of a tile into shared memory and go on; those of several tiles are joined and stored
// at once.
//
// What does not depend on earlier kernels comes before the wait for them: tables, the first units of weights.
//
// Launch: grid = multiprocessors, at most a tile each; block = 32 * ranges; dynamic shared memory =
// ranges * (SLOTS * SLOT_BYTES + 64 * rows * x_blocks + 128 * min(rows, 8) * tile_buffers +
// 8 * matrices * range_blocks).
#include "linear.cuh"

namespace oxl {

// Units that a warp has in its ring.
constexpr int SLOTS = 2;

// Bytes of a unit at most, and of its place in a ring: weights, then scales.
constexpr int UNIT_BYTES = 2048;
constexpr int SLOT_BYTES = UNIT_BYTES + 128;

// Where GPTQ's zeros lie behind a unit's scales.
constexpr int ZEROS_AT = 64;

// Bytes of a lane's piece of a copy.
constexpr int PIECE_BYTES = 16;

// Blocks of a full unit.
__device__ __forceinline__ constexpr int unit_blocks(int bits) {
    return bits <= 4 ? 4 : bits <= 8 ? 2 : 1;
}

// A unit: the same for all tiles. `Unit` of `ranges.rs`.
struct Unit {
    uint32_t shape;  // kind | blocks << 8 | ends its group << 11 | m_g (fp16 bits) << 16
    uint32_t place;  // bytes | group << 12
};

// What neighbouring units have in common that are multiplied in one loop.
constexpr uint32_t SHAPE_OF_RUN = 0xffff;

// From a slot's first byte in its ring to the other's.
static_assert(SLOTS == 2, "slots take turns");
__device__ __forceinline__ int next_slot(int slot) { return SLOT_BYTES - slot; }

// Kinds of units are bits of a weight, and one more.
constexpr int KIND_GPTQ = 1;

__device__ __forceinline__ int kind_of(uint32_t shape) { return shape & 0xff; }
__device__ __forceinline__ int blocks_of(uint32_t shape) { return shape >> 8 & 7; }
__device__ __forceinline__ bool ends_group(uint32_t shape) { return (shape >> 11 & 1) != 0; }

// A block in a ring, as `take_weights` reads it.
struct BlockReader {
    const char* block;

    __device__ __forceinline__ uint4 quad(int byte) const {
        return *reinterpret_cast<const uint4*>(block + byte);
    }
    __device__ __forceinline__ uint2 two(int byte) const {
        return *reinterpret_cast<const uint2*>(block + byte);
    }
    __device__ __forceinline__ uint32_t one(int byte) const {
        return *reinterpret_cast<const uint32_t*>(block + byte);
    }
};

// Copies a piece if `left` is positive.
__device__ __forceinline__ void copy_async(char* to, const uint8_t* from, int left) {
    const uint32_t place = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile(
        "{\n\t"
        ".reg .pred is_asked;\n\t"
        "setp.gt.s32 is_asked, %2, 0;\n\t"
        "@is_asked cp.async.cg.shared.global [%0], [%1], 16;\n\t"
        "}" ::"r"(place),
        "l"(from), "r"(left)
        : "memory");
}

__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// The matrix that has a column tile of the launch.
__device__ __forceinline__ int matrix_of(const LinearArgs& args, int item) {
    int index = 0;
#pragma unroll 1
    while (index + 1 < args.matrix_count && item >= args.matrices[index + 1].first_item) ++index;
    return index;
}

// One warp's part of a matrix. `WarpRange` of `ranges.rs`.
struct WarpRange {
    int32_t units;       // how many
    int32_t first_unit;  // BLOCK_UNIT_BYTES before its bytes in a tile
    int32_t bytes;       // of it in a tile
    int32_t reserved;
};

// What a warp copies into its ring.
struct CopyCursor {
    const uint8_t* source;  // of the next unit, at this lane's piece
    const uint8_t* scales;  // of the tile's group 0, at this lane's piece
    int scale_bytes;        // from a group's piece to the next one's; 0: the lane copies none
    int tile_scales;        // from a tile's scales to the next one's
    int skip;               // from the end of the range's bytes to those of the next tile
    const Unit* units;      // of the matrix
    const Unit* unit;       // the next one
    const Unit* units_end;
    int slot;               // the next unit's
    int item;
    int matrix_end;         // first item past the matrix, or the CTA's end
    int index;              // of the matrix

    // Goes to `item`, the first one of matrix `index` that the CTA has.
    __device__ __forceinline__ void begin_matrix(const LinearArgs& args, const WarpRange& range,
                                                 const Unit* all_units, int item_end, int lane) {
        const LinearMatrix& target = args.matrices[index];
        const TileMatrix& matrix = target.matrix;
        matrix_end = min(target.first_item + matrix.tiles, item_end);
        units = all_units + index * args.range_blocks;
        unit = units;
        units_end = units + range.units;
        const int tile = item - target.first_item;
        const int64_t first = int64_t(tile) * matrix.tile_units + range.first_unit;
        source = matrix.weights + first * BLOCK_UNIT_BYTES + lane * PIECE_BYTES;
        skip = matrix.tile_units * BLOCK_UNIT_BYTES - range.bytes;
        scale_bytes = 0;
        const uint8_t* start = static_cast<const uint8_t*>(matrix.scales) + lane * PIECE_BYTES;
        if (matrix.encoding == ENCODING_EXL2) {
            if (lane == 0) scale_bytes = 16;
        } else if (matrix.encoding == ENCODING_GPTQ) {
            scale_bytes = lane < 4 ? 64 : lane < 6 ? 32 : 0;
            if (lane >= 4) {
                start = reinterpret_cast<const uint8_t*>(matrix.zeros) + (lane - 4) * PIECE_BYTES;
            }
        }
        tile_scales = matrix.groups * scale_bytes;
        scales = start + int64_t(tile) * tile_scales;
    }

    // Asks for the next unit.
    __device__ __forceinline__ void copy(char* ring, int lane) {
        char* to = ring + slot + lane * PIECE_BYTES;
        const uint32_t place = unit->place;
        const int bytes = place & 0xfff;
        const int left = bytes - lane * PIECE_BYTES;
#pragma unroll
        for (int at = 0; at < UNIT_BYTES; at += WARP_LANES * PIECE_BYTES) {
            copy_async(to + at, source + at, left - at);
        }
        copy_async(to + UNIT_BYTES, scales + (place >> 12) * uint32_t(scale_bytes), scale_bytes);
        source += bytes;
        slot = next_slot(slot);
        ++unit;
    }

    __device__ __forceinline__ void next_tile() {
        unit = units;
        source += skip;
        scales += tile_scales;
    }
};

// A lane's activations of the next block, in shared memory: [block, row, 32].
struct SharedRows {
    const char* next;
    int block_bytes;
    int second;  // from a lane's row of the first row tile to that of the second

    __device__ __forceinline__ uint4 of(int tile) const {
        return *reinterpret_cast<const uint4*>(next + tile * second);
    }
};

// The scales of a lane's outputs in a unit's group: what `decode_scales` gives, in fewer instructions.
__device__ __forceinline__ void unit_scales(const char* slot, uint32_t shape, bool is_exl2, int lane,
                                            float (&scales)[4]) {
    const char* at = slot + UNIT_BYTES;
    uint32_t pairs[2];
    if (is_exl2) {
        // (e + 1)^2 has at most nine bits, so that the product is rounded once.
        uint32_t codes = *reinterpret_cast<const uint16_t*>(at + lane / 4 * 2);
        codes |= codes << 12;
        const __half2 largest = __half2half2(__ushort_as_half(shape >> 16));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t code = mask_to_half2(codes >> (8 * i), 0x000f000fu);
            const uint32_t bits = add(code, half2_of(-1023.0f));
            const __half2 root = *reinterpret_cast<const __half2*>(&bits);
            const __half2 scale = __hmul2_rn(__hmul2_rn(root, root), largest);
            pairs[i] = *reinterpret_cast<const uint32_t*>(&scale);
        }
    } else if (kind_of(shape) == KIND_GPTQ) {
        const uint2 stored = *reinterpret_cast<const uint2*>(at + lane / 4 * 8);
        pairs[0] = stored.x;
        pairs[1] = stored.y;
    } else {
        pairs[0] = pairs[1] = half2_of(1.0f);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const __half2 pair = *reinterpret_cast<const __half2*>(&pairs[i]);
        scales[2 * i] = __low2float(pair);
        scales[2 * i + 1] = __high2float(pair);
    }
}

// A warp's stream of units through its ring, multiplied in turn.
template <int ROW_TILES>
struct Stream {
    const LinearArgs& args;
    char* ring;
    const Unit* all_units;
    const WarpRange* ranges;  // of all matrices
    int lane;
    int item_end;
    CopyCursor cursor;
    int slot;  // of the next unit to multiply
    SharedRows x;
    Sums<ROW_TILES> sums;
    Sums<ROW_TILES> part;

    // Asks for one more unit, if there is one.
    __device__ __forceinline__ void copy_next() {
        if (cursor.item < item_end) {
            cursor.copy(ring, lane);
            if (cursor.unit == cursor.units_end && ++cursor.item < item_end) {
                if (cursor.item < cursor.matrix_end) {
                    cursor.next_tile();
                } else {
                    ++cursor.index;
                    cursor.begin_matrix(args, ranges[cursor.index], all_units, item_end, lane);
                }
            }
        }
        commit_copies();
    }

    // part += weights * activations over a block.
    template <int BITS, bool ZEROED>
    __device__ __forceinline__ void multiply_one(const char* block, uint32_t zeros) {
        const BlockReader reader = {block};
        LaneWeights weights;
        if constexpr (ZEROED) {
            take_zeroed(reader, lane, zeros, weights);
        } else {
            take_weights<BITS>(reader, lane, weights);
        }
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            multiply_block(weights, x.of(tile), part[tile]);
        }
        x.next += x.block_bytes;
    }

    // sums += weights * activations over a run of units, which all look like the first.
    template <int BITS, bool ZEROED>
    __device__ __forceinline__ void multiply_run(const Unit* unit, const Unit* end, bool is_exl2) {
        constexpr int block_bytes = BITS * BLOCK_UNIT_BYTES;
        const uint32_t run = unit->shape;
        const bool is_full = blocks_of(run) == unit_blocks(BITS);
#pragma unroll 1
        for (; unit != end; ++unit) {
            wait_for_copies<SLOTS - 1>();
            __syncwarp();
            const char* first = ring + slot;
            uint32_t zeros = 0;
            if constexpr (ZEROED) {
                zeros = *reinterpret_cast<const uint32_t*>(first + UNIT_BYTES + ZEROS_AT +
                                                           lane / 4 * 4);
            }
            if (is_full) {
#pragma unroll
                for (int i = 0; i < unit_blocks(BITS); ++i) {
                    multiply_one<BITS, ZEROED>(first + i * block_bytes, zeros);
                }
            } else {
#pragma unroll 1
                for (int i = 0; i < blocks_of(run); ++i) {
                    multiply_one<BITS, ZEROED>(first + i * block_bytes, zeros);
                }
            }
            if (ends_group(run)) {
                float scales[4];
                unit_scales(first, unit->shape, is_exl2, lane, scales);
                add_group<ROW_TILES>(scales, part, sums);
#pragma unroll
                for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) part[tile][i / 4][i % 4] = 0.0f;
                }
            }
            slot = next_slot(slot);
            __syncwarp();
            copy_next();
        }
    }

    // The same by what the run's units are.
    __device__ __forceinline__ void multiply(const Unit* unit, const Unit* end, bool is_exl2) {
        const int kind = kind_of(unit->shape);
        // The usual one first.
        if (kind == 4) {
            multiply_run<4, false>(unit, end, is_exl2);
            return;
        }
        switch (kind) {
            case KIND_GPTQ:
                multiply_run<4, true>(unit, end, is_exl2);
                break;
            case 2:
                multiply_run<2, false>(unit, end, is_exl2);
                break;
            case 3:
                multiply_run<3, false>(unit, end, is_exl2);
                break;
            case 5:
                multiply_run<5, false>(unit, end, is_exl2);
                break;
            case 6:
                multiply_run<6, false>(unit, end, is_exl2);
                break;
            case 8:
                multiply_run<8, false>(unit, end, is_exl2);
                break;
            default:
                multiply_run<BITS_FLOAT, false>(unit, end, is_exl2);
        }
    }
};

// Copies the activations of `count` blocks from `block` on to a warp's place for them.
__device__ __forceinline__ void fill_rows(const LinearArgs& args, const __half* x, int lane,
                                          int block, int count, char* place) {
    __syncwarp();
    const int stride = args.blocks * BLOCK_INPUTS;
    const int block_bytes = args.rows * BLOCK_INPUTS * sizeof(__half);
#pragma unroll 1
    for (int piece = lane; piece < count * 4; piece += WARP_LANES) {
        const __half* from = x + block * BLOCK_INPUTS + piece * 8;
        char* to = place + piece / 4 * block_bytes + piece % 4 * 16;
#pragma unroll 4
        for (int row = 0; row < args.rows; ++row) {
            *reinterpret_cast<uint4*>(to) = load_activations(from);
            from += stride;
            to += BLOCK_INPUTS * sizeof(__half);
        }
    }
    __syncwarp();
}

// Puts a lane's sums of up to 8 rows where `sum_place` says.
__device__ __forceinline__ void put_row_tile(const float (&sums)[2][4], int lane, int rows,
                                             float* places) {
    const int first_row = 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // Both of a lane's rows change places alike.
        const int place = sum_place(first_row, 8 * i + lane / 4);
        if (first_row < rows) places[place] = sums[i / 2][i % 2 * 2];
        if (first_row + 1 < rows) places[place + TILE_OUTPUTS] = sums[i / 2][i % 2 * 2 + 1];
    }
}

// The sum of a row and output over all ranges of K.
__device__ __forceinline__ float sum_ranges(const float* from, int ranges, int stride) {
    float sum = 0.0f;
#pragma unroll 1
    for (int first = 0; first < ranges; first += RANGES_OF_SUM) {
        float part = 0.0f;
#pragma unroll
        for (int i = 0; i < RANGES_OF_SUM; ++i) {
            if (first + i < ranges) part += from[(first + i) * stride];
        }
        sum += part;
    }
    return sum;
}

// Joins and stores the sums of up to 8 rows of `tiles` items, of the rows from `first_row` on.
__device__ __forceinline__ void store_tiles(const LinearArgs& args, const float* sums, int item,
                                            int tiles, int first_row, int rows, int warp, int lane,
                                            int ranges) {
    const int sum_floats = rows * TILE_OUTPUTS;
    int tile = 0;
    int row = warp;
#pragma unroll 1
    while (true) {
        for (; row >= rows; row -= rows) ++tile;
        if (tile >= tiles) return;
        const float* from = sums + tile * ranges * sum_floats + sum_place(row, lane);
        const float sum = sum_ranges(from, ranges, sum_floats);
        const LinearMatrix& target = args.matrices[matrix_of(args, item + tile)];
        const int output = (item + tile - target.first_item) * TILE_OUTPUTS + lane;
        store(args, target, first_row + row, output, sum);
        row += ranges;
    }
}

// Copies a warp's range and units of some of the matrices to shared memory.
__device__ __forceinline__ void load_tables(const LinearArgs& args, int first, int last, int warp,
                                            int lane, int ranges, Unit* units, WarpRange* own) {
#pragma unroll 1
    for (int i = first; i <= last; ++i) {
        const uint4* table = args.matrices[i].matrix.range_table;
        const uint2* from =
            reinterpret_cast<const uint2*>(table + ranges) + warp * args.range_blocks;
        uint2* to = reinterpret_cast<uint2*>(units + i * args.range_blocks);
        if (lane == 0) *reinterpret_cast<uint4*>(own + i) = __ldg(table + warp);
#pragma unroll 1
        for (int unit = lane; unit < args.range_blocks; unit += WARP_LANES) {
            to[unit] = __ldg(from + unit);
        }
    }
    __syncwarp();
}

template <int ROW_TILES>
__device__ __forceinline__ void clear(Sums<ROW_TILES>& sums) {
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[tile][i / 4][i % 4] = 0.0f;
    }
}

// The sums of one tile over a warp's range, of blocks `begin..end`, whose units end at `units_end`.
// Activations are there if all of the range fit into the warp's `places`; else they are copied, as many
// blocks at a time as do.
template <int ROW_TILES>
__device__ __forceinline__ void multiply_tile(Stream<ROW_TILES>& stream, const LinearArgs& args,
                                              const LinearMatrix& target, const Unit* unit,
                                              const Unit* units_end, const char* x_lane,
                                              char* places, int begin, int end) {
    const int lane = stream.lane;
    const bool is_exl2 = target.matrix.encoding == ENCODING_EXL2;
    stream.x.next = x_lane;
    int block = begin;
    clear<ROW_TILES>(stream.sums);
    clear<ROW_TILES>(stream.part);
    int room = args.x_blocks >= end - begin ? end - begin : 0;
#pragma unroll 1
    while (unit != units_end) {
        const uint32_t run = unit->shape & SHAPE_OF_RUN;
        const int run_blocks = blocks_of(run);
        if (room < run_blocks) {
            room = min(args.x_blocks, end - block);
            fill_rows(args, target.x, lane, block, room, places);
            stream.x.next = x_lane;
        }
        const Unit* run_end = unit;
#pragma unroll 1
        do {
            ++run_end;
            room -= run_blocks;
            block += run_blocks;
        } while (run_end != units_end && (run_end->shape & SHAPE_OF_RUN) == run &&
                 room >= run_blocks);
        stream.multiply(unit, run_end, is_exl2);
        unit = run_end;
    }
}

template <int ROW_TILES>
__device__ __forceinline__ void linear(const LinearArgs& args) {
    constexpr int RING = SLOTS * SLOT_BYTES;
    extern __shared__ __align__(128) char shared[];
    __shared__ __align__(16) WarpRange all_ranges[MOST_WARPS][MOST_MATRICES];
    dependency_trigger();
    const int warp = warp_number();
    const int lane = lane_number();
    const int ranges = 1 << args.ranges_shift;
    const int rows = args.rows;
    const int begin = args.blocks * warp >> args.ranges_shift;
    const int end = args.blocks * (warp + 1) >> args.ranges_shift;
    const int first_item = args.items * int(blockIdx.x) / int(gridDim.x);
    const int item_end = args.items * int(blockIdx.x + 1) / int(gridDim.x);

    const int block_bytes = rows * BLOCK_INPUTS * int(sizeof(__half));
    char* ring = shared + warp * RING;
    char* places = shared + ranges * RING + warp * args.x_blocks * block_bytes;
    const int sum_floats = min(rows, ROWS_OF_TILE) * TILE_OUTPUTS;
    float* all_sums =
        reinterpret_cast<float*>(shared + ranges * (RING + args.x_blocks * block_bytes));
    const int own_units = args.matrix_count * args.range_blocks;
    Unit* units =
        reinterpret_cast<Unit*>(all_sums + args.tile_buffers * ranges * sum_floats) +
        warp * own_units;
    int index = matrix_of(args, first_item);
    const int last_index = matrix_of(args, item_end - 1);
    load_tables(args, index, last_index, warp, lane, ranges, units, all_ranges[warp]);

    const int lane_row = min(lane / 4, rows - 1) * 64;
    const int second_row = min(lane / 4 + ROWS_OF_TILE, rows - 1) * 64;
    const char* x_lane = places + lane_row + lane % 4 * 16;
    Stream<ROW_TILES> stream = {args, ring, units, all_ranges[warp], lane, item_end, {}, 0, {}, {}, {}};
    stream.x = {x_lane, block_bytes, second_row - lane_row};
    stream.cursor.slot = 0;
    stream.cursor.item = first_item;
    stream.cursor.index = index;
    stream.cursor.begin_matrix(args, all_ranges[warp][index], units, item_end, lane);
#pragma unroll 1
    for (int i = 0; i < SLOTS; ++i) stream.copy_next();
    dependency_wait();

    const bool fits = args.x_blocks >= end - begin;
    // The activations of the whole range that are there.
    const __half* x_source = nullptr;
    float* own_sums = all_sums + warp * sum_floats;
    int buffer = 0;
#pragma unroll 1
    for (int item = first_item; item < item_end;) {
        const LinearMatrix& target = args.matrices[index];
        const int matrix_end = target.first_item + target.matrix.tiles;
        const Unit* unit = units + index * args.range_blocks;
        const Unit* units_end = unit + all_ranges[warp][index].units;
        if (fits && x_source != target.x) {
            x_source = target.x;
            fill_rows(args, x_source, lane, begin, end - begin, places);
        }
        multiply_tile<ROW_TILES>(stream, args, target, unit, units_end, x_lane, places, begin, end);

        ++item;
        if constexpr (ROW_TILES == 1) {
            put_row_tile(stream.sums[0], lane, rows, own_sums + buffer * ranges * sum_floats);
            if (++buffer == args.tile_buffers || item == item_end) {
                __syncthreads();
                store_tiles(args, all_sums, item - buffer, buffer, 0, rows, warp, lane, ranges);
                if (item < item_end) __syncthreads();
                buffer = 0;
            }
        } else {
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; ++tile) {
                const int first_row = tile * ROWS_OF_TILE;
                const int tile_rows = min(rows - first_row, ROWS_OF_TILE);
                float* own = all_sums + warp * tile_rows * TILE_OUTPUTS;
                put_row_tile(stream.sums[tile], lane, tile_rows, own);
                __syncthreads();
                store_tiles(args, all_sums, item - 1, 1, first_row, tile_rows, warp, lane, ranges);
                __syncthreads();
            }
        }
        if (item == matrix_end) ++index;
    }
}

}  // namespace oxl

// Up to 8 rows.
extern "C" __global__ void __launch_bounds__(512, 1)
    oxl_linear_8(const __grid_constant__ LinearArgs args) {
    oxl::linear<1>(args);
}

// Up to 16 rows.
extern "C" __global__ void __launch_bounds__(512, 1)
    oxl_linear_16(const __grid_constant__ LinearArgs args) {
    oxl::linear<2>(args);
}
