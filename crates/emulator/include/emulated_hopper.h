// What `bulk.cuh` and `group_product.cuh` have, made by hand: barriers in shared memory, copies that are made when
// somebody waits for them, clusters, and products of warp groups that are made when they are waited for.
#pragma once

#include <cuda_fp16.h>

namespace oxl {

// --- Barriers ---

inline void barrier_init(uint32_t barrier, int arrivals) { emulated::make_barrier(barrier, arrivals); }
inline void barriers_are_made() {}
inline void barrier_arrive(uint32_t barrier) { emulated::arrive(barrier, emulated::cta, 0); }
inline void barrier_expect(uint32_t barrier, uint32_t bytes) { emulated::arrive(barrier, emulated::cta, bytes); }
inline void barrier_arrive_at(uint32_t barrier, int rank) { emulated::arrive(barrier, rank, 0); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    do {
        emulated::oxl_emulated_meet(emulated::POLL);
    } while (!emulated::has_passed(barrier, parity));
}

// --- Copies and clusters ---

inline void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    emulated::start_bulk_copy(emulated::cta, to, from, bytes, barrier);
}
inline void bulk_copy_to_both(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    for (int rank = 0; rank < 2; ++rank) emulated::start_bulk_copy(rank, to, from, bytes, barrier);
}
inline uint32_t cluster_address(uint32_t address, int rank) { return emulated::cluster_address_of(address, rank); }
template <int COUNT>
inline void send_async(uint32_t to, const float (&x)[COUNT], uint32_t barrier) {
    emulated::start_send(to, x, sizeof(x), barrier);
}
inline void cluster_meet() { emulated::oxl_emulated_meet(emulated::CLUSTER); }

// --- Threads ---

inline void show_to_tensor_cores() {}
template <int REGISTERS>
inline void take_registers() {}
template <int REGISTERS>
inline void give_registers() {}
inline void meet_other_warp(int number) { emulated::oxl_emulated_meet(emulated::TWO_WARPS + number); }
inline void add_four(float* to, const float4& y) {
    to[0] += y.x;
    to[1] += y.y;
    to[2] += y.z;
    to[3] += y.w;
}

// --- Products ---

inline void group_fence() {}
inline void group_commit() { emulated::end_products(); }
template <int GROUPS>
inline void group_wait() {
    emulated::oxl_emulated_meet(emulated::WARP);
    emulated::wait_for_products(GROUPS);
}

template <int WIDTH, int B = 0>
struct GroupProduct {
    static void start(float (&sums)[WIDTH / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b,
                      bool adds) {
        const uint32_t a[] = {a0, a1, a2, a3};
        emulated::start_product(sums, WIDTH, a, b, B != 0, adds);
    }
};

inline void start_shared_product(float (&sums)[32], uint64_t a, uint64_t b, bool adds) {
    emulated::start_shared_product(sums, 64, a, b, adds);
}

}  // namespace oxl
