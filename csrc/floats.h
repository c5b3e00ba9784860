// Conversions between float and the 16-bit formats, and the division that rounds up, for host and device.
//
// Files compiled for different instruction sets include this header: everything in it has internal linkage and uses no
// template of the standard library, so that no code made for a newer processor is linked into a caller for an older.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TRAK_FAST_HOST_DEVICE __host__ __device__ static inline
#else
#define TRAK_FAST_HOST_DEVICE static inline
#endif

namespace trak_fast {

// a / b, rounded up.
TRAK_FAST_HOST_DEVICE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

TRAK_FAST_HOST_DEVICE float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

TRAK_FAST_HOST_DEVICE uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

TRAK_FAST_HOST_DEVICE float bf16_to_float(uint16_t x) { return float_from_bits(static_cast<uint32_t>(x) << 16); }

// Converts fp16. Selects instead of branches let it vectorise; it is exact for subnormal numbers whatever the
// processor's rounding flags say.
TRAK_FAST_HOST_DEVICE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7FFF;
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24F;
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7C00 ? 0x70000000U : 0x38000000U);
  return float_from_bits(sign | (magnitude < 0x400 ? bits_of_float(small) : normal));
}

// Returns the nearest bf16, ties to even; NaN stays NaN, and a finite value never becomes infinite.
TRAK_FAST_HOST_DEVICE uint16_t nearest_bf16(float x) {
  const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return 0x7FC0;
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const bool overflowed = (rounded & 0x7FFF) == 0x7F80 && magnitude != 0x7F800000;
  return static_cast<uint16_t>(overflowed ? rounded - 1 : rounded);
}

}  // namespace trak_fast
