// The kernel that multiplies, for any kind: it writes 128 columns of P for a row block as floats to the first-level
// cache and uses them for the whole batch, a few registers of rows times L::kFmaBatch gradients at a time.
#pragma once
#include "../normal_table.h"
#include "pack_f32.h"
#include "philox_rows.h"

namespace trak_fast {
namespace {

template <class L, Kind kind>
class FmaKernel {
 public:
  static constexpr bool kUsesTables = false;
  static constexpr int64_t kRowBlocks = 1;

  static void multiply(const Multiply& m) {
    alignas(64) float p[kStep][kRowBlock];
    const uint16_t* half = half_table_for(kind);
    for (int64_t r = 0; r < m.row_blocks; ++r) {
      const PhiloxRows<L> philox(kind, m.seed, m.stream, m.row + static_cast<uint32_t>(kRowBlock * r),
                                 first_block<kind>(m.unit));
      float* acc = m.acc + r * kRowBlock * m.batch;
      for (int64_t unit = 0; unit < m.units; ++unit) {
        const float* rows = static_cast<const float*>(m.panel) + unit * m.batch * kPanelRow;
        for (int step = 0; step < 4; ++step) {
          make(philox, first_block<kind>(m.unit + static_cast<uint64_t>(unit)), step, half, p);
          multiply_batch(rows + kStep * step, m.batch, p, acc);
        }
      }
    }
  }

  // Adds the sum over j of p[j][i] x[j] to acc[i], for the whole batch. x: the panel, from the step's first column on.
  static TRAK_FAST_INLINE void multiply_batch(const float* x, int64_t batch, const float (*p)[kRowBlock], float* acc) {
    int64_t b = 0;
    for (; b + L::kFmaBatch <= batch; b += L::kFmaBatch) multiply_rows<L::kFmaBatch>(x, batch, b, p, acc);
    for (; b < batch; ++b) multiply_rows<1>(x, batch, b, p, acc);
  }

 private:
  using Floats = typename L::Floats;
  static constexpr int kCalls = kStep / (4 * KindTraits<kind>::entries_per_word);  // Philox calls for a row and step
  static constexpr int kVectors = kRowBlock / L::kLanes;
  // Registers of rows: more where they are narrow, to share each gradient's load.
  static constexpr int kFmaVectors = L::kLanes < 8 ? 4 : 2;

  // Writes one step's entries as p[column in the panel's order][row].
  static void make(const PhiloxRows<L>& philox, uint64_t block, int step, const uint16_t* half, float (*p)[kRowBlock]) {
    for (int v = 0; v < kVectors; ++v) {
      for (int part = 0; part < kCalls; ++part) {
        const int call = kCalls * step + part;  // within the unit: block after block, with four values of t in each
        typename L::Words words[4];
        philox.words(static_cast<uint32_t>(block) + static_cast<uint32_t>(call / 4), static_cast<uint32_t>(call % 4), v,
                     words);
        for (int w = 0; w < 4; ++w) {
          if constexpr (kind == Kind::rademacher) {
            for (int bit = 0; bit < 32; ++bit) {
              L::store(p[32 * w + bit] + v * L::kLanes, L::sign_of_bit(words[w], bit));
            }
          } else {
            Floats even, odd;
            L::normal(words[w], half, even, odd);
            const int column = 32 * (part / 4) + 8 * w + 2 * (part % 4);
            L::store(p[column] + v * L::kLanes, even);
            L::store(p[column + 1] + v * L::kLanes, odd);
          }
        }
      }
    }
  }

  template <int kBatch>
  static TRAK_FAST_INLINE void multiply_rows(const float* x, int64_t batch, int64_t b, const float (*p)[kRowBlock],
                                             float* acc) {
    x += b * kPanelRow;
    for (int v = 0; v < kVectors; v += kFmaVectors) {
      Floats sums[kFmaVectors][kBatch];
      for (auto& row : sums) {
        for (auto& s : row) s = L::zero();
      }
      for (int64_t j = 0; j < kStep; ++j) {
#pragma GCC unroll 16
        for (int i = 0; i < kBatch; ++i) {
          const Floats g = L::set(x[i * kPanelRow + j]);
#pragma GCC unroll 4
          for (int w = 0; w < kFmaVectors; ++w) {
            sums[w][i] = L::multiply_add(L::load(p[j] + (v + w) * L::kLanes), g, sums[w][i]);
          }
        }
      }
      for (int w = 0; w < kFmaVectors; ++w) {
        for (int i = 0; i < kBatch; ++i) {
          float* a = acc + ((v + w) * batch + b + i) * L::kLanes;
          L::store(a, L::add(L::load(a), sums[w][i]));
        }
      }
    }
  }
};

}  // namespace
}  // namespace trak_fast
