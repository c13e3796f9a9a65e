// The block that runs: what its threads show each other, and their copies.
#include <cuda_fp16.h>
#include <stdio.h>
#include <stdlib.h>

#include <deque>
#include <unordered_map>
#include <vector>

emulated::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

int thread;
int cta;
uint8_t* dynamic_shared;

namespace {

constexpr int MOST_WARPS = MOST_CLUSTER_THREADS / LANES;

struct Warp {
    // In turns: a lane may show its next words while others still look at the last ones.
    uint32_t words[2][LANES][MOST_WORDS];
    double products[LANES][4];
    // What the products are of, by the lanes' `times`.
    uint32_t multiplied;
};

Warp warps[MOST_WARPS];
// How often a thread has shown something: its words go to one of two places in turn.
uint32_t times[MOST_CLUSTER_THREADS];

struct Copy {
    uint32_t to;
    int bytes;
    int read_bytes;
    const void* from;
};

// What a thread has started, in groups, the one that has not ended last.
template <typename Work>
struct Groups {
    std::vector<std::vector<Work>> ended;
    std::vector<Work> current;

    void end() {
        ended.push_back(std::move(current));
        current.clear();
    }

    // Does all but the last `pending` groups that have ended.
    template <typename Do>
    void wait(int pending, Do work) {
        const int done = int(ended.size()) - pending;
        if (done <= 0) return;
        for (int i = 0; i < done; ++i) {
            for (Work& one : ended[i]) work(one);
        }
        ended.erase(ended.begin(), ended.begin() + done);
    }

    void clear() {
        ended.clear();
        current.clear();
    }
};

Groups<Copy> copies[MOST_CLUSTER_THREADS];

// Blocks of a cluster.
constexpr int MOST_CTAS = 8;

// Eight bytes of shared memory.
struct Barrier {
    uint16_t left;
    uint16_t arrivals : 15;
    uint16_t phase : 1;
    int32_t bytes;

    void look() {
        if (left != 0 || bytes != 0) return;
        left = arrivals;
        phase ^= 1;
    }
};
static_assert(sizeof(Barrier) == 8, "as kernels count on");

// Of each block, in the order in which it has made them.
std::vector<Barrier*> barriers[MOST_CTAS];

// Where dynamic shared memory of each block is.
uint8_t* dynamic_of[MOST_CTAS];

struct BulkCopy {
    uint8_t* to;
    const void* from;  // null: what was sent
    uint32_t bytes;
    Barrier* barrier;
    uint8_t sent[16];

    void make() {
        memcpy(to, from == nullptr ? sent : from, bytes);
        barrier->bytes -= int32_t(bytes);
        barrier->look();
    }
};

// By the barrier that they count at, in the order in which they were started.
std::unordered_map<const Barrier*, std::deque<BulkCopy>> bulk_copies;

// Whether what is sent arrives at once.
bool arrives_at_once;

// A block of the cluster in an address there.
constexpr int RANK_BIT = 24;

// A lane's part of a group's product: rows g and g + 8 of the warp's 16.
struct GroupPart {
    float* sums;
    int width;
    float a[2][16];
    uint64_t shared_a;
    uint64_t b;
    bool is_shared_a, is_columns, adds;
};

Groups<GroupPart> products[MOST_CLUSTER_THREADS];

[[noreturn]] void fail(const char* what) {
    fprintf(stderr, "%s: thread %d of block %u\n", what, thread, blockIdx.x);
    abort();
}

// What addresses of shared memory count from: static shared memory is the library's.
uint8_t anchor;

Warp& own_warp() { return warps[thread / LANES]; }

// What the warp has shown last.
const uint32_t (*last_shown())[MOST_WORDS] { return own_warp().words[(times[thread] - 1) % 2]; }

// Whether the thread is the first of its warp to come here since the warp has shown something.
bool is_first(Warp& warp) {
    const bool is_new = warp.multiplied != times[thread];
    warp.multiplied = times[thread];
    return is_new;
}

const float* make_half_values() {
    float* values = static_cast<float*>(malloc(65536 * sizeof(float)));
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const uint32_t exponent = bits >> 10 & 31;
        const uint32_t mantissa = bits & 1023;
        float x = exponent == 0    ? ldexpf(float(mantissa), -24)
                  : exponent == 31 ? (mantissa == 0 ? INFINITY : NAN)
                                   : ldexpf(float(1024 + mantissa), int(exponent) - 25);
        values[bits] = bits & 0x8000 ? -x : x;
    }
    return values;
}

}  // namespace

const float* const half_values = make_half_values();

Shown show(Meeting meeting, const uint32_t* words, int count) {
    uint32_t(*shown)[MOST_WORDS] = own_warp().words[times[thread] % 2];
    ++times[thread];
    memcpy(shown[lane()], words, count * sizeof(uint32_t));
    oxl_emulated_meet(meeting);
    return {shown};
}

