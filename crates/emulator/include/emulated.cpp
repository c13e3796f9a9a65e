// The block that runs: what its threads show each other, and their copies.
#include <cuda_fp16.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

emulated::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

int thread;
uint8_t* dynamic_shared;

namespace {

constexpr int MOST_WARPS = MOST_THREADS / LANES;

struct Warp {
    // In turns: a lane may show its next words while others still look at the last ones.
    uint32_t words[2][LANES][MOST_WORDS];
    double products[LANES][4];
    // What the products are of, by the lanes' `times`.
    uint32_t multiplied;
};

Warp warps[MOST_WARPS];
// How often a thread has shown something: its words go to one of two places in turn.
uint32_t times[MOST_THREADS];

struct Copy {
    uint32_t to;
    int bytes;
    int read_bytes;
    const void* from;
};

// A thread's copies in groups, the one that has not ended last.
struct Copies {
    std::vector<std::vector<Copy>> ended;
    std::vector<Copy> current;
};

Copies copies[MOST_THREADS];

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

void end_group() {
    Copies& own = copies[thread];
    own.ended.push_back(std::move(own.current));
    own.current.clear();
}

void wait_for_groups(int pending) {
    auto& ended = copies[thread].ended;
    const int done = int(ended.size()) - pending;
    if (done <= 0) return;
    for (int i = 0; i < done; ++i) {
        for (const Copy& copy : ended[i]) {
            uint8_t* to = shared_at(copy.to);
            if (uintptr_t(to) % copy.bytes != 0 || uintptr_t(copy.from) % copy.bytes != 0) {
                fprintf(stderr, "a copy of %d bytes to %p from %p\n", copy.bytes, to, copy.from);
                abort();
            }
            memset(to, 0, copy.bytes);
            memcpy(to, copy.from, copy.read_bytes);
        }
    }
    ended.erase(ended.begin(), ended.begin() + done);
}

}  // namespace emulated

// Begins a block.
extern "C" void oxl_emulated_begin(const uint32_t* grid, const uint32_t* extent, const uint32_t* block,
                                   uint8_t* shared) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {extent[0], extent[1], extent[2]};
    blockIdx = {block[0], block[1], block[2]};
    emulated::dynamic_shared = shared;
    const int threads = int(extent[0] * extent[1] * extent[2]);
    for (int i = 0; i < threads; ++i) {
        emulated::times[i] = 0;
        emulated::warps[i / emulated::LANES].multiplied = 0;
        emulated::copies[i].ended.clear();
        emulated::copies[i].current.clear();
    }
}

// Makes a thread the one that runs.
extern "C" void oxl_emulated_enter(int32_t thread) {
    emulated::thread = thread;
    const uint32_t number = uint32_t(thread);
    threadIdx = {number % blockDim.x, number / blockDim.x % blockDim.y,
                 number / (blockDim.x * blockDim.y)};
}
