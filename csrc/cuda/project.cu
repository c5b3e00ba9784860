// The CUDA projection: chooses the kernel, cuts the work and launches the pieces in order.
//
// A pass multiplies up to 256 panel rows (samples times bf16 terms) by all rows and columns of P. Each tile has some
// rows of P, a share of the columns, and sums of its own; reduce adds those up. A large tensor whose memory is a panel
// already is read in place; all others are packed, chunk by chunk, into one buffer of bounded size. The cut depends on
// the shapes and the device alone, so the same call gives the same bits.
#include <algorithm>

#include "../floats.h"
#include "../normal_table.h"
#include "../trak_fast.h"
#include "launch.cuh"
#include "panel.h"
#include "plan.h"
#include "sparse.h"
#include "tile.cuh"

namespace trak_fast {
namespace {

constexpr int64_t kPassRows = 256;  // most panel rows in a pass
// Most columns in a launch: TMA's coordinates reach no further, and the high block bits stay the same.
constexpr int64_t kSpanColumns = 1 << 30;
constexpr int kLeastUnits = 4;  // fewest units for which a split is worth starting

enum class Family { sm80, sm90, sm90_wide };

struct Name {
  const char* name;
  Family family;
};
constexpr Name kNames[] = {{"sm90", Family::sm90}, {"sm90_wide", Family::sm90_wide}, {"sm80", Family::sm80}};

#ifdef TRAK_FAST_SM90
constexpr bool kHasSm90 = true;
#else
constexpr bool kHasSm90 = false;
#endif

std::vector<Name> usable_kernels(int device) {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = device_attribute(cudaDevAttrComputeCapabilityMinor, device);
  std::vector<Name> names;
  for (const Name& candidate : kNames) {
    const bool hopper = candidate.family != Family::sm80;
    if (hopper ? kHasSm90 && major == 9 && minor == 0 : major >= 8) names.push_back(candidate);
  }
  return names;
}

Family choose_kernel(int device, const std::string& wanted) {
  std::string known;
  for (const Name& candidate : usable_kernels(device)) {
    if (wanted.empty() || wanted == candidate.name) return candidate.family;
    known += (known.empty() ? "" : ", ") + std::string(candidate.name);
  }
  if (known.empty()) {
    throw std::runtime_error("CUDA device " + std::to_string(device) +
                             " is older than compute capability 8.0, which the projection needs");
  }
  throw std::invalid_argument("CUDA kernel '" + wanted + "' is not one that device " + std::to_string(device) +
                              " can run: " + known);
}

// The cut of a projection into passes, spans and launches. It knows everything but the data.
class Plan {
 public:
  Plan(const Projection& projection, int device, const std::string& kernel)
      : projection_(projection), family_(choose_kernel(device, kernel)) {
    multiprocessors_ = device_attribute(cudaDevAttrMultiProcessorCount, device);
    const Dtype first = projection_.parts.empty() ? Dtype::float32 : projection_.parts.front().dtype;
    const bool same = std::all_of(projection_.parts.begin(), projection_.parts.end(),
                                  [&](const Part& q) { return q.dtype == first; });
    native_ = same && (first == Dtype::bfloat16 || first == Dtype::float16);
    bf16_ = !native_ || first == Dtype::bfloat16;
    terms_ = native_ ? 1 : projection_.terms;
    // Kernels fetch 16 bytes at a time from columns that are multiples of 8: TMA from any other is an illegal
    // instruction.
    spans_ =
        cut_columns(projection_, [&](const Part& part, uint64_t column) { return is_panel(part) && column % 8 == 0; });
    for (int64_t b = 0; b < projection_.batch; b += passes_.back().samples) {
      const int64_t samples = pass_samples(b), panel_rows = samples * terms_;
      passes_.push_back({.first = b, .samples = samples, .cut = cut(panel_rows)});
      sums_bytes_ = std::max(sums_bytes_, passes_.back().cut.sums_bytes);
      panel_bytes_ = std::max(panel_bytes_, panel_rows * longest_launch(panel_rows, true) * kUnit * 2);
    }
    panel_bytes_ = divide_up(panel_bytes_, 256) * 256;
  }

  int64_t scratch_bytes() const { return panel_bytes_ + sums_bytes_; }

