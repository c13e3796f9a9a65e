// What every unit needs: integer types under NVRTC, and what C++ has no words for.
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

#include "ptx.cuh"

namespace oxl {

constexpr int WARP_LANES = 32;

// Tokens of one cache page; `oxllama_backend::PAGE_TOKENS`.
constexpr int PAGE_TOKENS = 256;

}  // namespace oxl
