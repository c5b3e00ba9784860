// Any processor: vectors of four floats as GCC and Clang offer them everywhere (NEON on arm64, SSE2 on x86-64), and
// multiplication for both kinds.
#include "../normal_table.h"
#include "fma_kernel.h"

namespace trak_fast {
namespace {

struct Portable {
  static constexpr int kLanes = 4;
  static constexpr int kFmaBatch = 6;
  using Wide = uint64_t __attribute__((vector_size(16)));
  using Words = uint32_t __attribute__((vector_size(16)));
  using Floats = float __attribute__((vector_size(16)));

  static TRAK_FAST_INLINE Wide wide(uint64_t x) { return Wide{x, x}; }
  static TRAK_FAST_INLINE Wide wide_rows(uint32_t first) { return Wide{first, first + 2}; }
  static TRAK_FAST_INLINE Wide in_register(Wide x) { return x; }
  static TRAK_FAST_INLINE Wide multiply(Wide a, Wide b) { return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF); }
  static TRAK_FAST_INLINE Wide xor2(Wide a, Wide b) { return a ^ b; }
  static TRAK_FAST_INLINE Wide xor3(Wide a, Wide b, Wide c) { return a ^ b ^ c; }
  static TRAK_FAST_INLINE Wide high(Wide product) { return product >> 32; }
  static TRAK_FAST_INLINE Wide high_too(Wide product) { return product >> 32; }
  static TRAK_FAST_INLINE Words interleave(Wide even, Wide odd) {
    return Words{static_cast<uint32_t>(even[0]), static_cast<uint32_t>(odd[0]), static_cast<uint32_t>(even[1]),
                 static_cast<uint32_t>(odd[1])};
  }

  static TRAK_FAST_INLINE Floats zero() { return Floats{}; }
  static TRAK_FAST_INLINE Floats set(float x) { return Floats{x, x, x, x}; }
  static TRAK_FAST_INLINE Floats load(const float* p) {
    Floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static TRAK_FAST_INLINE void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
  static TRAK_FAST_INLINE Floats add(Floats a, Floats b) { return a + b; }
  static TRAK_FAST_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

  static TRAK_FAST_INLINE Floats sign_of_bit(Words words, int bit) {
    const Words x = (words << (31 - bit) & 0x80000000) ^ 0x3F800000;
    Floats sign;
    std::memcpy(&sign, &x, sizeof sign);
    return sign;
  }
  static TRAK_FAST_INLINE void normal(Words words, const uint16_t* half, Floats& even, Floats& odd) {
    float entries[2][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      entries[0][i] = bf16_to_float(normal_bits(half, words[i] & 0xFFFF));
      entries[1][i] = bf16_to_float(normal_bits(half, words[i] >> 16));
    }
    even = load(entries[0]);
    odd = load(entries[1]);
  }
};

template <Kind kind>
constexpr Kernel make_kernel() {
  return {false, 1, kPanelRow * 4, 4, 1, pack_f32<kind>, FmaKernel<Portable, kind>::multiply};
}

const Kernel kernels[2] = {make_kernel<Kind::rademacher>(), make_kernel<Kind::normal>()};

const Kernel& kernel(Kind kind, int) { return kernels[static_cast<int>(kind)]; }

}  // namespace

extern const Backend portable_backend;
const Backend portable_backend = {"portable", kernel};

}  // namespace trak_fast