  void run(bool add, const void* half_table, void* scratch, void* stream) const {
    auto* panel = static_cast<uint16_t*>(scratch);
    auto* sums = reinterpret_cast<float*>(static_cast<char*>(scratch) + panel_bytes_);
    Tile tile = {};
    tile.generator = make_generator(projection_.seed, projection_.stream);
    tile.half_table = static_cast<const uint16_t*>(half_table) + (bf16_ ? 0 : kNormalHalf);
    tile.rows = projection_.rows;
    tile.sums = sums;
    for (const auto& [b, samples, c] : passes_) {
      tile.batch_tiles = c.batch_tiles;
      tile.splits = c.splits;
      tile.add = false;
      for (const Span& span : spans_) {
        const int64_t step = span.direct ? kSpanColumns : chunk_units(samples * terms_) * kUnit;
        const int64_t first = static_cast<int64_t>(projection_.offset) + span.begin;
        const int64_t end = static_cast<int64_t>(projection_.offset) + span.end;
        for (int64_t from = first; from < end;) {
          // Steps end at multiples of their length, so a column meets the same multiplication wherever it comes from.
          const int64_t to = std::min((from / step + 1) * step, end);
          tile.first_unit = from / kUnit;
          tile.units = static_cast<int>(divide_up(to, kUnit) - tile.first_unit);
          tile.units_per_split = static_cast<int>(divide_up(tile.units, c.splits));
          if (span.direct) {
            tile.panel = part_as_panel(projection_.parts[span.first], b, samples, from - first, to - first);
            tile.panel.first += first;
          } else {
            tile.panel =
                pack(span, b, samples, first, tile.first_unit * kUnit, int64_t{tile.units} * kUnit, panel, stream);
          }
          launch_tile(c.shape, tile, stream);
          tile.add = true;
          from = to;
        }
      }
      launch_reduce({.sums = sums,
                     .splits = c.splits,
                     .rows = projection_.rows,
                     .width = int64_t{c.batch_tiles} * c.shape.width,
                     .samples = samples,
                     .terms = terms_,
                     .add = add,
                     .out = projection_.out + b * projection_.out_batch_stride,
                     .batch_stride = projection_.out_batch_stride,
                     .row_stride = projection_.out_row_stride},
                    stream);
    }
  }

 private:
  // The cut of a pass.
  struct Cut {
    TileShape shape;
    int batch_tiles, splits;
    int64_t sums_bytes;
  };

  struct Pass {
    int64_t first, samples;
    Cut cut;
  };

  // Returns the number of samples in the pass that begins at sample b.
  int64_t pass_samples(int64_t b) const {
    const int64_t rows = (projection_.batch - b) * terms_;
    // 129 to 192 rows are better served as 128 and a narrower rest than by 256.
    return std::min(projection_.batch - b, (rows <= 192 ? kPassRows / 2 : kPassRows) / terms_);
  }

  TileShape shape(int64_t panel_rows) const {
#ifdef TRAK_FAST_SM90
    if (family_ != Family::sm80) return tile_shape_sm90(projection_.kind, panel_rows, family_ == Family::sm90_wide);
#endif
    return tile_shape_sm80(projection_.kind, panel_rows);
  }

  void launch_tile(const TileShape& shape, const Tile& tile, void* stream) const {
#ifdef TRAK_FAST_SM90
    if (family_ != Family::sm80) return launch_tile_sm90(projection_.kind, bf16_, shape, tile, stream);
#endif
    launch_tile_sm80(projection_.kind, bf16_, shape, tile, stream);
  }

  Cut cut(int64_t panel_rows) const {
    Cut c = {.shape = shape(panel_rows), .batch_tiles = 0, .splits = 1, .sums_bytes = 0};
    c.batch_tiles = static_cast<int>(divide_up(panel_rows, c.shape.width));
    const int64_t blocks = divide_up(projection_.rows, c.shape.rows) * c.batch_tiles;
    const int64_t room = int64_t{multiprocessors_} * c.shape.blocks_per_multiprocessor;
    const int64_t most = std::max<int64_t>(
        1, std::min(std::max<int64_t>(4, room * 2 / blocks), longest_launch(panel_rows) / kLeastUnits));
    c.splits = choose_splits(blocks, room, most);
    c.sums_bytes = c.splits * projection_.rows * c.batch_tiles * c.shape.width * static_cast<int64_t>(sizeof(float));
    return c;
  }

