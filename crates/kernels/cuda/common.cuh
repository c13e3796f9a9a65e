// What every unit needs: integer types under NVRTC, programmatic dependent launch.
#pragma once

#if defined(__CUDACC_RTC__)
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <stdint.h>
#endif

#include <cuda_fp16.h>

namespace oxl {

constexpr int WARP_LANES = 32;

// Tokens of one cache page; `oxllama_backend::PAGE_TOKENS`.
constexpr int PAGE_TOKENS = 256;

// Where something lies in shared memory, as instructions on it take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return uint32_t(__cvta_generic_to_shared(pointer));
}

// Waits until the kernels that this one depends on have finished and their writes are visible.
// Every thread that reads or writes what another kernel of the step touches calls it before.
// What no kernel writes during a step (weights) may be read earlier.
__device__ __forceinline__ void dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start as soon as every block of this one has come here (or
// ended); its own `dependency_wait` still waits for this kernel's end.
__device__ __forceinline__ void dependency_trigger() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace oxl
