// The host twins of ptx.cuh: each function does what the PTX ISA says of its instruction, on the emulated GPU of
// emulator.h.
#pragma once
#include "cuda.h"
#include "cuda_runtime.h"
#include "emulator.h"

namespace trak_fast {
namespace ptx {

using TensorMap = CUtensorMap;

inline char* dynamic_shared() { return emulator::shared_memory(); }
inline uint32_t shared_address(const void* p) { return emulator::shared_address(p); }

// Registers and bits -------------------------------------------------------------------------------------------------

inline uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) { return (a & b) ^ c; }
inline uint32_t opaque(uint32_t x) { return x; }
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (nibble & 7)) & 0xFF;
    if ((nibble & 8) != 0) byte = (byte & 0x80) != 0 ? 0xFF : 0;
    d |= byte << 8 * i;
  }
  return d;
}

inline uint32_t round_to_bf16(float a, float b) {
  const auto round = [](float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  };
  return round(a) | round(b) << 16;
}

inline void halves_to_floats(float& low, float& high, uint32_t pair) {
  low = emulator::bf16_or_fp16_to_float(false, pair & 0xFFFF);
  high = emulator::bf16_or_fp16_to_float(false, pair >> 16);
}

// Barriers -----------------------------------------------------------------------------------------------------------

inline void block_barrier() { emulator::meet_block(); }
inline void mbarrier_init(uint64_t* barrier, int arrivals) { emulator::mbarrier_init(barrier, arrivals); }
inline void fence_mbarrier_init() { emulator::mbarrier_fence(); }
inline void mbarrier_arrive(uint64_t* barrier) { emulator::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) { emulator::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) { emulator::mbarrier_wait(barrier, parity); }
inline void mbarrier_wait_or_fail(uint64_t* barrier, uint32_t parity) { emulator::mbarrier_wait(barrier, parity); }

// Copies to shared memory --------------------------------------------------------------------------------------------

inline void cp_async_16(void* shared, const void* global, int valid) {
  emulator::copy_async(shared, global, 16, valid);
}
template <int bytes>
void cp_async_narrow(void* shared, const void* global, int valid) {
  static_assert(bytes == 4 || bytes == 8, "16 bytes have an instruction of their own");
  emulator::copy_async(shared, global, bytes, valid);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int n>
void cp_async_wait() {
  emulator::wait_copies(n);
}
inline void prefetch_tensor_map(const TensorMap*) {}
inline void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int32_t x, int32_t y) {
  emulator::load_box(shared, map, barrier, x, y);
}

// mma.sync -----------------------------------------------------------------------------------------------------------

inline void ldmatrix_x4(uint32_t (&d)[4], const void* shared_row) {
  struct Operands {
    uint32_t* d;
    const void* row;
  } mine{d, shared_row};
  emulator::check_shared(shared_row, 16, 16, "ldmatrix");
  emulator::meet_warp("ldmatrix", &mine, [](void* const* lanes) {
    const auto of = [&](int lane) { return static_cast<Operands*>(lanes[lane]); };
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto* row = static_cast<const char*>(of(8 * matrix + lane / 4)->row);
        std::memcpy(&of(lane)->d[matrix], row + lane % 4 * 4, 4);
      }
    }
  });
}

inline uint32_t movmatrix_trans(uint32_t a) {
  struct Operands {
    uint32_t a, d;
  } mine{a, 0};
  emulator::meet_warp("movmatrix", &mine, [](void* const* lanes) {
    const auto of = [&](int lane) { return static_cast<Operands*>(lanes[lane]); };
    const auto element = [&](int row, int column) { return of(row * 4 + column / 2)->a >> column % 2 * 16 & 0xFFFF; };
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      of(lane)->d = element(column, row) | element(column + 1, row) << 16;
    }
  });
  return mine.d;
}

// Lane l has, with t = l % 4:
//   a: columns 2t, 2t + 1 of row l / 4, the same columns of row l / 4 + 8, then columns 2t + 8, 2t + 9 of both rows;
//   b: rows (k) 2t, 2t + 1 of column l / 4, then rows 2t + 8, 2t + 9;
//   d: columns 2t, 2t + 1 of row l / 4, then of row l / 4 + 8.
template <bool bf16>
void mma_m16n8k16(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  emulator::meet_warp(bf16 ? "mma bf16" : "mma fp16", &mine, [](void* const* lanes) {
    const auto of = [&](int lane) { return static_cast<Operands*>(lanes[lane]); };
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const int half = i % 2 * 16;
        a[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] =
            emulator::bf16_or_fp16_to_float(bf16, of(lane)->a[i / 2] >> half & 0xFFFF);
        if (i < 4) {
          b[2 * t + i % 2 + i / 2 * 8][g] = emulator::bf16_or_fp16_to_float(bf16, of(lane)->b[i / 2] >> half & 0xFFFF);
        }
      }
    }
    emulator::multiply_16(16, 8, &a[0][0], &b[0][0], &c[0][0]);
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) of(lane)->d[i] += c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
  });
}

// wgmma (warpgroup) --------------------------------------------------------------------------------------------------

inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int n>
void wgmma_wait() {
  emulator::wgmma_wait(n);
}
template <int size>
void wgmma_operand(float (&)[size]) {}
inline void wgmma_operand(uint32_t (&)[4]) {}
template <int count>
void increase_registers() {
  emulator::set_registers(count);
}
template <int count>
void decrease_registers() {
  emulator::set_registers(count);
}
template <int n, bool bf16>
void wgmma_m64k16(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(n % 8 == 0 && n >= 8 && n <= 256, "no such wgmma");
  emulator::wgmma(n, bf16, d, a, b, accumulate);
}

}  // namespace ptx
}  // namespace trak_fast