  // Returns the units of a packed chunk. They are a power of two, so that no launch meets two values of the block
  // number's high bits.
  int64_t chunk_units(int64_t panel_rows) const {
    int64_t units = kSpanColumns / kUnit;
    while (units > 1 && units * panel_rows * kUnit * 2 > kPanelBytes) units /= 2;
    return units;
  }

  // Returns how many units a span's columns meet.
  int64_t units_of(const Span& span) const {
    const int64_t offset = static_cast<int64_t>(projection_.offset);
    return divide_up(offset + span.end, kUnit) - (offset + span.begin) / kUnit;
  }

  // Returns the units of the longest launch, or of the longest one that packs.
  int64_t longest_launch(int64_t panel_rows, bool packed_only = false) const {
    int64_t longest = 0;
    for (const Span& span : spans_) {
      if (span.direct && packed_only) continue;
      longest =
          std::max(longest, std::min(units_of(span), span.direct ? kSpanColumns / kUnit : chunk_units(panel_rows)));
    }
    return longest;
  }

  // Returns true if a tensor's memory is a panel already.
  bool is_panel(const Part& part) const {
    const bool rows = projection_.batch == 1 || (part.batch_stride >= part.columns && part.batch_stride % 8 == 0);
    return native_ && is_contiguous(part) && rows && reinterpret_cast<uintptr_t>(part.data) % 16 == 0;
  }

  // Returns columns begin .. end - 1 of a part's samples as a panel, whose first column counts from the part's first.
  Panel part_as_panel(const Part& part, int64_t b, int64_t samples, int64_t begin, int64_t end) const {
    const int64_t skipped = begin / 8 * 8;  // keeps the address aligned
    const auto* data = static_cast<const uint16_t*>(part.data) + b * part.batch_stride + skipped;
    const int64_t stride = projection_.batch == 1 ? divide_up(part.columns, 8) * 8 : part.batch_stride;
    return {.data = data, .row_stride = stride, .rows = samples, .columns = end - skipped, .first = skipped};
  }

  Panel pack(const Span& span, int64_t b, int64_t samples, int64_t offset, int64_t first, int64_t columns,
             uint16_t* panel, void* stream) const {
    const PanelType type = native_ ? PanelType::copy_16_bits : PanelType::bf16_terms;
    launch_pack({.type = type,
                 .terms = terms_,
                 .first_sample = b,
                 .samples = samples,
                 .first_column = first,
                 .columns = columns,
                 .offset = static_cast<uint64_t>(offset),
                 .panel = panel},
                parts_of(projection_, span), stream);
    return {.data = panel, .row_stride = columns, .rows = samples * terms_, .columns = columns, .first = first};
  }

  const Projection& projection_;
  const Family family_;
  int multiprocessors_ = 0, terms_ = 1;
  bool native_ = false, bf16_ = true;
  std::vector<Span> spans_;
  std::vector<Pass> passes_;
  int64_t panel_bytes_ = 0, sums_bytes_ = 0;
};

}  // namespace

std::string cuda_architectures() { return TRAK_FAST_CUDA_ARCHITECTURES; }
int cuda_version() { return CUDART_VERSION; }

int cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::vector<std::string> cuda_kernels(int device) {
  std::vector<std::string> names;
  for (const Name& candidate : usable_kernels(device)) names.emplace_back(candidate.name);
  return names;
}

void project_cuda(const Projection& projection, bool add, const void* half_table, const Allocate& scratch, int device,
                  void* stream, const std::string& kernel) {
  if (projection.kind == Kind::sjlt) {
    choose_kernel(device, kernel);  // for its errors: the sparse kind has one kernel for all devices
    return project_sparse_cuda(projection, add, scratch, device, stream);
  }
  const Plan plan(projection, device, kernel);
  void* memory = scratch(plan.scratch_bytes());
  const DeviceGuard guard(device);
  plan.run(add, half_table, memory, stream);
}

}  // namespace trak_fast