// The lane that goes on first multiplies for all.
const double* product() {
    Warp& warp = own_warp();
    if (is_first(warp)) {
        const auto words = last_shown();
        const auto value = [](uint32_t word, int i) {
            return half_values[word >> (16 * i) & 0xffff];
        };
        float a[16][16], b[8][16];
        for (int l = 0; l < LANES; ++l) {
            const int g = l / 4;
            for (int i = 0; i < 2; ++i) {
                const int k = 2 * (l % 4) + i;
                a[g][k] = value(words[l][0], i);
                a[g + 8][k] = value(words[l][1], i);
                a[g][k + 8] = value(words[l][2], i);
                a[g + 8][k + 8] = value(words[l][3], i);
                b[g][k] = value(words[l][4], i);
                b[g][k + 8] = value(words[l][5], i);
            }
        }
        for (int l = 0; l < LANES; ++l) {
            for (int i = 0; i < 4; ++i) {
                const float* row = a[l / 4 + i / 2 * 8];
                const float* column = b[2 * (l % 4) + i % 2];
                double sum = 0.0;
                for (int k = 0; k < 16; ++k) sum += double(row[k]) * double(column[k]);
                warp.products[l][i] = sum;
            }
        }
    }
    return warp.products[lane()];
}

uint8_t* shared_at(uint32_t address) {
    if (address < (1u << 30)) return dynamic_shared + address;
    return &anchor + int32_t(address << 2) / 4;
}

uint32_t shared_address_of(const void* pointer) {
    const auto* at = static_cast<const uint8_t*>(pointer);
    const ptrdiff_t offset = at - dynamic_shared;
    if (offset >= 0 && offset < (1 << 20)) return uint32_t(offset);
    const ptrdiff_t distance = at - &anchor;
    return (uint32_t(distance) & ((1u << 30) - 1)) | 1u << 30;
}

void start_copy(uint32_t to, const void* from, int bytes, int read_bytes) {
    copies[thread].current.push_back({to, bytes, read_bytes, from});
}

void end_group() { copies[thread].end(); }

void wait_for_groups(int pending) {
    copies[thread].wait(pending, [](const Copy& copy) {
        uint8_t* to = shared_at(copy.to);
        if (uintptr_t(to) % copy.bytes != 0 || uintptr_t(copy.from) % copy.bytes != 0) {
            fail("a copy that is not aligned");
        }
        memset(to, 0, copy.bytes);
        memcpy(to, copy.from, copy.read_bytes);
    });
}

namespace {

Barrier& own_barrier(uint32_t barrier) {
    uint8_t* at = shared_at(barrier);
    if (uintptr_t(at) % sizeof(Barrier) != 0) fail("a barrier that is not aligned");
    return *reinterpret_cast<Barrier*>(at);
}

Barrier& barrier_of(uint32_t barrier, int rank) {
    Barrier& own = own_barrier(barrier);
    if (rank == cta) return own;
    for (size_t i = 0; i < barriers[cta].size(); ++i) {
        if (barriers[cta][i] == &own && i < barriers[rank].size()) return *barriers[rank][i];
    }
    fail("a barrier that was not made");
}

// A half at an address that a descriptor and a place make: 16-byte pieces are permuted by the rows' numbers.
float half_at(uint64_t descriptor, uint32_t place) {
    const uint32_t linear = uint32_t(descriptor & 0x3fff) * 16 + place;
    uint16_t bits;
    memcpy(&bits, shared_at(linear ^ (linear >> 7 & 7) << 4), sizeof(bits));
    return half_values[bits];
}

// Of rows of 64 inputs, eight after each other.
float half_of_row(uint64_t descriptor, int row, int k) {
    return half_at(descriptor, row / 8 * 1024 + row % 8 * 128 + k * 2);
}

// Of rows that are inputs, of 64 columns each.
float half_of_column(uint64_t descriptor, int column, int k) {
    const uint32_t columns_bytes = uint32_t(descriptor >> 16 & 0x3fff) * 16;
    return half_at(descriptor, column / 64 * columns_bytes + k / 8 * 1024 + k % 8 * 128 + column % 64 * 2);
}

void multiply_part(GroupPart& part) {
    const int g = lane() / 4;
    const int t = lane() % 4;
    if (part.is_shared_a) {
        const int first = thread / LANES % 4 * 16 + g;
        for (int i = 0; i < 2; ++i) {
            for (int k = 0; k < 16; ++k) part.a[i][k] = half_of_row(part.shared_a, first + 8 * i, k);
        }
    }
    for (int column = 0; column < part.width; column += 8) {
        for (int i = 0; i < 2; ++i) {
            float b[16];
            for (int k = 0; k < 16; ++k) {
                const int own = column + 2 * t + i;
                b[k] = part.is_columns ? half_of_column(part.b, own, k) : half_of_row(part.b, own, k);
            }
            for (int row = 0; row < 2; ++row) {
                double sum = 0.0;
                for (int k = 0; k < 16; ++k) sum += double(part.a[row][k]) * double(b[k]);
                float& to = part.sums[column / 2 + 2 * row + i];
                to = float((part.adds ? double(to) : 0.0) + sum);
            }
        }
    }
}

}  // namespace

