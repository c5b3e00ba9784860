// The backend for any processor: vectors of four floats, which GCC and Clang offer everywhere (NEON on arm64, SSE2 on
// x86-64), and multiplication for both kinds.
#include "../normal_table.h"
#include "float_backend.h"

namespace trak_fast {
namespace {

struct Portable {
  static constexpr int kLanes = 4;
  static constexpr int kFmaBatch = 4;
  // Scalars: 16-byte vectors of 64-bit lanes cannot be multiplied in one operation everywhere, and gain little where
  // they can.
  struct Wide {
    uint64_t x[2];
  };
  using Words = uint32_t __attribute__((vector_size(16)));
  using Floats = float __attribute__((vector_size(16)));

  static TRAK_FAST_INLINE Wide wide(uint64_t x) { return {{x, x}}; }
  static TRAK_FAST_INLINE Wide wide_rows(uint32_t first) { return {{first, first + 2}}; }
  static TRAK_FAST_INLINE Wide load_wide(const uint64_t* p) { return {{p[0], p[1]}}; }
  static TRAK_FAST_INLINE Wide in_register(Wide x) { return x; }
  static TRAK_FAST_INLINE Wide multiply(Wide a, Wide b) {
    return {{low(a.x[0]) * low(b.x[0]), low(a.x[1]) * low(b.x[1])}};
  }
  static TRAK_FAST_INLINE Wide xor2(Wide a, Wide b) { return {{a.x[0] ^ b.x[0], a.x[1] ^ b.x[1]}}; }
  static TRAK_FAST_INLINE Wide xor3(Wide a, Wide b, Wide c) { return xor2(xor2(a, b), c); }
  static TRAK_FAST_INLINE Wide high(Wide product) { return {{product.x[0] >> 32, product.x[1] >> 32}}; }
  static TRAK_FAST_INLINE Wide high_too(Wide product) { return high(product); }
  static TRAK_FAST_INLINE Words interleave(Wide even, Wide odd) {
    return Words{static_cast<uint32_t>(even.x[0]), static_cast<uint32_t>(odd.x[0]), static_cast<uint32_t>(even.x[1]),
                 static_cast<uint32_t>(odd.x[1])};
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

  static TRAK_FAST_INLINE Floats gather(const float* table, Words places) {
    return Floats{table[places[0]], table[places[1]], table[places[2]], table[places[3]]};
  }

  static TRAK_FAST_INLINE Floats sign_of_bit(Words words, int bit) {
    return reinterpret_cast<Floats>((words << (31 - bit) & 0x80000000) ^ 0x3F800000);
  }
  // Takes no branch on the sign, which no processor could predict.
  static TRAK_FAST_INLINE void normal(Words words, const uint16_t* half, Floats& even, Floats& odd) {
    using Halves = uint16_t __attribute__((vector_size(16)));
    const Halves u = reinterpret_cast<Halves>(words);
    const Halves positive = -(u >> 15);  // all ones where u >= 32768
    const Halves m = u ^ positive ^ 0x7FFF, sign = ~positive & 0x8000;
    const Halves bits = {half[m[0]], half[m[1]], half[m[2]], half[m[3]],
                         half[m[4]], half[m[5]], half[m[6]], half[m[7]]};
    const Words pairs = reinterpret_cast<Words>(bits ^ sign);
    even = reinterpret_cast<Floats>(pairs << 16);
    odd = reinterpret_cast<Floats>(pairs & 0xFFFF0000);
  }

 private:
  static TRAK_FAST_INLINE uint64_t low(uint64_t x) { return x & 0xFFFFFFFF; }
};

}  // namespace

extern const Backend portable_backend;
constexpr Backend portable_backend = float_backend<Portable, FmaKernel<Portable, Kind::rademacher>>("portable");

}  // namespace trak_fast
