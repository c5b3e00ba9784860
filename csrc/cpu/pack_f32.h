// The panel of the kernels that multiply floats: [unit][row][528], each row's 512 columns in the kernels' order.
//
// The 16 spare floats keep rows 2112 bytes apart: at 2048, a column of many rows would fall into two cache sets.
#pragma once
#include <cstring>

#include "../floats.h"
#include "backend.h"

namespace trak_fast {
namespace {

constexpr int64_t kPanelRow = kUnit + 16;

// Writes one unit's columns to a panel row. Rademacher: in the order (t, word, bit), so that a word's bits meet them
// one after the other. Normal: in their natural order.
template <Kind kind>
void pack_f32(const Pack& p) {
  float* out = static_cast<float*>(p.panel) + (p.unit * p.batch + p.row) * kPanelRow;
  float floats[kUnit];
  const auto* x = static_cast<const float*>(p.columns);
  if (p.raw_bf16) {
    const auto* raw = static_cast<const uint16_t*>(p.columns);
    for (int64_t j = 0; j < kUnit; ++j) floats[j] = bf16_to_float(raw[j]);
    x = floats;
  }
  if constexpr (kind == Kind::normal) {
    std::memcpy(out, x, kUnit * sizeof(float));
  } else {
    for (int64_t v = 0; v < 4; ++v) {
      for (int64_t t = 0; t < 4; ++t) {
        for (int64_t e = 0; e < 2; ++e) {
          for (int64_t n = 0; n < 16; ++n) out[128 * t + 32 * v + 16 * e + n] = x[128 * v + 8 * n + 2 * t + e];
        }
      }
    }
  }
}

}  // namespace
}  // namespace trak_fast