void make_barrier(uint32_t barrier, int arrivals) {
    Barrier& made = own_barrier(barrier);
    made = {uint16_t(arrivals), uint16_t(arrivals), 0, 0};
    barriers[cta].push_back(&made);
}

void arrive(uint32_t barrier, int rank, uint32_t announced_bytes) {
    Barrier& found = barrier_of(barrier, rank);
    if (found.left == 0) fail("one too many at a barrier");
    found.bytes += int32_t(announced_bytes);
    --found.left;
    found.look();
}

bool has_passed(uint32_t barrier, uint32_t parity) {
    Barrier& own = own_barrier(barrier);
    std::deque<BulkCopy>& copies = bulk_copies[&own];
    while (!copies.empty() && own.phase == parity) {
        BulkCopy copy = copies.front();
        copies.pop_front();
        copy.make();
    }
    return own.phase != parity;
}

void start_bulk_copy(int rank, uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    if ((to | bytes | uint32_t(uintptr_t(from))) % 16 != 0) fail("a copy that is not aligned");
    Barrier& there = barrier_of(barrier, rank);
    bulk_copies[&there].push_back({dynamic_of[rank] + to, from, bytes, &there, {}});
}

uint32_t cluster_address_of(uint32_t address, int rank) {
    if (address >= 1u << RANK_BIT) fail("an address in a cluster of what is no dynamic shared memory");
    return address | uint32_t(rank) << RANK_BIT;
}

void start_send(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    const auto at = [](uint32_t address) {
        return dynamic_of[address >> RANK_BIT] + (address & ((1u << RANK_BIT) - 1));
    };
    if (to % bytes != 0 || barrier % sizeof(Barrier) != 0) fail("something sent that is not aligned");
    if (to >> RANK_BIT != barrier >> RANK_BIT) fail("something sent to one block and counted in another");
    BulkCopy copy = {at(to), nullptr, bytes, reinterpret_cast<Barrier*>(at(barrier)), {}};
    memcpy(copy.sent, from, bytes);
    if (arrives_at_once) {
        copy.make();
    } else {
        bulk_copies[copy.barrier].push_back(copy);
    }
}

void start_product(float* sums, int width, const uint32_t (&a)[4], uint64_t b, bool is_columns, bool adds) {
    const Shown shown = show(PRODUCT, a, 4);
    GroupPart part = {sums, width, {}, 0, b, false, is_columns, adds};
    for (int t = 0; t < 4; ++t) {
        const uint32_t* words = shown.of(lane() / 4 * 4 + t);
        for (int i = 0; i < 4; ++i) {
            for (int j = 0; j < 2; ++j) {
                part.a[i % 2][2 * t + j + i / 2 * 8] = half_values[words[i] >> (16 * j) & 0xffff];
            }
        }
    }
    products[thread].current.push_back(part);
}

void start_shared_product(float* sums, int width, uint64_t a, uint64_t b, bool adds) {
    products[thread].current.push_back({sums, width, {}, a, b, true, false, adds});
}

void end_products() { products[thread].end(); }

void wait_for_products(int pending) { products[thread].wait(pending, multiply_part); }

}  // namespace emulated

// Begins a cluster's blocks, which mostly is one: `block` is the first. `at_once`: what one sends another arrives as early
// as it may, instead of as late.
extern "C" void oxl_emulated_begin(const uint32_t* grid, const uint32_t* extent, const uint32_t* block,
                                   uint8_t* const* shared, int32_t ctas, bool at_once) {
    using namespace emulated;
    arrives_at_once = at_once;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {extent[0], extent[1], extent[2]};
    blockIdx = {block[0], block[1], block[2]};
    bulk_copies.clear();
    for (int i = 0; i < ctas; ++i) {
        dynamic_of[i] = shared[i];
        barriers[i].clear();
    }
    cta = 0;
    dynamic_shared = dynamic_of[0];
    const int threads = ctas * int(extent[0] * extent[1] * extent[2]);
    for (int i = 0; i < threads; ++i) {
        times[i] = 0;
        warps[i / LANES].multiplied = 0;
        copies[i].clear();
        products[i].clear();
    }
}

// Makes a thread the one that runs, by its number in the cluster.
extern "C" void oxl_emulated_enter(int32_t thread) {
    using namespace emulated;
    const uint32_t block_threads = blockDim.x * blockDim.y * blockDim.z;
    const uint32_t number = uint32_t(thread) % block_threads;
    const int own_cta = int(uint32_t(thread) / block_threads);
    if (own_cta != cta) {
        blockIdx.x += uint32_t(own_cta - cta);
        cta = own_cta;
        dynamic_shared = dynamic_of[cta];
    }
    emulated::thread = thread;
    threadIdx = {number % blockDim.x, number / blockDim.x % blockDim.y, number / (blockDim.x * blockDim.y)};
}
